"""What detectors on a frozen CLIP share: names as text, its features, the file, opening it.

    detector = open_detector("out/fvit/fvit.safetensors", kinds=[FViT])     # set_classes, detect
"""

import json
import os
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision import ops

from data import RESIZES, constant, normalize, pad_to, resize
from downstream.detection import Detections
from eval_region import open_model
from model import DeCLIP
from util import UserError, distributed, hub
from util.files import find
from util.text import find_templates
from util.towers import recorded_model
from util.weights import (
    check_fit,
    read_design,
    read_weights,
    state_checksum,
    write_checkpoint,
)
from util.windows import resized_size


class Detector(nn.Module):
    """A detector of any names on a CLIP that stays as it is, in eval mode.

    backbone: the CLIP. classes: names. seen: which of them training may see. design: a kind's
    Design, with image_size, resize, attention, normalization and templates. text: embeddings of
    the classes and of OTHER (K + 1, C), None to compute them. layers: blocks whose outputs are
    looked at, the last one included.
    A kind has `NAME`, of its record and file; `DESIGN`, its Design; `OTHER`, what the last row of
    the text names, one of the classes that training sees; and `RULES`, how it scores on known data
    sets. It has `detect` and `objects` (see FViT's).
    """

    NAME: str
    DESIGN: type
    OTHER: str
    RULES: dict[str, NamedTuple]

    def __init__(self, backbone: DeCLIP, classes: Sequence[str], seen: Sequence[bool],
                 design: NamedTuple, text: Tensor | None, layers: Sequence[int]):
        super().__init__()
        visual = backbone.visual
        self.backbone, self.design = backbone.requires_grad_(False), design
        self.layers = list(layers)
        is_clip = design.normalization == "clip"
        self.mean = visual.mean if is_clip else IMAGENET_DEFAULT_MEAN
        self.std = visual.std if is_clip else IMAGENET_DEFAULT_STD
        text = self.encode_names(classes) if text is None else text
        self.register_buffer("text", text.clone())
        self.name_classes(classes, seen)
        self.trained = {clean_name(name) for name, is_seen in zip(classes, seen) if is_seen}

    def encode_names(self, names: Sequence[str], cache: str | None = None) -> Tensor:
        """Names and OTHER -> their embeddings (K + 1, C), L2-normalised."""
        return encode_names(self.backbone, [*names, self.OTHER], self.design.templates, cache)

    def name_classes(self, classes: Sequence[str], seen: Sequence[bool]) -> None:
        """What the rows of `text` are; the last one is OTHER, which is seen."""
        self.classes, self.seen = list(classes), [bool(flag) for flag in seen]
        is_seen = torch.tensor([*self.seen, True], device=self.text.device)
        self.register_buffer("is_seen", is_seen, persistent=False)

    def set_classes(self, names: Sequence[str], seen: Sequence[bool] | None = None,
                    cache: str | None = None) -> None:
        """What is detected from now on. seen: None for the names that training has seen.

        cache: as DeCLIP.encode_text's. Raises UserError if the backbone has no text tower.
        """
        seen = [clean_name(name) in self.trained for name in names] if seen is None else seen
        self.text = self.encode_names(names, cache).to(self.text.device)
        self.name_classes(names, seen)

    def train(self, mode: bool = True) -> "Detector":
        """As nn.Module's; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def views(self, images: list[Tensor]) -> list[Tensor]:
        """uint8 (3, H, W) of any size -> float [0, 1], the longest side `image_size`."""
        side = self.design.image_size
        return [resize(image, *resized_size(image, side, side), self.design.resize)
                for image in images]

    def look(self, images: list[Tensor], attention: str | None = None) -> list[Tensor]:
        """Float [0, 1] (3, h, w) each -> the backbone's outputs, (B, D, h', w') each.

        Padding is 0 after the normalisation. One pass: the last output also makes the VLM's map.
        attention: of the last block, instead of the design's.
        """
        side = self.design.image_size
        batch = torch.stack([pad_to(normalize(image, self.mean, self.std), side, side)
                             for image in images])
        # Not in inference mode: backward through what follows needs these outputs.
        with torch.no_grad():
            return self.backbone.visual.encode_layers(batch, self.layers,
                                                      attention or self.design.attention)

    def vlm_map(self, tokens: Tensor) -> Tensor:
        """The last block's output (B, D, h, w) -> dense features (B, C, h, w), L2-normalised."""
        content = self.backbone.visual.project(tokens.flatten(2).mT)
        return F.normalize(content.float(), dim=-1).mT.unflatten(2, tokens.shape[2:])

    def gives_masks(self, rules: NamedTuple) -> bool:
        """Whether detections have masks."""
        return False

    def unused(self, rules: NamedTuple) -> dict[str, str | bool]:
        """Settings of scores -> why one changes nothing for these classes; False: it does."""
        return {}

    # ------------------------------------------------------------------------------ the file

    def state(self) -> dict[str, Tensor]:
        """All that a file keeps: weights, text, statistics of norms, but not the backbone."""
        return {name: value for name, value in self.state_dict().items()
                if not name.startswith("backbone.")}

    def about(self) -> dict:
        """What the file's record says of the detector."""
        return {"classes": self.classes, "seen": self.seen, "design": self.design._asdict(),
                "backbone": backbone_checksum(self.backbone)}

    def save(self, path: str | Path, settings: dict | None = None) -> None:
        """Writes a file that describes itself; of the backbone it has a checksum and `settings`,
        which say how to open it."""
        write_checkpoint(path, self.state(), self.backbone.describe() | {
            self.NAME: self.about(), "settings": settings or {},
            "use": f"python -m downstream.{self.NAME}.eval or tools.detect"})


