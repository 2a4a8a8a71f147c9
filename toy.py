"""The toy world: drawn scenes, a nano CLIP and a nano VFM, with which the whole method runs offline in minutes.

    python toy.py                       # draws data/toy: images to train with, two labelled sets to evaluate with
    python toy.py --pretrain clip       # trains the nano CLIP anew, into toy/clip
    python toy.py --pretrain vfm        # trains the nano VFM anew, into toy/vfm

A scene has stuff (1 to 3 textured zones) and things (1 to 5 shapes on them, of a colour typical for their class). It is
drawn from its number alone; training, pretraining, choosing settings (dev) and reporting (val) have numbers of their own.

    data/toy/train/*.png                                        images without labels, for train.py
    data/toy/{dev,val}/images/*.png                             labelled scenes,
    data/toy/{dev,val}/panoptic.json, panoptic/*.png            as COCO panoptic for eval_region.py,
    data/toy/{dev,val}/labels/*.png, names.txt                  and as label images for eval_seg.py

`import toy` makes the nano models' towers known to timm. Then open_clip loads the CLIP by the name local-dir:toy/clip
(from this folder), and timm the VFM by the name nano_vfm.
"""

import colorsys
import copy
import gzip
import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import roi_align
from tqdm import tqdm

import settings
from data import normalize
from settings import UserError

OUT = "data/toy"                    # folder of the scenes
TRAIN = 1024                        # scenes to train with
DEV = 200                           # labelled scenes to choose settings with; 0 leaves what is there
VAL = 200                           # labelled scenes to report
SIZE = 160                          # side of a scene in pixels

PRETRAIN: str | None = None         # clip or vfm: train that model instead of drawing scenes
MODELS = "toy"                      # folder that PRETRAIN writes clip/ or vfm/ into
SCENES = 8000                       # that PRETRAIN draws, at 128 px
STEPS: int | None = None            # of PRETRAIN; None: 2500 for clip, 1500 for vfm
BATCH_SIZE: int | None = None       # of PRETRAIN; None: 128 crops for clip, 16 scenes for vfm
SEED = 0                            # of PRETRAIN's first weights and of what it draws


