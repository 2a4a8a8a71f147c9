"""Evaluates CAT-Seg on the six sets of Table 4, with eval_seg.py's own loop.

    python -m downstream.catseg.eval --ckpt out/catseg/catseg.safetensors
    python -m downstream.catseg.eval --benchmarks ade150 voc20 --ckpt ...
    torchrun --nproc_per_node 4 -m downstream.catseg.eval --ckpt ...

Published inference: the image is resized to a short side of 640 (at most 2,560 long), and that,
without antialiasing, stretched to 640 x 640 for four windows of 384, and to 384 as a whole; the
mean of the windows' probabilities and of the whole's, at the original size. The checkpoint says
which model it is. Prints mIoU and each class's IoU; writes them to catseg.json beside it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Classes, constant, load_share, normalize, resize
from downstream.catseg.data import BENCHMARKS as TABLE_4
from downstream.catseg.data import find_evaluation
from downstream.catseg.model import CATSeg, open_catseg
from eval_seg import evaluate, summarize, table
from util import UserError, distributed, settings
from util.labels import NOT_IN_DATA, find_data, overview
from util.precision import autocast, check_precision
from util.results import identity, write_result
from util.text import best_text
from util.windows import resized_size, window_starts

SHARED = {"eval_region": ["The evaluation"]}

# What is read
CKPT = "out/catseg/catseg.safetensors"      # checkpoint of downstream.catseg.train
BENCHMARKS = ("all",)               # all: the six of Table 4 at hand; also eval_seg.py's; my.json
DATA = "data"                       # folder that holds the data sets in their original layouts

# The protocol
SIZE: int | None = None             # image's side; None: 5/3 of a window's (640); 1/1: no windows
STRIDE: int | None = None           # from window to window; None: 2/3 of one (256)
WINDOW_BATCH = 5                    # windows of one forward pass
PRECISION = "fp32"                  # bf16, fp16: faster on a GPU, but rounded; auto: as train.py
TF32 = True                         # fp32 products with 10 bits on a GPU, as published

# The evaluation
BATCH_SIZE = 1                      # images that share forward passes


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns each benchmark's figures."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__, cfg.TF32) as ranks:
        return run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> dict:
    """Segments every benchmark; prints and writes each one's figures."""
    settings.check_min(cfg, BATCH_SIZE=1, NUM_WORKERS=0, WINDOW_BATCH=1, SIZE=1, STRIDE=1)
    check_precision(cfg.PRECISION)
    sets, missing = find_data(cfg.BENCHMARKS, tuple(TABLE_4), cfg.DATA, find_evaluation)
    segmenter = open_catseg(cfg.CKPT).to(ranks.device)
    protocol = Protocol.of(segmenter, cfg.SIZE, cfg.STRIDE, cfg.WINDOW_BATCH, cfg.PRECISION)
    settings.refuse_unused(
        cfg, DATA=all(Path(images.benchmark.folder).is_absolute() for images, _ in sets.values())
        and NOT_IN_DATA,
        STRIDE=not protocol.places() and "is of windows, but SIZE is one window")
    attention, result = segmenter.design.attention or segmenter.clip.context, {}
    for name, (dataset, classes) in sets.items():
        of = identity(cfg, segmenter, [vars(classes), len(dataset)], **segmenter.clip.describe()
                      | segmenter.design._asdict() | {"attention": attention, "benchmark": name,
                                                      "size": protocol.size,
                                                      "stride": protocol.stride})
        segment = partial(predict, protocol, segmenter, classes, encode(segmenter, classes))
        loader = load_share(dataset, ranks, cfg.BATCH_SIZE, cfg.NUM_WORKERS)
        confusion = evaluate(segment, loader, len(classes), ranks, name)
        # Published figures leave classes out that a set has no pixel of, as A-847 may.
        result[name] = summarize(confusion, classes, absent_count=False)
        if ranks.is_main:
            print(f"\n{name}: CAT-Seg over {segmenter.clip.model_name}, attention {attention}, "
                  f"{len(dataset)} images\n{table(result[name])}")
            write_result(cfg, "catseg", of, result[name])
    if ranks.is_main and (len(result) > 1 or missing):
        print(overview(result, missing, of_paper=()))     # Table 4 has no mean
    return result


# -------------------------------------------------------------------------------- segmentation

