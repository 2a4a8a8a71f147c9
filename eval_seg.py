"""Open-vocabulary segmentation: each pixel gets the class whose text is nearest (Tables 5, 10).

    python eval_seg.py --ckpt out/declip/declip.safetensors
    python eval_seg.py --benchmarks all --ckpt ...          # of the paper's eight those at hand
    python eval_seg.py --attention clearclip                # a baseline, no checkpoint
    torchrun --nproc_per_node 8 eval_seg.py --ckpt ...      # images divided among GPUs

The paper's protocol (section 9.2): shorter side 448, windows of 336 with a stride of 112, ImageNet
templates. Prints mIoU, pixel accuracy and each class's IoU; adds them to seg.json beside the
checkpoint, which keeps the results of other evaluations.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Classes, constant, in_order, load_share, normalize, pad_to, read_classes, resize
from eval_region import open_model, title
from model import DeCLIP
from util import UserError, distributed, settings
from util.files import find
from util.labels import (
    CLASS_FILES,
    NOT_IN_DATA,
    VOID,
    SegmentationBenchmark,
    SegmentationImages,
    find_data,
    overview,
    read_benchmark,
)
from util.pamr import refine
from util.precision import autocast, check_precision
from util.results import identity, told_apart, write_result
from util.text import best_text, find_templates
from util.windows import Maps, resized_size, window_starts

# The model, its precision and the run are set as in eval_region.py
SHARED = {"eval_region": ["The model", "Names and numbers", "The evaluation"]}

# The data
BENCHMARKS = ("voc20", "voc21")     # which to evaluate; all: the paper's eight; my.json: your own
DATA = "data"                       # folder that holds the data sets in their original layouts
CLASSES: str | None = None          # class file instead of the benchmark's own in classes/

# The windows
SHORT_SIDE: int | None = None       # of the image, in pixels; None: 448, less for small models
LONG_SIDE: int | None = None        # most that the longer side may have; None: 2048, the authors'
WINDOW: int | None = None           # side, a multiple of the patch size; None: 336, or less
STRIDE: int | None = None           # from window to window; None: a third of WINDOW
LOGIT_SCALE: float | None = None    # factor of the cosines before the softmax; None: 40 (VOC21: 80)
THRESHOLD: float | None = None      # background where no class is more probable; None: benchmark's
PAMR = 0                            # steps that fit scores to the image's colours (docs/beyond.md)
WINDOW_BATCH = 16                   # windows of one forward pass


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns each benchmark's figures."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        return run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> dict:
    """Segments every benchmark; prints and writes each one's figures."""
    settings.check_min(cfg, BATCH_SIZE=1, NUM_WORKERS=0)
    # What can be wrong is looked at before a model is loaded.
    protocols, templates = find_protocols(cfg), find_templates(cfg.TEMPLATES)
    sets, missing = find_data(cfg.BENCHMARKS, PAPER_BENCHMARKS, cfg.DATA,
                              partial(find_set, class_file=cfg.CLASSES))
    clip = open_model(cfg).to(ranks.device)
    result = {}
    for name, (dataset, classes) in sets.items():
        protocol = protocols[name].fit(clip)
        of = identity(cfg, clip, [vars(classes), len(dataset)], **clip.describe(), benchmark=name,
                      **protocol.recorded(), attention=cfg.ATTENTION or clip.context)
        text = clip.encode_text(classes.prompts, templates, cfg.CACHE)
        segmenter = partial(predict, protocol, clip, classes, text)
        loader = load_share(dataset, ranks, cfg.BATCH_SIZE, cfg.NUM_WORKERS)
        confusion = evaluate(segmenter, loader, len(classes), ranks, name)
        result[name] = summarize(confusion, classes)
        if ranks.is_main:
            print(f"\n{name}: {title(cfg, clip)}, {len(dataset)} images\n{table(result[name])}")
            write_result(cfg, "seg", of, result[name])
    if ranks.is_main and (len(result) > 1 or missing):
        print(overview(result, missing, PAPER_BENCHMARKS))
    return result


# ------------------------------------------------------------------------------------ protocol

