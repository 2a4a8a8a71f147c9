"""The numeric precision that models compute in: fp32, bf16, fp16, or what suits the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from util import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}     # autocast's
PRECISIONS = ("auto", *DTYPES)


def check_precision(name: str) -> None:
    """Raises UserError if PRECISION is unknown."""
    if name not in PRECISIONS:
        raise UserError(f"PRECISION is {name!r}; it must be one of {', '.join(PRECISIONS)}.")


def find_precision(name: str, device: torch.device) -> str:
    """A key of DTYPES. `auto` is bf16 on a GPU that has it, fp16 on other GPUs, fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    # V100 and T4 only emulate bf16.
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp16"


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The context in which models compute in a precision of PRECISIONS."""
    dtype = DTYPES[find_precision(name, device)]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@contextmanager
def fp32_products(tf32: bool = False) -> Iterator[None]:
    """Within it, a GPU multiplies fp32 matrices and convolutions exactly, or with TF32's 10 bits.

    torch's own defaults differ: exact for matrices, TF32 for convolutions.
    """
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = tf32
        yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


class StepFilter(torch.amp.GradScaler):
    """A GradScaler that scales nothing: it only leaves out steps whose gradient is not finite."""

    def __init__(self, device: str):
        super().__init__(device, init_scale=1.0, growth_interval=2**31 - 1)

    def update(self, new_scale: float | None = None) -> None:
        """Keeps the scale at 1: GradScaler would halve it at every step that it leaves out."""
        super().update(1.0)


def grad_scaler(name: str, device: torch.device) -> torch.amp.GradScaler:
    """What a step's gradients go through: fp16 scales them, all leave out those not finite."""
    if find_precision(name, device) == "fp16":
        return torch.amp.GradScaler(device.type)
    return StepFilter(device.type)
