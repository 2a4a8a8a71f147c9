"""The toy world's scenes: images to train with, and labelled ones to evaluate with.

    python -m toy.world                 # draws data/toy

A scene has stuff (1 to 3 textured zones) and things (1 to 5 shapes on them, of a colour typical for
their class). It is drawn from its number alone; training, pretraining, choosing settings (dev) and
reporting (val) have numbers of their own.

    data/toy/train/*.png                                images without labels, for train.py
    data/toy/train/instances.json                       what things are on them, for detectors
    data/toy/{dev,val}/images/*.png                     labelled scenes,
    data/toy/{dev,val}/panoptic.json, panoptic/*.png    as COCO panoptic for eval_region.py,
    data/toy/{dev,val}/labels/*.png, names.txt          as label images for eval_seg.py
    data/toy/{dev,val}/instances.json                   and as COCO instances
    data/toy/labelled/                                  the same, to train segmenters with
"""

import colorsys
import json
import shutil
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_masks
from tqdm import tqdm

from util import distributed, settings

OUT = "data/toy"                    # folder of the scenes
TRAIN = 1024                        # scenes to train with
DEV = 200                           # labelled scenes to choose settings with; 0 keeps those in OUT
VAL = 200                           # labelled scenes to report
LABELLED = 0                        # labelled scenes to train detectors and segmenters with
SIZE = 160                          # side of a scene in pixels


