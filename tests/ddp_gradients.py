"""Run under torchrun by test_train.py: writes the gradients that the ranks of one step agree on.

    torchrun --nproc_per_node 2 tests/ddp_gradients.py IMAGES OUT [bypass]

`bypass` calls the student past DDP, as the published code does; then the ranks never synchronise.
"""

import sys
from types import SimpleNamespace

import tiny  # noqa: F401
import torch

sys.path.insert(0, str(tiny.ROOT))
import distributed  # noqa: E402
import settings  # noqa: E402
import train  # noqa: E402


def gradients(cfg: SimpleNamespace, ranks: distributed.Ranks, bypass: bool = False) -> dict[str, torch.Tensor]:
    """The gradients of the first step of a run with these settings, through train.py's own functions."""
    micro_batch, accumulate = train.divide_batch(cfg, ranks.world)
    dataset = train.TrainingImages(cfg.IMAGES)
    student, teacher, vfm = train.build(cfg, ranks.device)
    amp, scaler = train.precision("fp32", ranks.device)
    batches = train.load(cfg, dataset, 0, micro_batch, ranks)
    student.clip.text.to("meta")        # on another device than the rest, as beside a GPU
    wrapped = train.distribute(student, ranks)
    batch = list(train.islice(batches, accumulate))
    train.accumulate_gradients(cfg, student if bypass else wrapped, teacher, vfm, batch, 0, amp, scaler)
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.requires_grad}


def settings_for(images: str) -> SimpleNamespace:
    """Two images a step, tiny models, uneven grids."""
    models = "--model tiny-eva --pretrained none --vfm_model tiny_vfm --vfm_pretrained false"
    sizes = "--image_size 64 --crop_size 32 --batch_size 2 --workers 0"
    return settings.parse(["--images", images, *models.split(), *sizes.split()], train)


if __name__ == "__main__":
    with distributed.session(__file__) as ranks:
        out = gradients(settings_for(sys.argv[1]), ranks, bypass="bypass" in sys.argv)
        torch.save(out, f"{sys.argv[2]}.{ranks.rank}")