def main(argv: list[str] | None = None) -> None:
    """Draws scenes or trains a model, as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    try:
        run(cfg)
    except (UserError, OSError) as error:
        raise SystemExit(f"toy.py: {error}") from None


def run(cfg: SimpleNamespace) -> None:
    """Everything that the settings ask for."""
    settings.check_least(cfg, TRAIN=0, DEV=0, VAL=0, SIZE=32, SCENES=1, STEPS=1, BATCH_SIZE=1, SEED=0)
    if cfg.PRETRAIN not in (None, *PRETRAINERS):
        raise UserError(f"PRETRAIN is {cfg.PRETRAIN!r}; it must be one of {', '.join(PRETRAINERS)}.")
    if max(cfg.TRAIN, cfg.DEV, cfg.VAL, cfg.SCENES) > MOST_SCENES:
        raise UserError(f"More than {MOST_SCENES:,} scenes of a kind were asked for, and there are no more; ask for fewer.")
    if cfg.PRETRAIN:
        pretrain(cfg)
    else:
        draw_data(cfg)


# ----------------------------------------------------------------------------------------------------------- drawing

THINGS = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "arrow", "bowtie")
STUFF = ("stripes", "checker", "dots", "noise", "plain", "bricks", "waves", "grid")
NAMES = THINGS + STUFF
FIRST_SCENE = {"train": 0, "dev": 10_000_000, "val": 20_000_000, "clip": 30_000_000, "vfm": 40_000_000}
MOST_SCENES = 10_000_000
HUE_SPREAD = 25 / 360       # standard deviation of a thing's hue around its class's; classes are 36° apart
LARGEST_TURN = 0.4          # of things, in radians to either side


class Scene(NamedTuple):
    """A drawn picture and what is where."""
    image: np.ndarray       # uint8 (size, size, 3)
    segments: np.ndarray    # uint8 (size, size): the segment that a pixel belongs to
    classes: list[int]      # index into NAMES of each segment, the zones of stuff first


def ray(angle: np.ndarray, radius: float | np.ndarray = 1.0) -> np.ndarray:
    """Points (n, 2) at angles clockwise from the top."""
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.reshape(radius, (-1, 1))


def regular(corners: int, radius: float | np.ndarray = 1.0, turn: float = 0.0) -> np.ndarray:
    """The corners (n, 2) of a regular polygon around 0, or of a star if radii alternate."""
    return ray(turn + np.linspace(0, 2 * np.pi, corners, endpoint=False), radius)


def outlines() -> dict[str, np.ndarray]:
    """The outline of each thing, points (n, 2) within a radius of about 1; a ring is a disc with a hole of 0.55."""
    t, c = np.linspace(0, 2 * np.pi, 60, endpoint=False), 0.34
    heart = [16 * np.sin(t)**3, 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 13 * np.cos(t) - 2]
    crescent = [ray(np.linspace(0.5, 2 * np.pi - 0.5, 40)), ray(np.linspace(2 * np.pi - 0.78, 0.78, 40), 0.68) - [0, 0.39]]
    quarter = np.array([[-c, -1], [c, -1], [c, -c]])
    turned = [quarter @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) for a in np.pi / 2 * np.arange(4)]
    return {"circle": regular(48, 0.92), "square": regular(4, 1.12, np.pi / 4), "triangle": regular(3, 1.12) + [0, 0.15],
            "star": regular(10, np.tile([1.1, 0.45], 5)), "ring": regular(48), "cross": np.concatenate(turned),
            "heart": np.stack(heart, axis=1) / 15.5, "crescent": np.concatenate(crescent),
            "arrow": np.array([[0, -1.1], [.85, -.1], [.32, -.1], [.32, 1], [-.32, 1], [-.32, -.1], [-.85, -.1]]),
            "bowtie": np.array([[-1.05, -.75], [0, -.2], [1.05, -.75], [1.05, .75], [0, .2], [-1.05, .75]])}


OUTLINES = outlines()


def step(value: np.ndarray, width: float) -> np.ndarray:
    """0 below zero, 1 above, with a ramp of `width` between them, against jagged edges."""
    return np.clip(0.5 + value / width, 0, 1)


def texture(kind: str, draw: np.random.Generator, size: int) -> np.ndarray:
    """A stuff texture (size, size, 3) in [0, 1], turned, of a random period, in two colours."""
    angle, period, pixel = draw.uniform(0, np.pi), draw.uniform(9, 17) * size / 128, size / 128
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave = lambda length, period: np.sin(2 * np.pi * length / period)       # noqa: E731
    edge = 2 * np.pi / period * pixel
    if kind == "stripes":
        mix = step(wave(u, period), edge)
    elif kind == "checker":
        mix = step(wave(u, 2 * period) * wave(v, 2 * period), edge)
    elif kind == "dots":
        mix = step(0.3 * period - np.hypot(u % period - period / 2, v % period - period / 2), pixel)
    elif kind == "noise":
        cells = max(2, round(size / period / 0.28))
        grey = Image.fromarray(draw.uniform(0, 1, (cells, cells)).astype(np.float32))
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
    hue = draw.uniform()
    first = second = pale(draw, hue)
    while abs(first.mean() - second.mean()) < 0.22:
        second = pale(draw, hue + draw.uniform(-0.2, 0.2))
    return first + (second - first) * mix[..., None]


def pale(draw: np.random.Generator, hue: float) -> np.ndarray:
    """A colour (3,) of stuff: little saturated."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, draw.uniform(0.08, 0.4), draw.uniform(0.4, 0.98)))


