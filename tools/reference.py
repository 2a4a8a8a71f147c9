"""The method as one would first write it: PIL crops, whole matrices, one window at a time.

Training and evaluation use none of this. Their faster forms are held against it: by the tests in
what they return, by `tools.bench --baseline` in what they cost.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from data import Classes, Grid, fitted_size, grid_boxes, normalize, pad_to, resize
from eval_seg import Protocol, window_scores
from model import VFM, DeCLIP, VisionTower, content_loss
from train import vfm_size
from util.images import unreadable
from util.windows import resized_size, window_starts

# ----------------------------------------------------------------------------------- the input

def resized(image: Image.Image, height: int, width: int) -> Tensor:
    """A PIL image -> float [0, 1] (3, height, width), by PIL."""
    return pil_to_tensor(image.resize((width, height), Image.Resampling.BICUBIC)).float() / 255


def student_image(image: Image.Image, size: int, mean: Sequence[float],
                  std: Sequence[float]) -> Tensor:
    """As data.student_image, of a PIL image."""
    height, width = fitted_size(torch.empty(image.height, image.width, device="meta"), size)
    return normalize(pad_to(resized(image, height, width), size, size), mean, std)


def grid_crops(image: Image.Image, grid: Grid, size: int, mean: Sequence[float],
               std: Sequence[float]) -> Tensor:
    """As data.grid_crops, each cell cut at whole pixels and resized: (k, 3, size, size)."""
    crops = []
    for cell in grid.cells:
        row, column = divmod(cell, grid.columns)
        box = (round(column * image.width / grid.columns), round(row * image.height / grid.rows),
               round((column + 1) * image.width / grid.columns),
               round((row + 1) * image.height / grid.rows))
        crops.append(normalize(resized(image.crop(box), size, size), mean, std))
    return torch.stack(crops)


def sample(image: Image.Image, grid: Grid, cfg: SimpleNamespace, clip: VisionTower,
           vfm: VFM) -> tuple[Tensor, ...]:
    """All that a step needs of an image: float images of student and VFM, crops, boxes."""
    of_clip = clip.mean, clip.std
    return (student_image(image, cfg.IMAGE_SIZE, *of_clip),
            student_image(image, vfm_size(cfg.IMAGE_SIZE, clip, vfm), vfm.mean, vfm.std),
            grid_crops(image, grid, cfg.CROP_SIZE, *of_clip),
            grid_boxes(torch.empty(3, image.height, image.width), grid, cfg.IMAGE_SIZE))


class Samples(Dataset):
    """Image files with their grids; workers make a `sample` of each."""

    def __init__(self, paths: Sequence[str], grids: Sequence[Grid], cfg: SimpleNamespace,
                 clip: VisionTower, vfm: VFM):
        self.paths, self.grids, self.cfg = paths, grids, cfg
        # No models go to the workers.
        self.clip, self.vfm = (
            SimpleNamespace(mean=model.mean, std=model.std, patch_size=model.patch_size)
            for model in (clip, vfm))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        path = self.paths[index]
        with unreadable(path, "an image"), Image.open(path) as file:
            image = file.convert("RGB")
        return sample(image, self.grids[index], self.cfg, self.clip, self.vfm)


# --------------------------------------------------------------------------- the training step

@contextmanager
def whole_attention(*models: VisionTower | VFM) -> Iterator[None]:
    """Within it, the models compute attention by its matrix, keep it, and are not compiled."""
    with ExitStack() as stack, torch.compiler.set_stance("force_eager"):
        for model in models:
            changes = [(module, "fused_attn", False) for module in model.modules()
                       if getattr(module, "fused_attn", False)]
            if isinstance(model, VisionTower):
                changes += [(model, "attend", attend),
                            (model, "checkpointing", False)]
            for change in changes:
                stack.enter_context(patch.object(*change))
        yield


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Equation 6 as it is written: softmax(scale QKᵀ)V."""
    return (q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT).softmax(dim=-1) @ v


def correlation(tokens: Tensor) -> Tensor:
    """Equation 8: the cosine of every token with every other, (B, N, D) -> (B, N, N)."""
    tokens = F.normalize(tokens.float(), dim=-1)
    return tokens @ tokens.mT


def context_loss(context: Tensor, vfm_tokens: Tensor) -> Tensor:
    """Equation 9 with both correlation matrices."""
    with torch.autocast(context.device.type, enabled=False):
        return (correlation(context) - correlation(vfm_tokens)).norm(dim=-1).mean()


def distill(student: VisionTower, teacher: VisionTower, vfm: VFM,
            samples: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """As train.distill, of what `Samples` returns, on the models' device."""
    inputs, vfm_inputs, crops, boxes = zip(*samples)
    regions, context = student(torch.stack(inputs), list(boxes))
    with torch.no_grad():
        cls = teacher.encode_image(torch.cat(crops))
        tokens = vfm(torch.stack(vfm_inputs))
    return {"content": content_loss(regions, cls, [len(of_image) for of_image in boxes]),
            "context": context_loss(context, tokens)}


# -------------------------------------------------------------------------------- segmentation

@torch.inference_mode()
def score_image(protocol: Protocol, clip: DeCLIP, image: Tensor, text: Tensor) -> Tensor:
    """uint8 (3, H, W) and text (P, C) -> scores of all pixels (P, H, W), one window at a time.

    They are summed at the size that the model sees.
    """
    window, stride = protocol.window, protocol.stride
    h, w = resized_size(image, protocol.short_side, protocol.long_side)
    resized = pad_to(resize(image, h, w), max(h, window), max(w, window))
    resized = normalize(resized, clip.mean, clip.std)
    total = resized.new_zeros(len(text), *resized.shape[1:])
    count = resized.new_zeros(resized.shape[1:])
    for y in window_starts(resized.shape[1], window, stride):
        for x in window_starts(resized.shape[2], window, stride):
            place = (..., slice(y, y + window), slice(x, x + window))
            scores = window_scores(protocol, clip, resized[place][None], text)
            total[place] += F.interpolate(scores, window, mode="bilinear")[0]
            count[place] += 1
    scores = (total / count)[None, :, :h, :w]
    return F.interpolate(scores, image.shape[-2:], mode="bilinear")[0]


@torch.inference_mode()
def predict(protocol: Protocol, clip: DeCLIP, classes: Classes, text: Tensor, image: Tensor
            ) -> Tensor:
    """uint8 (3, H, W) -> class of each pixel (H, W), by probabilities of all prompts and pixels.

    Without PAMR, whose plain form tests/util/test_pamr.py has.
    """
    scores = score_image(protocol, clip, image, text)
    probabilities = (scores * protocol.logit_scale).softmax(dim=0)
    probability, prediction = classes.best(probabilities).max(dim=0)
    if protocol.threshold is None:
        return prediction
    return prediction.masked_fill(probability < protocol.threshold, 0)
