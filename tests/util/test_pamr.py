"""util/pamr.py: scores against the plain form, and what refining is for."""

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


def test_it_is_that_of_the_plain_form():
    """Scores after two steps, by whole images and pixel by pixel; more texts than a chunk has, and
    rows that come in strips."""
    image = F.interpolate(torch.rand(1, 3, 4, 5), (13, 31))[0].mul(255).byte()
    scores = torch.rand(20, 13, 31)
    expected = pamr_step(pamr_step(scores, image), image)
    found = pamr.refine(scores.clone().split(5, dim=1), image, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_moves_a_border_to_where_the_colour_changes():
    """A square of one colour whose scores end four pixels early."""
    image = torch.zeros(3, 48, 48, dtype=torch.uint8)
    image[:, 8:40, 8:40] = 200
    scores = torch.zeros(2, 48, 48)
    scores[0], scores[1, 12:36, 12:36] = 0.5, 1.0
    found = pamr.refine([scores], image, 10)
    assert torch.equal(found.argmax(dim=0).bool(), image[0] > 0)


def test_scores_that_are_the_same_everywhere_stay():
    """What neighbours weigh sums to 1 at every pixel, also at the border and in an image of one
    colour."""
    for image in (torch.randint(0, 256, (3, 9, 30)).byte(), torch.zeros(3, 9, 30).byte()):
        weights = pamr.colour_weights(image)
        assert weights.shape == (8 * len(pamr.DILATIONS), 9, 30)
        torch.testing.assert_close(weights.sum(dim=0), torch.ones(9, 30))
        scores = torch.tensor([0.25, -3.0]).view(2, 1, 1).expand(2, 9, 30).clone()
        torch.testing.assert_close(pamr.refine([scores], image, 3), scores)
