"""Dense features of your own photographs as arrays, for code of your own.

    python -m tools.features photos/ --out features/ --ckpt ...     # of each a .npy (h, w, C)
    python -m tools.features photos/ --shard 100 --ckpt ...         # of 100 each a .safetensors
    python -m tools.features photos/ --x_context true --layers 3 7 --ckpt ...   # more channels
    python -m tools.features photos/ --one_pass true --ckpt ...     # no windows
    torchrun --nproc_per_node 8 -m tools.features photos/ --ckpt ...    # divided among GPUs

A photograph is resized as for segmentation, to SHORT_SIDE but not beyond LONG_SIDE, and has a cell
for each patch of that size, rounded to whole ones (--one_pass rounds the size, too). Where windows
overlap, a cell is their mean. A json beside each array says what is in it and where pixels lie. The
same command goes on with a killed run. docs/features.md shows what to do with the arrays.
"""

import json
import sys
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import load_share, normalize, resize
from eval_region import open_model
from eval_seg import Protocol, map_images
from model import UNDECOUPLED, DeCLIP
from tools.segment import find_photos, say_failed
from util import UserError, arrays, distributed, printable, settings
from util.precision import autocast, find_precision
from util.weights import state_checksum
from util.windows import resized_size

SHARED = {"eval_region": ["The model"], "eval_seg": ["The windows"]}

# What is kept
X_CONTEXT = False                   # also X_context, which tells what belongs together
LAYERS: tuple[int, ...] = ()        # also outputs of these blocks, from 0; a second forward pass

# How a photograph is seen
ONE_PASS = False                    # the whole photograph at once instead of windows
PRECISION = "fp32"                  # bf16, fp16: faster on a GPU, but rounded; auto: as train.py
NUM_WORKERS = 4                     # processes that decode photographs, for each GPU

# What is written
SHARD: int | None = None            # photographs of one safetensors file; None: a .npy for each
OUT = "out/features"                # folder of all files


def main(argv: list[str] | None = None) -> None:
    """Writes the features of the photographs that the command line (or `argv`) names."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="PHOTOS")
    with distributed.session(__file__) as ranks:
        run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> None:
    """Writes what is not there yet; photographs that fail are named at the end."""
    check_settings(cfg)
    plan, paths = plan_arrays(cfg)
    clip = open_model(cfg).to(ranks.device)
    settings.refuse_unused(cfg, X_CONTEXT=clip.context in UNDECOUPLED and
                           f"is of decoupled blocks, and this model's is {clip.context}")
    view = View(cfg, clip, Protocol.of(cfg).fit(clip))
    about = describe(view, ranks.device)
    missing = arrays.find_missing(plan, about, Path(cfg.OUT), ranks)
    if ranks.is_main and len(missing) < len(plan):
        print(f"left as they are: {len(plan) - len(missing):,} of {len(plan):,} arrays")
    share = {array: plan[array] for array in missing[ranks.rank::ranks.world_size]}
    photos = arrays.ImageFiles([paths[image["name"]] for array in share for image in plan[array]])
    loader = load_share(photos, ranks._replace(rank=0, world_size=1), 1,
                        min(cfg.NUM_WORKERS, len(photos) // 8))     # a few need no workers
    failed = write_share(share, tqdm(loader, unit="photo", disable=not ranks.is_main), view, about)
    failed = sum(distributed.gather(failed), [])
    if failed and not ranks.is_main:
        raise SystemExit(1)     # the first rank says why
    say_failed(failed)


def check_settings(cfg: SimpleNamespace) -> None:
    """Raises UserError on settings out of their range or in vain."""
    Protocol.of(cfg)
    settings.check_min(cfg, SHARD=1, NUM_WORKERS=0)
    settings.check(cfg, LAYERS=(len({*cfg.LAYERS}) == len(cfg.LAYERS), "different numbers"))
    of_scores = "is for classes' scores, and features have none"
    of_windows = cfg.ONE_PASS and "is of windows, and ONE_PASS has none"
    settings.refuse_unused(cfg, PAMR=of_scores, THRESHOLD=of_scores, LOGIT_SCALE=of_scores,
                           WINDOW=of_windows, STRIDE=of_windows, WINDOW_BATCH=of_windows)


# -------------------------------------------------------------------------------- the features

class View(NamedTuple):
    """How a model sees a photograph; the settings say which of its outputs are kept."""
    cfg: SimpleNamespace
    clip: DeCLIP
    protocol: Protocol

    @torch.inference_mode()
    def __call__(self, photo: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """uint8 (3, H, W) -> float32 (h, w, P), and the height and width that were seen."""
        protocol, patch = self.protocol, self.clip.patch_size
        size = resized_size(photo, protocol.short_side, protocol.long_side)
        grid = tuple(max(1, int(side / patch + 0.5)) for side in size)
        if self.cfg.ONE_PASS:
            size = grid[0] * patch, grid[1] * patch
            image = normalize(resize(photo, *size), self.clip.mean, self.clip.std)
            return self.stack(image[None])[0].permute(1, 2, 0), size
        maps, = map_images(protocol, self.clip, [photo], self.stack)
        maps = maps._replace(size=grid)     # a pixel a cell, whose values are of its centre
        return (maps.down @ maps.patches @ maps.across.T).permute(1, 2, 0), size

    def stack(self, images: Tensor) -> Tensor:
        """Normalised (n, 3, H, W) -> float32 (n, P, H/patch, W/patch), the channels of all."""
        return torch.cat([*self.outputs(images).values()], dim=1)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised (n, 3, H, W) -> float32 (n, channels, H/patch, W/patch) of each output."""
        attention = self.protocol.attention
        with autocast(self.protocol.precision, images.device):
            content, context = self.clip.encode_dense(images, attention)
            found = {"content": content}
            if self.cfg.X_CONTEXT:
                found["context"] = context.mT.unflatten(2, content.shape[-2:])
            if self.cfg.LAYERS:
                found |= zip([f"layer {number}" for number in self.cfg.LAYERS],
                             self.clip.encode_layers(images, self.cfg.LAYERS, attention))
        return {name: values.float() for name, values in found.items()}

    @torch.inference_mode()
    def channels(self, device: torch.device) -> dict[str, tuple[int, int]]:
        """Where each output's channels begin and end. UserError for a layer that is not there."""
        found = self.outputs(torch.zeros(1, 3, *2 * [self.clip.image_size], device=device))
        ends = [*accumulate((values.shape[1] for values in found.values()), initial=0)]
        return dict(zip(found, zip(ends, ends[1:])))


