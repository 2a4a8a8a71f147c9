"""Run in two ranks by test_train.py: writes the gradients that the ranks of one step agree on.

    torchrun --nproc_per_node 2 tests/ddp_gradients.py IMAGES OUT [bypass]

`bypass` calls the student past DDP, as the published code does; then the ranks never synchronise.
"""

import contextlib
import sys
import tempfile
from types import SimpleNamespace

import tiny  # noqa: F401
import torch

sys.path.insert(0, str(tiny.ROOT))
import train  # noqa: E402
from util import distributed, settings  # noqa: E402


def gradients(cfg: SimpleNamespace, ranks: distributed.Ranks, bypass: bool = False
              ) -> dict[str, torch.Tensor]:
    """The gradients of the first step of a run, through train.py itself.

    train() runs to the point where it would step; bypass: the student is not wrapped in DDP.
    """
    found = {}

    class Stop(Exception):
        pass

    def stop(run: train.Run, lr: float) -> None:
        found.update((name, parameter.grad.clone())
                     for name, parameter in run.model.visual.named_parameters()
                     if parameter.requires_grad)
        raise Stop

    end_step, wrap, begin = train.Run.end_step, distributed.wrap, train.Run.begin

    def begin_with_text_elsewhere(run: train.Run, model: train.DeCLIP, *parts: object,
                                  **named: object) -> torch.nn.Module:
        student = begin(run, model, *parts, **named)
        model.text.to("meta")       # on another device than the rest, as beside a GPU
        return student

    train.Run.end_step, train.Run.begin = stop, begin_with_text_elsewhere
    if bypass:
        distributed.wrap = lambda module, ranks: module
    try:
        with tempfile.TemporaryDirectory() as cfg.OUT, contextlib.suppress(Stop):
            train.train(cfg, ranks)
    finally:
        train.Run.end_step, train.Run.begin, distributed.wrap = end_step, begin, wrap
    return found


def settings_for(images: str) -> SimpleNamespace:
    """Two images a step, tiny models, uneven grids."""
    models = "--model tiny-eva --pretrained none --vfm_model tiny_vfm --vfm_pretrained false"
    sizes = "--image_size 64 --crop_size 32 --batch_size 2 --num_workers 0 --precision fp32"
    return settings.parse(["--images", images, *models.split(), *sizes.split()], train)


if __name__ == "__main__":
    with distributed.session(__file__) as ranks:
        out = gradients(settings_for(sys.argv[1]), ranks, bypass="bypass" in sys.argv)
        torch.save(out, f"{sys.argv[2]}.{ranks.rank}")
