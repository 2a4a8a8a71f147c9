"""Trains the toy world's nano models anew: two CLIPs and a vision foundation model.

    python -m toy.pretrain clip         # into toy/clip
    python -m toy.pretrain siglip       # into toy/siglip
    python -m toy.pretrain vfm          # into toy/vfm

All are plain timm towers with a config.json beside their weights, so nothing of ours must be
imported to load them: open_clip knows the CLIPs as local-dir:toy/clip and local-dir:toy/siglip,
timm the VFM as local-dir:toy/vfm, all as seen from the repository's folder.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import roi_align
from tqdm import tqdm

from data import normalize
from toy.world import FIRST_SCENE, MAX_SCENES, NAMES, STUFF, THINGS, describe, draw_scene
from util import distributed, settings

MODELS = "toy"                      # folder that clip/, siglip/ or vfm/ is written into
SCENES = 8000                       # scenes drawn to learn from, at 128 px
STEPS: int | None = None            # optimiser steps; None: 2500 for a CLIP, 1500 for vfm
BATCH_SIZE: int | None = None       # None: 128 crops for a CLIP, 16 scenes for vfm
SEED = 0                            # of the first weights and of what is sampled


def main(argv: list[str] | None = None) -> None:
    """Trains the model that the command line (or `argv`) names."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="KIND")
    with distributed.session(__file__):
        run(cfg)


def run(cfg: SimpleNamespace) -> None:
    """Trains and writes one model."""
    settings.check_min(cfg, SCENES=1, STEPS=1, BATCH_SIZE=1, SEED=0)
    kind = " ".join(cfg.KIND)
    settings.check(cfg, KIND=(kind in PRETRAINERS, f"one of {', '.join(PRETRAINERS)}"),
                   SCENES=(cfg.SCENES <= MAX_SCENES, f"at most {MAX_SCENES:,}"))
    torch.manual_seed(cfg.SEED)
    folder = Path(cfg.MODELS) / kind
    copy_configs(kind, folder)
    scenes = draw_scenes(FIRST_SCENE[kind], cfg.SCENES)
    model, file = PRETRAINERS[kind](cfg, folder, scenes)
    # Half precision halves what the repository holds; it is computed in float32.
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / file)
    count = sum(value.numel() for value in model.parameters()) / 1e6
    print(f"{folder / file} holds {count:.2f} million weights")


# ----------------------------------------------------------------------------- the nano models

HOME = Path(__file__).parent        # clip/, siglip/ and vfm/ in it say what the models are
STATISTICS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def copy_configs(kind: str, folder: Path) -> None:
    """The files beside a model's weights, with paths into its new folder: timm's and open_clip's
    configurations, and the merges of a tokenizer whose every word is one token."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*(HOME / kind).glob("*.json"), *(HOME / kind).glob("merges*")):
        content = file.read_bytes().replace(f"toy/{kind}".encode(), str(folder).encode())
        (folder / file.name).write_bytes(content)


# ------------------------------------------------------------------------- what is learned from

class SceneTensors(NamedTuple):
    """Many scenes as tensors; S is the most regions that a scene has."""
    images: Tensor      # uint8 (n, 3, size, size)
    regions: Tensor     # uint8 (n, size, size)
    classes: Tensor     # (n, S), -1 where a scene has no such region
    boxes: Tensor       # (n, S, 4) x0 y0 x1 y1 in pixels


def draw_scenes(first: int, count: int, size: int = 128) -> SceneTensors:
    """Scenes `first`, `first` + 1, ... drawn in several processes."""
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(draw_scene, size=size), range(first, first + count), chunksize=64)
        scenes = list(tqdm(drawn, desc="draw", total=count, unit="scene"))
    most = max(len(scene.classes) for scene in scenes)
    classes, boxes = torch.full((count, most), -1), torch.zeros(count, most, 4)
    for index, scene in enumerate(scenes):
        for region, kind in enumerate(scene.classes):
            x, y, width, height = describe(scene, region)["bbox"]
            classes[index, region] = kind
            boxes[index, region] = torch.tensor([x, y, x + width, y + height])
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    regions = torch.from_numpy(np.stack([scene.regions for scene in scenes]))
    return SceneTensors(images.permute(0, 3, 1, 2).contiguous(), regions, classes, boxes)


def sample_boxes(source: SceneTensors, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops to learn from -> scenes (count,) and boxes (count, 4).

    Half are around things, a fifth around zones, the rest anywhere.
    """
    size = source.images.shape[-1]
    scenes = torch.randint(len(source.images), (count,), generator=rng)
    way = torch.rand(count, generator=rng)
    is_thing = (source.classes[scenes] >= 0) & (source.classes[scenes] < len(THINGS))
    is_wanted = torch.where(way[:, None] < 0.5, is_thing, source.classes[scenes] >= len(THINGS))
    is_wanted[:, 0] |= ~is_wanted.any(dim=1)        # a scene without things shows its first zone
    chosen = torch.multinomial(is_wanted.float(), 1, generator=rng)[:, 0]
    x0, y0, x1, y1 = source.boxes[scenes, chosen].unbind(dim=1)

    def random(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng) * (high - low) + low

    sides = torch.stack([x1 - x0, y1 - y0], dim=1)
    centres = torch.stack([x0 + x1, y0 + y1], dim=1) / 2 + sides * random(-0.1, 0.1, count, 2)
    sides = sides * random(0.9, 1.5, count, 1)
    anywhere = way > 0.7
    sides = torch.where(anywhere[:, None], random(size / 6, size, count, 2), sides).clamp(8, size)
    centres = torch.where(anywhere[:, None], random(0, size, count, 2), centres)
    centres = centres.clamp(sides / 2, size - sides / 2)
    return scenes, torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


