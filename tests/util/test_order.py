"""util/order.py: every image once an epoch, for any number of ranks; a billion without an array."""

import itertools
import resource
import time

import numpy as np
import pytest
import torch

from util.distributed import Ranks
from util.order import PART, POOL, RUN, WINDOW, WindowOrder, epoch_order, rank_batches

UNEVEN = np.array([5, 0, PART, PART + 1, 1, 20_000, 0, 7])
BILLION = np.full(100_000, 10_000)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_see_each_image_once_an_epoch(world):
    """All but the incomplete last batch, which are others in each epoch."""
    for epoch in range(2):
        order = WindowOrder(UNEVEN, 12, epoch, 0)
        seen = [index for rank in range(world)
                for batch in rank_batches(order, Ranks(rank, world, torch.device("cpu")), 2)
                for index in batch]
        assert len(seen) == len(set(seen)) == len(order) * 12 == UNEVEN.sum() // 12 * 12
        assert 0 <= min(seen) and max(seen) < UNEVEN.sum()


def test_the_order_is_of_seed_epoch_and_counts_alone():
    def head(*given) -> list[int]:
        order = WindowOrder(*given)
        return np.concatenate([order[step] for step in range(50)]).tolist()

    assert head(UNEVEN, 8, 0, 1) == head(UNEVEN, 8, 0, 1)
    assert len({tuple(head(UNEVEN, 8, *which)) for which in ((0, 1), (1, 1), (0, 2))}) == 3


def test_a_run_may_go_on_at_any_step():
    """Steps looked at alone, in any order, are those of the whole epoch."""
    whole = [step.tolist() for step in map(WindowOrder(UNEVEN, 16, 3, 0).__getitem__, range(900))]
    for step in (899, 0, 256, 255, 512):
        assert WindowOrder(UNEVEN, 16, 3, 0)[step].tolist() == whole[step]


def test_images_are_spread_evenly():
    """Over 400 epochs each of 60 images is equally often in each fifth of the epoch."""
    counts = np.zeros((60, 5))
    for epoch in range(400):
        order = WindowOrder(np.array([20, 40]), 12, epoch, 0)
        for step in range(5):
            counts[order[step], step] += 1
    chi2 = ((counts - 80) ** 2 / 80).sum()
    assert 170 < chi2 < 310         # 236 degrees of freedom


def test_reads_stay_in_a_few_runs():
    """A pool's images come from 256 runs, each read at once, and from many parts."""
    order = WindowOrder(np.full(64, PART), RUN * POOL, 0, 0)
    for step in (0, 7, len(order) - 1):
        images = order[step]
        assert len(set(images // RUN)) == POOL and len(set(images // PART)) > WINDOW / 2


def test_a_billion_images_cost_no_memory_and_no_time():
    """The next batch of 512 takes less than a millisecond, windows that begin included."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order, seconds = WindowOrder(BILLION, 512, 1, 0), []
    assert len(order) == 10**9 // 512
    for step in (*range(1000), *range(len(order) - 1000, len(order))):
        start = time.thread_time()
        order[step]
        seconds.append(time.thread_time() - start)
    assert np.mean(seconds) < 1e-3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024      # KB


def test_64_ranks_share_a_billion_images():
    """No image twice in an epoch: 64 ranks divide each step, steps divide windows, and windows
    divide all parts."""
    order = WindowOrder(BILLION, 512, 0, 0)
    assert (order.parts[:, 1] - order.parts[:, 0]).sum() == 10**9
    assert (np.sort(order.parts[:, 0])[1:] == np.sort(order.parts[:, 1])[:-1]).all()
    steps = range(int(order.starts[5000]) // 512, -(-int(order.starts[5001]) // 512))
    shares = [list(itertools.islice(rank_batches(order, Ranks(rank, 64, torch.device("cpu")), 8,
                                                 steps[0]), len(steps))) for rank in range(64)]
    seen = np.array(shares).reshape(-1)
    assert len(seen) == len(steps) * 512 == len(np.unique(seen))
    of_window = [np.arange(*part) for part in order.parts[5000 * WINDOW:][:WINDOW]]
    assert np.isin(np.concatenate(of_window), seen).all()


def test_machines_that_share_a_batch_read_different_runs():
    """Of what each of 8 machines fetches by runs it uses nearly all; were shares not sorted, each
    run would be fetched by 5 of them."""
    order = WindowOrder(np.full(100, 10_000), 512, 0, 0)
    images = np.stack([order[step] for step in range(WINDOW * PART // 512)])
    shares = images.reshape(-1, 8, 64).swapaxes(0, 1).reshape(8, -1)
    fetched = np.mean([len(np.unique(share // RUN)) * RUN / len(share) for share in shares])
    assert 1 <= fetched < 1.4


# ------------------------------------------------------------------------ images that are no shards

def test_an_epoch_has_every_image_once():
    order = epoch_order(32, 4, epoch=0, seed=1)
    assert order.shape == (8, 4) and sorted(order.flatten().tolist()) == list(range(32))
    assert not torch.equal(order, epoch_order(32, 4, epoch=1, seed=1))
    assert torch.equal(order, epoch_order(32, 4, epoch=0, seed=1))
    assert epoch_order(35, 4, 0, 1).shape == (8, 4)         # the rest waits for another epoch


@pytest.mark.parametrize("world, micro_batch", [(1, 8), (2, 4), (2, 1), (4, 2)])
def test_ranks_share_each_step(world, micro_batch):
    """Whatever the ranks and micro batches, step s has the images of order[s]; and a run can begin
    at any step."""
    order = epoch_order(40, 8, 0, 0)
    ranks = [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
    shares = [list(rank_batches(order, rank, micro_batch, first_step=2)) for rank in ranks]
    per_step = 8 // world // micro_batch
    for step in range(2, 5):
        seen = [i for share in shares
                for batch in share[(step - 2) * per_step:(step - 1) * per_step] for i in batch]
        assert sorted(seen) == sorted(order[step].tolist())
