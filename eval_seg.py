"""Open-vocabulary segmentation from dense features: each pixel gets the class whose text is nearest (Tables 5 and 10).

    python eval_seg.py --ckpt out/declip/declip.safetensors
    python eval_seg.py --benchmarks all --ckpt ...                 # the paper's eight, as far as their data are there
    python eval_seg.py --attention clearclip                       # a baseline, no checkpoint
    torchrun --nproc_per_node 8 eval_seg.py --ckpt ...             # images divided among GPUs

The paper's protocol (section 9.2): shorter side 448, windows of 336 with a stride of 112, ImageNet templates.
Prints mIoU, pixel accuracy and each class's IoU; writes them to seg.json beside the checkpoint.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import distributed
import evaluation
import settings
from data import BENCHMARKS as KNOWN
from data import PAPERS, VOID, Classes, NotThere, SegmentationImages, constant, normalize, padded, read_classes, resize
from model import DeCLIP
from settings import UserError

# Besides these, the settings of evaluation.py: which model, which attention, where the result goes.
BENCHMARKS = ("voc20", "voc21")     # which to evaluate; all: the paper's eight, as far as their data are there
DATA = "data"                       # folder that holds the data sets in their original layouts
CLASSES: str | None = None          # class file instead of the benchmark's own in classes/, with as many lines
SHORT_SIDE: int | None = None       # of the image, in pixels; None: the benchmark's own (448; cityscapes: 560)
WINDOW = 336                        # side of a window; a multiple of the patch size
STRIDE = 112                        # from window to window
LOGIT_SCALE: float | None = None    # factor of the cosine similarities before the softmax; None: the benchmark's own
THRESHOLD: float | None = None      # background where no class is more probable; None: the benchmark's own
WINDOW_BATCH = 16                   # windows of one forward pass
BATCH_SIZE = 8                      # images whose windows fill the forward passes together


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns what seg.json holds."""
    cfg = settings.parse(argv, sys.modules[__name__], evaluation)
    with distributed.session(__file__) as ranks:
        return run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> dict:
    """Every benchmark through the model, each printed; the json is written after each."""
    check(cfg)
    sets, missing = find_data(cfg)
    clip = evaluation.open_model(cfg).to(ranks.device)
    check_patches(cfg, clip)
    result = {}
    for name, (dataset, classes) in sets.items():
        confusion = evaluate(protocol(cfg, name), clip, dataset, classes, name, ranks)
        result[name] = summarize(confusion, classes)
        if ranks.is_main:
            print(f"\n{name}: {evaluation.title(cfg, clip)}, {len(dataset)} images\n{table(result[name])}")
            evaluation.write_result(cfg, clip, "seg", {"benchmarks": result})
    if ranks.is_main and (len(result) > 1 or missing):
        print(overview(result, missing))
    return result


def find_data(cfg: SimpleNamespace) -> tuple[dict[str, tuple[SegmentationImages, Classes]], dict[str, str]]:
    """(images and classes of each benchmark asked for; of `all`, what was looked for in vain)."""
    sets, missing = {}, {}
    wants_all = cfg.BENCHMARKS == ("all",)
    for name in PAPERS if wants_all else cfg.BENCHMARKS:
        try:
            sets[name] = SegmentationImages(KNOWN[name], cfg.DATA), benchmark_classes(cfg, name)
        except NotThere as error:
            if not wants_all:
                raise
            missing[name] = str(error)
    if not sets:
        raise UserError(f"None of the benchmarks is in {Path(cfg.DATA).absolute()}; README.md says how each is unpacked: "
                        + " ".join(missing.values()))
    return sets, missing


def protocol(cfg: SimpleNamespace, name: str) -> SimpleNamespace:
    """The settings with a benchmark's own ones where none were given."""
    own = {"SHORT_SIDE": KNOWN[name].short_side, "LOGIT_SCALE": KNOWN[name].logit_scale, "THRESHOLD": KNOWN[name].threshold}
    given = {key: value for key, value in vars(cfg).items() if value is not None}
    if KNOWN[name].threshold is None:       # without a background class there is nothing for a threshold to do
        given.pop("THRESHOLD", None)
    return SimpleNamespace(**vars(cfg) | own | given)


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    unknown = [name for name in cfg.BENCHMARKS if name not in KNOWN and cfg.BENCHMARKS != ("all",)]
    if unknown:
        raise UserError(f"There is no benchmark {unknown[0]!r}; choose among {', '.join(KNOWN)}, or all alone.")
    settings.check_least(cfg, BATCH_SIZE=1)
    check_windows(cfg)


