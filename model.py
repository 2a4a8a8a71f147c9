"""DeCLIP: a CLIP whose last attention block gives content and context (paper, section 3), its teachers and its losses.

    clip = DeCLIP("EVA02-B-16", pretrained="merged2b_s8b_b131k")
    content, context = clip.encode_dense(images)               # images as `clip.mean` and `clip.std` normalise them
    regions = region_features(content, boxes)
    logits = regions @ clip.encode_text(["cat", "dog"]).T

Letters: B images, N = h*w patch tokens, D width of the vision tower, C width of the text-image space, K regions.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipViT
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import eva, vision_transformer, vision_transformer_sam
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

import toy  # noqa: F401 - timm and open_clip learn of the nano models
from settings import UserError


class Attention(NamedTuple):
    """What the last block computes: the sum over projections A of softmax(AAᵀ)V, and what of the block is kept."""
    projections: str | None     # letters among q and k; "" is V itself; None is the block's own softmax(QKᵀ)V
    keeps_residual: bool        # the residual connections and the FFN


ATTENTIONS = {
    "clip": Attention(None, True),
    "maskclip": Attention("", True),
    "sclip": Attention("qk", True),
    "clearclip": Attention("q", False),
    "q": Attention("q", False),
    "k": Attention("k", False),
    "qk": Attention("qk", False),
}
DECOUPLED = ("q", "k", "qk")
UNDECOUPLED = ("clip", "maskclip")      # X_dense learns from both teachers: the first rows of Table 1
CONTEXTS = DECOUPLED + UNDECOUPLED


class DeCLIP(nn.Module):
    """A CLIP model by open_clip name, its vision tower a timm trunk, its last block decoupled (equations 4 to 6).

    model_name: a name of open_clip.list_models(); None is the file's own, else EVA02-B-16.
    pretrained: an open_clip tag; a file (`declip.safetensors`, an EVA-CLIP layout `.pt` or an open_clip state dict);
        None for random weights. A model named `local-dir:FOLDER` brings its own, whatever the tag.
    context: q, k or qk, the projections that make X_context (Table 7); clip or maskclip for a block that is not
        decoupled, whose dense output is content and context at once (Table 1); None is the file's own, else q.
    scale: factor of the decoupled block's logits (baselines always have 1/√d); None is the file's own, else the
        paper's 1/√d. The checkpoints that the authors released need 1.

    Raises UserError for an unknown name, tag or context, for a vision tower without a [CLS] projection, for a file
    of another model, and for a context or scale other than the one that a `declip.safetensors` was trained with.
    """

    def __init__(self, model_name: str | None = None, pretrained: str | None = None, context: str | None = None,
                 scale: float | None = None):
        super().__init__()
        self.checkpointing = False      # whether blocks are computed again in backward instead of kept, to save memory
        looks_like_file = pretrained and Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors")
        file = pretrained if looks_like_file or (pretrained and Path(pretrained).is_file()) else None
        state, recorded = read_weights(file) if file else ({}, {})
        self.model_name = model_name or recorded.get("model", "EVA02-B-16")
        self.context = context or recorded.get("context", "q")
        self.scale = scale if scale is not None else recorded.get("scale")
        if self.context not in CONTEXTS:
            raise UserError(f"context is {self.context!r}; it must be one of {', '.join(CONTEXTS)}.")
        self.clip = create_open_clip(self.model_name, None if file else pretrained)
        self.preprocess = dict(self.clip.visual.preprocess_cfg)     # as open_clip keeps it
        self.mean = tuple(recorded.get("mean", self.preprocess["mean"]))
        self.std = tuple(recorded.get("std", self.preprocess["std"]))
        self.clip.visual = timm_trunk(self.clip.visual, self.model_name)
        self.has_text = not file
        if file:
            self.load_weights(file, state, recorded)
        self.eval()

    @property
    def visual(self) -> nn.Module:
        """The vision tower, a timm trunk."""
        return self.clip.visual

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels; images must be multiples of it."""
        return self.visual.patch_embed.patch_size[0]

    @property
    def image_size(self) -> int:
        """Side of the image that CLIP was trained with."""
        return self.visual.patch_embed.img_size[0]

    def embed(self, images: Tensor) -> tuple[Tensor, dict, tuple[int, int]]:
        """(B, 3, H, W) -> tokens (B, 1 + N, D) with [CLS] first, keyword arguments of the blocks, (h, w).

        The position embedding is resampled bicubically without antialiasing, as the published code does.
        """
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise UserError(f"The image is {H}x{W}, but {self.model_name} needs sides divisible by its patch size, "
                            f"{self.patch_size}; resize or pad it.")
        visual = self.visual
        x = visual.patch_embed.proj(images)
        h, w = x.shape[-2:]
        tokens = torch.cat([visual.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        position = resample_abs_pos_embed(visual.pos_embed, (h, w), visual.patch_embed.grid_size, antialias=False)
        rope = getattr(visual, "rope", None)
        return visual.norm_pre(tokens + position), {"rope": rope.get_embed((h, w))} if rope is not None else {}, (h, w)

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) of the last block's output -> (..., C): final norm and visual projection."""
        return self.visual.head(self.visual.norm(tokens))

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C): the [CLS] embedding, not normalised."""
        x, extra, _ = self.embed(images)
        return self.project(self._run(self.visual.blocks, x, extra)[:, 0])

    def encode_dense(self, images: Tensor, attention: str | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> content (B, C, h, w), X_content in text-image space; context (B, N, D), X_context.

        attention: a row of ATTENTIONS for the content (a baseline's), by default this model's own context. The
            context does not depend on it. Neither output is normalised. For `qk` the context is (B, N, 2D), so
            that its cosine similarity is the mean of the two; where nothing is decoupled it is the content, (B, N, C).
        """
        attention = self.context if attention is None else attention
        if attention not in ATTENTIONS:
            raise UserError(f"attention is {attention!r}; it must be one of {', '.join(ATTENTIONS)}.")
        x, extra, (h, w) = self.embed(images)
        x = self._run(self.visual.blocks[:-1], x, extra)
        y, context = self._last_block(x, extra, attention)
        content = self.project(y[:, 1:])
        if self.context in UNDECOUPLED:
            own = y if attention == self.context else self._last_block(x, extra, self.context)[0]
            context = self.project(own)
        return content.transpose(1, 2).unflatten(2, (h, w)), context[:, 1:]

    def forward(self, images: Tensor, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One training step's view: region features (sum k, C) and context (B, N, D). DDP must be entered here."""
        content, context = self.encode_dense(images)
        return region_features(content, boxes), context

    def _run(self, blocks: nn.Sequential, x: Tensor, extra: dict) -> Tensor:
        """Tokens (B, 1 + N, D) through some blocks."""
        recomputes = self.checkpointing and torch.is_grad_enabled()
        for block in blocks:
            # Nothing in a block is random, so no random states are kept.
            x = (checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **extra) if recomputes else
                 block(x, **extra))
        return x

    def _last_block(self, x: Tensor, extra: dict, attention: str) -> tuple[Tensor, Tensor]:
        """(B, 1 + N, D) -> what `attention` makes of it, and X_context (equations 4 to 6), the same shape or 2D wide.

        X_context is None where nothing is decoupled.
        """
        block, (projections, keeps_residual) = self.visual.blocks[-1], ATTENTIONS[attention]
        normed = block.norm1(x)
        of_context = self.context if self.context in DECOUPLED else ""
        heads = {name: self.heads(name, normed) for name in {*of_context, *(projections or "")}}
        context = self._merge_context([heads[name].transpose(1, 2).flatten(2) for name in of_context])
        if projections is None:
            return block(x, **extra), context
        v = self.heads("v", normed)
        scale = self.scale if attention in DECOUPLED else None      # baselines divide by √d
        y = sum(self.self_attention(heads[name], v, scale) for name in projections)
        y = (y if projections else v).transpose(1, 2).flatten(2)
        y = block.attn.proj(block.attn.norm(y))
        if keeps_residual:
            y = x + y
            y = y + block.mlp(block.norm2(y))
        return y, context

    def heads(self, name: str, normed: Tensor) -> Tensor:
        """Proj_name of the last block's normed input, (B, heads, 1 + N, d); the rotary embedding is not applied."""
        attn = self.visual.blocks[-1].attn
        return projection(attn, name)(normed).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def self_attention(a: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """softmax(scale AAᵀ)V for (B, heads, 1 + N, d), without the matrix; scale None is 1/√d."""
        return F.scaled_dot_product_attention(a, a, v, scale=scale)

    @staticmethod
    def _merge_context(parts: list[Tensor]) -> Tensor | None:
        if len(parts) < 2:
            return parts[0] if parts else None
        # Unit vectors side by side: their cosine is the mean of the parts' cosines.
        return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1)

    @torch.no_grad()
    def encode_text(self, names: Sequence[str], templates: Sequence[str | Callable[[str], str]] = ("{}",)) -> Tensor:
        """K names -> (K, C): the mean of each name's L2-normalised embeddings over the templates, L2-normalised.

        templates: sentences with `{}` or functions of the name, such as open_clip.OPENAI_IMAGENET_TEMPLATES.
        Raises UserError for a name that is no list, for a template without {}, and if the weights came from a file
        without a text tower.
        """
        if isinstance(names, str) or any("{}" not in template for template in templates if isinstance(template, str)):
            raise UserError(f"names are {names!r} and templates {templates!r}; give a list of names, and sentences with {{}}.")
        if not self.has_text:
            raise UserError("The weights hold no text tower, so classes cannot be named; load the model by an "
                            "open_clip tag first, and this file on top of it.")
        tokenizer = open_clip.get_tokenizer(self.model_name)
        device = self.visual.pos_embed.device
        return open_clip.build_zero_shot_classifier(self.clip, tokenizer, list(names), templates, device=device).T

    def freeze(self, unlocked_blocks: int) -> None:
        """Leaves the last `unlocked_blocks` attention blocks trainable, less what the last one does not use for `context`.

        Raises UserError unless 1 <= unlocked_blocks <= depth.
        """
        blocks = self.visual.blocks
        if not 1 <= unlocked_blocks <= len(blocks):
            raise UserError(f"{unlocked_blocks} blocks were to be unlocked, but {self.model_name} has {len(blocks)}; "
                            f"choose 1 to {len(blocks)}.")
        self.requires_grad_(False)
        blocks[len(blocks) - unlocked_blocks:].requires_grad_(True)
        used = "qk" if self.context == "clip" else ATTENTIONS[self.context].projections
        unused = [projection(blocks[-1].attn, name) for name in "qk" if name not in used]
        unused += [] if ATTENTIONS[self.context].keeps_residual else [blocks[-1].norm2, blocks[-1].mlp]
        for module in unused:
            module.requires_grad_(False)

    def load_weights(self, path: str | Path, state: dict | None = None, recorded: dict | None = None) -> None:
        """Loads a file of any layout that the class knows over the present weights; a text tower may be absent.

        Raises UserError if vision weights are missing, if names or shapes are another model's, or if a
        `declip.safetensors` was trained as another model, or with another context or scale, than this one has.
        """
        if state is None:
            state, recorded = read_weights(path)
        for key, asked in {"model": self.model_name, "context": self.context, "scale": self.scale}.items():
            if recorded and asked != recorded[key]:
                raise UserError(f"{path} was trained with {key} {recorded[key]}, but {key} {asked} was asked for; "
                                f"leave {key} out, or set it to {recorded[key]}.")
        if not recorded:
            state = self._from_published_layout(state)
        own = self.clip.state_dict()
        missing = [key for key in own if key not in state and key.startswith("visual.")]
        alien = [key for key in state if key not in own or state[key].shape != own[key].shape]
        text_keys = [key for key in own if key.startswith("text.")]
        has_text = any(key in state for key in text_keys)
        missing += [key for key in text_keys if key not in state] if has_text else []
        if missing or alien:
            raise UserError(f"{path} does not fit {self.model_name}: {len(missing)} weights are missing and {len(alien)} "
                            f"are unknown or of another shape, the first being {(missing + alien)[0]}; "
                            "name the model that the file was made with.")
        self.clip.load_state_dict(state, strict=False)
        self.has_text = self.has_text or has_text

    def _from_published_layout(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under EVA-CLIP's or open_clip's names -> under this class's own."""
        state = convert_to_custom_text_state_dict(state)
        to_timm = eva if isinstance(self.visual, eva.Eva) else vision_transformer
        # Without any vision weight under a known name the filter would hand the text tower's back.
        known = {key: value for key, value in state.items() if key.startswith("visual.")}
        vision = split_last_qkv(to_timm.checkpoint_filter_fn(known, self.visual, antialias=False))
        out = {f"visual.{key}": value for key, value in vision.items()}
        out |= {key: value for key, value in state.items() if key.startswith("text.") and key != "text.attn_mask"}
        if "logit_scale" in state:
            out["logit_scale"] = state["logit_scale"].reshape(self.clip.logit_scale.shape)
        return out

    def save(self, path: str | Path, settings: dict | None = None, original: "DeCLIP | None" = None,
             share: float = 1.0) -> None:
        """Writes a checkpoint that describes itself: both towers, and as metadata the model, context, scale and settings.

        original, share: the weights saved are `share` of this model's and the rest of `original`'s, the CLIP that
            training began with (the published scripts' ensemble; the paper's share is 1).
        """
        state = {key: value.detach().cpu().contiguous() for key, value in self.clip.state_dict().items()}
        for key, value in original.clip.state_dict().items() if original and share < 1 else ():
            state[key] = torch.lerp(value.to(state[key]), state[key], share)
        record = {"model": self.model_name, "context": self.context, "scale": self.scale, "mean": self.mean,
                  "std": self.std, "settings": settings or {}}
        write_whole(path, lambda file: save_file(state, file, {"declip": json.dumps(record)}))


def create_open_clip(model_name: str, tag: str | None) -> nn.Module:
    """open_clip's model with its text tower as `.text`; its warnings about missing weights are ours to give.

    A model in a folder, `local-dir:FOLDER`, or on the Hugging Face hub brings its own weights; tag None leaves them out.
    """
    schema, _, folder = model_name.partition(":")
    if schema == "local-dir" and not (Path(folder) / "open_clip_config.json").is_file():
        raise UserError(f"{model_name} has no open_clip_config.json; name a folder that holds a model in open_clip's format, "
                        "as seen from the present one.")
    if schema not in ("local-dir", "hf-hub"):
        check_tag(model_name, tag)
    with silenced():
        return open_clip.create_model(model_name, pretrained=tag, load_weights=tag is not None, force_custom_text=True)


def check_tag(model_name: str, tag: str | None) -> None:
    """Raises UserError unless open_clip has the model and weights of that tag for it, made with its activation."""
    if model_name not in open_clip.list_models():
        raise UserError(f"open_clip has no model named {model_name!r}; see open_clip.list_models().")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag and tag not in tags:
        raise UserError(f"{tag!r} is neither a file nor one of open_clip's weights for {model_name}: "
                        f"{', '.join(tags) or 'it has none'}.")
    if tag and open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu", False) != uses_quick_gelu(model_name):
        raise UserError(f"The weights {tag!r} need the other activation; use the model "
                        f"{model_name.removesuffix('-quickgelu') + ('' if uses_quick_gelu(model_name) else '-quickgelu')}.")


def uses_quick_gelu(model_name: str) -> bool:
    """Whether open_clip builds `model_name` with OpenAI's approximate GELU."""
    return open_clip.get_model_config(model_name).get("quick_gelu", False)


@contextmanager
def silenced():
    """Without log messages below errors."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class SplitQKV(nn.Module):
    """timm's fused qkv as three projections, so that one can be frozen (and kept from weight decay) alone."""

    def __init__(self, qkv: nn.Linear):
        super().__init__()
        for name, weight, bias in zip("qkv", qkv.weight.chunk(3), qkv.bias.chunk(3)):
            linear = nn.Linear(qkv.in_features, len(weight))
            linear.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def split_last_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the last block's fused qkv as SplitQKV names it; a state without one is returned as it is."""
    last = max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=0)
    fused = f"blocks.{last}.attn.qkv."
    out = {key: value for key, value in state.items() if not key.startswith(fused)}
    for kind in ("weight", "bias"):
        if fused + kind in state:
            out |= {f"{fused}{name}.{kind}": part for name, part in zip("qkv", state[fused + kind].chunk(3))}
    return out