def cut(source: SceneTensors, scenes: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops as float [0, 1] (n, 3, size, size)."""
    images, places = scenes.unique(return_inverse=True)
    # toy/clip has weights of before this was aligned: its crops lay half a pixel off.
    return roi_align(source.images[images].float() / 255,
                     torch.cat([places[:, None], boxes], dim=1), size, sampling_ratio=2,
                     aligned=True)


def region_shares(source: SceneTensors, scenes: Tensor, boxes: Tensor, points: int = 24) -> Tensor:
    """The share of each region in each crop, (n, S), from a grid of points."""
    steps = (torch.arange(points) + 0.5) / points
    x = (boxes[:, 0, None] + steps * (boxes[:, 2] - boxes[:, 0])[:, None]).long()
    y = (boxes[:, 1, None] + steps * (boxes[:, 3] - boxes[:, 1])[:, None]).long()
    seen = source.regions[scenes[:, None, None], y[:, :, None], x[:, None, :]].flatten(1).long()
    return F.one_hot(seen, source.classes.shape[1]).float().mean(dim=1)


def caption(classes: Sequence[int], shares: Sequence[float], only_first: bool) -> str:
    """What one would say of a crop: what stands out first, or all that is well visible.

    For example `star and ring on dots`.
    """
    salience = [share * (2 if kind < len(THINGS) else 1) for kind, share in zip(classes, shares)]
    order = sorted(range(len(classes)), key=lambda region: -salience[region])
    if only_first:
        return NAMES[classes[order[0]]]
    things = list(dict.fromkeys(NAMES[classes[s]] for s in order if 0 <= classes[s] < len(THINGS)
                                and shares[s] > 0.06))
    stuff = [NAMES[classes[s]] for s in order if classes[s] >= len(THINGS) and shares[s] > 0.15]
    return " on ".join(" and ".join(names) for names in (things, stuff) if names)


def contrast(image: Tensor, text: Tensor, matched: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss for images (n, C) that share captions (u, C).

    matched: the caption of each image, (n,).
    """
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    to_image = logits.T.log_softmax(dim=-1)[matched, torch.arange(len(matched))]
    # Every caption counts once, however many images it has.
    weight = 1 / matched.bincount(minlength=len(text))[matched]
    return (F.cross_entropy(logits, matched) - (to_image * weight).sum() / weight.sum()) / 2


def judge_pairs(image: Tensor, text: Tensor, matched: Tensor, scale: Tensor, bias: Tensor
                ) -> Tensor:
    """SigLIP's loss for images (n, C) that share captions (u, C): whether the two of a pair belong
    together is asked of each pair by itself, right ones and wrong ones.

    matched: the caption of each image, (n,).
    """
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias
    sign = 2 * F.one_hot(matched, len(text)) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and of attention pooling, AdamW for the rest: several times
    faster than AdamW."""
    in_blocks, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and ("blocks." in name or "attn_pool." in name)
            (in_blocks if is_matrix else others).append(parameter)
    return [torch.optim.Muon(in_blocks, lr=3e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1.2e-3, weight_decay=0.01, betas=(0.9, 0.98))]


def optimize(model: nn.Module, steps: int, log: Path,
             loss_of_step: Callable[[], tuple[Tensor, Callable]]) -> None:
    """Minimises loss_of_step() -> (loss, a function that returns figures to log).

    Linear warm-up, then linear to 0; a line of json every 50 steps.
    """
    chosen = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, (steps - s) / steps)) for optimizer in chosen]
    start, lines = time.perf_counter(), []
    for done in tqdm(range(1, steps + 1), desc="pretrain", unit="step"):
        loss, figures = loss_of_step()
        loss.backward()
        for optimizer, schedule in zip(chosen, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if done % 50 == 0 or done == steps:
            lines.append({"step": done, "loss": loss.item(), **figures(),
                          "seconds": round(time.perf_counter() - start)})
            tqdm.write(json.dumps(lines[-1]))
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def pretrain_clip(cfg: SimpleNamespace, folder: Path, source: SceneTensors
                  ) -> tuple[nn.Module, str]:
    """Contrast of crops with captions, no other supervision -> the model and its file's name.

    The loss is SigLIP's if the model has that loss's bias, else CLIP's. Logs the accuracy of naming
    what stands out in fresh crops.
    """
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, load_weights=False)
    tokenizer = open_clip.get_tokenizer(name)
    is_siglip = model.logit_bias is not None
    loss_of = partial(judge_pairs, bias=model.logit_bias) if is_siglip else contrast
    rng = torch.Generator().manual_seed(cfg.SEED)
    fresh = draw_scenes(FIRST_SCENE["clip"] + cfg.SCENES, 200)

    def sample(source: SceneTensors, count: int, only_first: Tensor) -> tuple[Tensor, list[str]]:
        scenes, boxes = sample_boxes(source, count, rng)
        shares = region_shares(source, scenes, boxes)
        captions = [caption(*crop) for crop in zip(
            source.classes[scenes].tolist(), shares.tolist(), only_first.expand(count).tolist())]
        return normalize(cut(source, scenes, boxes, 64), **STATISTICS), captions

    def loss_of_step():
        template = open_clip.OPENAI_IMAGENET_TEMPLATES[torch.randint(80, (), generator=rng)]
        count = cfg.BATCH_SIZE or 128
        # One draw for a whole batch would give batches of few captions and of many. A softmax
        # does not mind; sigmoids learned no stuff, since what is likely changed with every batch.
        only_first = torch.rand(count if is_siglip else 1, generator=rng) < 0.6
        images, captions = sample(source, count, only_first)
        unique = list(dict.fromkeys(captions))
        text = model.encode_text(tokenizer([template(caption) for caption in unique]))
        matched = torch.tensor([unique.index(caption) for caption in captions])
        scale = model.logit_scale.exp().clamp(max=100)
        return loss_of(model.encode_image(images), text, matched, scale), figures

    @torch.no_grad()
    def figures() -> dict[str, float]:
        images, captions = sample(fresh, 400, torch.tensor(True))
        model.eval()
        sentences = tokenizer([f"a photo of a {name}." for name in NAMES])
        text = F.normalize(model.encode_text(sentences), dim=-1)
        found = [NAMES[index] for index in (model.encode_image(images) @ text.T).argmax(dim=1)]
        model.train()
        right = {kind: [a == b for a, b in zip(found, captions) if b in kind]
                 for kind in (THINGS, STUFF)}
        return {"thing": np.mean(right[THINGS]).round(3), "stuff": np.mean(right[STUFF]).round(3)}

    optimize(model, cfg.STEPS or 2500, folder / "log.jsonl", loss_of_step)
    return model, "open_clip_model.safetensors"


def pretrain_vfm(cfg: SimpleNamespace, folder: Path, source: SceneTensors) -> tuple[nn.Module, str]:
    """Like SAM, from regions without classes -> the model and its file's name.

    Cosines of patches are fitted to those of the regions that they cover.
    """
    model = timm.create_model(f"local-dir:{folder}")
    rng = torch.Generator().manual_seed(cfg.SEED)

    def loss_of_step():
        scenes = torch.randint(len(source.images), (cfg.BATCH_SIZE or 16,), generator=rng)
        images = normalize(source.images[scenes].float() / 255, **STATISTICS)
        tokens, = model.forward_intermediates(images, indices=1, norm=True,
                                              intermediates_only=True)
        tokens = F.normalize(tokens.flatten(2).mT, dim=-1)
        shares = F.one_hot(source.regions[scenes].long(), source.classes.shape[1])
        shares = F.avg_pool2d(shares.permute(0, 3, 1, 2).float(), 8)
        shares = F.normalize(shares.flatten(2).mT, dim=-1)
        found, wanted = tokens @ tokens.mT, shares @ shares.mT
        agreement = ((found > 0.5) == (wanted > 0.5)).float().mean()
        return F.mse_loss(found, wanted), lambda: {"pairs": round(agreement.item(), 4)}

    optimize(model, cfg.STEPS or 1500, folder / "log.jsonl", loss_of_step)
    return model, "model.safetensors"


PRETRAINERS = {"clip": pretrain_clip, "siglip": pretrain_clip, "vfm": pretrain_vfm}

if __name__ == "__main__":
    main()
