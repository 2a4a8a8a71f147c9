"""DeCLIP, detectors and CAT-Seg in one's own program: one call opens a model, one asks it.

    clip = declip("out/declip/declip.safetensors")          # a DeCLIP that also segments
    classes, scores = clip.segment("photo.jpg", ["cat", "wooden chair", "grass"])
    found = detector("out/fvit/fvit.safetensors").detect("photo.jpg", ["person", "red kite"])
    classes, scores = segmenter("out/catseg/catseg.safetensors").segment(image, ["cat", "grass"])

A photograph is a path or a PIL image, which are turned upright as their EXIF entry says, or a uint8
tensor (3, H, W). Names are a list, synonyms of a class with commas between, or one text as
tools.segment takes it. Models are nn.Modules in eval mode; `.to("cuda")` moves them.
torch.hub.load calls the same functions (hubconf.py). Bad input raises a ValueError.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from data import Classes
from downstream.catseg import eval as catseg_eval
from downstream.catseg.model import CATSeg, open_catseg
from downstream.detector import Detector, open_detector
from downstream.evaluation import KINDS, check_rules, detector_settings, rules_of
from eval_region import open_model
from eval_seg import Protocol, decide, predict, score_images
from model import DeCLIP
from tools.names import check_classes, classes_of, names_any, typed_classes
from util import UserError
from util.images import as_image
from util.pamr import refine
from util.text import find_templates

Photo = str | Path | Image.Image | Tensor


class Segmentation(NamedTuple):
    """The class of each pixel, and how well each class fits it."""
    classes: Tensor             # long (H, W), places in the names
    scores: Tensor | None       # float (K, H, W): cosines of a CLIP, probabilities of a CAT-Seg


class Found(NamedTuple):
    """What a detector found, the surest first."""
    boxes: Tensor               # float (n, 4), x0 y0 x1 y1 in pixels of the upright photograph
    scores: Tensor              # (n,) in [0, 1]
    names: list[str]            # of the n objects
    masks: list[Tensor] | None  # bool (H, W) each; None of a detector without masks


# --------------------------------------------------------------------------------------- opening

def declip(ckpt: str | None = None, name: str | None = None,
           pretrained: str | None = "merged2b_s8b_b131k", context: str | None = None,
           scale: float | None = None) -> "SegmentingCLIP":
    """A DeCLIP, by its file or `hf-hub:owner/name@revision`; without one the CLIP `name`, as
    --model.

    The other arguments are those of eval_seg.py. Raises UserError as eval_region.open_model does.
    """
    cfg = SimpleNamespace(CKPT=ckpt and str(ckpt), MODEL=name, PRETRAINED=pretrained,
                          CONTEXT=context, SCALE=scale, ATTENTION=None)
    with torch.random.fork_rng():       # a program's random numbers are its own
        return open_model(cfg, SegmentingCLIP)


def detector(ckpt: str, backbone: DeCLIP | str | None = None) -> "PhotoDetector":
    """A detector by its file; see downstream.detector.open_detector."""
    with torch.random.fork_rng():
        model = open_detector(ckpt, backbone, KINDS)
    return PhotoDetector(model, rules_of(type(model), detector_settings(ckpt).get("DATASET")))


def segmenter(ckpt: str) -> "PhotoSegmenter":
    """A CAT-Seg by its file; see downstream.catseg.model.open_catseg."""
    with torch.random.fork_rng():
        return PhotoSegmenter(open_catseg(ckpt))


def find_names(names: str | Sequence[str]) -> Classes:
    """The classes that a caller names; UserError if there is none, or one twice."""
    if isinstance(names, str):
        return check_classes(typed_classes(names))
    if not isinstance(names, Iterable):
        raise UserError(f"The names are {names!r:.60}; give a list of texts, a class each.")
    names = [*names]
    wrong = [name for name in names if not (isinstance(name, str) and names_any(name))]
    if wrong:
        raise UserError(f"The names have {wrong[0]!r:.60} among them; give texts, a class each.")
    return check_classes(classes_of(names))


# ---------------------------------------------------------------------------------------- asking

class SegmentingCLIP(DeCLIP):
    """A DeCLIP that segments a photograph by the paper's windows (section 9.2)."""

    @torch.no_grad()
    def segment(self, image: Photo, names: str | Sequence[str],
                templates: str | Sequence[str] = "imagenet", with_scores: bool = True,
                **protocol: object) -> Segmentation:
        """A photograph and names of K classes -> the class of each pixel, and each class's cosines.

        templates: as of eval_seg.py, or several with {}. with_scores: False spares the memory of
        K x H x W numbers, twice over. protocol: fields of eval_seg.Protocol, such as
        short_side=896, attention="clip", precision="bf16" or, with a first class that gets what no
        other is sure of, threshold=0.4.
        Raises UserError for what can't be read or named, and for a field out of its range.
        """
        rules, classes = Protocol(**protocol).fit(self), find_names(names)
        text = self.text_of(classes, templates)
        photo = as_image(image).to(text.device)
        if not with_scores:
            # A copy, because users may compute with it outside of inference mode
            return Segmentation(predict(rules, self, classes, text, [photo])[0].clone(), None)
        maps, = score_images(rules, self, [photo], text)
        scores = torch.cat([*maps.of_pixels()], dim=1)
        scores = refine(scores, photo, rules.pamr) if rules.pamr else scores
        found = decide([scores], classes, rules.logit_scale, rules.threshold)
        return Segmentation(found, classes.best(scores))

    def text_of(self, classes: Classes, templates: str | Sequence[str]) -> Tensor:
        """Embeddings of all names (P, C)."""
        templates = find_templates(templates) if isinstance(templates, str) else [*templates]
        text = kept(self, self.text, (classes.prompts, templates),
                    lambda: self.encode_text(classes.prompts, templates))
        return text.to(self.visual.trunk.pos_embed.device)