def projection(attn: nn.Module, name: str) -> nn.Linear:
    """Proj_q, Proj_k or Proj_v of a last block's attention."""
    return getattr(attn.qkv, name) if isinstance(attn.qkv, SplitQKV) else getattr(attn, f"{name}_proj")


def timm_trunk(visual: nn.Module, model_name: str) -> nn.Module:
    """open_clip's vision tower as a timm trunk with the same weights; UserError if the method can't use it."""
    try:
        trunk = dynamic(visual.trunk) if isinstance(visual, TimmModel) else convert_vit(visual)
    except (AttributeError, RuntimeError):     # a transformer with parts that timm's has no place for
        trunk = None
    if not isinstance(trunk, eva.Eva | vision_transformer.VisionTransformer) or not is_usable(trunk):
        raise UserError(f"The vision tower of {model_name} is not a transformer with a projected [CLS] token, which "
                        "the method distils from; use an EVA02 or OpenAI-style ViT such as EVA02-B-16 or ViT-B-16.")
    attn = trunk.blocks[-1].attn
    if attn.qkv is not None:
        attn.qkv = SplitQKV(attn.qkv)
    return trunk


def is_usable(trunk: eva.Eva | vision_transformer.VisionTransformer) -> bool:
    """Whether a trunk has a projected [CLS], plain patches, and blocks of the kind that `_last_block` takes apart."""
    block = trunk.blocks[-1]
    fused = block.attn.qkv
    return (trunk.global_pool == "token" and isinstance(trunk.head, nn.Linear) and trunk.num_prefix_tokens == 1
            and trunk.pos_embed is not None and type(trunk.patch_embed) is PatchEmbed
            and type(block) in (eva.EvaBlock, vision_transformer.Block) and (fused is None or fused.bias is not None)
            and getattr(block, "gamma_1", None) is None and isinstance(getattr(block, "ls1", None), nn.Identity | type(None)))