@dataclass(frozen=True)
class Protocol:
    """How images become windows, and scores classes. None: `fit` finds what suits a model.

    Raises UserError for a value out of its range.
    """
    short_side: int | None = None
    long_side: int = 2048
    window: int | None = None
    stride: int | None = None
    logit_scale: float = 40.0           # the authors'; 1 / temperature of the softmax
    threshold: float | None = None      # None: background is no class
    pamr: int = 0
    attention: str | None = None        # a row of model.ATTENTIONS; None: the model's context
    precision: str = "fp32"
    window_batch: int = 16

    def __post_init__(self) -> None:
        check_precision(self.precision)
        own = SimpleNamespace(**{name.upper(): value for name, value in asdict(self).items()})
        settings.check_min(own, SHORT_SIDE=1, LONG_SIDE=1, WINDOW=1, STRIDE=1, WINDOW_BATCH=1,
                           LOGIT_SCALE=1, PAMR=0)
        if not 0 <= (self.threshold or 0) <= 1:
            raise UserError(f"THRESHOLD is {self.threshold}; it is a probability, from 0 to 1.")
        if None not in (self.stride, self.window) and self.stride > self.window:
            raise UserError(f"STRIDE is {self.stride}; it must be from 1 to WINDOW, {self.window}, "
                            "or pixels are left out.")

    @classmethod
    def of(cls, cfg: SimpleNamespace, benchmark: SegmentationBenchmark | None = None) -> "Protocol":
        """That of the settings and, where they leave something open, of a benchmark."""
        settings_of = {field.name: getattr(cfg, field.name.upper()) for field in fields(cls)}
        chosen = {name: value for name, value in settings_of.items() if value is not None}
        if benchmark is None:
            return cls(**chosen)
        own = {"logit_scale": benchmark.logit_scale, "threshold": benchmark.threshold}
        if benchmark.threshold is None:     # background is no class
            chosen.pop("threshold", None)
        return cls(**own | benchmark.protocol | chosen)

    def fit(self, clip: DeCLIP) -> "Protocol":
        """With the paper's 448, 336 and 112 for short_side, window and stride where they are open.

        Those are for a CLIP that learned from images of 224 px; one that learned from smaller
        images has them in proportion, because in larger ones it recognises little.
        Raises UserError if the model's patches don't fill a window.
        """
        share, p = min(1.0, clip.image_size / 224), clip.patch_size
        window = self.window or max(1, int(336 * share) // p) * p
        if window % p:
            raise UserError(f"WINDOW {window} is no multiple of {clip.model_name}'s patch size; "
                            f"set it to {window // p * p or p}.")
        return replace(self, short_side=self.short_side or round(448 * share), window=window,
                       stride=self.stride or max(1, round(window / 3)))

    def recorded(self) -> dict:
        """What a result says of it."""
        return {name: value for name, value in asdict(self).items()
                if name not in ("attention", "precision", "window_batch")}


def find_protocols(cfg: SimpleNamespace) -> dict[str, Protocol]:
    """The protocol of each benchmark; UserError for a setting that is out of range or in vain."""
    names = PAPER_BENCHMARKS if cfg.BENCHMARKS == ("all",) else cfg.BENCHMARKS
    benchmarks = {name: find_benchmark(name) for name in names}
    protocols = {name: Protocol.of(cfg, benchmark) for name, benchmark in benchmarks.items()}
    no_background = all(benchmark.threshold is None for benchmark in benchmarks.values()) and (
        "is for background, which gets what no class is sure of, but "
        f"{', '.join(names)} has none")
    settings.refuse_unused(cfg, THRESHOLD=no_background, LOGIT_SCALE=no_background,
                           DATA={*names}.isdisjoint(KNOWN_BENCHMARKS) and NOT_IN_DATA)
    return protocols


# ---------------------------------------------------------------------------------- benchmarks

VOC = ("VOCdevkit/VOC2012", "ImageSets/Segmentation/val.txt", "JPEGImages/{}.jpg",
       "SegmentationClass/{}.png")
CONTEXT_LAYOUT = ("VOCdevkit/VOC2010", "ImageSets/SegmentationContext/val.txt",
                  "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png")
CONTEXT_ORIGIN = ("mmsegmentation's tools/dataset_converters/pascal_context.py writes labels and "
                  "list, of VOC 2010 and PASCAL-Context's json")
CITYSCAPES = ("cityscapes", "*/*", "leftImg8bit/val/{}_leftImg8bit.png",
              "gtFine/val/{}_gtFine_labelIds.png")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_VOID = (*(id for id in range(34) if id not in CITYSCAPES_IDS), 255)
ADE = ("ADEChallengeData2016", "*", "images/validation/{}.jpg", "annotations/validation/{}.png")
OBJECT = ("coco", "*", "val2017/{}.jpg", "annotations/instances_val2017.json")
STUFF = ("coco", "*", "val2017/{}.jpg", "stuffthingmaps/val2017/{}.png")
# COCO-Stuff's PNGs have the id less one; these ids have no class.
NOT_IN_STUFF = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
STUFF_VALUES = [id - 1 for id in range(1, 183) if id not in NOT_IN_STUFF]
STUFF_VOID = (*(id - 1 for id in NOT_IN_STUFF), 255)

# Thresholds and scales are the authors' (configs/ of their code); the paper has none.
KNOWN_BENCHMARKS = {
    "voc21": SegmentationBenchmark(*VOC, "voc21.txt", range(21), (255,), 0.4, 80.0, palette="voc"),
    "context60": SegmentationBenchmark(*CONTEXT_LAYOUT, "context60.txt", range(60), (255,), 0.15,
                                       origin=CONTEXT_ORIGIN),
    "coco_object": SegmentationBenchmark(*OBJECT, "coco_object.txt", range(81), threshold=0.2),
    "voc20": SegmentationBenchmark(*VOC, "voc20.txt", range(1, 21), (0, 255), palette="voc"),
    "context59": SegmentationBenchmark(*CONTEXT_LAYOUT, "context59.txt", range(1, 60), (0, 255),
                                       origin=CONTEXT_ORIGIN),
    "coco_stuff": SegmentationBenchmark(*STUFF, "coco_stuff.txt", STUFF_VALUES, STUFF_VOID),
    "cityscapes": SegmentationBenchmark(*CITYSCAPES, "cityscapes.txt", CITYSCAPES_IDS,
                                        CITYSCAPES_VOID),
    "ade150": SegmentationBenchmark(*ADE, "ade150.txt", range(1, 151), (0,)),
}
PAPER_BENCHMARKS = tuple(KNOWN_BENCHMARKS)      # of Tables 5 and 10


def find_benchmark(name: str) -> SegmentationBenchmark:
    """The benchmark of a name, or the one that a user's json describes (docs/data.md): a file, or
    the benchmark.json in a folder. UserError if there is none."""
    if name in KNOWN_BENCHMARKS:
        return KNOWN_BENCHMARKS[name]
    in_folder = find(Path(name) / "benchmark.json")
    if not name.endswith(".json") and not in_folder.is_file():
        raise UserError(f"There is no benchmark {name!r}; choose among "
                        f"{', '.join(KNOWN_BENCHMARKS)}, all alone, or a json file of your own.")
    benchmark = read_benchmark(name if name.endswith(".json") else in_folder)
    if benchmark.values is None:
        benchmark = replace(benchmark, values=range(len(read_classes(benchmark.classes))))
    return benchmark


def find_set(name: str, data: str, class_file: str | None = None
             ) -> tuple[SegmentationImages, Classes]:
    """A benchmark's images and its class list, or one's own; UserError if its length is another."""
    benchmark = find_benchmark(name)
    path = class_file or CLASS_FILES / benchmark.classes
    images, classes = SegmentationImages(benchmark, data), read_classes(path)
    if len(classes) != len(benchmark.values):
        raise UserError(f"{path} has {len(classes)} classes, but {name} has "
                        f"{len(benchmark.values)}; give as many lines.")
    if images.instances:        # 0, the first class, is what no object covers
        classes = in_order(classes, [classes.names[0], *images.instances.names], path,
                           benchmark.label)
    return images, classes


# -------------------------------------------------------------------------------- segmentation

Segmenter = Callable[[list[Tensor]], list[Tensor]]     # uint8 (3, H, W) each -> classes (H, W) each


def evaluate(segmenter: Segmenter, loader: DataLoader, num_classes: int, ranks: distributed.Ranks,
             name: str) -> Tensor:
    """The confusion matrix (K, K) of any segmenter, rows true, columns predicted, over all ranks.

    loader: data.load_share of items like those of SegmentationImages.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=ranks.device)
    # Nothing below waits for a GPU: files are read and results counted while it works.
    with tqdm(total=len(loader.dataset), desc=name, unit="image",
              disable=not ranks.is_main) as progress:
        for samples in loader:
            images = [image.to(ranks.device, non_blocking=True) for image, _ in samples]
            for (_, label), prediction in zip(samples, segmenter(images)):
                label = label.to(ranks.device, non_blocking=True)
                confusion += confusion_matrix(label, prediction, num_classes)
            progress.update(len(samples))
    confusion = distributed.sum_over_ranks(confusion).cpu()
    if not confusion.any():
        raise UserError(f"The labels of {name} are void at every pixel, so nothing can be scored; "
                        "take the labels of this benchmark.")
    return confusion


@torch.inference_mode()
def predict(protocol: Protocol, clip: DeCLIP, classes: Classes, text: Tensor,
            images: Sequence[Tensor]) -> list[Tensor]:
    """Images uint8 (3, H, W) and all names' embeddings (P, C) -> the class of each pixel, (H, W).
    """
    predictions = []
    for scores, image in zip(score_images(protocol, clip, images, text), images):
        rows = ([some] for some in scores.of_pixels())
        if protocol.pamr:
            rows = [map(partial(refine, image=image, steps=protocol.pamr), scores.of_texts())]
        predictions.append(torch.cat([
            decide(some, classes, protocol.logit_scale, protocol.threshold) for some in rows]))
    return predictions


@torch.inference_mode()
def score_images(protocol: Protocol, clip: DeCLIP, images: Sequence[Tensor], text: Tensor
                 ) -> list[Maps]:
    """Images uint8 (3, H, W) and text (P, C) -> their cosines by a sliding window."""
    return map_images(protocol, clip, images, partial(window_scores, protocol, clip, text=text))


def map_images(protocol: Protocol, clip: DeCLIP, images: Sequence[Tensor],
               function: Callable[[Tensor], Tensor]) -> list[Maps]:
    """Images uint8 (3, H, W) -> what a function makes of their windows' patches.

    function: normalised windows (n, 3, S, S) -> (n, P, S/patch, S/patch). Windows of all images
        together fill its batches.
    """
    window, stride = protocol.window, protocol.stride
    # 1. Resize; an image smaller than a window is one window, padded
    sizes = [resized_size(image, protocol.short_side, protocol.long_side) for image in images]
    resized = [pad_to(resize(image, *size), *(max(side, window) for side in size))
               for image, size in zip(images, sizes)]
    resized = [normalize(image, clip.mean, clip.std) for image in resized]
    # 2. Windows
    places = [[window_starts(side, window, stride) for side in image.shape[-2:]]
              for image in resized]
    windows = [image[:, y:y + window, x:x + window]
               for image, (ys, xs) in zip(resized, places) for y in ys for x in xs]
    # 3. One value for each patch and each text
    batch = protocol.window_batch
    values = torch.cat([function(torch.stack(windows[start:start + batch]))
                        for start in range(0, len(windows), batch)])
    # 4. Rows and columns of each image's patches
    of_image = values.split([len(ys) * len(xs) for ys, xs in places])
    return [Maps.of(patches, size, window, stride, image.shape[-2:])
            for patches, size, image in zip(of_image, sizes, images)]


def window_scores(protocol: Protocol, clip: DeCLIP, windows: Tensor, text: Tensor) -> Tensor:
    """Windows (n, 3, S, S) -> float32 cosines of patches and texts, (n, P, S/patch, S/patch)."""
    with autocast(protocol.precision, windows.device):
        content = clip.encode_dense(windows, protocol.attention)[0].float()
    return torch.einsum("nchw,pc->nphw", F.normalize(content, dim=1), text)


def decide(scores: Iterable[Tensor], classes: Classes, logit_scale: float,
           threshold: float | None) -> Tensor:
    """Cosines of all prompts, (p, H, W) for some after the others -> class of each pixel (H, W).

    A class has the probability of its most probable synonym. With a threshold, a pixel where no
    class is that probable is class 0, the background.
    """
    best, prompt, total = best_text(scores, None if threshold is None else logit_scale)
    prediction = constant(tuple(classes.class_of_prompt), torch.long, best.device)[prompt]
    if threshold is None:
        return prediction
    return prediction.masked_fill((logit_scale * best - total).exp() < threshold, 0)


# ------------------------------------------------------------------------------------- figures

def confusion_matrix(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Pixels of each true (row) and predicted (column) class, (K, K); VOID does not count."""
    pair = label.long() * num_classes + prediction
    pair = torch.where(label == VOID, num_classes**2, pair).flatten()
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.long, device=label.device)
    counts.index_add_(0, pair, torch.ones_like(pair))
    return counts[:-1].view(num_classes, num_classes)


