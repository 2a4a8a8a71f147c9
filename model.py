"""DeCLIP: a CLIP whose last attention block gives content and context (paper, section 3).

    clip = DeCLIP("EVA02-B-16", pretrained="merged2b_s8b_b131k")
    content, context = clip.encode_dense(images)    # images normalised by clip.mean and clip.std
    regions = region_features(content, boxes)
    logits = regions @ clip.encode_text(["cat", "dog"]).T

In this order: the vision tower with its decoupled block, region and mask pooling, the two losses,
the vision foundation model, the whole CLIP, and how evaluation opens one.

Letters: B images, N = h*w patch tokens, D width of the vision tower, C width of the text-image
space, K regions or classes.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import eva, vision_transformer, vision_transformer_sam
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from data import Classes
from util import UserError
from util.distributed import is_main
from util.files import atomic_write
from util.precision import find_precision
from util.sharding import whole
from util.towers import (
    check_folder,
    create_open_clip,
    locate,
    paths_inside,
    project_values,
    projection,
    timm_trunk,
)
from util.weights import from_published, read_record, read_weights, write_checkpoint


class Attention(NamedTuple):
    """What the last block computes: the sum over projections A of softmax(AAᵀ)V."""
    projections: str | None     # letters of q and k; "": V itself; None: the block's QKᵀ
    keeps_residual: bool        # whether the residual connections and the FFN stay
    of_cls: bool = False        # the first residual connection is [CLS]'s for all tokens
    layers: int = 1             # last blocks whose V are added up


ATTENTIONS = {
    "clip": Attention(None, True),
    "maskclip": Attention("", True),
    "catseg": Attention("", True, of_cls=True),     # what CAT-Seg makes of OpenAI's CLIP
    "sclip": Attention("qk", True),
    "clearclip": Attention("q", False),
    "q": Attention("q", False),
    "k": Attention("k", False),
    "qk": Attention("qk", False),
    "values": Attention("", False, layers=3),       # DenseRC's, without its gate (docs/beyond.md)
}
DECOUPLED = ("q", "k", "qk")
UNDECOUPLED = ("clip", "maskclip", "values")    # one output learns from both teachers (Table 1)
CONTEXTS = DECOUPLED + UNDECOUPLED


# ---------------------------------------------------------------------------- the vision tower

class VisionTower(nn.Module):
    """CLIP's vision tower with a decoupled last block (equations 4 to 6). This is what is trained.

    trunk: a timm ViT or EVA02 with a projected [CLS]. context: a value of CONTEXTS. scale: factor
    of the decoupled block's logits, None for 1/√d. name: the model's name, for messages.
    """

    def __init__(self, trunk: nn.Module, context: str, scale: float | None,
                 mean: Sequence[float], std: Sequence[float], name: str):
        super().__init__()
        self.trunk, self.context, self.scale = trunk, context, scale
        self.mean, self.std, self.name = tuple(mean), tuple(std), name
        self.patch_size = trunk.patch_embed.patch_size[0]
        self.image_size = trunk.patch_embed.img_size[0]     # side of the images CLIP learned from
        self.num_layers, self.num_prefix_tokens = len(trunk.blocks), trunk.num_prefix_tokens
        self.checkpointing = False      # saves memory: backward computes the blocks again

    @property
    def attention_scale(self) -> float:
        """The factor of the decoupled block's logits, as a number."""
        d = self.trunk.embed_dim // self.trunk.blocks[-1].attn.num_heads
        return d**-0.5 if self.scale is None else self.scale

    @property
    def layers(self) -> int:
        """The number of last blocks that are computed in parts, for the content."""
        return ATTENTIONS[self.context].layers

    def forward(self, images: Tensor, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The student's part of a training step: region features (sum k, C), context (B, N, D).

        DDP averages gradients only if training calls it here.
        """
        content, context = self.encode_dense(images)
        return region_features(content, boxes), context

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C): the [CLS] embedding, not normalised."""
        x, extra, _ = self.embed(images)
        return self.project(self._run(self.trunk.blocks, x, extra)[:, 0])

    def encode_dense(self, images: Tensor, attention: str | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> content (B, C, h, w) in text-image space; context (B, N, D), X_context.

        attention: the row of ATTENTIONS that makes the content, by default the tower's own context.
            The context does not depend on it. Neither output is normalised. For `qk` the context is
            (B, N, 2D), so that its cosine is the mean of two cosines. Where nothing is decoupled
            the context is the content, (B, N, C).
        Raises UserError for an unknown attention, and for sides that the patch does not divide.
        """
        attention = self.known(attention)
        x, extra, grid = self.embed(images)
        inputs = self._inputs(x, extra, attention)
        y, context = self._last_block(inputs, extra, attention)
        content = self.project(y[:, 1:])
        if self.context in UNDECOUPLED:
            is_own = attention == self.context
            context = self.project(y if is_own
                                   else self._last_block(inputs, extra, self.context)[0])
        return content.mT.unflatten(2, grid), context[:, 1:]

    def encode_layers(self, images: Tensor, layers: Sequence[int], attention: str | None = None
                      ) -> list[Tensor]:
        """(B, 3, H, W) -> the patch tokens after each of the blocks `layers`, (B, D, h, w) each.

        layers: numbers of blocks from 0. The last block is the one that `attention` names, as in
        encode_dense; its output is the one before the final norm.
        Raises UserError for a layer that does not exist.
        """
        attention = self.known(attention)
        check_layers(layers, self.num_layers, self.name)
        x, extra, grid = self.embed(images)
        outputs, inputs, count = {}, [x], ATTENTIONS[attention].layers
        for number, block in enumerate(self.trunk.blocks[:-1]):
            inputs = [*inputs, self._run([block], inputs[-1], extra)][-count:]
            if number in layers:
                outputs[number] = inputs[-1]
        if self.num_layers - 1 in layers:
            outputs[self.num_layers - 1] = self._last_block(inputs, extra, attention)[0]
        return [outputs[number][:, 1:].mT.unflatten(2, grid) for number in layers]

    def attention_maps(self, images: Tensor, attention: str | None = None) -> list[Tensor]:
        """(B, 3, H, W) -> for each block its attention, the mean over heads: (B, 1 + N, 1 + N).

        Rows sum to 1, [CLS] comes first. The last block's is that of `attention` (equation 6).
        """
        attention = self.known(attention)
        projections, attn = ATTENTIONS[attention].projections, self.trunk.blocks[-1].attn
        x, extra, _ = self.embed(images)
        with recorded_attention(self.trunk.blocks) as maps:
            x = self._run(self.trunk.blocks[:-1], x, extra)
            self.trunk.blocks[-1](x, **extra)
        normed = self.trunk.blocks[-1].norm1(x)
        if projections == "":       # each token attends to itself
            maps[-1] = torch.eye(x.shape[1], device=x.device).expand_as(maps[-1])
        elif projections:
            scale = self.attention_scale if attention in DECOUPLED else attn.scale
            heads = [self.heads(name, normed) for name in projections]
            maps[-1] = torch.stack([(a @ a.mT * scale).softmax(dim=-1)
                                    for a in heads]).mean(dim=(0, 2))
        return maps

    def embed(self, images: Tensor) -> tuple[Tensor, dict, tuple[int, int]]:
        """(B, 3, H, W) -> tokens (B, 1 + N, D), [CLS] first; the blocks' keyword arguments; (h, w).

        The position embedding is resampled bicubically without antialiasing, like the published
        code does.
        """
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise UserError(f"The image is {H}x{W}, but {self.name} needs sides divisible by its "
                            f"patch size, {self.patch_size}; resize or pad it.")
        trunk = self.trunk
        x = trunk.patch_embed.proj(images)
        grid = x.shape[-2:]
        tokens = torch.cat([trunk.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
        position = resample_abs_pos_embed(trunk.pos_embed, grid, trunk.patch_embed.grid_size,
                                          antialias=False)
        rope = getattr(trunk, "rope", None)
        extra = {"rope": rope.get_embed(grid)} if rope is not None else {}
        return trunk.norm_pre(tokens + position), extra, tuple(grid)

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) of the last block's output -> (..., C): final norm, visual projection."""
        return self.trunk.head(self.trunk.norm(tokens))

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, extra: dict) -> Tensor:
        """Tokens (B, 1 + N, D) through some blocks."""
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so no random states are kept.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **extra)
            else:
                x = block(x, **extra)
        return x

    def _inputs(self, x: Tensor, extra: dict, attention: str) -> list[Tensor]:
        """The first block's tokens -> those before each of the last blocks that the content needs,
        (B, 1 + N, D) each."""
        count = max(self.layers, ATTENTIONS[attention].layers)
        inputs = [self._run(self.trunk.blocks[:-count], x, extra)]
        for block in self.trunk.blocks[-count:-1]:
            inputs.append(self._run([block], inputs[-1], extra))
        return inputs

    def _last_block(self, inputs: list[Tensor], extra: dict, attention: str
                    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, 1 + N, D) before the last blocks -> the last one's output by `attention`, and
        X_context (equations 4 to 6).

        X_context has the same shape, is 2D wide for `qk`, and None where nothing is decoupled.
        """
        block, row, x = self.trunk.blocks[-1], ATTENTIONS[attention], inputs[-1]
        projections = row.projections
        of_context = self.context if self.context in DECOUPLED else ""
        # 1. X_context = Proj_q(X), without the rotary embedding
        normed = block.norm1(x)
        heads = {name: self.heads(name, normed) for name in {*of_context, *(projections or "")}}
        context = merge_context([heads[name].transpose(1, 2).flatten(2) for name in of_context])
        if projections is None:
            return block(x, **extra), context
        # 2. softmax(X_context X_contextᵀ / √d) V
        v = self.heads("v", normed)
        scale = self.scale if attention in DECOUPLED else None      # baselines divide by √d
        y = sum(self.self_attention(heads[name], v, scale) for name in projections)
        y = (y if projections else v).transpose(1, 2).flatten(2)
        # 3. Proj, without residual connection and FFN; for `values` also of the blocks before
        earlier = slice(-row.layers, -1)
        y = sum((each.attn.proj(each.attn.norm(project_values(each.attn, each.norm1(tokens))))
                 for each, tokens in zip(self.trunk.blocks[earlier], inputs[earlier])),
                start=block.attn.proj(block.attn.norm(y)))
        if row.keeps_residual:
            y = (x[:, :1] if row.of_cls else x) + y
            y = y + block.mlp(block.norm2(y))
        return y, context

    def heads(self, name: str, normed: Tensor) -> Tensor:
        """Proj_q, Proj_k or Proj_v of the last block's normed input, (B, heads, 1 + N, d)."""
        attn = self.trunk.blocks[-1].attn
        return projection(attn, name)(normed).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def self_attention(a: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """softmax(scale AAᵀ)V for (B, heads, 1 + N, d), without the matrix; None is 1/√d."""
        return F.scaled_dot_product_attention(a, a, v, scale=scale)

    def known(self, attention: str | None) -> str:
        """A row of ATTENTIONS, None for this tower's context; UserError for any other."""
        attention = self.context if attention is None else attention
        if attention not in ATTENTIONS:
            raise UserError(f"attention is {attention!r}; it must be one of "
                            f"{', '.join(ATTENTIONS)}.")
        return attention

    def freeze(self, unlocked_blocks: int | None = None) -> None:
        """Leaves the last `unlocked_blocks` attention blocks trainable, None for all of them.

        Of the last block, what `context` does not use is frozen too.
        Raises UserError unless 1 <= unlocked_blocks <= depth.
        """
        blocks = self.trunk.blocks
        unlocked_blocks = len(blocks) if unlocked_blocks is None else unlocked_blocks
        if not 1 <= unlocked_blocks <= len(blocks):
            raise UserError(f"{unlocked_blocks} blocks were to be unlocked, but {self.name} has "
                            f"{len(blocks)}; choose 1 to {len(blocks)}.")
        self.requires_grad_(False)
        blocks[len(blocks) - unlocked_blocks:].requires_grad_(True)
        row = ATTENTIONS[self.context]
        used = "qk" if row.projections is None else row.projections
        unused = [projection(blocks[-1].attn, name) for name in "qk" if name not in used]
        unused += [] if row.keeps_residual else [blocks[-1].norm2, blocks[-1].mlp]
        for module in unused:
            module.requires_grad_(False)


def merge_context(parts: list[Tensor]) -> Tensor | None:
    """X_context of one or two projections; of two, the cosine is the mean of their cosines."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1)


@contextmanager
def recorded_attention(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects softmax(QKᵀ/√d) of timm blocks that run within it, each the mean over heads."""
    maps, handles = [], []
    were_fused = [block.attn.fused_attn for block in blocks]
    for block in blocks:
        # Only the plain form has the matrix; it passes it to a dropout.
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_pre_hook(
            lambda _, given: maps.append(given[0].mean(dim=1))))
    try:
        yield maps
    finally:
        for block, was_fused in zip(blocks, were_fused):
            block.attn.fused_attn = was_fused
        for handle in handles:
            handle.remove()