def zones(draw: np.random.Generator, size: int) -> np.ndarray:
    """1 to 3 zones with wavy borders: (size, size), the number of each pixel's zone."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = draw.uniform(0, 2 * np.pi)
    across, along = x * np.sin(angle) + y * np.cos(angle), x * np.cos(angle) - y * np.sin(angle)
    across += draw.uniform(0.01, 0.04) * np.sin(2 * np.pi * (along * draw.uniform(1, 2.5) + draw.uniform()))
    borders = [[], [draw.uniform(-0.18, 0.18)], [draw.uniform(-0.25, -0.12), draw.uniform(0.12, 0.25)]][draw.integers(3)]
    return sum((across > border).astype(np.uint8) for border in borders) + np.zeros((size, size), np.uint8)


class Shape(NamedTuple):
    """A thing's place in a scene, in pixels."""
    kind: int               # index into THINGS
    radius: float
    centre: np.ndarray      # (2,) x, y
    frame: np.ndarray       # (2, 2) turns and stretches

    def cover(self, size: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
        """How much of each pixel the shape covers, (size, size, 1) in [0, 1]; shrunk by `scale`, moved by `shift`."""
        finer, name = 3, THINGS[self.kind]
        canvas = Image.new("L", (size * finer, size * finer))
        place = lambda points: (points * self.radius @ self.frame + self.centre + shift) * finer    # noqa: E731
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in place(OUTLINES[name] * scale)], fill=255)
        if name == "ring":      # its hole grows as the rest shrinks
            ImageDraw.Draw(canvas).polygon([tuple(point) for point in place(OUTLINES[name] * 0.55 / scale)], fill=0)
        return np.asarray(canvas.reduce(finer), np.float32)[..., None] / 255


def random_shape(draw: np.random.Generator, size: int) -> Shape:
    """Any thing anywhere."""
    turn, stretch = draw.uniform(-LARGEST_TURN, LARGEST_TURN), np.exp(draw.normal(0, 0.12))
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return Shape(int(draw.integers(len(THINGS))), draw.uniform(0.12, 0.26) * size, draw.uniform(0.12, 0.88, 2) * size,
                 np.diag([stretch, 1 / stretch]) @ turned)


def draw_scene(number: int, size: int = SIZE) -> Scene:
    """The scene of a number, the same at every call; of another size it is another scene."""
    draw = np.random.default_rng(number)
    segments = zones(draw, size)
    classes = [len(THINGS) + int(kind) for kind in draw.permutation(len(STUFF))[:segments.max() + 1]]
    painted = np.stack([texture(NAMES[kind], draw, size) for kind in classes])
    image = np.take_along_axis(painted, segments[None, ..., None].astype(int), axis=0)[0]
    whole = np.bincount(segments.ravel()).tolist()      # pixels of each segment before others covered it
    for _ in range(draw.integers(1, 6)):
        shape = random_shape(draw, size)
        hue = (shape.kind / len(THINGS) + draw.normal(0, HUE_SPREAD)) % 1
        colour = np.array(colorsys.hsv_to_rgb(hue, draw.uniform(0.6, 0.95), draw.uniform(0.6, 1)))
        cover = shape.cover(size)
        after = np.where(cover[..., 0] > 0.5, np.uint8(len(classes)), segments)
        seen = np.bincount(after.ravel(), minlength=len(classes) + 1)
        # Every segment stays recognisable: a zone keeps a third of itself, a thing two thirds.
        kept = [pixels >= (1 / 3 if kind >= len(THINGS) else 2 / 3) * before
                for pixels, before, kind in zip(seen, whole, classes)]
        if not all(kept) or seen[-1] < 0.01 * size**2:
            continue
        image = image * (1 - 0.28 * shape.cover(size, shift=0.02 * size))                   # its shadow
        image = image * (1 - cover) + colour * (0.72 + 0.28 * shape.cover(size, 0.86)) * cover      # with a darker rim
        segments, whole = after, [*whole, seen[-1]]
        classes.append(shape.kind)
    return Scene((image.clip(0, 1) * 255).round().astype(np.uint8), segments, classes)


# ------------------------------------------------------------------------------------------------- data sets of scenes

