"""Open-vocabulary segmentation from dense features: each pixel gets the class whose text is nearest (Tables 5 and 10).

    python eval_seg.py --ckpt out/declip/declip.safetensors
    python eval_seg.py --benchmarks all --ckpt ...                 # the paper's eight, as far as their data are there
    python eval_seg.py --attention clearclip                       # a baseline, no checkpoint
    torchrun --nproc_per_node 8 eval_seg.py --ckpt ...             # images divided among GPUs

The paper's protocol (section 9.2): shorter side 448, windows of 336 with a stride of 112, ImageNet templates.
Prints mIoU, pixel accuracy and each class's IoU; writes them to seg.json beside the checkpoint.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import distributed
import evaluation
import settings
from data import BENCHMARKS as KNOWN
from data import PAPERS, VOID, Classes, NotThere, SegmentationImages, normalize, padded, read_classes, resize, workers
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
    check_windows(cfg)


def check_windows(cfg: SimpleNamespace) -> None:
    """The same for the settings that `segment` and `decide` need."""
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
    share = Subset(dataset, range(ranks.rank, len(dataset), ranks.world))
    loader = DataLoader(share, batch_size=None, num_workers=workers(cfg.WORKERS))
    for image, label in tqdm(loader, desc=name, unit="image", disable=not ranks.is_main):
        prediction = predict(cfg, clip, image.to(ranks.device), text, classes)
        confusion += confusion_matrix(label.to(ranks.device), prediction, len(classes))
    return distributed.sum_over_ranks(confusion).cpu()


@torch.inference_mode()
def predict(cfg: SimpleNamespace, clip: DeCLIP, image: Tensor, text: Tensor, classes: Classes) -> Tensor:
    """uint8 (3, H, W) and the embeddings (P, C) of all names of `classes` -> the class of each pixel, (H, W)."""
    rows = resized_rows(segment(cfg, clip, image, text), *image.shape[-2:])
    return torch.cat([decide(scores, classes, cfg.LOGIT_SCALE, cfg.THRESHOLD) for scores in rows])


def resized_rows(scores: Tensor, height: int, width: int, most: int = 2**26) -> Iterator[Tensor]:
    """(P, h, w) resized bilinearly to (P, height, width), some rows at a time, of at most about `most` numbers.

    All rows of 171 classes on a picture of 12 megapixels would be 8 GB.
    """
    wide = F.interpolate(scores[None], (scores.shape[1], width), mode="bilinear")[0]
    places = ((torch.arange(height, device=scores.device) + 0.5) * scores.shape[1] / height - 0.5).clamp(0, scores.shape[1] - 1)
    for chosen in places.split(max(1, most // (len(scores) * width))):
        above = chosen.long()
        below = (above + 1).clamp(max=scores.shape[1] - 1)
        yield torch.lerp(wide[:, above], wide[:, below], (chosen - above)[:, None])


@torch.inference_mode()
def segment(cfg: SimpleNamespace, clip: DeCLIP, image: Tensor, text: Tensor) -> Tensor:
    """uint8 (3, H, W) and text (P, C) -> (P, h, w): cosine similarities, the mean over overlapping windows.

    h and w are of the image with its shorter side resized to SHORT_SIDE.
    """
    H, W = image.shape[-2:]
    factor = cfg.SHORT_SIDE / min(H, W)
    picture = resize(image, max(1, round(H * factor)), max(1, round(W * factor)))
    h, w = picture.shape[-2:]
    # An image smaller than a window is one window, padded; what lies in the padding is cut off below.
    picture = normalize(padded(picture, max(h, cfg.WINDOW), max(w, cfg.WINDOW)), clip.mean, clip.std)
    corners = [(y, x) for y in window_starts(picture.shape[-2], cfg.WINDOW, cfg.STRIDE)
               for x in window_starts(picture.shape[-1], cfg.WINDOW, cfg.STRIDE)]
    total = picture.new_zeros(len(text), *picture.shape[-2:])
    count = picture.new_zeros(picture.shape[-2:])
    for start in range(0, len(corners), cfg.WINDOW_BATCH):
        batch = corners[start:start + cfg.WINDOW_BATCH]
        windows = torch.stack([picture[:, y:y + cfg.WINDOW, x:x + cfg.WINDOW] for y, x in batch])
        for (y, x), scores in zip(batch, window_logits(cfg, clip, windows, text)):
            total[:, y:y + cfg.WINDOW, x:x + cfg.WINDOW] += scores
            count[y:y + cfg.WINDOW, x:x + cfg.WINDOW] += 1
    return (total / count)[:, :h, :w]


def window_logits(cfg: SimpleNamespace, clip: DeCLIP, windows: Tensor, text: Tensor) -> Tensor:
    """Windows (n, 3, S, S) -> cosine similarities of each pixel with each text, (n, P, S, S)."""
    content, _ = clip.encode_dense(windows, cfg.ATTENTION)
    scores = torch.einsum("nchw,pc->nphw", F.normalize(content.float(), dim=1), text)
    return F.interpolate(scores, windows.shape[-2:], mode="bilinear")


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last moved back to end with the side."""
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def decide(logits: Tensor, classes: Classes, logit_scale: float, threshold: float | None) -> Tensor:
    """Cosine similarities of all prompts (P, H, W) -> class of each pixel (H, W).

    A class has the probability of its most probable synonym. With a threshold, a pixel where no class is that
    probable is class 0, the background.
    """
    probability, prediction = classes.best((logits * logit_scale).softmax(dim=0)).max(dim=0)
    return prediction if threshold is None else prediction.masked_fill(probability < threshold, 0)


def confusion_matrix(label: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Pixels of each true (row) and predicted (column) class, (K, K); VOID pixels do not count."""
    counted = label != VOID
    return (label[counted].long() * classes + prediction[counted]).bincount(minlength=classes**2).view(classes, classes)


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