def check_layers(layers: Sequence[int], depth: int, name: str) -> None:
    """Raises UserError on a layer that a tower of `depth` blocks does not have."""
    wrong = next((layer for layer in layers if not 0 <= layer < depth), None)
    if wrong is not None:
        raise UserError(f"There is no layer {wrong} in {name}; choose from 0 to {depth - 1}.")


# --------------------------------------------------------------------------- pooling and losses

def region_features(content: Tensor, boxes: list[Tensor]) -> Tensor:
    """RoIAlign (1x1, adaptive sampling, aligned) of content (B, C, h, w) -> float32 (sum k, C).

    boxes: for each image (k, 4), x0 y0 x1 y1 in [0, 1] of the image.
    """
    h, w = content.shape[-2:]
    # Scaled by numbers, column by column: a GPU would wait for a tensor of them.
    boxes = [torch.stack([box[:, 0::2].float() * w, box[:, 1::2].float() * h], dim=-1).flatten(1)
             for box in boxes]
    return roi_align(content.float(), boxes, 1, sampling_ratio=-1, aligned=True)[..., 0, 0]


def mask_features(content: Tensor, masks: list[Tensor]) -> Tensor:
    """Weighted mean of content (B, C, h, w) over each mask -> float32 (sum k, C).

    masks: for each image (k, h, w), weights >= 0 on the feature grid; an empty mask gives zeros.
    """
    pooled = [torch.einsum("chw,khw->kc", features.float(), mask.float())
              / mask.float().sum(dim=(1, 2)).clamp(min=1e-6)[:, None]
              for features, mask in zip(content, masks)]
    return torch.cat(pooled)


