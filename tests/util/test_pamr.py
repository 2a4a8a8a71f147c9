"""util/pamr.py: scores against the plain form, and what refining is for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from util import pamr
from util.pamr import DILATIONS


def pamr_step(scores: Tensor, image: Tensor) -> Tensor:
    """One step of pamr.refine, pixel by pixel: (P, H, W), uint8 (3, H, W) -> (P, H, W)."""
    H, W = image.shape[-2:]
    colours, found = image / 255, torch.empty_like(scores)
    for y in range(H):
        for x in range(W):
            places = [(min(max(y + dy * d, 0), H - 1), min(max(x + dx * d, 0), W - 1))
                      for d in DILATIONS for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
            near = torch.stack([colours[:, j, i] for j, i in places], dim=1)        # (3, 8 * d)
            own = colours[:, y, x, None].expand(-1, len(DILATIONS))
            spread = torch.cat([near, own], dim=1).std(dim=1, keepdim=True)
            likeness = -((near - own[:, :1]).abs() / (0.1 * spread + 1e-8)).mean(dim=0)
            others = torch.stack([scores[:, j, i] for j, i in places], dim=1)
            found[:, y, x] = others @ likeness.softmax(dim=0)
    return found


@pytest.mark.parametrize("most", [1, 2**20])
def test_it_is_that_of_the_plain_form(most):
    """Scores after three steps, as a whole or in three strips, and pixel by pixel."""
    image = F.interpolate(torch.rand(1, 3, 4, 5), (61, 5))[0].mul(255).byte()
    expected = scores = torch.rand(4, 61, 5)
    for _ in range(3):
        expected = pamr_step(expected, image)
    found = pamr.refine(scores.clone(), image, 3, most)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_memory_is_that_of_a_strip(monkeypatch):
    """Weights of neighbours, 192 bytes a pixel, are there for `most` pixels at a time, not for all;
    so figures of 2,000 rows take a tenth of what they would."""
    image, sizes = torch.zeros(3, 2000, 8, dtype=torch.uint8), []
    average = pamr.average
    monkeypatch.setattr(pamr, "average", lambda scores, begin, weights, out: sizes.append(
        weights.untyped_storage().nbytes()) or average(scores, begin, weights, out))
    pamr.refine(torch.rand(1, 2000, 8), image, 2, most=1000)
    assert max(sizes) <= 1000 * 192 and len(sizes) >= 2 * 2000 / 125


def test_it_moves_a_border_to_where_the_colour_changes():
    """A square of one colour whose scores end four pixels early."""
    image = torch.zeros(3, 48, 48, dtype=torch.uint8)
    image[:, 8:40, 8:40] = 200
    scores = torch.zeros(2, 48, 48)
    scores[0], scores[1, 12:36, 12:36] = 0.5, 1.0
    found = pamr.refine(scores, image, 10)
    assert torch.equal(found.argmax(dim=0).bool(), image[0] > 0)


def test_scores_that_are_the_same_everywhere_stay():
    """What neighbours weigh sums to 1 at every pixel, also at the border and in an image of one
    colour."""
    for image in (torch.randint(0, 256, (3, 9, 30)).byte(), torch.zeros(3, 9, 30).byte()):
        weights = pamr.colour_weights(image)
        assert weights.shape == (8 * len(pamr.DILATIONS), 9, 30)
        torch.testing.assert_close(weights.sum(dim=0), torch.ones(9, 30))
        scores = torch.tensor([0.25, -3.0]).view(2, 1, 1).expand(2, 9, 30).clone()
        torch.testing.assert_close(pamr.refine(scores.clone(), image, 3), scores)
