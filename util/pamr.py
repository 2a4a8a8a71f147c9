"""PAMR: scores of pixels fitted to the image's colours (Araslanov and Roth, CVPR 2020).

It is not in the paper; docs/beyond.md has what it gives.
"""

from collections.abc import Iterable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

# Distances of the pixels that are compared, as published.
DILATIONS = (1, 2, 4, 8, 12, 24)


def refine(scores: Iterable[Tensor], image: Tensor, steps: int) -> Tensor:
    """Scores of an image's pixels, (P, rows, W) for some rows after the other -> (P, H, W).

    In every step a pixel's scores become a mean of those of its neighbours, 8 in each of DILATIONS,
    that weighs those of a like colour most. image: uint8 (3, H, W).
    """
    weights = colour_weights(image)
    refined = torch.cat(list(scores), dim=1)
    for some in refined.split(16):      # scores of one text do not depend on those of others
        for _ in range(steps):
            shifted = neighbours(some)      # of a copy
            some.zero_()
            for weight, neighbour in zip(weights, shifted):
                some.addcmul_(weight, neighbour)
    return refined


def colour_weights(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> what each of a pixel's neighbours weighs, (8 * dilations, H, W), sum 1.

    The softmax of the negative difference of colours, in tenths of the standard deviation among the
    neighbours and, once for each dilation, the pixel itself.
    """
    image = image.float() / 255
    differences = [neighbour - image for neighbour in neighbours(image)]
    count = len(differences) + len(DILATIONS)
    mean = sum(differences) / count
    squares = sum(difference.square() for difference in differences)
    variance = (squares - count * mean.square()) / (count - 1)
    unit = 0.1 * variance.clamp(min=0).sqrt() + 1e-8
    return torch.stack([-(difference.abs() / unit).mean(dim=0)
                        for difference in differences]).softmax(dim=0)


def neighbours(maps: Tensor) -> list[Tensor]:
    """(C, H, W) -> for each neighbour a view of a copy with repeated borders, (C, H, W)."""
    H, W, m = *maps.shape[-2:], max(DILATIONS)
    padded = F.pad(maps[None], (m, m, m, m), mode="replicate")[0]
    return [padded[:, y:y + H, x:x + W] for d in DILATIONS
            for y, x in product((m - d, m, m + d), repeat=2) if (y, x) != (m, m)]
