"""DeCLIP: a CLIP whose last attention block gives content and context (paper, section 3).

    clip = DeCLIP("EVA02-B-16", pretrained="merged2b_s8b_b131k")
    content, context = clip.encode_dense(images)    # images normalised by clip.mean and clip.std
    regions = region_features(content, boxes)
    logits = regions @ clip.encode_text(["cat", "dog"]).T

In this order: the vision tower with its decoupled block, region and mask pooling, the two losses,
the vision foundation model, the whole CLIP.

Letters: B images, N = h*w patch tokens, T tokens with [CLS], D width of the vision tower, C width
of the text-image space, K regions or classes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from util import UserError, hub
from util.backbones import family_of
from util.distributed import is_main
from util.sharding import whole
from util.text import Template, cached_embeddings, check_lengths, check_names, fill_template
from util.towers import (
    create_open_clip,
    create_vit,
    locate,
    recorded_model,
    text_design,
    timm_trunk,
    tokenizer_of,
)
from util.weights import (
    check_fit,
    check_record,
    from_published,
    is_weights_file,
    read_weights,
    write_checkpoint,
)

# --------------------------------------------------------------------- what the last block computes

class Attention(NamedTuple):
    """The sum over projections A of softmax(AAᵀ)V, and what follows it."""
    projections: str | None     # letters of q and k; "": V itself; None: the block's QKᵀ
    residual: str               # connection kept, with the FFN: own, cls ([CLS]'s for all), none
    value_blocks: int = 1       # last blocks whose V are added up


ATTENTIONS = {
    "clip": Attention(None, "own"),
    "maskclip": Attention("", "own"),
    "catseg": Attention("", "cls"),                 # what CAT-Seg makes of OpenAI's CLIP
    "sclip": Attention("qk", "own"),
    "clearclip": Attention("q", "none"),
    "q": Attention("q", "none"),
    "k": Attention("k", "none"),
    "qk": Attention("qk", "none"),
    "values": Attention("", "none", value_blocks=3),        # DenseRC's (docs/beyond.md)
}
BASELINES = ("catseg", "sclip", "clearclip")    # never trained; every other row can be
TRAINED = tuple(name for name in ATTENTIONS if name not in BASELINES)
DECOUPLED = tuple(name for name in TRAINED if ATTENTIONS[name].projections)
# One output learns from both teachers (Table 1)
UNDECOUPLED = tuple(name for name in TRAINED if name not in DECOUPLED)
CONTEXTS = DECOUPLED + UNDECOUPLED


# ---------------------------------------------------------------------------- the vision tower

class VisionTower(nn.Module):
    """CLIP's vision tower with a decoupled last block (equations 4 to 6). This is what is trained.

    trunk: a timm ViT of a family in util/backbones.py, which says what its last block is: the last
    of EVA-CLIP's or OpenAI's, the pooling head of SigLIP's. context: a value of CONTEXTS. scale:
    factor of the decoupled block's logits, None for 1/√d. name: the model's name, for messages.
    Raises UserError for another trunk, and for a context without meaning in its family.
    """

    def __init__(self, trunk: nn.Module, context: str, scale: float | None,
                 mean: Sequence[float], std: Sequence[float], name: str):
        super().__init__()
        self.trunk, self.context, self.scale = trunk, context, scale
        self.mean, self.std, self.name = tuple(mean), tuple(std), name
        self.family = family_of(trunk, name)
        self.patch_size = trunk.patch_embed.patch_size[0]
        # Side of the images CLIP learned from, in whole patches
        self.image_size = trunk.patch_embed.grid_size[0] * self.patch_size
        self.width, self.embed_dim = self.family.width, self.family.embed_dim   # D and C
        self.num_layers, self.num_prefix_tokens = len(self.blocks), self.family.prefix
        self.checkpointing = False      # saves memory: backward computes the blocks again
        self.known(context)

    blocks = property(lambda self: self.family.blocks)      # attention blocks, the head included
    # How many of the last ones are computed in parts, for the content
    value_blocks = property(lambda self: ATTENTIONS[self.context].value_blocks)

    @property
    def attention_scale(self) -> float:
        """The factor of the decoupled block's logits, as a number."""
        d = self.width // self.family.num_heads
        return d**-0.5 if self.scale is None else self.scale

    def forward(self, images: Tensor, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The student's part of a training step: region features (sum k, C), context (B, N, D).

        DDP averages gradients only if training calls it here.
        """
        content, context = self.encode_dense(images)
        return region_features(content, boxes), context

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C): the image's embedding, [CLS] or a probe's, not normalised."""
        x, extra, _ = self.embed(images)
        return self.family.pooled(self._run(self.blocks[:-1], x, extra), extra)

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
        *earlier, x = self._inputs(x, extra, attention)
        y, context = self._last_block(x, extra, attention, earlier)
        content = self.project(y[:, self.num_prefix_tokens:])
        if self.context in UNDECOUPLED:     # its own content is what learns from the VFM
            if attention != self.context:
                y, _ = self._last_block(x, extra, self.context, earlier)
            context = self.project(y)
        return content.mT.unflatten(2, grid), context[:, self.num_prefix_tokens:]

    def encode_layers(self, images: Tensor, layers: Sequence[int], attention: str | None = None
                      ) -> list[Tensor]:
        """(B, 3, H, W) -> the patch tokens after each of the blocks `layers`, (B, D, h, w) each.

        layers: numbers of blocks from 0. The last block, which may be a pooling head, is the one
        that `attention` names, as in encode_dense; its output is the one before `project`.
        Raises UserError for a layer that does not exist.
        """
        attention = self.known(attention)
        wrong = next((layer for layer in layers if not 0 <= layer < self.num_layers), None)
        if wrong is not None:
            raise UserError(f"There is no layer {wrong} in {self.name}; choose from 0 to "
                            f"{self.num_layers - 1}.")
        x, extra, grid = self.embed(images)
        outputs, inputs, count = {}, [x], ATTENTIONS[attention].value_blocks
        for number, block in enumerate(self.blocks[:-1]):
            inputs = [*inputs, self._run([block], inputs[-1], extra)][-count:]
            if number in layers:
                outputs[number] = inputs[-1]
        if self.num_layers - 1 in layers:
            *earlier, x = inputs
            outputs[self.num_layers - 1] = self._last_block(x, extra, attention, earlier)[0]
        return [outputs[number][:, self.num_prefix_tokens:].mT.unflatten(2, grid)
                for number in layers]

    def embed(self, images: Tensor) -> tuple[Tensor, dict, tuple[int, int]]:
        """(B, 3, H, W) -> tokens (B, T, D), [CLS] first; the blocks' keyword arguments; (h, w).

        Raises UserError for sides that the patch does not divide.
        """
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise UserError(f"The image is {H}x{W}, but {self.name} needs sides divisible by its "
                            f"patch size, {self.patch_size}; resize or pad it.")
        return self.family.embed(images)

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) of the last block's output -> (..., C), in text-image space."""
        return self.family.project(tokens)

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, extra: dict) -> Tensor:
        """Tokens (B, T, D) through some blocks."""
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so no random states are kept.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **extra)
            else:
                x = block(x, **extra)
        return x

    def _inputs(self, x: Tensor, extra: dict, attention: str) -> list[Tensor]:
        """The first block's tokens -> those before each of the last blocks that the content needs,
        (B, T, D) each: one, but for rows of several value_blocks."""
        count = max(self.value_blocks, ATTENTIONS[attention].value_blocks)
        inputs = [self._run(self.blocks[:-count], x, extra)]
        for block in self.blocks[-count:-1]:
            inputs.append(self._run([block], inputs[-1], extra))
        return inputs

    def _last_block(self, x: Tensor, extra: dict, attention: str, earlier: Sequence[Tensor] = ()
                    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, D) before the last block -> its output by `attention`, and X_context
        (equations 4 to 6).

        X_context has the same shape, is 2D wide for `qk`, and None where nothing is decoupled.
        earlier: the tokens before the blocks before, for rows of several value_blocks.
        """
        row = ATTENTIONS[attention]
        # 1. X_context = Proj_q(X), without the rotary embedding (equation 4)
        of_context = ATTENTIONS[self.context].projections if self.context in DECOUPLED else ""
        of_content = "" if row.projections is None else "v" + row.projections
        heads = self.family.heads(dict.fromkeys(of_context + of_content), x)
        context = merge_context([heads[name].transpose(1, 2).flatten(2) for name in of_context])
        if row.projections is None:
            return self.family.whole(x, extra, self.attend), context
        # 2. softmax(X_context X_contextᵀ / √d) V (equation 6); baselines always divide by √d
        scale = self.scale if attention in DECOUPLED else None
        y = sum(self.attend(heads[name], heads[name], heads["v"], scale)
                for name in row.projections) if row.projections else heads["v"]
        # 3. X_content = Proj of that (equation 5), without residual connection and FFN but for
        # baselines that keep them
        earlier = earlier[len(earlier) + 1 - row.value_blocks:]
        return self.family.dense(x, y, row.residual, earlier), context

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """softmax(scale QKᵀ)V for (B, heads, T, d), without the matrix; None is 1/√d."""
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def known(self, attention: str | None) -> str:
        """A row of ATTENTIONS, None for this tower's context; UserError for any other, and for one
        without meaning in this tower."""
        attention = self.context if attention is None else attention
        refused = self.family.REFUSED
        rows = ", ".join(name for name in ATTENTIONS if name not in refused)
        if attention not in ATTENTIONS:
            raise UserError(f"attention is {attention!r}; it must be one of {rows}.")
        if attention in refused:
            raise UserError(f"There is no {attention} in {self.name}, whose last block "
                            f"{refused[attention]}; choose one of {rows}.")
        return attention

    def freeze(self, unlocked_blocks: int | None = None) -> None:
        """Leaves the last `unlocked_blocks` attention blocks trainable, None for all of them.

        Of the last block, what `context` does not use is frozen too.
        Raises UserError unless 1 <= unlocked_blocks <= depth.
        """
        depth = self.num_layers
        unlocked_blocks = depth if unlocked_blocks is None else unlocked_blocks
        if not 1 <= unlocked_blocks <= depth:
            raise UserError(f"{unlocked_blocks} blocks were to be unlocked, but {self.name} has "
                            f"{depth}; choose 1 to {depth}.")
        self.requires_grad_(False)
        for block in self.blocks[depth - unlocked_blocks:]:
            block.requires_grad_(True)
        row = ATTENTIONS[self.context]
        used = "qk" if row.projections is None else row.projections
        for part in self.family.unused(used, row.residual):
            part.requires_grad_(False)


def merge_context(parts: list[Tensor]) -> Tensor | None:
    """X_context of one or two projections; of two, the cosine is the mean of their cosines."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1)


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