def dynamic(trunk: nn.Module) -> nn.Module:
    """The same timm model built anew for images of any size (its rotary embedding is fixed to one otherwise)."""
    if not isinstance(trunk, eva.Eva | vision_transformer.VisionTransformer):
        return trunk
    anew = timm.create_model(trunk.pretrained_cfg["architecture"], img_size=trunk.patch_embed.img_size,
                             num_classes=trunk.num_classes, global_pool=trunk.global_pool, dynamic_img_size=True)
    anew.load_state_dict(trunk.state_dict())
    return anew


def convert_vit(visual: OpenClipViT) -> vision_transformer.VisionTransformer:
    """open_clip's own VisionTransformer as timm's; [CLS] agrees to 3e-7."""
    block = visual.transformer.resblocks[0]
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise AttributeError("no [CLS] projection")
    width = block.mlp.c_fc.in_features
    trunk = vision_transformer.VisionTransformer(
        img_size=visual.image_size, patch_size=visual.patch_size, embed_dim=width, num_heads=block.attn.num_heads,
        depth=len(visual.transformer.resblocks), mlp_ratio=block.mlp.c_fc.out_features / width,
        num_classes=visual.output_dim, global_pool="token", pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=visual.ln_post.eps),
        act_layer="quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu")
    state = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    trunk.load_state_dict(vision_transformer.checkpoint_filter_fn(state, trunk))
    return trunk


