"""CAT-Seg as one would first write it: every class and place repeated, concatenated and padded.

Tests hold what downstream/catseg returns against it. All functions take the weights of a `CATSeg`
and its layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data import normalize, resize
from downstream.catseg.model import Aggregator, CATSeg, ClassBlock, SwinBlock, Up, tokenizer_of


def loss(segmenter: CATSeg, images: Tensor, labels: Tensor) -> Tensor:
    """As CATSeg.forward: one target of 0 or 1 for each pixel and class."""
    found = F.interpolate(logits(segmenter, images, encode_classes(segmenter)), labels.shape[1:],
                          mode="bilinear").movedim(1, -1)
    target = torch.zeros_like(found)
    target[labels >= 0] = F.one_hot(labels[labels >= 0], found.shape[-1]).float()
    return F.binary_cross_entropy_with_logits(found, target)


def encode_classes(segmenter: CATSeg) -> Tensor:
    """As CATSeg.encode_classes: each class's sentence, padded to the tower's whole context."""
    sentences = [segmenter.design.template.format(name) for name in segmenter.names]
    tokens = tokenizer_of(segmenter.clip.source)(sentences).to(segmenter.tokens.device)
    return F.normalize(segmenter.clip.text.encode_text(tokens).float(), dim=-1)


def logits(segmenter: CATSeg, images: Tensor, text: Tensor) -> Tensor:
    """As CATSeg.logits: CLIP runs twice, for its content and for its blocks' outputs."""
    clip, attention = segmenter.clip, segmenter.design.attention
    content, _ = clip.encode_dense(images, attention)
    normalized = content / content.norm(dim=1, keepdim=True)
    cost = torch.stack([(normalized * name[:, None, None]).sum(1) for name in text], dim=1)
    taps = clip.encode_layers(images, segmenter.taps, attention)
    taps = [up(tap) for up, tap in zip(segmenter.upsample, taps)]
    content = normalized if segmenter.design.normalize else content
    return torch.cat([aggregate(segmenter.aggregator, *of_image, text)
                      for of_image in zip(cost, content, zip(*taps))])


def aggregate(aggregator: Aggregator, cost: Tensor, content: Tensor, taps: tuple[Tensor, Tensor],
              text: Tensor) -> Tensor:
    """As Aggregator, of one image: cost (T, h, w), content (C, h, w), taps (2D, 2h, 2w) and
    (D, 4h, 4w), text (T, C) -> (1, T, 4h, 4w)."""
    out = torch.full((len(cost), 4 * cost.shape[1], 4 * cost.shape[2]), -100.0, device=cost.device)
    best = sorted(range(len(cost)), key=lambda k: -cost[k].max().item())
    kept = sorted(best[:aggregator.max_classes])
    of_image = aggregator.image_guidance(content[None]).expand(len(kept), -1, -1, -1)
    of_text = aggregator.text_guidance(text[kept])
    x = torch.cat([aggregator.embed(cost[k][None, None]) for k in kept])        # (T, D, h, w)
    for layer in aggregator.layers:
        guidance = layer.norm(of_image.movedim(1, -1))
        for block in layer.spatial:
            x = spatial(block, x.movedim(1, -1), guidance).movedim(-1, 1)
        x = classes(layer.classes, x, of_text)
    decoder = aggregator.decoder
    for block, narrow, tap in zip(decoder.up, decoder.guidance, taps):
        x = up(block, x, narrow(tap[None]).expand(len(kept), -1, -1, -1))
    out[kept] = decoder.head(x)[:, 0]
    return out[None]


def spatial(block: SwinBlock, x: Tensor, guidance: Tensor) -> Tensor:
    """As SwinBlock, by the whole attention matrix: (T, h, w, D) each -> (T, h, w, D).

    Places are in one window if they lie in the same part of the grid, cut at `shift` and every
    `window` from there.
    """
    T, h, w, D = x.shape
    normed = block.norm1(x)
    both = torch.cat([normed, guidance], dim=-1)
    q, k, v = (part.flatten(1, 2).unflatten(-1, (block.heads, -1)).transpose(1, 2)
               for part in (block.q(both), block.k(both), block.v(normed)))
    row, column = ((torch.arange(side, device=x.device) - block.shift).div(
        block.window, rounding_mode="floor") for side in (h, w))
    part = (1000 * row[:, None] + column).flatten()
    weights = (q @ k.mT / (D / block.heads) ** 0.5).masked_fill(part[:, None] != part, -torch.inf)
    y = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(T, h, w, D)
    x = x + block.proj(y)
    return x + block.mlp(block.norm2(x))


def classes(block: ClassBlock, x: Tensor, guidance: Tensor) -> Tensor:
    """As ClassBlock, with every class that is padded: x (T, D, h, w), guidance (T, D) -> x."""
    T, D, h, w = x.shape
    small = F.avg_pool2d(x, 2) if block.training else x
    missing = max(0, block.max_classes - T)
    padding = block.padding[None, :, None, None].expand(missing, -1, *small.shape[2:])
    y = torch.cat([small, padding]).permute(2, 3, 0, 1)                 # (h, w, classes, D)
    guidance = torch.cat([guidance, block.padding_guidance.expand(missing, -1)])
    normed = block.norm1(y)
    both = torch.cat([normed, guidance.expand(*y.shape[:2], -1, -1)], dim=-1)
    q, k, v = (part.unflatten(-1, (block.heads, -1)).transpose(2, 3)
               for part in (block.q(both), block.k(both), block.v(normed)))
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT                # (h, w, heads, classes, classes)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
    y = y + (weights @ v).transpose(2, 3).flatten(3)
    y = (y + block.mlp(block.norm2(y)))[:, :, :T].permute(2, 3, 0, 1)
    return x + F.interpolate(y, (h, w), mode="bilinear", align_corners=True)


def up(block: Up, x: Tensor, guidance: Tensor) -> Tensor:
    """As Up: x (T, channels, h, w), guidance (T, g, 2h, 2w) -> (T, out, 2h, 2w)."""
    x = torch.cat([block.up(x), guidance], dim=1)
    x = F.relu(block.norm1(block.conv1(x)))
    return F.relu(block.norm2(block.conv2(x)))


@torch.inference_mode()
def probabilities(size: int, segmenter: CATSeg, text: Tensor, image: Tensor, starts: Sequence[int]
                  ) -> Tensor:
    """Published inference for an image uint8 (3, H, W), one view at a time -> (P, H, W).

    size: of the stretched image. starts: where windows begin, along both sides.
    """
    clip, window = segmenter.clip, segmenter.design.image_size

    def of(view: Tensor) -> Tensor:
        found = logits(segmenter, normalize(view, clip.mean, clip.std)[None], text)
        return F.interpolate(found, (window, window), mode="bilinear")[0].sigmoid()

    factor = min(size / min(image.shape[1:]), 4 * size / max(image.shape[1:]))
    seen = resize(image, *(int(side * factor + 0.5) for side in image.shape[1:]), "pil")[None]
    stretched, layers = F.interpolate(seen, (size, size), mode="bilinear")[0], []
    for y in starts:
        for x in starts:
            layer = torch.full((len(text), size, size), torch.nan, device=text.device)
            layer[:, y:y + window, x:x + window] = of(
                stretched[:, y:y + window, x:x + window])
            layers.append(layer)
    whole = of(F.interpolate(seen, (window, window), mode="bilinear")[0])
    whole = F.interpolate(whole[None], (size, size), mode="bilinear")
    mean = (torch.stack(layers).nanmean(dim=0) + whole) / 2 if layers else whole
    return F.interpolate(mean, image.shape[1:], mode="bilinear")[0]