def draw_data(cfg: SimpleNamespace) -> None:
    """Draws the training images and both labelled sets below OUT, in several processes."""
    with ProcessPoolExecutor() as pool:
        for kind, count in (("train", cfg.TRAIN), ("dev", cfg.DEV), ("val", cfg.VAL)):
            folder = Path(cfg.OUT) / kind
            if not count:
                continue
            if folder.exists():     # scenes of another size or number
                shutil.rmtree(folder)
            for name in ("images", "panoptic", "labels") if kind != "train" else ("",):
                (folder / name).mkdir(parents=True, exist_ok=True)
            draw = partial(write_image if kind == "train" else write_labelled, folder, FIRST_SCENE[kind], cfg.SIZE)
            annotations = list(tqdm(pool.map(draw, range(count), chunksize=16), desc=f"draw {kind}", total=count, unit="scene"))
            if kind != "train":
                categories = [{"id": kind + 1, "name": name, "isthing": int(name in THINGS)} for kind, name in enumerate(NAMES)]
                images = [{"id": index, "file_name": f"{index:05}.png"} for index in range(count)]
                content = {"images": images, "annotations": annotations, "categories": categories}
                (folder / "panoptic.json").write_text(json.dumps(content))
                (folder / "names.txt").write_text("".join(f"{index:05}\n" for index in range(count)))
    print(f"{cfg.TRAIN} scenes to train with, {cfg.DEV} to choose settings with and {cfg.VAL} to report are in {cfg.OUT}")


def write_image(folder: Path, first: int, size: int, index: int) -> None:
    """Draws scene `first + index` as folder/INDEX.png."""
    Image.fromarray(draw_scene(first + index, size).image).save(folder / f"{index:05}.png")


def write_labelled(folder: Path, first: int, size: int, index: int) -> dict:
    """Draws a scene with its label image and its panoptic PNG; returns its annotation for the json."""
    scene, name = draw_scene(first + index, size), f"{index:05}.png"
    Image.fromarray(scene.image).save(folder / "images" / name)
    Image.fromarray(np.array(scene.classes, np.uint8)[scene.segments]).save(folder / "labels" / name)
    ids = scene.segments + 1        # 0 is COCO's id of pixels without a segment
    Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], axis=-1)).save(folder / "panoptic" / name)
    return {"image_id": index, "file_name": name,
            "segments_info": [describe(scene, segment) for segment in range(len(scene.classes))]}


def describe(scene: Scene, segment: int) -> dict:
    """A segment as COCO panoptic has it."""
    ys, xs = np.nonzero(scene.segments == segment)
    bbox = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
    return {"id": segment + 1, "category_id": scene.classes[segment] + 1, "bbox": bbox, "area": len(ys), "iscrowd": 0}


# --------------------------------------------------------------------------------------------------- the nano models

FOLDER = Path(__file__).parent / "toy"      # the models that this repository ships
STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

# timm looks up the weights of register_model's functions here.
default_cfgs = {
    "nano_eva02_clip": {"input_size": (3, 64, 64), "classifier": "head", **STATISTICS},
    "nano_vfm": {"input_size": (3, 128, 128), "classifier": "head", "num_classes": 0,
                 "file": str(FOLDER / "vfm" / "model.safetensors"), **STATISTICS},
}


@register_model
def nano_eva02_clip(pretrained: bool = False, **options) -> Eva:
    """EVA02-CLIP's vision tower at width 128: unfused qkv, SwiGLU, inner norms, rotary embedding, [CLS] pooling."""
    shape = dict(img_size=64, patch_size=8, embed_dim=128, depth=5, num_heads=4, mlp_ratio=2, ref_feat_shape=(8, 8))
    block = dict(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True)
    return build_model_with_cfg(Eva, "nano_eva02_clip", pretrained, **shape | block | {"global_pool": "token"} | options)


@register_model
def nano_vfm(pretrained: bool = False, **options) -> VisionTransformer:
    """A plain ViT of width 96: the toy world's DINO or SAM."""
    shape = dict(img_size=128, patch_size=8, embed_dim=96, depth=4, num_heads=3, class_token=False, global_pool="avg")
    return build_model_with_cfg(VisionTransformer, "nano_vfm", pretrained, **shape | options)


CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 128, "custom_text": True,
        "vision_cfg": {"image_size": 64, "timm_model_name": "nano_eva02_clip", "timm_model_pretrained": False,
                       "timm_pool": "token", "timm_proj": None},
        "text_cfg": {"context_length": 32, "vocab_size": 0, "width": 64, "heads": 2, "layers": 2,
                     "tokenizer_kwargs": {"bpe_path": ""}}},
    "preprocess_cfg": STATISTICS | {"interpolation": "bicubic", "resize_mode": "squash"},
}