def kept(owner: nn.Module, tower: nn.Module | None, key: object, encode: Callable[[], Tensor]
         ) -> Tensor:
    """encode(), or what it gave at the call before, for videos: `owner` keeps the last one as long
    as the key and the text tower's weights are the same."""
    # A weight's version grows with each change in place, such as load_state_dict's.
    key = key, sum(weight._version for weight in tower.parameters()) if tower else 0
    if getattr(owner, "_kept", (None,))[0] != key:
        owner._kept = key, encode()
    return owner._kept[1]


class PhotoDetector(nn.Module):
    """A detector that takes photographs. model: the detector itself. rules: how it scores."""

    def __init__(self, model: Detector, rules: NamedTuple):
        super().__init__()
        self.model, self.rules = model, rules

    @torch.no_grad()
    def detect(self, image: Photo, names: str | Sequence[str] | None = None, least: float = 0.3,
               **rules: object) -> Found:
        """A photograph -> the objects on it that have one of the names.

        names: one a class; None for those of the call before, at first the detector's own. least:
        the score from which an object is given. rules: fields of the detector's ScoreRules, such as
        nms=0.5.
        Raises UserError for what can't be read or named, and for rules that are out of range.
        """
        rules = check_rules(self.rules, {"least": least} | rules)
        classes = None if names is None else find_names(names)
        if classes and len(classes.prompts) > len(classes):
            raise UserError("A detector takes one name a class; leave the synonyms out.")
        photo = as_image(image).to(self.model.text.device)
        if classes and classes.names != self.model.classes:
            self.model.set_classes(classes.names)
        found, = self.model.detect([photo], rules)
        names = [self.model.classes[label] for label in found.labels.tolist()]
        masks = found.masks and [mask.clone() for mask in found.masks]
        return Found(found.boxes.clone(), found.scores.clone(), names, masks)


class PhotoSegmenter(nn.Module):
    """A CAT-Seg that takes photographs. model: the CAT-Seg itself."""

    def __init__(self, model: CATSeg):
        super().__init__()
        self.model = model

    @torch.no_grad()
    def segment(self, image: Photo, names: str | Sequence[str], with_scores: bool = True,
                **protocol: object) -> Segmentation:
        """A photograph and names of K classes -> the class of each pixel, each one's probability by
        itself.

        with_scores: False spares the memory of K x H x W numbers. protocol: what
        downstream.catseg.eval.Protocol.of takes, such as size=384 for one window.
        Raises UserError for what can't be read or named.
        """
        rules, classes = catseg_eval.Protocol.of(self.model, **protocol), find_names(names)
        tower = self.model.clip.text
        text = kept(self, tower, classes.prompts, lambda: catseg_eval.encode(self.model, classes))
        text = text.to(tower.logit_scale.device)
        photo = as_image(image).to(text.device)
        if not with_scores:
            found, = catseg_eval.predict(rules, self.model, classes, text, [photo])
            return Segmentation(found.clone(), None)
        logits, = catseg_eval.look(rules, self.model, text, [photo])
        scores = classes.best(catseg_eval.probabilities(rules, logits, photo.shape[-2:]))
        return Segmentation(scores.argmax(dim=0), scores)
