"""One process or many: torchrun's environment, and the few exchanges between ranks."""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from util import UserError, printable
from util.precision import fp32_products


class Ranks(NamedTuple):
    """This process among the `world_size` processes of a run, and the device it computes on."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def heed_signals() -> None:
    """Makes a scheduler's SIGTERM and a closed terminal's SIGHUP end this process like Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:      # as nohup has it
            signal.signal(number, signal.default_int_handler)


def start() -> Ranks:
    """Joins the process group if torchrun started this process; picks a GPU, or the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SystemExit(f"torchrun started more processes on this machine than it has GPUs, "
                         f"{count}; set --nproc_per_node to {count} or less.")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world_size,
                            store=store_of_attempt(store, rank, world_size),
                            device_id=device if cuda else None)
    return Ranks(rank, world_size, device)


def store_of_attempt(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of torchrun's store that only the ranks of this attempt write to.

    After `torchrun --max_restarts` has started the ranks again, its store still has the addresses
    of the attempt before, which nobody answers. So rank 0 names the attempt, and each rank goes on
    when all have confirmed a name that was given in answer to itself. Machines count restarts
    differently, so that number is no name.
    """
    meeting, own = dist.PrefixStore("attempts", store), uuid.uuid4().hex
    meeting.set(f"rank {rank}", own)
    others = range(1, world_size)
    while rank == 0 and not all(meeting.check([f"{own} {other}"]) for other in others):
        present = [meeting.get(f"rank {other}").decode() for other in range(world_size)]
        meeting.set("attempt", json.dumps([own, present]))
        time.sleep(0.02)
    if rank == 0:
        meeting.set(f"{own} is complete", "")
        return dist.PrefixStore(own, store)
    while True:
        name, present = json.loads(meeting.get("attempt"))
        if len(present) > rank and present[rank] == own:
            meeting.set(f"{name} {rank}", "")
            if meeting.check([f"{name} is complete"]):
                return dist.PrefixStore(name, store)
        time.sleep(0.02)


@contextmanager
def session(script: str, tf32: bool = False) -> Iterator[Ranks]:
    """Joins the process group for a script's run and leaves it at the end.

    tf32: whether a GPU may round what it multiplies in fp32 to TF32.

    A UserError ends the script with its sentence alone, and so do errors that users meet often.
    """
    ranks, name = start(), Path(script).name
    try:
        with fp32_products(tf32):
            yield ranks
        from util.images import say_turned  # which imports this module
        say_turned(ranks.is_main)
    except UserError as error:
        # An error in a worker of a DataLoader brings the worker's traceback along.
        sentence = str(error).strip().rsplit(f"{type(error).__name__}: ", 1)[-1]
        raise SystemExit(printable(f"{name}: {sentence}")) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except torch.OutOfMemoryError as error:
        found = str(error).split(". ")[0]
        raise SystemExit(f"{name}: the GPU's memory ran out ({found}); lower the number of images "
                         "or windows of a forward pass, or their size (in training also: "
                         "--checkpointing).") from None
    except OSError as error:
        # Libraries raise OSErrors without a number, mostly when a download fails.
        advice = "make room or choose another path" if error.errno else (
            "if weights were to be downloaded, check the network, name a local file, or try the "
            "toy world of README.md")
        raise SystemExit(f"{name}: {str(error).strip().rstrip('.')}; {advice}.") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(f"{name}: {' '.join(str(error).split())[:200].rstrip('.')}; a process "
                         "that reads images has died, mostly because memory ran out: lower "
                         "NUM_WORKERS or free memory, and start again (a training by --resume)."
                         ) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def divide_batch(batch_size: int, micro_batch: int, world_size: int) -> tuple[int, int]:
    """BATCH_SIZE over all ranks -> (images of one forward pass of a rank, forward passes a step).

    Raises UserError if BATCH_SIZE is no multiple of the number of ranks.
    """
    if batch_size % world_size:
        fits = -(-batch_size // world_size) * world_size
        raise UserError(f"BATCH_SIZE {batch_size} can't be divided over {world_size} processes; "
                        f"set it to {fits}, or choose another --nproc_per_node.")
    share = batch_size // world_size
    fitting = [size for size in range(1, min(share, micro_batch) + 1) if share % size == 0]
    return max(fitting), share // max(fitting)


def wrap(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module under DDP, whose forward every training step must call; itself in one process.

    So is one whose weights are divided over the ranks already (util/sharding.py).
    """
    if ranks.world_size == 1 or isinstance(module, FSDPModule):
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def synchronized(module: nn.Module, is_last: bool) -> AbstractContextManager:
    """Ranks average their gradients once a step, in the backward of its last micro batch.

    module: what `wrap` returned.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    waits = isinstance(module, DistributedDataParallel) and not is_last
    return module.no_sync() if waits else nullcontext()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The largest of `tensor` over all ranks, element by element, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def fetch(tensor: Tensor) -> Callable[[], list]:
    """Starts to copy a tensor to the host -> a function that returns its numbers.

    On a GPU that function waits for the copy alone, not for work that was sent there later.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return lambda: arrived.synchronize() or copy.tolist()


def is_main() -> bool:
    """Whether this is the first process, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(thing: object) -> list:
    """The `thing` of every rank, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


PIECE = 2**24       # bytes


def collect_lines(file: BinaryIO) -> None:
    """Appends the lines of the other ranks' files to that of rank 0, piece by piece.

    So no rank holds more than a piece of its own in memory, and rank 0 one of each.
    """
    file.seek(0, os.SEEK_END if is_main() else os.SEEK_SET)
    while any(gather(len(piece := b"" if is_main() else b"".join(file.readlines(PIECE))))):
        pieces = [b""] * dist.get_world_size() if is_main() else None
        dist.gather_object(piece, pieces)
        file.writelines(pieces or ())


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()