def check_windows(cfg: SimpleNamespace) -> None:
    """The same for the settings that `segment` and `decide` need."""
    evaluation.check_precision(cfg)
    settings.check_least(cfg, SHORT_SIDE=1, WINDOW=1, WINDOW_BATCH=1, LOGIT_SCALE=1)
    if not 0 <= (cfg.THRESHOLD or 0) <= 1:
        raise UserError(f"THRESHOLD is {cfg.THRESHOLD}; it is a probability, from 0 to 1.")
    if not 0 < cfg.STRIDE <= cfg.WINDOW:
        raise UserError(f"STRIDE is {cfg.STRIDE}; it must be from 1 to WINDOW, {cfg.WINDOW}, or pixels are left out.")


def check_patches(cfg: SimpleNamespace, clip: DeCLIP) -> None:
    """Raises UserError if the model's patches don't fill a window."""
    if cfg.WINDOW % clip.patch_size:
        raise UserError(f"WINDOW {cfg.WINDOW} is no multiple of {clip.model_name}'s patch size; set it to "
                        f"{cfg.WINDOW // clip.patch_size * clip.patch_size or clip.patch_size}.")


def benchmark_classes(cfg: SimpleNamespace, name: str) -> Classes:
    """The class list of a benchmark; UserError if a list of the user's own has another number of lines."""
    path = cfg.CLASSES or Path(__file__).parent / "classes" / KNOWN[name].classes
    classes = read_classes(path)
    if len(classes) != len(KNOWN[name].values):
        raise UserError(f"{path} has {len(classes)} classes, but {name} has {len(KNOWN[name].values)}; give as many lines.")
    return classes


def evaluate(cfg: SimpleNamespace, clip: DeCLIP, dataset: SegmentationImages, classes: Classes, name: str,
             ranks: distributed.Ranks) -> Tensor:
    """The confusion matrix (K, K) of a benchmark, rows true, columns predicted, summed over ranks."""
    text = evaluation.encode_classes(cfg, clip, classes)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.long, device=ranks.device)
    loader = evaluation.load_share(cfg, dataset, ranks)
    # Nothing below waits for a GPU, so that files are read and results counted while it works.
    with tqdm(total=len(loader.dataset), desc=name, unit="image", disable=not ranks.is_main) as progress:
        for samples in loader:
            images = [image.to(ranks.device, non_blocking=True) for image, _ in samples]
            for (_, label), prediction in zip(samples, predict(cfg, clip, images, text, classes)):
                confusion += confusion_matrix(label.to(ranks.device, non_blocking=True), prediction, len(classes))
            progress.update(len(samples))
    return distributed.sum_over_ranks(confusion).cpu()


@torch.inference_mode()
def predict(cfg: SimpleNamespace, clip: DeCLIP, images: Sequence[Tensor], text: Tensor, classes: Classes) -> list[Tensor]:
    """Images uint8 (3, H, W) and the embeddings (P, C) of all names of `classes` -> each image's classes of pixels, (H, W)."""
    return [torch.cat([decide(rows, classes, cfg.LOGIT_SCALE, cfg.THRESHOLD) for rows in scores.of_pixels()])
            for scores in segment(cfg, clip, images, text)]