def check_design(design: NamedTuple, patch_size: int | None, choices: dict[str, Collection[str]],
                 ranges: dict[str, tuple[float, float]]) -> None:
    """Raises UserError on a setting that is none of its choices or out of its range; if the
    backbone's `patch_size` is known, also if IMAGE_SIZE is no multiple of twice that."""
    for name, known in (choices | {"normalization": ("imagenet", "clip"),
                                   "resize": RESIZES}).items():
        if getattr(design, name) not in known:
            raise UserError(f"{name.upper()} is {getattr(design, name)!r}; it must be one of "
                            f"{', '.join(known)}.")
    for name, (least, most) in (ranges | {"image_size": (1, 2**13)}).items():
        if not least <= getattr(design, name) <= most:
            raise UserError(f"{name.upper()} is {getattr(design, name)}; it must be at least "
                            f"{least} and at most {most}.")
    side, coarsest = design.image_size, 2 * (patch_size or 0)
    if coarsest and side % coarsest:
        raise UserError(f"IMAGE_SIZE {side} is no multiple of twice the backbone's patch size, "
                        f"{coarsest}; set it to {max(1, round(side / coarsest)) * coarsest}.")


def cosines(regions: Tensor, text: Tensor) -> Tensor:
    """Unit vectors (n, C), (K, C) -> (n, K), in float32 under autocast, too."""
    with torch.autocast(regions.device.type, enabled=False):
        return regions.float() @ text.T


def make_generator(key: str, device: torch.device) -> torch.Generator:
    """A source of random numbers that depend on the key alone."""
    return torch.Generator(device).manual_seed(zlib.crc32(key.encode()))


def mean_over_ranks(count: int | Tensor, device: torch.device) -> Tensor:
    """A count's mean over ranks, where that of all is at least 1.

    DDP averages gradients, so what ranks divide by must be this for their gradient to be that of
    one process with all images.
    """
    both = torch.ones(2, device=device)
    both[:1] = count        # fills it in; both[0] = count, or a tensor made of it, is waited for
    total, ranks = distributed.sum_over_ranks(both)
    return total.clamp(min=1) / ranks


def choose(boxes: Tensor, scores: Tensor, rules: NamedTuple) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (n, 4) and scores (n, K) -> the detections' boxes, scores, labels, the best first.

    rules: a kind's ScoreRules, with least, nms and most.
    """
    region, label = (scores > rules.least).nonzero(as_tuple=True)
    boxes, scores = boxes[region], scores[region, label]
    kept = ops.batched_nms(boxes, scores, label, rules.nms)[:rules.most]
    return boxes[kept], scores[kept], label[kept]


def to_pixels(found: tuple[Tensor, Tensor, Tensor], size: tuple[int, int],
              of_image: tuple[int, int]) -> Detections:
    """Boxes, scores and labels of an image resized to `size` -> in the image's pixels."""
    boxes, scores, labels = found
    (h, w), (H, W) = size, of_image
    boxes = boxes * constant((W / w, H / h) * 2, torch.float, boxes.device)
    boxes = ops.clip_boxes_to_image(boxes, of_image)        # the factors are rounded
    return Detections(boxes, scores, labels, None)


# ------------------------------------------------------------------------------ names as text

def vild_sentences() -> list[Callable[[str], str]]:
    """The 63 sentences of ViLD, functions of a name."""
    lines = Path(__file__).with_name("vild.txt").read_text().splitlines()
    return [partial(fill_sentence, line) for line in lines]


def fill_sentence(sentence: str, name: str) -> str:
    """A sentence about a name: {} stands for it, {a} for its article."""
    name = clean_name(name)
    article = "an" if name.startswith(tuple("aeiou")) else "a"
    return sentence.replace("{a}", article).replace("{}", name)


def clean_name(name: str) -> str:
    """A data set's class name as words: "bow_(weapon)/arc." -> "bow (weapon) or arc"."""
    return name.replace("_", " ").replace("/", " or ").lower().rstrip(".").strip()