def read_record(path: str | Path) -> dict:
    """What a `declip.safetensors` says of itself: model, context, scale, mean, std, settings; {} for other files."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("declip", "{}"))
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); write or download it again.") from None


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """A weights file -> (state dict without wrapping, what the file says of itself). Executes nothing it reads."""
    if not Path(path).is_file():
        raise UserError(f"There is no weights file {path}; give an existing file, an open_clip tag, or none.")
    if Path(path).suffix == ".safetensors":
        record = read_record(path)
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, record
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:       # whatever it is that was not written by torch.save, or holds more than tensors
        raise UserError(f"{path} is not a plain file of tensors, and nothing else is read; save its state dict with "
                        "torch.save, or convert it to safetensors.") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not weights by name; give a file with a state dict.")
    for wrapper in ("state_dict", "model", "module"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}, {}


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}     # what autocast computes in
PRECISIONS = ("auto", *DTYPES)


def find_precision(name: str, device: torch.device) -> str:
    """A key of DTYPES; of `auto` bf16 on a GPU that has it, else fp16 there, fp32 on a CPU."""
    if name != "auto":
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp32" if device.type == "cpu" else "bf16" if has_bf16 else "fp16"


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The context in which models compute in a precision of PRECISIONS."""
    dtype = DTYPES[find_precision(name, device)]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def write_whole(path: str | Path, write: Callable[[str], None]) -> None:
    """Calls `write` with a temporary name, flushes the file to disk and renames it: it is whole, or the old one stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode     # safetensors leaves files to their owner alone
        write(str(temporary))
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (SafetensorError, RuntimeError) as error:        # what safetensors and torch.save make of a full disk
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def region_features(content: Tensor, boxes: list[Tensor]) -> Tensor:
    """RoIAlign (1x1, adaptive sampling, aligned) of content (B, C, h, w) -> (sum k, C) in float32.

    boxes: for each image (k, 4), x0 y0 x1 y1 in [0, 1] of the image.
    """
    h, w = content.shape[-2:]
    # Columns are scaled by numbers: a tensor of them would have to be sent to the GPU, which waits for it.
    boxes = [torch.stack([box[:, 0::2].float() * w, box[:, 1::2].float() * h], dim=-1).flatten(1) for box in boxes]
    return roi_align(content.float(), boxes, 1, sampling_ratio=-1, aligned=True)[..., 0, 0]


def mask_features(content: Tensor, masks: list[Tensor]) -> Tensor:
    """Weighted mean of content (B, C, h, w) over each mask -> (sum k, C) in float32; zeros for an empty mask.

    masks: for each image (k, h, w), weights >= 0 on the feature grid.
    """
    pooled = [torch.einsum("chw,khw->kc", features.float(), mask.float())
              / mask.float().sum(dim=(1, 2)).clamp(min=1e-6)[:, None] for features, mask in zip(content, masks)]
    return torch.cat(pooled)


def content_loss(regions: Tensor, crops: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Equation 7: 1 - cosine of region features (K, C) and the teacher's [CLS] of the same crops (K, C) -> scalar.

    counts: the number k of regions of each image, in order. Then the loss is the mean over images of equation 7, so
        that it does not depend on how images are spread over ranks and steps; without it, the mean over all regions.
    """
    loss = 1 - F.cosine_similarity(regions.float(), crops.float(), dim=-1)
    if counts is None:
        return loss.mean()
    return torch.stack([part.mean() for part in loss.split(list(counts))]).mean()