def write_clip_config(folder: Path) -> None:
    """open_clip_config.json and the merges of a tokenizer that knows ImageNet's templates and the world's names."""
    templates = [template("") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    merges = byte_pairs(re.findall("[a-z]+", " ".join([*templates, *NAMES, "and on"]).lower()))
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(folder / "merges.txt.gz", "wb", mtime=0) as file:
        file.write("\n".join(["#version: 0.2", *map(" ".join, merges)]).encode())
    config = copy.deepcopy(CLIP_CONFIG)
    config["model_cfg"]["text_cfg"] |= {"vocab_size": 2 * 256 + len(merges) + 2,     # bytes, inside and at the end of words
                                        "tokenizer_kwargs": {"bpe_path": str(folder / "merges.txt.gz")}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def byte_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding: the most frequent pair of neighbours is merged, until every word is one token -> the merges."""
    spelled, merges = {word: [*word[:-1], word[-1] + "</w>"] for word in words}, []
    while pairs := Counter(pair for parts in spelled.values() for pair in zip(parts, parts[1:])):
        merges.append(max(sorted(pairs), key=pairs.get))
        for parts in spelled.values():
            for place in range(len(parts) - 1, 0, -1):
                if tuple(parts[place - 1:place + 1]) == merges[-1]:
                    parts[place - 1:place + 1] = ["".join(merges[-1])]
    return merges


# ------------------------------------------------------------------------------------------------------- pretraining

class World(NamedTuple):
    """Many scenes as tensors; S is the most segments that a scene has."""
    images: Tensor      # uint8 (n, 3, size, size)
    segments: Tensor    # uint8 (n, size, size)
    classes: Tensor     # (n, S), -1 where a scene has no such segment
    boxes: Tensor       # (n, S, 4) x0 y0 x1 y1 in pixels


def draw_world(first: int, count: int, size: int = 128) -> World:
    """Scenes `first`, `first` + 1, ... drawn in several processes."""
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(draw_scene, size=size), range(first, first + count), chunksize=64)
        scenes = list(tqdm(drawn, desc="draw", total=count, unit="scene"))
    most = max(len(scene.classes) for scene in scenes)
    classes, boxes = torch.full((count, most), -1), torch.zeros(count, most, 4)
    for index, scene in enumerate(scenes):
        for segment, kind in enumerate(scene.classes):
            x, y, width, height = describe(scene, segment)["bbox"]
            classes[index, segment], boxes[index, segment] = kind, torch.tensor([x, y, x + width, y + height])
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    return World(images, torch.from_numpy(np.stack([scene.segments for scene in scenes])), classes, boxes)


def draw_boxes(world: World, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops to learn from -> scenes (count,) and boxes (count, 4): half around things, a fifth zones, the rest anywhere."""
    size = world.images.shape[-1]
    scenes = torch.randint(len(world.images), (count,), generator=draw)
    way = torch.rand(count, generator=draw)
    is_thing = (world.classes[scenes] >= 0) & (world.classes[scenes] < len(THINGS))
    is_wanted = torch.where(way[:, None] < 0.5, is_thing, world.classes[scenes] >= len(THINGS))
    is_wanted[:, 0] |= ~is_wanted.any(dim=1)        # a scene without things shows its first zone
    chosen = torch.multinomial(is_wanted.float(), 1, generator=draw)[:, 0]
    x0, y0, x1, y1 = world.boxes[scenes, chosen].unbind(dim=1)
    random = lambda low, high, *shape: torch.rand(*shape, generator=draw) * (high - low) + low     # noqa: E731
    sides = torch.stack([x1 - x0, y1 - y0], dim=1)
    centres = torch.stack([x0 + x1, y0 + y1], dim=1) / 2 + sides * random(-0.1, 0.1, count, 2)
    sides = sides * random(0.9, 1.5, count, 1)
    anywhere = way > 0.7
    sides = torch.where(anywhere[:, None], random(size / 6, size, count, 2), sides).clamp(8, size)
    centres = torch.where(anywhere[:, None], random(0, size, count, 2), centres)
    centres = centres.clamp(sides / 2, size - sides / 2)
    return scenes, torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


def cut(world: World, scenes: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops as float [0, 1] (n, 3, size, size)."""
    images, places = scenes.unique(return_inverse=True)
    return roi_align(world.images[images].float() / 255, torch.cat([places[:, None], boxes], dim=1), size, sampling_ratio=2)


def segment_shares(world: World, scenes: Tensor, boxes: Tensor, points: int = 24) -> Tensor:
    """The share of each segment in each crop, (n, S), from a grid of points."""
    steps = (torch.arange(points) + 0.5) / points
    x = (boxes[:, 0, None] + steps * (boxes[:, 2] - boxes[:, 0])[:, None]).long()
    y = (boxes[:, 1, None] + steps * (boxes[:, 3] - boxes[:, 1])[:, None]).long()
    seen = world.segments[scenes[:, None, None], y[:, :, None], x[:, None, :]].flatten(1).long()
    return F.one_hot(seen, world.classes.shape[1]).float().mean(dim=1)


def caption(classes: Sequence[int], shares: Sequence[float], only_first: bool) -> str:
    """What somebody would say of a crop: what stands out first, or all that is well visible, `a star and a ring on dots`."""
    salience = [share * (2 if kind < len(THINGS) else 1) for kind, share in zip(classes, shares)]
    order = sorted(range(len(classes)), key=lambda segment: -salience[segment])
    if only_first:
        return NAMES[classes[order[0]]]
    things = list(dict.fromkeys(NAMES[classes[s]] for s in order if 0 <= classes[s] < len(THINGS) and shares[s] > 0.06))
    stuff = [NAMES[classes[s]] for s in order if classes[s] >= len(THINGS) and shares[s] > 0.15]
    return " on ".join(" and ".join(names) for names in (things, stuff) if names)


def contrast(image: Tensor, text: Tensor, owner: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss for images (n, C) whose captions (u, C) may be the same: image i has caption owner[i]."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    to_image = logits.T.log_softmax(dim=-1)[owner, torch.arange(len(owner))]
    each = 1 / owner.bincount(minlength=len(text))[owner]       # every caption counts once, whatever its images
    return (F.cross_entropy(logits, owner) - (to_image * each).sum() / each.sum()) / 2


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of transformer blocks, AdamW for everything else; several times faster than AdamW alone."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    in_blocks = [parameter for name, parameter in trained if "blocks." in name and parameter.ndim == 2]
    others = [parameter for name, parameter in trained if "blocks." not in name or parameter.ndim != 2]
    return [torch.optim.Muon(in_blocks, lr=3e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1.2e-3, weight_decay=0.01, betas=(0.9, 0.98))]


def optimize(cfg: SimpleNamespace, model: nn.Module, steps: int, log: Path, loss_of_step) -> None:
    """Minimises loss_of_step() -> (loss, figures to log); linear warm-up, then linear to 0; a line of json each 50 steps."""
    chosen = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda s: min((s + 1) / 100, (steps - s) / steps)) for each in chosen]
    start, lines = time.perf_counter(), []
    for done in tqdm(range(1, steps + 1), desc=f"pretrain {cfg.PRETRAIN}", unit="step"):
        loss, figures = loss_of_step()
        loss.backward()
        for each, schedule in zip(chosen, schedules):
            each.step()
            schedule.step()
            each.zero_grad(set_to_none=True)
        if done % 50 == 0 or done == steps:
            lines.append({"step": done, "loss": loss.item(), **figures(), "seconds": round(time.perf_counter() - start)})
            tqdm.write(json.dumps(lines[-1]))
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def pretrain(cfg: SimpleNamespace) -> None:
    """Trains and writes the model that PRETRAIN names."""
    torch.manual_seed(cfg.SEED)
    folder = Path(cfg.MODELS) / cfg.PRETRAIN
    folder.mkdir(parents=True, exist_ok=True)
    world = draw_world(FIRST_SCENE[cfg.PRETRAIN], cfg.SCENES)
    model, file = PRETRAINERS[cfg.PRETRAIN](cfg, folder, world)
    # Half precision halves what the repository holds; it is computed in float32.
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, folder / file)
    print(f"{folder / file} holds {sum(value.numel() for value in model.parameters()) / 1e6:.2f} million weights")


def pretrain_clip(cfg: SimpleNamespace, folder: Path, world: World) -> tuple[nn.Module, str]:
    """Contrast of crops with captions, no other supervision; logs the accuracy of naming what stands out in fresh crops."""
    write_clip_config(folder)
    name = f"local-dir:{folder}"
    model, tokenizer = open_clip.create_model(name, load_weights=False), open_clip.get_tokenizer(name)
    draw = torch.Generator().manual_seed(cfg.SEED)
    fresh = draw_world(FIRST_SCENE[cfg.PRETRAIN] + cfg.SCENES, 200)

    def encode(captions: list[str]) -> Tensor:
        return model.encode_text(tokenizer(captions))

    def sample(world: World, count: int, only_first: bool) -> tuple[Tensor, list[str]]:
        scenes, boxes = draw_boxes(world, count, draw)
        shares = segment_shares(world, scenes, boxes)
        captions = [caption(*pair, only_first) for pair in zip(world.classes[scenes].tolist(), shares.tolist())]
        return normalize(cut(world, scenes, boxes, 64), **STATISTICS), captions

    def loss_of_step():
        template = open_clip.OPENAI_IMAGENET_TEMPLATES[torch.randint(80, (), generator=draw)]
        images, captions = sample(world, cfg.BATCH_SIZE or 128, torch.rand((), generator=draw) < 0.6)
        unique = list(dict.fromkeys(captions))
        owner = torch.tensor([unique.index(each) for each in captions])
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrast(model.encode_image(images), encode([template(each) for each in unique]), owner, scale)
        return loss, figures

    @torch.no_grad()
    def figures() -> dict[str, float]:
        images, captions = sample(fresh, 400, True)
        model.eval()
        text = F.normalize(encode([f"a photo of a {each}." for each in NAMES]), dim=-1)
        found = [NAMES[index] for index in (model.encode_image(images) @ text.T).argmax(dim=1)]
        model.train()
        right = {kind: [a == b for a, b in zip(found, captions) if b in kind] for kind in (THINGS, STUFF)}
        return {"thing": np.mean(right[THINGS]).round(3), "stuff": np.mean(right[STUFF]).round(3)}

    optimize(cfg, model, cfg.STEPS or 2500, folder / "log.jsonl", loss_of_step)
    return model, "open_clip_model.safetensors"


def pretrain_vfm(cfg: SimpleNamespace, folder: Path, world: World) -> tuple[nn.Module, str]:
    """Like SAM, from class-agnostic segments: cosines of patches are fitted to those of the segments that they cover."""
    model = nano_vfm(dynamic_img_size=True)
    draw = torch.Generator().manual_seed(cfg.SEED)

    def loss_of_step():
        scenes = torch.randint(len(world.images), (cfg.BATCH_SIZE or 16,), generator=draw)
        images = normalize(world.images[scenes].float() / 255, **STATISTICS)
        tokens, = model.forward_intermediates(images, indices=1, norm=True,
                                              intermediates_only=True)
        tokens = F.normalize(tokens.flatten(2).mT, dim=-1)
        shares = F.one_hot(world.segments[scenes].long(), world.classes.shape[1]).permute(0, 3, 1, 2).float()
        shares = F.normalize(F.avg_pool2d(shares, 8).flatten(2).mT, dim=-1)
        found, wanted = tokens @ tokens.mT, shares @ shares.mT
        agreement = ((found > 0.5) == (wanted > 0.5)).float().mean()
        return F.mse_loss(found, wanted), lambda: {"pairs": round(agreement.item(), 4)}

    optimize(cfg, model, cfg.STEPS or 1500, folder / "log.jsonl", loss_of_step)
    return model, "model.safetensors"


PRETRAINERS = {"clip": pretrain_clip, "vfm": pretrain_vfm}

if __name__ == "__main__":
    main()