def content_loss(regions: Tensor, crops: Tensor, counts: Sequence[int]) -> Tensor:
    """Equation 7: 1 - cosine of region features (K, C) and the crops' [CLS] (K, C) -> scalar.

    counts: the number k of regions of each image, in order. The loss is the mean over images, so
        it does not depend on how images are spread over ranks and steps.
    """
    loss = 1 - F.cosine_similarity(regions.float(), crops.float(), dim=-1)
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
        self.num_prefix_tokens = getattr(trunk, "num_prefix_tokens", 0)     # [CLS] and registers
        self.trunk = trunk.eval().requires_grad_(False)

    blocks = property(lambda self: self.trunk.blocks)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h*w, D'): the last block's patch tokens after the final norm, if any.

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


def load_vfm(name: str = "vit_base_patch14_dinov2.lvd142m", pretrained: bool = True) -> VFM:
    """A timm ViT as a teacher of context, one of docs/backbones.md or `local-dir:FOLDER`.

    pretrained: False for random weights.
    Raises UserError if timm has no such model, or if it is no plain ViT.
    """
    return VFM(create_vit(name, pretrained), name)


# --------------------------------------------------------------------------------- the whole CLIP

class DeCLIP(nn.Module):
    """A CLIP by open_clip name: `visual`, which is trained, and beside it `text`, which is not.

    model_name: a name of open_clip.list_models(), `local-dir:FOLDER`, or alone `hf-hub:owner/name`,
        whose declip.safetensors is the file; None is the file's own, else EVA02-B-16.
    pretrained: an open_clip tag; a file, here or of a hub (`declip.safetensors`, an EVA-CLIP `.pt`,
        open_clip's state dict); None for random weights; any tag is a `local-dir:` model's own.
    context: q, k or qk, which make X_context (Table 7); clip or maskclip for a block that is not
        decoupled (Table 1); values for three blocks' V (docs/beyond.md); None: the file's, else q.
    scale: factor of the decoupled block's logits (baselines always have 1/√d); None is the file's
        own, else the paper's 1/√d. The checkpoints that the authors released need 1.

    `text` is open_clip's model without its vision tower, None if the file has no text tower.
    Raises UserError for an unknown name, tag or context, a vision tower of no family in
    util/backbones.py, a file of another model, and a context or scale that a `declip.safetensors`
    was not trained with.
    """

    def __init__(self, model_name: str | None = None, pretrained: str | None = None,
                 context: str | None = None, scale: float | None = None):
        super().__init__()
        # 1. What the file says of itself, or what was asked for
        model_name, pretrained = hub.chosen(model_name, pretrained)
        file = pretrained if pretrained and is_weights_file(pretrained) else None
        state, record = read_weights(file) if file else ({}, {})
        self.model_name = model_name or recorded_model(file, record)
        context = context or record.get("context", "q")
        scale = scale if scale is not None else record.get("scale")
        if context not in CONTEXTS:
            raise UserError(f"context is {context!r}; it must be one of {', '.join(CONTEXTS)}.")
        # 2. open_clip's model; its vision tower becomes a timm trunk
        self.source = locate(self.model_name, file)     # as open_clip finds it
        self.text = create_open_clip(self.source, None if file else pretrained)
        self.preprocess = dict(self.text.visual.preprocess_cfg)     # as open_clip keeps it
        mean, std = (record.get(name, self.preprocess[name]) for name in ("mean", "std"))
        trunk = timm_trunk(self.text.visual)
        del self.text.visual
        self.visual = VisionTower(trunk, context, scale, mean, std, self.model_name)
        if file and not self.load_weights(file, state, record):
            self.text = None
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
    def encode_text(self, names: Sequence[str], templates: Sequence[Template] = ("{}",),
                    cache: str | Path | None = None) -> Tensor:
        """K names -> (K, C): the mean over templates of normalised embeddings, L2-normalised.

        templates: texts with `{}` or functions of the name, such as
            open_clip.OPENAI_IMAGENET_TEMPLATES.
        cache: a folder that keeps the embeddings, for this text tower, these names and templates.
        Raises UserError if names are no list, for a template without {}, for a name that is longer
        than what the text tower reads, and without a text tower.
        """
        check_names(names, templates)
        if self.text is None:
            raise UserError("The weights hold no text tower, so classes cannot be named; load the "
                            "model by an open_clip tag first, and this file on top of it.")
        if cache:
            sentences = [fill_template(template, "\0") for template in templates]
            key = [text_design(self.source), list(names), sentences]
            return cached_embeddings(cache, self.text.text, key,
                                     lambda: self.encode_text(names, templates))
        tokenizer = tokenizer_of(self.source)
        check_lengths(tokenizer, names, templates, self.model_name)
        device = self.text.logit_scale.device
        return open_clip.build_zero_shot_classifier(self.text, tokenizer, list(names), templates,
                                                    device=device).T

    def state(self) -> dict[str, Tensor]:
        """All weights under the names of a checkpoint: visual.*, text.*, logit_scale and _bias."""
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
            check_record(path, record, self.describe(), self.source)
        else:
            state = from_published(state, self.visual.trunk)
        has_text = any(name.startswith("text.") for name in state)
        check_fit(path, state, self.state(), self.model_name,
                  ("logit_",) if has_text else ("logit_", "text."))
        self.visual.trunk.load_state_dict({name.removeprefix("visual."): value
                                           for name, value in state.items()
                                           if name.startswith("visual.")})
        if self.text is not None:
            self.text.load_state_dict({name: value for name, value in state.items()
                                       if not name.startswith("visual.")}, strict=False)
        return has_text