# ---------------------------------------------------------------------------------- the arrays

def plan_arrays(cfg: SimpleNamespace) -> tuple[arrays.Plan, dict[str, Path]]:
    """The arrays that are wanted, and the photographs by name, that of a .npy of its own."""
    plan, paths, out = {}, {}, Path(cfg.OUT)
    for number, (path, array) in enumerate(find_photos(cfg.PHOTOS, cfg.OUT, ".npy").items()):
        root = next((root for root in map(Path, cfg.PHOTOS) if root in path.parents), path.parent)
        name = printable(array.relative_to(out).as_posix().removesuffix(".npy"))
        paths[name] = path
        if cfg.SHARD:
            array = out / f"features-{number // cfg.SHARD:05}.safetensors"
        plan.setdefault(array, []).append({
            "name": name, "file": path.relative_to(root).as_posix(),
            "bytes": path.stat().st_size if path.is_file() else 0, "crc": arrays.crc_of(path)})
    return plan, paths


def describe(view: View, device: torch.device) -> dict:
    """What the json of every array says, beside its images."""
    cfg, clip, protocol = view
    size = ["short_side", "long_side"] + ([] if cfg.ONE_PASS else ["window", "stride"])
    return json.loads(json.dumps(clip.describe() | {        # without tuples, as it is read
        "checksum": state_checksum(clip.state_dict(), ""),
        "attention": protocol.attention or clip.context,
        "precision": find_precision(protocol.precision, device),
        "one_pass": cfg.ONE_PASS, **{name: getattr(protocol, name) for name in size},
        "patch_size": clip.patch_size, "shard": cfg.SHARD, "dtype": "float16",
        "normalized": False, "channels": view.channels(device),
        "place": "pixel (x, y) is at row (y + 0.5) * scale[0] - 0.5, column (x + 0.5) * scale[1] "
                 "- 0.5; whole numbers are centres of cells"}))


def write_share(share: arrays.Plan, loader: Iterable, view: View, about: dict) -> list[str]:
    """Writes a rank's arrays -> why photographs failed. A full disk ends the whole, by an OSError.

    loader: of arrays.ImageFiles in the plan's order, one at a time.
    """
    failed, loaded = [], iter(loader)
    for array, identities in share.items():
        values, images = {}, []
        for identity, ((path, photo),) in zip(identities, loaded):  # the first ends without a photo
            try:
                values[identity["name"]], found = see(view, photo)
                images.append(identity | found)
            except Exception as error:      # a photograph's failure is its own
                failed.append(str(error) if error is photo else
                              f"{path} failed ({' '.join(str(error).split())}).")
        if values:
            left_out = [image for image in identities if image["name"] not in values]
            arrays.write(array, values, about | {"images": images, "left_out": left_out})
    next(loaded, None)      # so a progress bar is full
    return failed


def see(view: View, photo: Tensor | UserError) -> tuple[np.ndarray, dict]:
    """A photograph's features, float16 (h, w, P), and what the json says of them."""
    if isinstance(photo, UserError):
        raise photo
    features, size = view(photo.to(view.clip.visual.trunk.pos_embed.device, non_blocking=True))
    features, beyond = arrays.to_half(features)
    (H, W), (h, w) = photo.shape[-2:], features.shape[:2]
    return features, {"size": [H, W], "resized": size, "grid": [h, w], "scale": [h / H, w / W],
                      "clamped": beyond}


if __name__ == "__main__":
    main()