class Scores(NamedTuple):
    """An image's cosine similarities, one for each patch of each window, and the two matrices that make pixels of them.

    Enlarging a window's patches to its pixels, averaging where windows overlap and resizing to the original picture are
    linear, and act on rows and columns alike. So together they are a matrix for each, and scores of pixels, many times
    as many numbers, exist for a few rows at a time alone.
    """
    patches: Tensor     # (P, p, q): p rows and q columns of patches, window by window
    down: Tensor        # (H, p)
    across: Tensor      # (W, q)

    def of_pixels(self, most: int = 2**24) -> Iterator[Tensor]:
        """Scores of the pixels, (P, rows, W), some rows at a time, of at most about `most` numbers."""
        wide = self.patches @ self.across.T
        for some in self.down.split(max(1, most // wide[:, 0].numel())):
            yield some @ wide


@torch.inference_mode()
def segment(cfg: SimpleNamespace, clip: DeCLIP, images: Sequence[Tensor], text: Tensor) -> list[Scores]:
    """Images uint8 (3, H, W) and text (P, C) -> their scores. Windows of all images together fill the batches."""
    sizes = [resized_size(image, cfg.SHORT_SIDE) for image in images]
    # An image smaller than a window is one window, padded.
    pictures = [normalize(padded(resize(image, *size), *(max(side, cfg.WINDOW) for side in size)), clip.mean, clip.std)
                for image, size in zip(images, sizes)]
    places = [[window_starts(side, cfg.WINDOW, cfg.STRIDE) for side in picture.shape[-2:]] for picture in pictures]
    windows = [picture[:, y:y + cfg.WINDOW, x:x + cfg.WINDOW]
               for picture, (ys, xs) in zip(pictures, places) for y in ys for x in xs]
    scores = torch.cat([window_scores(cfg, clip, torch.stack(windows[start:start + cfg.WINDOW_BATCH]), text)
                        for start in range(0, len(windows), cfg.WINDOW_BATCH)])
    of_image = scores.split([len(ys) * len(xs) for ys, xs in places])
    return [Scores(each.unflatten(0, (len(ys), len(xs))).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2),
                   *(side_weights(*sides, cfg.WINDOW, cfg.STRIDE, each.shape[-1], each.device)
                     for sides in zip(size, image.shape[-2:])))
            for each, image, size, (ys, xs) in zip(of_image, images, sizes, places)]


def resized_size(image: Tensor, short_side: int) -> tuple[int, int]:
    """Height and width of an image (..., H, W) with its shorter side resized to `short_side`."""
    factor = short_side / min(image.shape[-2:])
    return tuple(max(1, round(side * factor)) for side in image.shape[-2:])


def window_scores(cfg: SimpleNamespace, clip: DeCLIP, windows: Tensor, text: Tensor) -> Tensor:
    """Windows (n, 3, S, S) -> cosine similarities of each patch with each text, (n, P, S/patch, S/patch), in float32."""
    content = evaluation.encode_dense(cfg, clip, windows)
    return torch.einsum("nchw,pc->nphw", F.normalize(content, dim=1), text)


@lru_cache(maxsize=256)
def side_weights(length: int, side: int, window: int, stride: int, patches: int, device: torch.device) -> Tensor:
    """What each row of patches of all windows adds to each row of pixels, (side, windows * patches); columns likewise.

    length: of the side as the model sees it, covered by windows of `window` pixels and `patches` patches.
    """
    starts = window_starts(max(length, window), window, stride)
    enlarged = F.interpolate(torch.eye(patches, device=device)[None], window, mode="linear")[0].T     # (window, patches)
    total = torch.zeros(max(length, window), len(starts), patches, device=device)
    for number, start in enumerate(starts):
        total[start:start + window, number] = enlarged
    covered = total.sum(dim=(1, 2))     # by how many windows: the weights of each are 1 together
    mean = total.flatten(1) / covered[:, None]
    # What was padded is cut off.
    return F.interpolate(mean[:length].T[None], side, mode="linear")[0].T.contiguous()


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last moved back to end with the side."""
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def decide(scores: Tensor, classes: Classes, logit_scale: float, threshold: float | None) -> Tensor:
    """Cosine similarities of all prompts (P, H, W) -> class of each pixel (H, W).

    A class has the probability of its most probable synonym. With a threshold, a pixel where no class is that
    probable is class 0, the background.
    """
    best, prompt = scores.max(dim=0)
    prediction = constant(tuple(classes.owner), torch.long, scores.device)[prompt]
    if threshold is None:
        return prediction
    probability = (logit_scale * best - torch.logsumexp(logit_scale * scores, dim=0)).exp()
    return prediction.masked_fill(probability < threshold, 0)


def confusion_matrix(label: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Pixels of each true (row) and predicted (column) class, (K, K); VOID pixels do not count."""
    pairs = torch.where(label == VOID, classes**2, label.long() * classes + prediction).flatten()
    counts = torch.zeros(classes**2 + 1, dtype=torch.long, device=label.device)
    return counts.index_add_(0, pairs, torch.ones_like(pairs))[:-1].view(classes, classes)


def summarize(confusion: Tensor, classes: Classes) -> dict:
    """mIoU, pixel accuracy and each class's IoU in per cent.

    A class that neither occurs nor is predicted has no IoU (None) and does not enter the mean; one that is predicted
    but does not occur has 0, as is usual.
    """
    right, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    iou = 100 * right.double() / union
    present = union > 0
    return {"mIoU": iou[present].mean().item(), "pixel accuracy": (100 * right.sum().double() / confusion.sum()).item(),
            "pixels": int(confusion.sum()),
            "IoU": {name: round(iou[index].item(), 2) if present[index] else None for index, name in enumerate(classes.names)}}


def table(result: dict) -> str:
    """Per-class IoU in columns, then the means, for a screen."""
    cells = [f"{name[:20]:20}{'-' if iou is None else f'{iou:.1f}':>6}" for name, iou in result["IoU"].items()]
    lines = ["   ".join(cells[start:start + 4]) for start in range(0, len(cells), 4)]
    return "\n".join([*lines, f"mIoU {result['mIoU']:.1f} %   pixel accuracy {result['pixel accuracy']:.1f} %"])


def overview(result: dict[str, dict], missing: dict[str, str]) -> str:
    """mIoU of each benchmark, their mean, and what was missing, for a screen."""
    papers = [result[name]["mIoU"] for name in result if name in PAPERS]
    lines = ["", *(f"{name:16}{each['mIoU']:6.1f}" for name, each in result.items())]
    if len(papers) > 1:
        lines.append(f"{'mean':16}{sum(papers) / len(papers):6.1f}   of {len(papers)} of the paper's {len(PAPERS)}, mIoU in %")
    return "\n".join([*lines, *(f"{name:16}     -   {reason}" for name, reason in missing.items())])


if __name__ == "__main__":
    main()