def encode_names(clip: DeCLIP, names: Sequence[str], templates: str, cache: str | None = None
                 ) -> Tensor:
    """K names -> their embeddings (K, C), L2-normalised.

    templates: vild, or what util.text.find_templates knows. cache: as DeCLIP.encode_text's.
    """
    sentences = vild_sentences() if templates == "vild" else find_templates(templates)
    words = list(map(clean_name, names))
    return clip.encode_text(words, sentences, cache).float().contiguous()


# ---------------------------------------------------------------------------- opening the file

def backbone_checksum(clip: DeCLIP) -> str:
    """8 digits of a vision tower's weights, and of its context and scale."""
    return state_checksum(clip.visual.trunk.state_dict(), json.dumps([clip.context, clip.scale]))


def open_backbone(settings: dict) -> DeCLIP:
    """The CLIP of a training's settings. Raises UserError as eval_region.open_model does."""
    file = hub.local(settings.get("BACKBONE"))
    if file and not os.path.isfile(file):
        raise UserError(f"There is no backbone {file}; train.py writes declip.safetensors, and a "
                        "detector needs that of its training; --backbone none --attention clip is "
                        "plain CLIP.")
    return open_model(SimpleNamespace(CKPT=file, **{name: settings.get(name) for name in (
        "MODEL", "PRETRAINED", "CONTEXT", "SCALE", "ATTENTION")}))


def recorded_backbone(path: str | Path, settings: dict) -> DeCLIP:
    """The CLIP that a detector's settings name.

    Raises UserError if it is not there, or if the file would decide about a download: only weights
    that open_clip itself lists are fetched.
    """
    file, model, tag = (settings.get(name) for name in ("BACKBONE", "MODEL", "PRETRAINED"))
    if (file, model, tag) == (None, None, None):
        raise UserError(f"{path} does not name the backbone that it was trained on; say where that "
                        "is (--backbone).")
    file = hub.local(file) if hub.is_remote(file) else str(find(file)) if file else None
    if file and not os.path.isfile(file):
        raise UserError(f"{path} was trained on {file}, which is not there; say where that "
                        "backbone is (--backbone).")
    model = recorded_model(path, {"model": model} if model else {})
    is_known = tag is None or os.path.isfile(tag) or model.startswith("local-dir:")
    if not (is_known or (model, tag) in open_clip.list_pretrained()):
        raise UserError(f"{path} was trained on {model} with the weights {tag}, which open_clip "
                        "does not list; give that backbone.")
    return open_backbone(settings | {"BACKBONE": file, "MODEL": settings.get("MODEL") and model})


def kind_of(record: dict, kinds: Sequence[type[Detector]]) -> type[Detector] | None:
    """Which of `kinds` a file's record is of; None: of none."""
    return next((kind for kind in kinds if kind.NAME in record), None)


def open_detector(path: str | Path, backbone: DeCLIP | str | None,
                  kinds: Sequence[type[Detector]]) -> Detector:
    """The detector of a file, of one of `kinds`, in eval mode.

    backbone: a CLIP, or the file of one; None for the one that the detector's file names.
    Raises UserError if the file is another one, if its backbone is not there, and if a backbone is
    not the one that it was trained on.
    """
    state, record = read_weights(path)
    kind = kind_of(record, kinds)
    if kind is None:
        names = " or ".join(f"a {kind.NAME}.safetensors of downstream/{kind.NAME}/train.py"
                            for kind in kinds)
        raise UserError(f"{path} is no detector; give {names}.")
    about, settings = record[kind.NAME], record.get("settings", {})
    design = read_design(path, {"resize": "bicubic"} | about["design"], kind.DESIGN)
    if isinstance(backbone, str):
        backbone = open_backbone(settings | {"BACKBONE": backbone})
    backbone = backbone or recorded_backbone(path, settings)
    if backbone_checksum(backbone) != about["backbone"]:
        raise UserError(f"{path} was trained on another backbone than this "
                        f"{backbone.model_name} with context {backbone.context}: their "
                        f"checksums differ; give the one of its training, "
                        f"{settings.get('BACKBONE') or settings.get('PRETRAINED')}.")
    backbone.visual.known(design.attention)
    shape = len(about["classes"]) + 1, backbone.visual.embed_dim
    if len(about["seen"]) != shape[0] - 1 or getattr(state.get("text"), "shape", None) != shape:
        raise UserError(f"{path} does not have a row of text and a mark of having been seen for "
                        f"each of {shape[0] - 1} classes; write or copy it again.")
    make = partial(kind, backbone, about["classes"], about["seen"], design, state["text"].float())
    with torch.device("meta"):      # nothing is made that the file does not hold
        check_fit(path, state, make().state(), "the detector that it describes")
    detector = make()
    detector.load_state_dict(state, strict=False)
    return detector