def content_loss(regions: Tensor, crops: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Equation 7: 1 - cosine of region features (K, C) and the crops' [CLS] (K, C) -> scalar.

    counts: the number k of regions of each image, in order. With it the loss is the mean over
        images of equation 7, which does not depend on how images are spread over ranks and steps;
        without it, the mean over all regions.
    """
    loss = 1 - F.cosine_similarity(regions.float(), crops.float(), dim=-1)
    if counts is None:
        return loss.mean()
    return torch.stack([part.mean() for part in loss.split(list(counts))]).mean()


def context_loss(context: Tensor, vfm_tokens: Tensor, kept: Tensor | None = None) -> Tensor:
    """Equations 8 and 9: the distance of two correlation matrices' rows, the mean -> scalar.

    context (B, N, D) and vfm_tokens (B, N, D'), of one grid. kept: bool (B, N), the tokens whose
    rows and columns count, at least one of an image; None for all. Computed in float32 under
    autocast, too. Raises UserError if the numbers of tokens differ.
    """
    if context.shape[:2] != vfm_tokens.shape[:2]:
        raise UserError(f"The student has {tuple(context.shape[:2])} images and tokens, the VFM "
                        f"{tuple(vfm_tokens.shape[:2])}; give the VFM the student's token grid "
                        "times its own patch size.")
    with torch.autocast(context.device.type, enabled=False):
        a, b = F.normalize(context.float(), dim=-1), F.normalize(vfm_tokens.float(), dim=-1)
        if kept is not None:        # rows and columns of zeros add nothing to a distance
            kept = kept.to(a.device, non_blocking=True)
            a, b = a * kept[..., None], b * kept[..., None]
        is_large = a.shape[1] > a.shape[2] + b.shape[2]
        distances = row_distances_gram(a, b) if is_large else row_distances_direct(a, b)
        if kept is None:
            return distances.mean()
        return (distances * kept).sum(dim=1).div(kept.sum(dim=1)).mean()


def row_distances_direct(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, D), (B, N, D') -> (B, N): the L2 norm of each row of AAᵀ - BBᵀ, by matrices."""
    return torch.linalg.vector_norm(a @ a.mT - b @ b.mT, dim=-1)


def row_distances_gram(a: Tensor, b: Tensor) -> Tensor:
    """The same without an N x N matrix, memory linear in N; imprecise below a norm of about 0.02.

    ‖row i‖² = aᵢ(AᵀA)aᵢᵀ - 2 aᵢ(AᵀB)bᵢᵀ + bᵢ(BᵀB)bᵢᵀ.
    """
    squared = (a * (a @ (a.mT @ a) - 2 * b @ (b.mT @ a))).sum(-1) + (b * (b @ (b.mT @ b))).sum(-1)
    return squared.clamp(min=1e-6).sqrt()


# ------------------------------------------------------------------- the vision foundation model

class VFM(nn.Module):
    """A frozen vision foundation model: images normalised by its mean and std -> patch tokens."""

    def __init__(self, trunk: nn.Module, name: str):
        super().__init__()
        config = timm.data.resolve_model_data_config(trunk)
        self.mean, self.std, self.name = config["mean"], config["std"], name
        self.patch_size = trunk.patch_embed.patch_size[0]
        self.num_layers = len(trunk.blocks)
        self.num_prefix_tokens = getattr(trunk, "num_prefix_tokens", 0)     # [CLS] and registers
        self.trunk = trunk.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h*w, D'): the last block's patch tokens after the final norm.

        SAM's are those after its neck. Raises UserError for sides that the patch does not divide.
        """
        H, W, p = *images.shape[-2:], self.patch_size
        if H % p or W % p:
            raise UserError(f"The VFM's image is {H}x{W}, but its patch size is {p}; the nearest "
                            f"size that works is {max(1, round(H / p)) * p}x"
                            f"{max(1, round(W / p)) * p}.")
        features, = self.trunk.forward_intermediates(images, indices=1, norm=True,
                                                     intermediates_only=True)
        return features.flatten(2).mT

    @torch.no_grad()
    def encode_layers(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """(B, 3, H, W) -> the patch tokens after each of the blocks `layers`, (B, D', h, w) each.

        Raises UserError for a layer that does not exist.
        """
        check_layers(layers, self.num_layers, self.name)
        outputs = self.trunk.forward_intermediates(images, indices=self.num_layers,
                                                   intermediates_only=True)
        return [outputs[number] for number in layers]

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> for each block its attention, the mean over heads: (B, T, T).

        T are the prefix tokens, then the N patches; rows sum to 1.
        Raises UserError for SAM, which attends within windows.
        """
        if isinstance(self.trunk, vision_transformer_sam.VisionTransformerSAM):
            raise UserError(f"{self.name} attends within windows, so it has no attention from one "
                            "token to all; choose another VFM_MODEL, such as "
                            "vit_base_patch14_dinov2.lvd142m, or none.")
        with recorded_attention(self.trunk.blocks) as maps:
            self.trunk(images)
        return maps


def load_vfm(name: str = "vit_base_patch14_dinov2.lvd142m", pretrained: bool | str = True) -> VFM:
    """A timm ViT as a teacher of context: DINO, DINOv2, DINOv3, SAM, or `local-dir:FOLDER`.

    pretrained: True for timm's weights, a file of weights, or False for random ones.
    Raises UserError if timm has no such model, or if it is no plain ViT.
    """
    source = locate(name)
    if name.startswith("local-dir:"):
        check_folder(source, "config.json", "timm")
    elif not timm.is_model(name):
        raise UserError(f"timm has no model named {name!r}; see timm.list_models('*dino*').")
    overlay = {"file": pretrained} if isinstance(pretrained, str) else None
    is_sam = name.startswith("samvit")      # takes images of any size as it is
    try:
        trunk = timm.create_model(source, pretrained=bool(pretrained),
                                  pretrained_cfg_overlay=overlay, num_classes=0,
                                  **{} if is_sam else {"dynamic_img_size": True})
    except TypeError:       # a model of a fixed image size does not know the last argument
        trunk = None
    except (OSError, RuntimeError):
        if not name.startswith("local-dir:"):
            raise
        raise UserError(f"{name} has no weights of a VFM in timm's format; name a folder that has "
                        "them, such as local-dir:toy/vfm.") from None
    if not isinstance(trunk, eva.Eva | vision_transformer.VisionTransformer
                      | vision_transformer_sam.VisionTransformerSAM):
        raise UserError(f"{name} is no plain ViT whose patch tokens can be compared; use one, such "
                        "as vit_base_patch14_dinov2.lvd142m.")
    return VFM(trunk, name)


# --------------------------------------------------------------------------------- the whole CLIP

class DeCLIP(nn.Module):
    """A CLIP by open_clip name: `visual`, which is trained, and beside it `text`, which is not.

    model_name: a name of open_clip.list_models(), or `local-dir:FOLDER`; None is the file's own,
        else EVA02-B-16.
    pretrained: an open_clip tag; a file (`declip.safetensors`, an EVA-CLIP `.pt` or an open_clip
        state dict); None for random weights. A `local-dir:` model brings its own for any tag.
    context: q, k or qk, the projections that make X_context (Table 7); clip or maskclip for a block
        that is not decoupled (Table 1); values for the sum of three blocks' V (docs/beyond.md);
        None is the file's own, else q.
    scale: factor of the decoupled block's logits (baselines always have 1/√d); None is the file's
        own, else the paper's 1/√d. The checkpoints that the authors released need 1.

    `text` is open_clip's model without its vision tower, None if the file has no text tower.
    Raises UserError for an unknown name, tag or context, for a vision tower without a [CLS]
    projection, for a file of another model, and for a context or scale other than the one that a
    `declip.safetensors` was trained with.
    """

    def __init__(self, model_name: str | None = None, pretrained: str | None = None,
                 context: str | None = None, scale: float | None = None):
        super().__init__()
        is_named_file = pretrained and Path(pretrained).suffix in (".pt", ".pth", ".bin",
                                                                   ".safetensors")
        file = pretrained if is_named_file or pretrained and Path(pretrained).is_file() else None
        state, record = read_weights(file) if file else ({}, {})
        self.model_name = model_name or recorded_model(file, record)
        context = context or record.get("context", "q")
        scale = scale if scale is not None else record.get("scale")
        if context not in CONTEXTS:
            raise UserError(f"context is {context!r}; it must be one of {', '.join(CONTEXTS)}.")
        self.source = locate(self.model_name, file)     # as open_clip finds it
        self.text = create_open_clip(self.source, None if file else pretrained)
        self.preprocess = dict(self.text.visual.preprocess_cfg)     # as open_clip keeps it
        mean, std = (record.get(name, self.preprocess[name]) for name in ("mean", "std"))
        trunk = timm_trunk(self.text.visual, self.model_name)
        del self.text.visual
        self.visual = VisionTower(trunk, context, scale, mean, std, self.model_name)
        if file:
            has_text = self.load_weights(file, state, record)
            self.text = self.text if has_text else None
        self.eval()

    context = property(lambda self: self.visual.context)
    scale = property(lambda self: self.visual.scale)
    mean = property(lambda self: self.visual.mean)
    std = property(lambda self: self.visual.std)
    patch_size = property(lambda self: self.visual.patch_size)
    image_size = property(lambda self: self.visual.image_size)

    def encode_image(self, images: Tensor) -> Tensor:
        """See VisionTower.encode_image."""
        return self.visual.encode_image(images)

    def encode_dense(self, images: Tensor, attention: str | None = None) -> tuple[Tensor, Tensor]:
        """See VisionTower.encode_dense."""
        return self.visual.encode_dense(images, attention)

    def encode_layers(self, images: Tensor, layers: Sequence[int], attention: str | None = None
                      ) -> list[Tensor]:
        """See VisionTower.encode_layers."""
        return self.visual.encode_layers(images, layers, attention)

    @torch.no_grad()
    def encode_text(self, names: Sequence[str],
                    templates: Sequence[str | Callable[[str], str]] = ("{}",)) -> Tensor:
        """K names -> (K, C): the mean over templates of normalised embeddings, L2-normalised.

        templates: texts with `{}` or functions of the name, such as
            open_clip.OPENAI_IMAGENET_TEMPLATES.
        Raises UserError if names are no list, for a template without {}, for a name that is longer
        than what the text tower reads, and without a text tower.
        """
        texts = [template for template in templates if isinstance(template, str)]
        if isinstance(names, str) or any("{}" not in text for text in texts):
            raise UserError(f"names are {names!r} and templates {templates!r}; give a list of "
                            "names, and templates with {}.")
        if self.text is None:
            raise UserError("The weights hold no text tower, so classes cannot be named; load the "
                            "model by an open_clip tag first, and this file on top of it.")
        with paths_inside(self.source):
            tokenizer = open_clip.get_tokenizer(self.source)
        check_names(tokenizer, names, templates, self.model_name)
        device = self.text.logit_scale.device
        return open_clip.build_zero_shot_classifier(self.text, tokenizer, list(names), templates,
                                                    device=device).T

    def state(self) -> dict[str, Tensor]:
        """All weights under the names of a checkpoint: visual.*, text.*, logit_scale."""
        vision = {f"visual.{name}": value for name, value in self.visual.trunk.state_dict().items()}
        return vision | (self.text.state_dict() if self.text is not None else {})

    def save(self, path: str | Path, settings: dict | None = None,
             original: VisionTower | None = None, share: float = 1.0) -> None:
        """Writes a checkpoint that describes itself: both towers, model, context, scale, settings.

        original, share: the weights saved are `share` of this model's and the rest of `original`'s,
            the tower that training began with (the published scripts; the paper's share is 1).
        Of towers that are divided over ranks, all ranks call it, and the first one writes.
        """
        state = {name: whole(value.detach()).cpu().contiguous()
                 for name, value in self.state().items()}
        if original is not None and share < 1:
            for name, value in original.trunk.state_dict().items():
                own = state[f"visual.{name}"]
                state[f"visual.{name}"] = torch.lerp(whole(value).to(own), own, share)
        if not is_main():
            return
        write_checkpoint(path, state, self.describe() | {
            "mean": self.mean, "std": self.std, "settings": settings or {}})

    def describe(self) -> dict:
        """What a checkpoint and a result say of the model."""
        return {"model": self.model_name, "context": self.context, "scale": self.scale}

    def load_weights(self, path: str | Path, state: dict[str, Tensor] | None = None,
                     record: dict | None = None) -> bool:
        """Loads a weights file -> whether it has a text tower, which it may lack.

        state, record: what read_weights(path) returned, if it has been read.

        Raises UserError if vision weights are missing, if names or shapes are another model's, or
        if a `declip.safetensors` was trained as another model, or with another context or scale.
        """
        if state is None:
            state, record = read_weights(path)
        if record:
            self.check_record(path, record)
        else:
            state = from_published(state, self.visual.trunk)
        own = self.state()
        has_text = any(name.startswith("text.") for name in state)
        needed = [name for name in own if name.startswith("visual.")
                  or has_text and name.startswith("text.")]
        missing = [name for name in needed if name not in state]
        alien = [name for name in state
                 if name not in own or state[name].shape != own[name].shape]
        if missing or alien:
            raise UserError(f"{path} does not fit {self.model_name}: {len(missing)} weights are "
                            f"missing and {len(alien)} are unknown or of another shape, the first "
                            f"being {(missing + alien)[0]}; name the model that the file was made "
                            "with.")
        self.visual.trunk.load_state_dict({name.removeprefix("visual."): value
                                           for name, value in state.items()
                                           if name.startswith("visual.")})
        if self.text is not None:
            self.text.load_state_dict({name: value for name, value in state.items()
                                       if not name.startswith("visual.")}, strict=False)
        return has_text

    def check_record(self, path: str | Path, record: dict) -> None:
        """Raises UserError if a checkpoint says that it is another model than this one."""
        for name, asked in self.describe().items():
            is_same = asked == record[name]
            if name == "model" and not is_same:     # two paths of one folder
                is_same = self.source == locate(record[name], path)
            if not is_same:
                raise UserError(f"{path} was trained with {name} {record[name]}, but {name} "
                                f"{asked} was asked for; leave {name} out, or set it to "
                                f"{record[name]}.")


def check_names(tokenizer: Callable, names: Sequence[str],
                templates: Sequence[str | Callable[[str], str]], model_name: str) -> None:
    """Raises UserError on a name of which the tokenizer cuts something off in the longest template.
    """
    longest = max(templates, key=lambda template: len(fill(template, "")))
    most = tokenizer.context_length
    tokens = tokenizer(["", *(fill(longest, name) for name in names)], 2 * most)
    is_cut = (tokens[1:, most:] != tokens[0, -1]).any(dim=1)        # the rest is not padding
    if is_cut.any():
        cut = names[is_cut.tolist().index(True)]
        raise UserError(f"The class name {cut!r} is longer than the {most} tokens that "
                        f"{model_name} reads; shorten it.")


def fill(template: str | Callable[[str], str], name: str) -> str:
    """A template's text with a name in it."""
    return template.format(name) if isinstance(template, str) else template(name)


def recorded_model(file: str | None, record: dict) -> str:
    """The model that a file says it is, by default EVA02-B-16.

    Raises UserError if building that model would ask a hub: files do not decide about downloads.
    """
    name = record.get("model", "EVA02-B-16")
    config = {} if ":" in name else open_clip.get_model_config(name) or {}
    text = config.get("text_cfg", {})
    is_remote = ":" in name and not name.startswith("local-dir:")
    if is_remote or "hf_model_name" in text or "hf_tokenizer_name" in text:
        raise UserError(f"{file} says that it is {name}, which open_clip asks a hub for; if you "
                        f"trust it, say --model {name}.")
    return name


# ------------------------------------------------------------- what the evaluation settings name

# What the setting TEMPLATES may name.
TEMPLATES = {"imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
             "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def open_model(cfg: SimpleNamespace) -> DeCLIP:
    """The model of CKPT, MODEL, PRETRAINED, CONTEXT and SCALE, to be used with ATTENTION.

    A `declip.safetensors` says what it is. Any other CKPT is loaded over MODEL with PRETRAINED, and
    its attention must be named. Raises UserError if there is no such file, and if MODEL, CONTEXT or
    SCALE contradict it or are missing.
    """
    if cfg.ATTENTION not in (None, *ATTENTIONS):
        raise UserError(f"ATTENTION is {cfg.ATTENTION!r}; it must be one of "
                        f"{', '.join(ATTENTIONS)}.")
    if cfg.CKPT and not Path(cfg.CKPT).is_file():
        raise UserError(f"There is no checkpoint {cfg.CKPT}; train.py writes declip.safetensors "
                        "into its OUT folder.")
    record = read_record(cfg.CKPT) if cfg.CKPT else {}
    if "use" in record:
        raise UserError(f"{cfg.CKPT} is more than a CLIP; use it by {record['use']}.")
    if record:
        return DeCLIP(cfg.MODEL, cfg.CKPT, cfg.CONTEXT, cfg.SCALE)
    weights = read_weights(cfg.CKPT) if cfg.CKPT else ()        # before anything is downloaded
    if cfg.CKPT and not any(name.startswith("visual.") for name in weights[0]):
        raise UserError(f"{cfg.CKPT} holds no vision tower of a CLIP (no name begins with visual.);"
                        " give a declip.safetensors of train.py or a published checkpoint.")
    if cfg.CKPT and cfg.ATTENTION is None and None in (cfg.MODEL, cfg.CONTEXT, cfg.SCALE):
        raise UserError(f"{cfg.CKPT} does not say which model and attention it was trained with; "
                        "give --model, --context and --scale (the authors' checkpoints: --model "
                        "EVA02-B-16 --context qk --scale 1; 1/√d is 0.125 for heads 64 wide), or "
                        "--attention.")
    torch.manual_seed(0)        # random weights, if asked for, are the same at every run
    clip = DeCLIP(cfg.MODEL, cfg.PRETRAINED, cfg.CONTEXT, cfg.SCALE)
    if cfg.CKPT:
        clip.load_weights(cfg.CKPT, *weights)
    return clip


def open_original(cfg: SimpleNamespace, clip: DeCLIP) -> DeCLIP:
    """The CLIP that CKPT was made from, on the same device; `clip` itself without a CKPT."""
    if not cfg.CKPT:
        return clip
    return DeCLIP(clip.source, cfg.PRETRAINED).to(clip.visual.trunk.pos_embed.device)


def title(cfg: SimpleNamespace, clip: DeCLIP) -> str:
    """One line that says what was evaluated: model, attention, weights, precision."""
    attention = cfg.ATTENTION or clip.context
    if attention in DECOUPLED:
        attention += f", scale {'1/√d' if clip.scale is None else clip.scale}"
    has_own = cfg.PRETRAINED and ":" in clip.model_name
    weights = cfg.CKPT or ("its own weights" if has_own else cfg.PRETRAINED) or "random weights"
    precision = find_precision(cfg.PRECISION, clip.visual.trunk.pos_embed.device)
    rounded = "" if precision == "fp32" else f", {precision}"
    return f"{clip.model_name}, attention {attention}, {weights}{rounded}"


def encode_classes(clip: DeCLIP, classes: Classes, templates: str | Sequence[Callable],
                   cache: str | None) -> Tensor:
    """All names of a class list, synonyms too -> (prompts, C), L2-normalised.

    templates: the setting TEMPLATES, or functions of a name. cache: a folder that keeps the
    embeddings under a checksum of the text tower, the names and the templates, so that any change
    computes them anew; or None.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES and not re.fullmatch(r"[^{}]*\{\}[^{}]*", templates):
            raise UserError(f"TEMPLATES is {templates!r}; it must be {', '.join(TEMPLATES)} or a "
                            "template with {}.")
        templates = TEMPLATES.get(templates, (templates,))
    if cache is None or clip.text is None:
        return clip.encode_text(classes.prompts, templates)
    path = Path(cache) / f"text-{checksum(clip, classes.prompts, templates)}.safetensors"
    if path.is_file():
        return read_weights(path)[0]["text"].to(clip.text.logit_scale.device)
    text = clip.encode_text(classes.prompts, templates)
    atomic_write(path, lambda file: save_file({"text": text.cpu().contiguous()}, file))
    return text


def checksum(clip: DeCLIP, prompts: Sequence[str], templates: Sequence) -> str:
    """24 hexadecimal digits of everything that text embeddings depend on."""
    filled = [fill(template, "\0") for template in templates]
    # The configuration has the activation and the tokenizer.
    config = open_clip.get_model_config(clip.source) or clip.model_name
    digest = hashlib.sha256(json.dumps([config, list(prompts), filled], default=str).encode())
    for name, value in sorted(clip.text.text.state_dict().items()):
        values = value.cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:24]