def summarize(confusion: Tensor, classes: Classes, absent_count: bool = True) -> dict:
    """mIoU, pixel accuracy and each class's IoU in per cent.

    A class that neither occurs nor is predicted has no IoU (None) and does not enter the mean; one
    that is predicted but does not occur has 0, as is usual. absent_count: False leaves that one
    out, too.
    """
    right = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - right
    iou = 100 * right.double() / union
    present = (union if absent_count else confusion.sum(1)) > 0
    return {"mIoU": iou[present].mean().item(),
            "pixel accuracy": (100 * right.sum().double() / confusion.sum()).item(),
            "pixels": int(confusion.sum()),
            "IoU": {name: round(iou[index].item(), 2) if present[index] else None
                    for index, name in enumerate(told_apart(classes.names))}}


def table(result: dict) -> str:
    """Per-class IoU in columns, then the means, for a screen."""
    cells = [f"{name[:20]:20}{'-' if iou is None else f'{iou:.1f}':>6}"
             for name, iou in result["IoU"].items()]
    lines = ["   ".join(cells[start:start + 4]) for start in range(0, len(cells), 4)]
    return "\n".join([*lines, f"mIoU {result['mIoU']:.1f} %   "
                              f"pixel accuracy {result['pixel accuracy']:.1f} %"])


if __name__ == "__main__":
    main()
