"""Families of vision towers: what the method needs of one, whatever its last block is.

A family is a class with the same few methods: embed, heads, dense, whole, pooled, project. The
equations are in model.py, which asks for nothing else.

Letters: B images, N = h*w patch tokens, T tokens, the prefix ([CLS]) first, D width, C width of the
text-image space.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.layers import AttentionPoolLatent, PatchEmbed, resample_abs_pos_embed
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from util import UserError

TIMM_VITS = eva.Eva | vision_transformer.VisionTransformer


class Split(nn.Module):
    """timm's fused projections, qkv or kv, as single ones, so that each can be frozen alone."""

    def __init__(self, fused: nn.Linear, letters: str):
        super().__init__()
        self.letters, count = letters, len(letters)
        for name, weight, bias in zip(letters, fused.weight.chunk(count), fused.bias.chunk(count)):
            linear = nn.Linear(fused.in_features, len(weight))
            linear.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.letters], dim=-1)


class Backbone:
    """What all families share. trunk: a timm ViT, to which all weights belong.

    A family adds `input_norm`, `num_heads`, `projection`, `dense`, `whole`, `pooled`, `project`,
    `unused`, and `reason_against`, which says what else it can't use.
    """

    REFUSED: dict[str, str] = {}        # rows of model.ATTENTIONS without meaning, and why

    def __init__(self, trunk: nn.Module):
        self.trunk, self.prefix = trunk, trunk.num_prefix_tokens
        self.width, self.embed_dim = trunk.embed_dim, trunk.num_classes or trunk.embed_dim
        self.blocks = [*trunk.blocks]       # attention blocks, of which the last is decoupled

    def embed(self, images: Tensor) -> tuple[Tensor, dict, tuple[int, int]]:
        """(B, 3, H, W) -> tokens (B, T, D); the blocks' keyword arguments; (h, w)."""
        trunk = self.trunk
        # Patches behind [CLS], if there is one, and where each of them is
        x = trunk.patch_embed.proj(images)
        grid = x.shape[-2:]
        x = trunk.patch_embed.norm(x.flatten(2).mT)
        if self.prefix:     # not len(x), which an exported program would keep as a number
            x = torch.cat([trunk.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        position, extra = self.positions(grid)
        return trunk.norm_pre(x + position), extra, tuple(grid)

    def positions(self, grid: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """What tells tokens of a grid (h, w) where they are: (1, T, D) to be added, and the blocks'
        keyword arguments.

        The position embedding is resampled bicubically without antialiasing, like the published
        code does.
        """
        trunk, rope = self.trunk, getattr(self.trunk, "rope", None)
        position = resample_abs_pos_embed(trunk.pos_embed, grid, trunk.patch_embed.grid_size,
                                          num_prefix_tokens=self.prefix, antialias=False)
        return position, {"rope": rope.get_embed(grid)} if rope is not None else {}

    def heads(self, names: Iterable[str], x: Tensor) -> dict[str, Tensor]:
        """Tokens before the last block -> their projections, (B, heads, T, d) by name."""
        normed = self.input_norm(x)
        return {name: self.by_heads(self.projection(name)(normed)) for name in names}

    def by_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, heads, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def probe(self) -> Tensor | None:
        """Proj_q of what attends for the image's embedding if it is no token, (1, heads, 1, d)."""

    @staticmethod
    def reason_against(trunk: nn.Module) -> str:
        """Why no family can embed for a timm ViT, for a sentence; "" if they can."""
        if type(trunk.patch_embed) is not PatchEmbed:
            return f"makes its patches by several layers ({type(trunk.patch_embed).__name__})"
        if getattr(trunk, "reg_token", None) is not None:
            return "has registers"
        if (trunk.pos_embed is None or getattr(trunk, "rope_mixed", False)
                or trunk.num_prefix_tokens and trunk.no_embed_class):
            return "has no learned position embedding of all tokens, or one in each block"
        return "" if trunk.dynamic_img_size else "takes images of one size (no dynamic_img_size)"


class ClassToken(Backbone):
    """EVA-CLIP's and OpenAI's ViTs: [CLS] is the image, and the trunk's last block is decoupled."""

    def __init__(self, trunk: nn.Module):
        super().__init__(trunk)
        self.attn, self.input_norm = self.blocks[-1].attn, self.blocks[-1].norm1
        self.num_heads = self.attn.num_heads
        if isinstance(self.attn.qkv, nn.Linear):
            self.attn.qkv = Split(self.attn.qkv, "qkv")

    def projection(self, name: str) -> nn.Linear:
        """Proj_q, Proj_k or Proj_v of the last block."""
        return projection(self.attn, name)

    def dense(self, x: Tensor, y: Tensor, residual: str, earlier: Sequence[Tensor] = ()) -> Tensor:
        """The last block's output, (B, T, D), for its input x and attention's, y (B, heads, T, d).

        residual: whose residual connection it keeps, with the FFN: each token's `own`, that of
        [`cls`] for all, or `none` (equation 5). earlier: tokens before blocks before, whose
        Proj(V) are added.
        """
        block = self.blocks[-1]
        y = self.attn.proj(self.attn.norm(y.transpose(1, 2).flatten(2)))
        for before, tokens in zip(self.blocks[-1 - len(earlier):-1], earlier):
            y = y + before.attn.proj(before.attn.norm(values(before.attn, before.norm1(tokens))))
        if residual == "none":
            return y
        y = y + (x[:, :1] if residual == "cls" else x)
        return y + block.mlp(block.norm2(y))

    def whole(self, x: Tensor, extra: dict, attend: Callable) -> Tensor:
        """The last block as it is: tokens (B, T, D) before it -> those after it."""
        return self.blocks[-1](x, **extra)

    def pooled(self, x: Tensor, extra: dict) -> Tensor:
        """Tokens before the last block -> the image's embedding, (B, C)."""
        return self.project(self.blocks[-1](x, **extra)[:, 0])

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) of the last block's output -> (..., C): final norm, visual projection."""
        return self.trunk.head(self.trunk.fc_norm(self.trunk.norm(tokens)))

    def unused(self, names: str, residual: str) -> list[nn.Module]:
        """What of the last block a dense output by these projections does not need."""
        block = self.blocks[-1]
        return ([self.projection(name) for name in "qk" if name not in names]
                + ([block.norm2, block.mlp] if residual == "none" else []))

    @staticmethod
    def reason_against(trunk: nn.Module) -> str:
        """Why a timm ViT is none of this family, for a sentence; "" if it is."""
        block = trunk.blocks[-1]
        if not isinstance(trunk.head, nn.Linear) or trunk.num_prefix_tokens != 1:
            return "has no projected [CLS] token alone"
        if not all(isinstance(getattr(block, name, None), nn.Identity | None)
                   for name in ("ls1", "gamma_1")):
            return "scales what its blocks add (LayerScale)"
        if type(block) not in (eva.EvaBlock, vision_transformer.Block):
            return f"has blocks of another kind than a plain one ({type(block).__name__})"
        attn = block.attn
        if (type(attn).__name__ not in ("Attention", "EvaAttention", "AttentionRope")
                or not isinstance(getattr(attn, "q_norm", None), nn.Identity | None)
                or (getattr(attn, "num_kv_heads", None) or attn.num_heads) != attn.num_heads):
            return "has attention of another kind than a plain one"
        fused = attn.qkv
        return "has projections without a bias" if fused is not None and fused.bias is None else ""


class AttentionPool(Backbone):
    """SigLIP and Perception Encoder: a probe attends to all tokens. That head is the last block.

    Its tokens are the trunk's after the final norm; decoupled, they take the probe's place.
    """

    REFUSED = {"catseg": "has no [CLS] whose residual connection all tokens could have",
               "values": "is no block of the residual stream, so V of others can't be added"}

    def __init__(self, trunk: nn.Module):
        super().__init__(trunk)
        self.head, self.input_norm = trunk.attn_pool, trunk.norm
        self.blocks, self.num_heads = [*self.blocks, self.head], self.head.num_heads
        if isinstance(self.head.kv, nn.Linear):
            self.head.kv = Split(self.head.kv, "kv")

    def projection(self, name: str) -> nn.Linear:
        """Proj_q, Proj_k or Proj_v of the head."""
        return self.head.q if name == "q" else getattr(self.head.kv, name)

    def dense(self, x: Tensor, y: Tensor, residual: str, earlier: Sequence[Tensor] = ()) -> Tensor:
        """Attention's output y (B, heads, T, d) -> the head's, (B, T, D).

        Its attention has no residual connection; its MLP has one, of the norm's input (`own`) or,
        in a decoupled head as published, of the norm's output (`none`).
        """
        y = self.head.proj(y.transpose(1, 2).flatten(2))
        normed = self.head.norm(y)
        return (normed if residual == "none" else y) + self.head.mlp(normed)

    def whole(self, x: Tensor, extra: dict, attend: Callable) -> Tensor:
        """The head as it is, each token in the probe's place."""
        heads = self.heads("qkv", x)
        return self.dense(x, attend(heads["q"], heads["k"], heads["v"]), "own")

    def pooled(self, x: Tensor, extra: dict) -> Tensor:
        """Tokens after the last of the trunk's blocks -> the image's embedding, (B, C)."""
        return self.project(self.head(self.input_norm(x)))

    def project(self, tokens: Tensor) -> Tensor:
        """The head's output (..., D) -> (..., C): a projection, if the tower has one."""
        return self.trunk.head(self.trunk.fc_norm(tokens))

    def probe(self) -> Tensor:
        """Proj_q of what attends in place of a token, (1, heads, 1, d)."""
        return self.by_heads(self.head.q(self.head.latent))

    def unused(self, names: str, residual: str) -> list[nn.Module | nn.Parameter]:
        """What of the head a dense output by these projections does not need: the probe, too."""
        return [self.projection(name) for name in "qk" if name not in names] + [self.head.latent]

    @staticmethod
    def reason_against(trunk: nn.Module) -> str:
        """Why a timm ViT is none of this family, for a sentence; "" if it is."""
        head = trunk.attn_pool
        if trunk.num_prefix_tokens and not getattr(trunk, "pool_include_prefix",
                                                   isinstance(trunk, eva.Eva)):
            return "pools without its [CLS] token"
        is_plain = (type(head) is AttentionPoolLatent and head.mlp is not None
                    and head.latent_len == 1 and head.pos_embed is None
                    and isinstance(head.q, nn.Linear) and head.kv.bias is not None
                    and isinstance(head.q_norm, nn.Identity))
        return "" if is_plain else "pools by attention of another kind than SigLIP's"


def projection(attn: nn.Module, name: str) -> nn.Linear:
    """Proj_q, Proj_k or Proj_v of a block's attention where they are not fused."""
    return getattr(attn, f"{name}_proj") if attn.qkv is None else getattr(attn.qkv, name)


def values(attn: nn.Module, x: Tensor) -> Tensor:
    """Proj_v of any block's attention, also of one whose three projections are fused."""
    if isinstance(attn.qkv, nn.Linear):
        return F.linear(x, attn.qkv.weight.chunk(3)[2], attn.qkv.bias.chunk(3)[2])
    return projection(attn, "v")(x)


def is_eva_clip(trunk: nn.Module) -> bool:
    """Whether a tower is EVA-CLIP's; timm's class Eva has others, such as Perception Encoder's."""
    return isinstance(trunk, eva.Eva) and trunk.global_pool == "token"


# By what timm calls a trunk's pooling.
FAMILIES = {"token": ClassToken, "map": AttentionPool}


def reason_against(trunk: nn.Module) -> str:
    """Why the method can't use a vision tower, for a sentence; "" if it can."""
    if isinstance(trunk, TimmModel):
        return reason_against(trunk.trunk) or "projects by a layer that is not its trunk's"
    if isinstance(trunk, OpenClipViT):
        return reason_against_converting(trunk)
    if not isinstance(trunk, TIMM_VITS):
        return f"is no plain ViT but a {type(trunk).__name__}"
    if trunk.global_pool not in FAMILIES:
        return ("has neither a projected [CLS] token nor a head that pools by attention (its "
                f"tokens' pooling is {trunk.global_pool})")
    return Backbone.reason_against(trunk) or FAMILIES[trunk.global_pool].reason_against(trunk)


def reason_against_converting(visual: OpenClipViT) -> str:
    """Why open_clip's own ViT has no like in timm, for a sentence."""
    if visual.attn_pool is not None or visual.pool_type != "tok":
        pool = "CoCa's attention" if visual.attn_pool is not None else visual.pool_type
        return f"has no projected [CLS] token (its tokens' pooling is {pool})"
    block = visual.transformer.resblocks[-1]
    if not isinstance(getattr(block, "ls_1", None), nn.Identity | None):
        return "scales what its blocks add (LayerScale)"
    return f"has blocks or norms of another kind than a plain one ({type(block).__name__})"


def family_of(trunk: nn.Module, name: str) -> ClassToken | AttentionPool:
    """A tower's family; UserError if the method can't use a tower, whose model is `name`."""
    reason = reason_against(trunk)
    if reason:
        raise UserError(f"The vision tower of {name} {reason}, so the method can't use it; choose "
                        "a model that works by docs/backbones.md, such as EVA02-B-16.")
    return FAMILIES[trunk.global_pool](trunk)
