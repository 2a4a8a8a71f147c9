"""Models whose weights, gradients and moments are divided over all ranks, and their checkpoints.

A checkpoint is a folder: each rank writes its part, and any number of ranks reads it again.
"""

import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from util import distributed
from util.distributed import Ranks
from util.files import read_json, sync_folder, write_json


def shard(module: nn.Module, blocks: Iterable[nn.Module], ranks: Ranks, *methods: str) -> None:
    """Divides a module's weights over all ranks, and puts them on the ranks' devices.

    blocks: parts of it whose weights are gathered only while they compute; they must be called as
    modules. methods: what is called besides `forward`. One process keeps all weights.
    """
    if ranks.world_size == 1:
        module.to(ranks.device)
        return
    # Outputs may be views as long as nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(module, method)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all ranks' parts; if it is divided, every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_parts(folder: Path, tensors: dict, about: dict, ranks: Ranks) -> None:
    """Writes a checkpoint folder, whole or not at all; every rank calls it.

    tensors: nested dictionaries of them, divided or not. about: what else torch.save takes.
    Raises OSError on all ranks if one can't write.
    """
    half, failure = folder.with_suffix(".tmp"), ""
    if ranks.is_main:
        shutil.rmtree(half, ignore_errors=True)
    distributed.barrier()
    try:
        dcp.save(tensors, checkpoint_id=half, no_dist=ranks.world_size == 1)
        if ranks.is_main:
            torch.save(about, half / "about.pt")
            complete(half, folder, ranks.world_size)
    except (CheckpointException, OSError, RuntimeError) as error:
        failure = " ".join(str(error).split()) or type(error).__name__
    failure = next(filter(None, distributed.gather(failure)), "")
    if failure:
        raise OSError(f"{folder} could not be written: {failure}")


def complete(half: Path, folder: Path, world_size: int) -> None:
    """Adds checksums to what the ranks have written, flushes it, and gives it its name."""
    missing = [rank for rank in range(world_size) if not any(half.glob(f"__{rank}_*"))]
    if missing:
        raise OSError(f"the part of rank {missing[0]} is not there; put OUT on a disk that all "
                      "machines share")
    sums = {path.name: file_checksum(path) for path in sorted(half.iterdir())}
    write_json(half / "sums.json", sums)
    for path in half.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(half)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(half, folder)
    sync_folder(folder.parent)


def file_checksum(path: Path) -> str:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while part := file.read(2**24):
            crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def read_about(folder: Path) -> dict:
    """What `write_parts` was told about a checkpoint. Raises ValueError or OSError if the folder
    is not as it was written."""
    sums = read_json(folder / "sums.json")
    if any(file_checksum(folder / name) != crc for name, crc in sums.items()):
        raise ValueError(f"{folder} has another checksum")
    return torch.load(folder / "about.pt", map_location="cpu", weights_only=True)


def read_parts(folder: Path, tensors: dict) -> None:
    """Fills tensors, divided over any number of ranks, with those of a checkpoint folder.

    Raises KeyError if it does not have them.
    """
    try:
        dcp.load(tensors, storage_reader=PartsReader(folder),
                 no_dist=not torch.distributed.is_initialized())
    except CheckpointException as error:
        raise KeyError(str(error)) from None


class PartsReader(dcp.FileSystemReader):
    """Reads a checkpoint folder as data: its `.metadata`, a pickle, may hold shapes and places of
    tensors in files of the folder, and nothing that Python would call."""

    def read_metadata(self, *args: object, **options: object) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or any(
                Path(info.relative_path).name != info.relative_path
                for info in metadata.storage_data.values()):
            raise KeyError(f"{self.path} has metadata that names files elsewhere")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    """Makes what DCP's metadata consists of. KeyError for anything else."""

    KNOWN = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
             ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
             *(("torch.distributed.checkpoint.metadata", name) for name in (
                 "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
                 "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"))}

    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in self.KNOWN and not is_dtype:
            raise KeyError(f"its metadata would call {module}.{name}")
        return super().find_class(module, name)
