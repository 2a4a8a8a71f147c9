"""One process or many: torchrun's environment, and the few exchanges between ranks that the scripts need."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from settings import UserError


class Ranks(NamedTuple):
    """This process among the processes of a run: its rank of `world`, and the device it computes on."""
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> Ranks:
    """Joins the process group if torchrun started this process, and picks a device: one GPU a process, or the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise SystemExit(f"torchrun started more than {torch.cuda.device_count()} processes on this machine, which has "
                         f"that many GPUs; set --nproc_per_node to {torch.cuda.device_count()} or less.")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def session(script: str) -> Iterator[Ranks]:
    """A script's run: joins the process group and leaves it; a UserError ends the script with its sentence alone."""
    ranks = start()
    try:
        yield ranks
    except UserError as error:
        # One that comes out of a worker of a DataLoader brings the worker's traceback along.
        sentence = str(error).strip().rsplit(f"{UserError.__name__}: ", 1)[-1]
        raise SystemExit(f"{Path(script).name}: {sentence}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"{Path(script).name}: the GPU's memory ran out ({str(error).split('. ')[0]}); lower the number of "
                         "images or windows of a forward pass, or their size (in training also: --checkpointing).") from None
    except OSError as error:
        # Without a number it comes from a library, mostly from a download.
        advice = "make room or choose another path" if error.errno else (
            "if weights were to be downloaded, check the network, name a local file, or try the toy world of README.md")
        raise SystemExit(f"{Path(script).name}: {str(error).strip().rstrip('.')}; {advice}.") from None
    if dist.is_initialized():
        dist.destroy_process_group()


def all_equal(number: int, device: torch.device) -> bool:
    """Whether every rank has the same number."""
    extremes = max_over_ranks(torch.tensor([number, -number], device=device))
    return bool(extremes[0] == -extremes[1])


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, in place; the tensor itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest of `tensor` over all ranks, element by element, in place; the tensor itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def fetch(tensor: torch.Tensor) -> Callable[[], list]:
    """Begins to copy a tensor to the host; what is returned gives its numbers when called.

    On a GPU that waits for the copy alone, not for the work that was sent there since.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return lambda: arrived.synchronize() or copy.tolist()


def gather(thing: object) -> list:
    """What every rank has, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()