def context_loss(context: Tensor, vfm_tokens: Tensor) -> Tensor:
    """Equations 8 and 9: the distance of the two correlation matrices' rows, mean over tokens and images -> scalar.

    context (B, N, D) and vfm_tokens (B, N, D'), of one grid. Computed in float32, also under autocast.
    Raises UserError if the numbers of tokens differ.
    """
    if context.shape[:2] != vfm_tokens.shape[:2]:
        raise UserError(f"The student has {tuple(context.shape[:2])} images and tokens, the VFM "
                        f"{tuple(vfm_tokens.shape[:2])}; give the VFM the student's token grid times its own patch size.")
    with torch.autocast(context.device.type, enabled=False):
        a, b = F.normalize(context.float(), dim=-1), F.normalize(vfm_tokens.float(), dim=-1)
        large = a.shape[1] > a.shape[2] + b.shape[2]
        return (row_distances_gram(a, b) if large else row_distances_direct(a, b)).mean()


def row_distances_direct(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, D), (B, N, D') -> (B, N): the L2 norm of each row of AAᵀ - BBᵀ, through the N x N matrices."""
    return torch.linalg.vector_norm(a @ a.mT - b @ b.mT, dim=-1)


def row_distances_gram(a: Tensor, b: Tensor) -> Tensor:
    """The same without an N x N matrix, memory linear in N; below a distance of about 0.02 float32 cancels.

    ‖row i‖² = aᵢ(AᵀA)aᵢᵀ - 2 aᵢ(AᵀB)bᵢᵀ + bᵢ(BᵀB)bᵢᵀ.
    """
    squared = (a * (a @ (a.mT @ a) - 2 * b @ (b.mT @ a))).sum(-1) + (b * (b @ (b.mT @ b))).sum(-1)
    return squared.clamp(min=1e-6).sqrt()


class VFM(nn.Module):
    """A frozen vision foundation model: images normalised with its own `mean` and `std` -> patch tokens (B, N, D').

    Raises UserError for an image whose sides its patch size does not divide.
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        config = timm.data.resolve_model_data_config(trunk)
        self.mean, self.std = config["mean"], config["std"]
        self.patch_size = trunk.patch_embed.patch_size[0]
        self.trunk = trunk.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h*w, D'): the last block's patch tokens after the final norm (SAM: its neck), row-major."""
        H, W, p = *images.shape[-2:], self.patch_size
        if H % p or W % p:
            raise UserError(f"The VFM's picture is {H}x{W}, but its patch size is {p}; the nearest size that works is "
                            f"{max(1, round(H / p)) * p}x{max(1, round(W / p)) * p}.")
        features, = self.trunk.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        return features.flatten(2).transpose(1, 2)


def load_vfm(name: str = "vit_base_patch14_dinov2.lvd142m", pretrained: bool | str = True) -> VFM:
    """A timm ViT as a teacher of context: DINO, DINOv2, DINOv3, SAM and others with tokens of one scale.

    pretrained: True for timm's weights, a file of weights, or False for random ones.
    Raises UserError if timm has no such model, or if it is no plain ViT.
    """
    if not timm.is_model(name):
        raise UserError(f"timm has no model named {name!r}; see timm.list_models('*dino*').")
    overlay = {"file": pretrained} if isinstance(pretrained, str) else None
    any_size = {} if name.startswith("samvit") else {"dynamic_img_size": True}     # SAM takes any size as it is
    try:
        trunk = timm.create_model(name, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, num_classes=0, **any_size)
    except TypeError:       # a model of a fixed image size does not know the last argument
        trunk = None
    if not isinstance(trunk, eva.Eva | vision_transformer.VisionTransformer | vision_transformer_sam.VisionTransformerSAM):
        raise UserError(f"{name} is no plain ViT whose patch tokens can be compared; use one, such as "
                        "vit_base_patch14_dinov2.lvd142m.")
    return VFM(trunk)