def main(argv: list[str] | None = None) -> None:
    """Draws scenes as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__):
        run(cfg)


def run(cfg: SimpleNamespace) -> None:
    """Draws the training images and both labelled sets below OUT, in several processes."""
    settings.check_min(cfg, TRAIN=0, DEV=0, VAL=0, LABELLED=0, SIZE=32)
    counts = {kind: getattr(cfg, kind.upper()) for kind in ("train", "dev", "val", "labelled")}
    settings.check(cfg, **{kind.upper(): (count <= MAX_SCENES, f"at most {MAX_SCENES:,}")
                           for kind, count in counts.items()})
    with ProcessPoolExecutor() as pool:
        for kind, count in counts.items():
            if count:
                draw_set(pool, Path(cfg.OUT) / kind, kind, count, cfg.SIZE)
    print(f"{cfg.TRAIN} scenes to train with, {cfg.DEV} to choose settings with and {cfg.VAL} to "
          f"report are in {cfg.OUT}")


# ------------------------------------------------------------------------------------- drawing

THINGS = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "arrow",
          "bowtie")
STUFF = ("stripes", "checker", "dots", "noise", "plain", "bricks", "waves", "grid")
NAMES = THINGS + STUFF
FIRST_SCENE = {"train": 0, "dev": 10_000_000, "val": 20_000_000, "clip": 30_000_000,
               "siglip": 30_000_000, "vfm": 40_000_000, "labelled": 50_000_000}
MAX_SCENES = 10_000_000
# standard deviation of a thing's hue around its class's; classes are 36° apart
HUE_SPREAD = 25 / 360
LARGEST_TURN = 0.4          # of things, in radians to either side


class Scene(NamedTuple):
    """An image and what is where."""
    image: np.ndarray       # uint8 (size, size, 3)
    regions: np.ndarray     # uint8 (size, size): the region that a pixel belongs to
    classes: list[int]      # index into NAMES of each region, the zones of stuff first


def ray(angle: np.ndarray, radius: float | np.ndarray = 1.0) -> np.ndarray:
    """Points (n, 2) at angles clockwise from the top."""
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.reshape(radius, (-1, 1))


def regular(corners: int, radius: float | np.ndarray = 1.0, turn: float = 0.0) -> np.ndarray:
    """The corners (n, 2) of a regular polygon around 0, or of a star if radii alternate."""
    return ray(turn + np.linspace(0, 2 * np.pi, corners, endpoint=False), radius)


def outlines() -> dict[str, np.ndarray]:
    """The outline of each thing, points (n, 2) within a radius of about 1; a ring is a disc with a
    hole of 0.55."""
    t, c = np.linspace(0, 2 * np.pi, 60, endpoint=False), 0.34
    heart = [16 * np.sin(t)**3, 5 * np.cos(2 * t) + 2 * np.cos(3 * t)
             + np.cos(4 * t) - 13 * np.cos(t) - 2]
    crescent = [ray(np.linspace(0.5, 2 * np.pi - 0.5, 40)),
                ray(np.linspace(2 * np.pi - 0.78, 0.78, 40), 0.68) - [0, 0.39]]
    quarter = np.array([[-c, -1], [c, -1], [c, -c]])
    turned = [quarter @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
              for a in np.pi / 2 * np.arange(4)]
    return {"circle": regular(48, 0.92), "square": regular(4, 1.12, np.pi / 4),
            "triangle": regular(3, 1.12) + [0, 0.15],
            "star": regular(10, np.tile([1.1, 0.45], 5)), "ring": regular(48),
            "cross": np.concatenate(turned),
            "heart": np.stack(heart, axis=1) / 15.5, "crescent": np.concatenate(crescent),
            "arrow": np.array([[0, -1.1], [.85, -.1], [.32, -.1], [.32, 1], [-.32, 1], [-.32, -.1],
                               [-.85, -.1]]),
            "bowtie": np.array([[-1.05, -.75], [0, -.2], [1.05, -.75], [1.05, .75], [0, .2],
                                [-1.05, .75]])}


OUTLINES = outlines()


def step(value: np.ndarray, width: float) -> np.ndarray:
    """0 below zero, 1 above, with a ramp of `width` between them, against jagged edges."""
    return np.clip(0.5 + value / width, 0, 1)


def texture(kind: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A stuff texture (size, size, 3) in [0, 1], turned, of a random period, in two colours."""
    angle, period, pixel = rng.uniform(0, np.pi), rng.uniform(9, 17) * size / 128, size / 128
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def wave(length: np.ndarray, period: float) -> np.ndarray:
        return np.sin(2 * np.pi * length / period)

    edge = 2 * np.pi / period * pixel
    if kind == "stripes":
        mix = step(wave(u, period), edge)
    elif kind == "checker":
        mix = step(wave(u, 2 * period) * wave(v, 2 * period), edge)
    elif kind == "dots":
        mix = step(0.3 * period - np.hypot(u % period - period / 2, v % period - period / 2), pixel)
    elif kind == "noise":
        cells = max(2, round(size / period / 0.28))
        grey = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
        mix = np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR))
    elif kind == "plain":
        mix = (u - u.min()) / np.ptp(u) / 4
    elif kind == "bricks":
        height, width, joint = 0.75 * period, 1.5 * period, 0.09 * period
        along, across = (u + v // height % 2 * width / 2) % width, v % height
        mix = step(np.minimum(along, across) - joint, pixel)
    elif kind == "waves":
        mix = step(wave(u + 0.42 * period * wave(v, 2.2 * period), period), edge)
    else:       # grid
        mix = step(0.18 * period - np.minimum(u % period, v % period), pixel)
    hue = rng.uniform()
    first = second = pale(rng, hue)
    while abs(first.mean() - second.mean()) < 0.22:
        second = pale(rng, hue + rng.uniform(-0.2, 0.2))
    return first + (second - first) * mix[..., None]


def pale(rng: np.random.Generator, hue: float) -> np.ndarray:
    """A colour (3,) of stuff: little saturated."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.08, 0.4), rng.uniform(0.4, 0.98)))


def zones(rng: np.random.Generator, size: int) -> np.ndarray:
    """1 to 3 zones with wavy borders: (size, size), the number of each pixel's zone."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    across, along = x * np.sin(angle) + y * np.cos(angle), x * np.cos(angle) - y * np.sin(angle)
    across += (rng.uniform(0.01, 0.04)
               * np.sin(2 * np.pi * (along * rng.uniform(1, 2.5) + rng.uniform())))
    borders = [[], [rng.uniform(-0.18, 0.18)],
               [rng.uniform(-0.25, -0.12), rng.uniform(0.12, 0.25)]][rng.integers(3)]
    return (sum((across > border).astype(np.uint8) for border in borders)
            + np.zeros((size, size), np.uint8))


class Shape(NamedTuple):
    """A thing's place in a scene, in pixels."""
    kind: int               # index into THINGS
    radius: float
    centre: np.ndarray      # (2,) x, y
    frame: np.ndarray       # (2, 2) turns and stretches

    def cover(self, size: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
        """How much of each pixel the shape covers, (size, size, 1) in [0, 1]; shrunk by `scale`,
        moved by `shift`."""
        finer, name = 3, THINGS[self.kind]
        canvas = Image.new("L", (size * finer, size * finer))

        def place(points: np.ndarray) -> list[tuple[float, float]]:
            points = (points * self.radius @ self.frame + self.centre + shift) * finer
            return [tuple(point) for point in points]

        ImageDraw.Draw(canvas).polygon(place(OUTLINES[name] * scale), fill=255)
        if name == "ring":      # its hole grows as the rest shrinks
            ImageDraw.Draw(canvas).polygon(place(OUTLINES[name] * 0.55 / scale), fill=0)
        return np.asarray(canvas.reduce(finer), np.float32)[..., None] / 255


def random_shape(rng: np.random.Generator, size: int) -> Shape:
    """Any thing anywhere."""
    turn, stretch = rng.uniform(-LARGEST_TURN, LARGEST_TURN), np.exp(rng.normal(0, 0.12))
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return Shape(int(rng.integers(len(THINGS))), rng.uniform(0.12, 0.26) * size,
                 rng.uniform(0.12, 0.88, 2) * size, np.diag([stretch, 1 / stretch]) @ turned)


def draw_scene(number: int, size: int = SIZE) -> Scene:
    """The scene of a number, the same at every call; of another size it is another scene."""
    rng = np.random.default_rng(number)
    regions = zones(rng, size)
    classes = [len(THINGS) + int(kind) for kind in rng.permutation(len(STUFF))[:regions.max() + 1]]
    painted = np.stack([texture(NAMES[kind], rng, size) for kind in classes])
    image = np.take_along_axis(painted, regions[None, ..., None].astype(int), axis=0)[0]
    whole = np.bincount(regions.ravel()).tolist()       # a region's pixels before others cover it
    for _ in range(rng.integers(1, 6)):
        shape = random_shape(rng, size)
        hue = (shape.kind / len(THINGS) + rng.normal(0, HUE_SPREAD)) % 1
        colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 0.95), rng.uniform(0.6, 1)))
        cover = shape.cover(size)
        after = np.where(cover[..., 0] > 0.5, np.uint8(len(classes)), regions)
        seen = np.bincount(after.ravel(), minlength=len(classes) + 1)
        # Every region stays recognisable: a zone keeps a third of itself, a thing two thirds.
        kept = [pixels >= (1 / 3 if kind >= len(THINGS) else 2 / 3) * before
                for pixels, before, kind in zip(seen, whole, classes)]
        if not all(kept) or seen[-1] < 0.01 * size**2:
            continue
        # The shape's shadow, then the shape with a darker rim.
        image = image * (1 - 0.28 * shape.cover(size, shift=0.02 * size))
        image = image * (1 - cover) + colour * (0.72 + 0.28 * shape.cover(size, 0.86)) * cover
        regions, whole = after, [*whole, seen[-1]]
        classes.append(shape.kind)
    return Scene((image.clip(0, 1) * 255).round().astype(np.uint8), regions, classes)


