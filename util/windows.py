"""Windows over an image: where they begin, and what their patches add to its pixels."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def resized_size(image: Tensor, short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width of an image (..., H, W) with its shorter side resized to `short_side`, or
    its longer one to `long_side` if that would be exceeded; halves are rounded up (published)."""
    factor = min(short_side / min(image.shape[-2:]), long_side / max(image.shape[-2:]))
    return tuple(max(1, int(side * factor + 0.5)) for side in image.shape[-2:])


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last one so that it ends with it."""
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def tile_sections(length: int, tile: int, margin: int) -> list[tuple[int, int, int]]:
    """Tiles along a side: where each begins, and the section (from, to) of the side that is its.

    The last tile ends with the side. Two that overlap, by twice the margin or more, meet in the
    middle. A side shorter than a tile is one.
    """
    tile = min(tile, length)
    starts = window_starts(length, tile, max(1, tile - 2 * margin))
    meet = [(before + tile + after) // 2 for before, after in pairwise(starts)]
    return [*zip(starts, [0, *meet], [*meet, length])]


class Maps(NamedTuple):
    """Values of each patch of each window of an image, such as cosines, and how they become pixels.

    Enlarging a window's patches to its pixels, averaging where windows overlap and resizing to the
    original image are linear, and act on rows and columns alike. So together they are one matrix
    for each. Values of pixels, many times as many numbers, exist for some rows at a time only.
    """
    patches: Tensor     # (P, p, q): p rows and q columns of patches, window by window
    resized: tuple[int, int]    # the image as the model sees it, in windows every `stride`
    window: int
    stride: int
    size: tuple[int, int]       # of the pixels (H, W): the image's, or any other

    @classmethod
    def of(cls, values: Tensor, resized: tuple[int, int], window: int, stride: int,
           size: tuple[int, int]) -> "Maps":
        """Of an image that was `resized`, and padded to a window if smaller, the values of all
        windows (n, P, h, w), row by row -> of pixels of the image at `size`."""
        ys, xs = (window_starts(max(side, window), window, stride) for side in resized)
        values = values.unflatten(0, (len(ys), len(xs))).permute(2, 0, 3, 1, 4)
        return cls(values.flatten(3).flatten(1, 2), resized, window, stride, size)

    down = property(lambda self: self.weights(0))       # (H, p)
    across = property(lambda self: self.weights(1))     # (W, q)

    def weights(self, side: int) -> Tensor:
        """What patches add to pixels along a side, 0 for rows and 1 for columns."""
        length, patches = self.resized[side], self.patches.shape[1 + side]
        starts = window_starts(max(length, self.window), self.window, self.stride)
        return side_weights(self.size[side], length, self.window, self.stride,
                            patches // len(starts), self.patches.device)

    def of_pixels(self, most: int = 2**24) -> Iterator[Tensor]:
        """Values of the pixels, (P, rows, W), about `most` numbers at a time."""
        wide = self.patches @ self.across.T
        for some in self.down.split(max(1, most // wide[:, 0].numel())):
            yield some @ wide

    def of_texts(self, most: int = 10**8) -> Iterator[Tensor]:
        """Values of all pixels, (p, H, W), of some texts, or channels, after the others."""
        pixels = len(self.down) * len(self.across)
        for some in self.patches.split(max(1, most // pixels)):
            yield from self._replace(patches=some).of_pixels(max(most, pixels))


@lru_cache(maxsize=256)
def side_weights(side: int, length: int, window: int, stride: int, patches: int,
                 device: torch.device) -> Tensor:
    """What rows of patches of all windows add to rows of pixels, (side, windows * patches).

    length: of the side as the model sees it, covered by windows of `window` pixels and `patches`
    patches. The same serves columns.
    """
    starts = window_starts(max(length, window), window, stride)
    eye = torch.eye(patches, device=device)[None]
    enlarged = F.interpolate(eye, window, mode="linear")[0].T       # (window, patches)
    total = torch.zeros(max(length, window), len(starts), patches, device=device)
    for number, start in enumerate(starts):
        total[start:start + window, number] = enlarged
    # A row's weights of one window sum to 1, so this is the number of windows that cover it.
    covered = total.sum(dim=(1, 2))
    mean = total.flatten(1) / covered[:, None]
    # Without the padding, to the original size.
    return F.interpolate(mean[:length].T[None], side, mode="linear")[0].T.contiguous()
