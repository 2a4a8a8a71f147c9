"""PAMR: scores of pixels fitted to the image's colours (Araslanov and Roth, CVPR 2020).

It is not in the paper; docs/beyond.md has what it gives.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

# Distances of the pixels that are compared, as published.
DILATIONS = (1, 2, 4, 8, 12, 24)
REACH = max(DILATIONS)


def refine(scores: Tensor, image: Tensor, steps: int, most: int = 2**20) -> Tensor:
    """Scores of an image's pixels, (P, H, W) -> refined ones in their place.

    In every step a pixel's scores become a mean of those of its neighbours, 8 in each of DILATIONS,
    that weighs those of a like colour most. image: uint8 (3, H, W). most: pixels whose neighbours'
    weights, 192 bytes a pixel, are in memory at once, about.
    """
    (H, W), lag = image.shape[-2:], REACH * (steps - 1)
    # In strips: each step ends REACH rows above the one before, so that all it needs below is done.
    # What it needs above was overwritten with the strip before, which has kept it.
    kept, weights = [scores[:, :0]] * steps, torch.empty(0)
    rows = max(REACH, most // W - lag)
    for top in range(0, H, rows):
        bottom = min(H, top + rows)
        new = colour_weights(image, top, bottom)
        weights = torch.cat([weights[:, -lag:], new], dim=1) if top and lag else new
        first = bottom - weights.shape[1]
        for step in range(steps):
            begin = max(0, top - REACH * step)
            end = H if bottom == H else max(0, bottom - REACH * step)
            if begin < end:
                some = torch.cat([kept[step], scores[:, begin:end + REACH]], dim=1)
                above = kept[step].shape[1]
                kept[step] = scores[:, max(begin, end - REACH):end].clone()
                average(some, above, weights[:, begin - first:end - first], scores[:, begin:end])
    return scores


def average(scores: Tensor, begin: int, weights: Tensor, out: Tensor) -> None:
    """One step for rows `begin` ... of scores (P, h, W), which have those around them, too.

    weights: (8 * dilations, rows, W). out: (P, rows, W).
    """
    shifted = neighbours(scores, begin, begin + out.shape[1])
    # A CPU's cache holds so many; a GPU is kept busy by more.
    rows = max(1, 2**(24 if out.is_cuda else 18) // out[:, 0].numel())
    for start in range(0, out.shape[1], rows):
        part = out[:, start:start + rows].zero_()
        for weight, neighbour in zip(weights, shifted):
            part.addcmul_(weight[start:start + rows], neighbour[:, start:start + rows])


def colour_weights(image: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
    """uint8 (3, H, W) -> what each neighbour of the pixels in rows begin ... end weighs, (8 *
    dilations, rows, W), sum 1.

    The softmax of the negative difference of colours, in tenths of the standard deviation among the
    neighbours and, once for each dilation, the pixel itself.
    """
    end = image.shape[1] if end is None else end
    first = max(0, begin - REACH)
    own = image[:, begin:end].float() / 255
    shifted = neighbours(image[:, first:end + REACH].float() / 255, begin - first, end - first)
    count = len(shifted) + len(DILATIONS)
    mean = sum(neighbour - own for neighbour in shifted) / count
    squares = sum((neighbour - own).square() for neighbour in shifted)
    variance = (squares - count * mean.square()) / (count - 1)
    unit = 0.1 * variance.clamp(min=0).sqrt() + 1e-8
    weights = own.new_empty(len(shifted), *own.shape[1:])
    for weight, neighbour in zip(weights, shifted):
        torch.mean(-((neighbour - own).abs() / unit), dim=0, out=weight)
    weights.sub_(weights.amax(dim=0)).exp_()        # a softmax that takes no more memory
    return weights.div_(weights.sum(dim=0))


def neighbours(maps: Tensor, begin: int, end: int) -> list[Tensor]:
    """Rows begin ... end of (C, H, W) -> for each neighbour a view of a copy with repeated borders,
    (C, rows, W). Rows of maps that are not there, REACH before and after, are borders."""
    H, W, m = *maps.shape[-2:], REACH
    maps = maps[:, max(0, begin - m):end + m]
    missing = max(0, m - begin), max(0, end + m - H)
    padded = F.pad(maps[None], (m, m, *missing), mode="replicate")[0]
    return [padded[:, y:y + end - begin, x:x + W] for d in DILATIONS
            for y, x in product((m - d, m, m + d), repeat=2) if (y, x) != (m, m)]
