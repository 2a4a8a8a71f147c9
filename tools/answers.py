"""What the page of tools.app asks of models: classes, attention and boxes of one photograph.

    answers = Answers(cfg, device)
    scene = answers.segment(Scene(photo), "cat, wooden chair | stool, grass")
    scene = answers.attend(scene)

Nothing here knows of the page.
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor

from data import Classes, first_twice
from downstream.catseg.model import is_catseg, open_catseg
from eval_seg import Segmenter
from tools import detect, figures, library, segment
from tools.names import classes_of, typed_classes
from tools.visualize import Shown, grid_of, token_of
from util import UserError
from util.images import FORMATS, read_image
from util.precision import autocast

DRAWN = 900         # longest side of each picture in the page, in pixels


@dataclass(frozen=True)
class Scene:
    """What a page has of its photograph, and keeps between requests."""
    photo: Tensor                           # uint8 (3, H, W)
    classes: Classes | None = None
    found: Tensor | None = None             # the class of each pixel, (H, W)
    attention: tuple[Tensor, ...] = ()      # of each patch in CLIP and in the model, (N, h, w)


class Answers:
    """The models, and what a page asks of them."""

    def __init__(self, cfg: SimpleNamespace, device: torch.device):
        # Anyone may type words, so they leave no files.
        cfg = SimpleNamespace(**vars(cfg) | {"CACHE": None})
        self.cfg, self.device = cfg, device
        self.catseg = open_catseg(cfg.CKPT).to(device) if is_catseg(cfg.CKPT) else None
        if self.catseg:
            segment.refuse_unused_by_catseg(cfg, self.catseg.clip)
        self.clip = self.catseg.clip if self.catseg else segment.open_shown(cfg).to(device)
        original = segment.open_original(cfg, self.clip)
        name = "CAT-Seg" if self.catseg else "DeCLIP" if cfg.CKPT else "CLIP, decoupled, untrained"
        attention = self.catseg and self.catseg.design.attention or self.clip.context
        self.rows = [Shown("CLIP", original.visual, "clip", cfg.PRECISION),
                     Shown(name, self.clip.visual, attention, cfg.PRECISION)]
        self.detector = cfg.DETECTOR and library.detector(cfg.DETECTOR).to(device)
        self.named = lru_cache(maxsize=8)(self.name)        # a text tower takes long

    @staticmethod
    def dropped(file: dict | None) -> str:
        """Where what was dropped lies, by what gradio says of it.

        Raises UserError if not in its own folder: a program may ask for any file of the machine.
        """
        path = Path((file or {}).get("path") or "").resolve()
        if not path.is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()):
            raise UserError("There is no photograph of that name here; drop one.")
        return str(path)

    def name(self, words: str) -> tuple[Classes, Segmenter]:
        """The classes that a text names, and what finds them in photographs."""
        classes = typed(words, self.cfg.MAX_NAMES)
        classes = segment.with_background(classes) if self.cfg.BACKGROUND else classes
        if self.catseg:
            return classes, segment.by_catseg(self.cfg, self.catseg, classes)
        return classes, segment.by_clip(self.cfg, self.clip, classes, None)

    def segment(self, scene: Scene, words: str) -> Scene:
        """The scene with the class of each pixel."""
        classes, segmenter = self.named(words)
        figures.use_fonts(classes.names)
        found, = segmenter([scene.photo.to(self.device)])
        return replace(scene, classes=classes, found=found.cpu())

    def attend(self, scene: Scene) -> Scene:
        """The scene with what each of its patches attends to in the last block."""
        photo, maps = scene.photo.to(self.device), []
        grid = grid_of(photo, None, self.clip.visual)
        for row in self.rows:
            patches = slice(row.model.num_prefix_tokens, None)
            maps.append(row.maps(photo, grid)[-1][patches, patches].unflatten(1, grid).cpu())
        return replace(scene, attention=tuple(maps))

    def boxes(self, scene: Scene) -> Image.Image | None:
        """The photograph with the detector's boxes, None without a detector."""
        if not self.detector:
            return None
        model = self.detector.model
        model.set_classes(scene.classes.names)
        rules = self.detector.rules._replace(least=self.cfg.LEAST)
        with autocast(self.cfg.PRECISION, self.device):
            found, = model.detect([scene.photo.to(self.device)], rules)
        titles = [name if seen else f"{name}*" for name, seen in zip(model.classes, model.seen)]
        file = BytesIO()
        detect.draw(scene.photo, found, titles, DRAWN, file)
        return Image.open(file)


# ------------------------------------------------------------------------ words and photographs

def typed(words: str, most: int) -> Classes:
    """Names as tools.segment takes them; of several lines, a class a line, synonyms after commas.

    It names no file, because who sees the page may not read the machine's. Raises UserError for
    no name, one twice, or more than `most`.
    """
    classes = classes_of(words.splitlines() if "\n" in words.strip() else words.split(","))
    if not classes.names:
        raise UserError('No class is named; type words, such as "cat, wooden chair, grass".')
    twice, count = first_twice(classes.prompts), len(classes.prompts)
    if twice:
        raise UserError(f"{twice!r} is named twice; remove one.")
    if count > most:
        raise UserError(f"There are {count:,} names, more than {most:,}; name fewer.")
    return classes


def read_photo(path: str, most: int) -> tuple[Tensor, str]:
    """A dropped file -> its pixels (3, H, W), and a sentence if they were reduced to `most`.

    Raises UserError, without the machine's folders, for a file that can't be read.
    """
    try:
        photo = read_image(path, upright=True, most=most)
    except UserError as error:
        raise UserError(str(error).replace(f"{Path(path).parent}{os.sep}", "")) from None
    with Image.open(path, formats=FORMATS) as file:
        pixels = file.width * file.height
    H, W = photo.shape[-2:]
    return photo, (f"The photograph has {pixels:,} pixels, more than {most:,}; it was reduced to "
                   f"{W} x {H}.") * (pixels > most)


def as_typed(names: str) -> str:
    """The setting CLASSES as one types it; of a class file, what it names."""
    classes = typed_classes(names)
    synonyms = [[] for _ in classes.names]
    for name, k in zip(classes.prompts, classes.class_of_prompt):
        synonyms[k].append(name)
    return ", ".join(map(" | ".join, synonyms))


# ------------------------------------------------------------------------------ the pictures

def draw_attention(scene: Scene, clicked: list[float]) -> list[Image.Image]:
    """The scene, and what the patch at a place of its picture attends to in each model, on one
    scale; the place is marked in all."""
    (H, W), small = scene.photo.shape[-2:], figures.resized(scene.photo, {}, DRAWN)[0]
    place = [min(at / side, 1 - 1e-6) for at, side in zip(clicked, small.shape[:0:-1])]
    anchor = int(place[0] * W), int(place[1] * H)
    values = [maps[token_of(anchor, scene.photo, maps.shape[1:])] for maps in scene.attention]
    brightest = torch.stack(values).quantile(0.995)
    pictures = [figures.heat(small, some, brightest) for some in values]
    return [figures.mark(shown, place) for shown in (shrunk(scene.photo, DRAWN), *pictures)]


def shrunk(photo: Tensor, largest: int) -> Image.Image:
    """A picture of a photograph (3, H, W)."""
    return Image.fromarray(figures.resized(photo, {}, largest)[0].permute(1, 2, 0).numpy())
