"""A linear probe on dense features: a worked example of a task of your own.

    python -m docs.linear_probe --ckpt out/toy/declip/declip.safetensors        # in the toy world
    torchrun --nproc_per_node 8 -m docs.linear_probe --train train.json --val val.json --ckpt ...
    python -m docs.linear_probe ... --resume            # go on after an interruption

Trains one linear layer that names each patch, over a model that stays as it is, and prints its
mIoU. `--train` and `--val` are segmentation benchmarks (docs/data.md) of the same classes. Resume,
log, signals, ranks and bad files are util/run.py's; what is left for a task to write is here.
"""

import math
import sys
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import fitted_size, load_share, pad_to, student_image, training_batches
from downstream.catseg.data import Labelled, LabelledImages
from eval_region import open_model
from eval_seg import evaluate, find_set, summarize, table
from model import DeCLIP
from util import distributed, settings
from util.labels import VOID
from util.results import identity, write_result
from util.run import Run, check_training
from util.weights import write_checkpoint

# The model, as for eval_region.py, and the machinery of every training
SHARED = {"eval_region": ["The model"], "util.run": ["The machinery"]}

# What is read and written
TRAIN = "toy/dev.json"              # labelled images to train with: a benchmark's name or json
VAL = "toy"                         # and to evaluate on
DATA = "data"                       # folder that holds the data sets
OUT = "out/linear_probe"            # folder of the run
RESUME = False                      # go on with the run in OUT from its last checkpoint

# The optimisation
IMAGE_SIZE = 128                    # longest side of an image; B/16: 560
BATCH_SIZE = 8                      # images of one optimiser step, over all GPUs
MICRO_BATCH = 8                     # most images of a forward pass
EPOCHS = 4                          # passes over the images
STEPS: int | None = None            # stop here, to go on with --resume; None: after EPOCHS
LR = 1e-2                           # learning rate at the first step; then cosine to 0
PRECISION = "auto"                  # bf16, fp16, fp32; auto: bf16 or fp16 on a GPU, fp32 on a CPU
SEED = 0                            # of the order of images and of the first weights


def main(argv: list[str] | None = None) -> dict:
    """Trains and evaluates as the command line (or `argv`) says; returns the figures."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        return evaluate_probe(cfg, train(cfg, ranks), ranks)


class LinearProbe(nn.Module):
    """A linear layer on a frozen model's dense features, L2-normalised."""

    def __init__(self, clip: DeCLIP, attention: str | None, num_classes: int):
        super().__init__()
        self.clip, self.attention = clip.requires_grad_(False), attention
        self.head = nn.Conv2d(clip.visual.embed_dim, num_classes, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Normalised (B, 3, S, S), labels (B, S, S) -> cross-entropy, scalar; VOID does not count.

        DDP averages gradients only if training calls it here.
        """
        return F.cross_entropy(self.logits(images), labels, ignore_index=VOID)

    def logits(self, images: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) -> float32 (B, K, S, S)."""
        with torch.no_grad():
            content, _ = self.clip.encode_dense(images, self.attention)
        scores = self.head(F.normalize(content.float(), dim=1)).float()
        return F.interpolate(scores, images.shape[-2:], mode="bilinear")

    def save(self, path: str, about: dict) -> None:
        """Writes the layer's weights with the settings."""
        write_checkpoint(path, self.head.state_dict(), self.clip.describe() | {
            "settings": about, "use": "python -m docs.linear_probe"})


def train(cfg: SimpleNamespace, ranks: distributed.Ranks) -> LinearProbe:
    """The whole of training: one loop for one process and many."""
    check_training(cfg)
    scenes, classes = find_set(cfg.TRAIN, cfg.DATA)
    images = LabelledImages(scenes, cfg.READ_TIMEOUT)
    with Run(cfg, ranks, images, "linear_probe.safetensors") as run:
        clip = open_model(cfg)
        torch.manual_seed(cfg.SEED)
        probe = LinearProbe(clip, cfg.ATTENTION, len(classes))
        probe.to(ranks.device)
        optimizer = torch.optim.AdamW(probe.head.parameters(), lr=cfg.LR)
        model = run.begin(probe, optimizer, probe.save)
        batches = training_batches(images, run)

        for step in run.steps():
            for batch in run.micro_batches(batches):
                inputs, labels = views(batch.data, cfg.IMAGE_SIZE, clip)
                with run.forward():
                    loss = model(inputs, labels)
                run.backward(loss, {}, batch)
            run.end_step(cfg.LR / 2 * (1 + math.cos(math.pi * step / run.total)))
    return probe


def views(samples: list[Labelled], size: int, clip: DeCLIP) -> tuple[Tensor, Tensor]:
    """Normalised images (B, 3, size, size), longest side to `size`, and their labels."""
    images = [student_image(sample.image, size, clip.mean, clip.std) for sample in samples]
    labels = [F.interpolate(sample.label[None, None].float(), fitted_size(sample.image, size))[0, 0]
              for sample in samples]
    padded = [pad_to(label - VOID, size, size) + VOID for label in labels]      # with VOID
    return torch.stack(images), torch.stack(padded).long()


def evaluate_probe(cfg: SimpleNamespace, probe: LinearProbe, ranks: distributed.Ranks) -> dict:
    """mIoU on VAL, printed and written to OUT."""
    dataset, classes = find_set(cfg.VAL, cfg.DATA)
    is_same = len(classes) == probe.head.out_channels
    settings.check(cfg, VAL=(is_same, "a benchmark of as many classes as TRAIN"))
    loader = load_share(dataset, ranks, cfg.MICRO_BATCH, cfg.NUM_WORKERS)
    confusion = evaluate(partial(predict, probe.eval(), cfg.IMAGE_SIZE), loader, len(classes),
                         ranks, cfg.VAL)
    result = summarize(confusion, classes)
    if ranks.is_main:
        print(table(result))
        write_result(cfg, "linear_probe", identity(cfg, probe, classes.names), result)
    return result


@torch.inference_mode()
def predict(probe: LinearProbe, size: int, images: list[Tensor]) -> list[Tensor]:
    """Images uint8 (3, H, W) -> the class of each pixel, (H, W)."""
    predictions = []
    for image in images:
        h, w = fitted_size(image, size)
        inputs = student_image(image, size, probe.clip.mean, probe.clip.std)
        logits = probe.logits(inputs[None])[..., :h, :w]        # without the padding
        logits = F.interpolate(logits, image.shape[-2:], mode="bilinear")
        predictions.append(logits[0].argmax(dim=0))
    return predictions


if __name__ == "__main__":
    main()