# ------------------------------------------------------------------------- data sets of scenes

def draw_set(pool: Executor, folder: Path, kind: str, count: int, size: int) -> None:
    """Draws a set of scenes into a folder, which is emptied first."""
    if folder.exists():     # scenes of another size or number
        shutil.rmtree(folder)
    for name in ("images", "panoptic", "labels") if kind != "train" else ("",):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write = partial(write_scene, folder, FIRST_SCENE[kind], size, kind != "train")
    drawn = pool.map(write, range(count), chunksize=16)
    panoptic, instances = zip(*tqdm(drawn, desc=f"draw {kind}", total=count, unit="scene"))
    images = [{"id": index, "file_name": f"{index:05}.png", "height": size, "width": size}
              for index in range(count)]
    categories = [{"id": number + 1, "name": name, "isthing": int(name in THINGS)}
                  for number, name in enumerate(NAMES)]
    # COCO's evaluation takes an id of 0 for none.
    things = [thing | {"id": number + 1} for number, thing in enumerate(sum(instances, []))]
    (folder / "instances.json").write_text(json.dumps(
        {"images": images, "annotations": things, "categories": categories[:len(THINGS)]}))
    if kind != "train":
        (folder / "panoptic.json").write_text(json.dumps(
            {"images": images, "annotations": panoptic, "categories": categories}))
        (folder / "names.txt").write_text("".join(f"{index:05}\n" for index in range(count)))


def write_scene(folder: Path, first: int, size: int, labelled: bool, index: int
                ) -> tuple[dict, list[dict]]:
    """Draws scene `first + index`, `labelled` with its label image and panoptic PNG; returns its
    annotation for panoptic.json and those for instances.json."""
    scene, name = draw_scene(first + index, size), f"{index:05}.png"
    Image.fromarray(scene.image).save(folder / ("images" if labelled else "") / name)
    if labelled:
        label = np.array(scene.classes, np.uint8)[scene.regions]
        Image.fromarray(label).save(folder / "labels" / name)
        ids = scene.regions + 1        # 0 is COCO's id of pixels without one
        Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], axis=-1)).save(folder / "panoptic" / name)
    segments = [describe(scene, region) for region in range(len(scene.classes))]
    things = [segment | {"image_id": index, "segmentation": outline(scene, region)}
              for region, segment in enumerate(segments) if scene.classes[region] < len(THINGS)]
    return {"image_id": index, "file_name": name, "segments_info": segments}, things


def outline(scene: Scene, region: int) -> dict:
    """A region's mask as COCO's run-length code."""
    code = coco_masks.encode(np.asfortranarray(scene.regions == region).astype(np.uint8))
    return code | {"counts": code["counts"].decode()}


def describe(scene: Scene, region: int) -> dict:
    """A region as COCO panoptic has it."""
    ys, xs = np.nonzero(scene.regions == region)
    bbox = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
    return {"id": region + 1, "category_id": scene.classes[region] + 1, "bbox": bbox,
            "area": len(ys), "iscrowd": 0}


if __name__ == "__main__":
    main()