@dataclass(frozen=True)
class Protocol:
    """The views of an image: windows of the stretched image, and all of it at a window's size."""
    size: int               # side that the image is stretched to
    stride: int             # from window to window
    window: int             # side of a window, the segmenter's image size
    window_batch: int       # views of one forward pass
    precision: str

    @classmethod
    def of(cls, segmenter: CATSeg, size: int | None = None, stride: int | None = None,
           window_batch: int = 5, precision: str = "fp32") -> "Protocol":
        """The published protocol, in proportion to the segmenter's window, but for what is given.

        Raises UserError if windows would leave pixels out.
        """
        window = segmenter.design.image_size
        size, stride = size or round(5 / 3 * window), stride or round(2 / 3 * window)
        if size < window or stride > window:
            raise UserError(f"SIZE is {size} and STRIDE {stride}, but the segmenter's window is "
                            f"{window}; SIZE must be at least, STRIDE at most that.")
        return cls(size, stride, window, window_batch, precision)

    def places(self) -> list[tuple[int, int]]:
        """Where windows begin, (y, x) each; none where one would be all of the image."""
        starts = window_starts(self.size, self.window, self.stride)
        return [*product(starts, starts)] if self.size > self.window else []


@torch.inference_mode()
def encode(segmenter: CATSeg, classes: Classes) -> Tensor:
    """The embeddings (P, C) of all names of a class list."""
    segmenter.set_classes(classes.prompts)
    return segmenter.encode_classes()


@torch.inference_mode()
def predict(protocol: Protocol, segmenter: CATSeg, classes: Classes, text: Tensor,
            images: Sequence[Tensor]) -> list[Tensor]:
    """Images uint8 (3, H, W) and all names' embeddings (P, C) -> the class of each pixel, (H, W).

    A class has the probability of its most probable name.
    """
    class_of_prompt = constant(tuple(classes.class_of_prompt), torch.long, text.device)
    return [class_of_prompt[best_prompt(protocol, logits, image.shape[-2:])]
            for logits, image in zip(look(protocol, segmenter, text, images), images)]


def look(protocol: Protocol, segmenter: CATSeg, text: Tensor, images: Sequence[Tensor]
         ) -> tuple[Tensor, ...]:
    """Images uint8 (3, H, W) and text (P, C) -> the logits of each one's views (n + 1, P, s, s)."""
    views = torch.cat([make_views(protocol, segmenter, image) for image in images])
    logits = []
    for batch in views.split(protocol.window_batch):
        with autocast(protocol.precision, views.device):
            logits.append(segmenter.logits(batch, text).float())
    return torch.cat(logits).split(len(views) // len(images))


def make_views(protocol: Protocol, segmenter: CATSeg, image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> normalised (n + 1, 3, S, S): its windows, then all of it."""
    size, window, clip = protocol.size, protocol.window, segmenter.clip
    how = segmenter.design.resize
    if how == "pil":        # published: two steps
        image, how = resize(image, *resized_size(image, size, 4 * size), how), "cv2"
    stretched = resize(image, size, size, how)
    views = [stretched[:, y:y + window, x:x + window] for y, x in protocol.places()]
    return normalize(torch.stack([*views, resize(image, window, window, how)]),
                     clip.mean, clip.std)


def best_prompt(protocol: Protocol, logits: Tensor, size: tuple[int, int], most: int = 2**25
                ) -> Tensor:
    """Logits of all views (n + 1, P, s, s) -> the most probable name of each pixel, (H, W).

    Probabilities of pixels, many numbers, exist for some names at a time only, about `most`.
    """
    count = max(1, most // max(len(logits) * protocol.window**2, size[0] * size[1]))
    return best_text(probabilities(protocol, some, size) for some in logits.split(count, dim=1))[1]


def probabilities(protocol: Protocol, logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits of all views (n + 1, P, s, s) -> probabilities of the pixels (P, H, W): the windows'
    mean where they overlap, and of that and the whole image's the mean."""
    window = protocol.window
    views = F.interpolate(logits, (window, window), mode="bilinear").sigmoid()
    mean = F.interpolate(views[-1:], (protocol.size, protocol.size), mode="bilinear")[0]
    if len(views) > 1:
        total, count = torch.zeros_like(mean), torch.zeros_like(mean[0])
        for view, (y, x) in zip(views, protocol.places()):
            total[:, y:y + window, x:x + window] += view
            count[y:y + window, x:x + window] += 1
        mean = (total / count + mean) / 2
    return F.interpolate(mean[None], size, mode="bilinear")[0]


if __name__ == "__main__":
    main()
