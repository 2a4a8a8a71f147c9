"""open_clip's models by name, and their vision towers as timm trunks: one code path serves all."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.layers import PatchEmbed
from timm.models import eva, vision_transformer, vision_transformer_sam
from torch import Tensor, nn

from util import UserError
from util.files import ROOT, read_json

TIMM_VITS = eva.Eva | vision_transformer.VisionTransformer
SAM = vision_transformer_sam.VisionTransformerSAM


def locate(name: str, near: str | Path | None = None) -> str:
    """A `local-dir:FOLDER` name with the folder's whole path; any other name as it is.

    A relative folder is looked for in the present one, above the file `near` (a checkpoint that
    names it), and in the repository.
    """
    if not name.startswith("local-dir:"):
        return name
    folder = Path(name.removeprefix("local-dir:"))
    above = Path(near).absolute().parents if near else ()
    places = [place / folder for place in (Path.cwd(), *above, ROOT)]
    return f"local-dir:{next((place for place in places if place.is_dir()), places[0])}"


@contextmanager
def paths_inside(source: str) -> Iterator[None]:
    """Within it, the relative paths that a local model's configuration names are found.

    open_clip looks for them in the present folder; they are relative to one above the model's own.
    Raises UserError if they are nowhere.
    """
    if not source.startswith("local-dir:"):
        yield
        return
    folder, before = Path(source.removeprefix("local-dir:")), Path.cwd()
    path = folder / "open_clip_config.json"
    config = read_json(path, "model_cfg")["model_cfg"]
    try:
        tower = config["vision_cfg"].get("timm_model_name") or ""
        named = [config["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path"),
                 tower.removeprefix("local-dir:") if tower.startswith("local-dir:") else None]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no model of open_clip's ({error}); write it again.") from None
    named = [path for path in named if path]
    for place in (folder, *folder.parents, before):
        if all((place / path).exists() for path in named):
            os.chdir(place)
            break
    else:
        raise UserError(f"{folder} says that it needs {' and '.join(named)}, which is not there; "
                        "put the folder back to where it was written, or write it again.")
    try:
        yield
    finally:
        os.chdir(before)


def create_open_clip(model_name: str, tag: str | None) -> nn.Module:
    """open_clip's model with its text tower as `.text`.

    A model in a folder, `local-dir:FOLDER`, or on the Hugging Face hub brings its own weights; tag
    None leaves them out. Raises UserError for an unknown model or tag, or a failed download.
    """
    schema = model_name.partition(":")[0]
    if schema == "local-dir":
        check_folder(model_name, "open_clip_config.json", "open_clip")
        folder = Path(model_name.removeprefix("local-dir:"))
        if tag and not any(path.suffix in (".safetensors", ".bin", ".pth")
                           for path in folder.iterdir()):
            raise UserError(f"{model_name} has no weights beside its configuration; put "
                            "open_clip_model.safetensors there.")
    elif schema != "hf-hub":
        check_tag(model_name, tag)
    logging.disable(logging.WARNING)        # open_clip would warn of missing weights
    try:
        with paths_inside(model_name):
            return open_clip.create_model(model_name, pretrained=tag, load_weights=tag is not None,
                                          force_custom_text=True)
    except (RuntimeError, OSError) as error:
        if "download" not in str(error):
            raise
        raise UserError(f"The weights {tag} of {model_name} could not be downloaded; check the "
                        "network, name a file of weights instead, or try the toy world of "
                        "README.md.") from None
    finally:
        logging.disable(logging.NOTSET)


def check_folder(name: str, file: str, library: str) -> None:
    """Raises UserError unless the folder of a `local-dir:` name has the library's `file`."""
    if not (Path(name.removeprefix("local-dir:")) / file).is_file():
        raise UserError(f"{name} has no {file}; name a folder that holds a model in {library}'s "
                        "format, by its whole path if it is elsewhere.")


def check_tag(model_name: str, tag: str | None) -> None:
    """Raises UserError unless open_clip has weights of that tag for this model and activation."""
    if model_name not in open_clip.list_models():
        raise UserError(f"open_clip has no model named {model_name!r}; see "
                        "open_clip.list_models().")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag and tag not in tags:
        raise UserError(f"{tag!r} is neither a file nor one of open_clip's weights for "
                        f"{model_name}: {', '.join(tags) or 'it has none'}.")
    is_quick = open_clip.get_model_config(model_name).get("quick_gelu", False)
    config = open_clip.get_pretrained_cfg(model_name, tag) if tag else {}
    if tag and config.get("quick_gelu", False) != is_quick:
        other = model_name.removesuffix("-quickgelu") + ("" if is_quick else "-quickgelu")
        raise UserError(f"The weights {tag!r} need the other activation; use the model {other}.")


def timm_trunk(visual: nn.Module, model_name: str) -> nn.Module:
    """open_clip's vision tower as a timm trunk with the same weights, for images of any size.

    Raises UserError if the method can't use it.
    """
    try:
        is_timm = isinstance(visual, TimmModel)
        trunk = with_dynamic_size(visual.trunk) if is_timm else convert_vit(visual)
    except (AttributeError, RuntimeError):     # a transformer with parts that timm's does not have
        trunk = None
    if not isinstance(trunk, TIMM_VITS) or not is_usable(trunk):
        raise UserError(f"The vision tower of {model_name} is not a transformer with a projected "
                        "[CLS] token, which the method distils from; use an EVA02 or OpenAI-style "
                        "ViT such as EVA02-B-16 or ViT-B-16.")
    attn = trunk.blocks[-1].attn
    if attn.qkv is not None:
        attn.qkv = SplitQKV(attn.qkv)
    return trunk


def is_usable(trunk: nn.Module) -> bool:
    """Whether a trunk has a projected [CLS], plain patches, and blocks like `_last_block` needs."""
    block = trunk.blocks[-1]
    fused = block.attn.qkv
    has_plain_block = (
        type(block) in (eva.EvaBlock, vision_transformer.Block)
        and (fused is None or fused.bias is not None) and getattr(block, "gamma_1", None) is None
        and isinstance(getattr(block, "ls1", None), nn.Identity | type(None)))
    return (has_plain_block and trunk.global_pool == "token" and isinstance(trunk.head, nn.Linear)
            and trunk.num_prefix_tokens == 1 and trunk.pos_embed is not None
            and type(trunk.patch_embed) is PatchEmbed)


def with_dynamic_size(trunk: nn.Module) -> nn.Module:
    """The same timm model for images of any size; otherwise its rotary embedding fits one size."""
    if not isinstance(trunk, TIMM_VITS) or trunk.dynamic_img_size:
        return trunk
    anew = timm.create_model(trunk.pretrained_cfg["architecture"], dynamic_img_size=True,
                             img_size=trunk.patch_embed.img_size, num_classes=trunk.num_classes,
                             global_pool=trunk.global_pool)
    anew.load_state_dict(trunk.state_dict())
    return anew


def convert_vit(visual: OpenClipViT) -> vision_transformer.VisionTransformer:
    """open_clip's own VisionTransformer as timm's; [CLS] agrees to 3e-7."""
    block = visual.transformer.resblocks[0]
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise AttributeError("no [CLS] projection")
    width = block.mlp.c_fc.in_features
    trunk = vision_transformer.VisionTransformer(
        img_size=visual.image_size, patch_size=visual.patch_size, embed_dim=width,
        num_heads=block.attn.num_heads, depth=len(visual.transformer.resblocks),
        mlp_ratio=block.mlp.c_fc.out_features / width, num_classes=visual.output_dim,
        global_pool="token", pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=visual.ln_post.eps),
        act_layer="quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu")
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    trunk.load_state_dict(vision_transformer.checkpoint_filter_fn(state, trunk))
    return trunk


class SplitQKV(nn.Module):
    """timm's fused qkv as three projections, so that each can be frozen alone."""

    def __init__(self, qkv: nn.Linear):
        super().__init__()
        for name, weight, bias in zip("qkv", qkv.weight.chunk(3), qkv.bias.chunk(3)):
            linear = nn.Linear(qkv.in_features, len(weight))
            linear.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def projection(attn: nn.Module, name: str) -> nn.Linear:
    """Proj_q, Proj_k or Proj_v of a last block's attention."""
    is_split = isinstance(attn.qkv, SplitQKV)
    return getattr(attn.qkv, name) if is_split else getattr(attn, f"{name}_proj")


def project_values(attn: nn.Module, x: Tensor) -> Tensor:
    """Proj_v of any block's attention, also of one whose three projections are fused."""
    if not isinstance(attn.qkv, nn.Linear):
        return projection(attn, "v")(x)
    return F.linear(x, attn.qkv.weight.chunk(3)[2], attn.qkv.bias.chunk(3)[2])


def recorded_model(file: str | None, record: dict) -> str:
    """The model that a file says it is, by default EVA02-B-16.

    Raises UserError if building that model would ask a hub: files do not decide about downloads.
    """
    name = record.get("model", "EVA02-B-16")
    config = {} if ":" in name else open_clip.get_model_config(name) or {}
    if name.startswith("local-dir:"):
        folder = Path(locate(name, file).removeprefix("local-dir:"))
        config = read_json(folder / "open_clip_config.json", "model_cfg")["model_cfg"]
    is_remote = ":" in name and not name.startswith("local-dir:")
    if is_remote or not is_plain(config):
        raise UserError(f"{file} says that it is {name}, for which open_clip asks a hub or runs "
                        f"code; if you trust it, say --model {name}.")
    return name


def is_plain(config: dict) -> bool:
    """Whether open_clip builds a configuration from itself alone: no hub, no code of others."""
    if not isinstance(config, dict):
        return False
    vision, text = (config.get(name, {}) for name in ("vision_cfg", "text_cfg"))
    if not isinstance(vision, dict) or not isinstance(text, dict):
        return False
    tower, options = str(vision.get("timm_model_name", "")), text.get("tokenizer_kwargs", {})
    is_local = tower.startswith("local-dir:") or ":" not in tower
    return (is_local and not any(name.startswith("hf_") for name in text)
            and set(options or {}) <= {"bpe_path"} and not vision.get("timm_model_pretrained"))


def create_vit(name: str, pretrained: bool) -> nn.Module:
    """A timm ViT by name, or of a `local-dir:FOLDER`, for images of any size.

    pretrained: False for random weights.
    Raises UserError if timm has no such model, or if it is no plain ViT.
    """
    source = locate(name)
    if name.startswith("local-dir:"):
        check_folder(source, "config.json", "timm")
    elif not timm.is_model(name):
        raise UserError(f"timm has no model named {name!r}; see timm.list_models('*dino*').")
    any_size = {} if name.startswith("samvit") else {"dynamic_img_size": True}
    try:
        trunk = timm.create_model(source, pretrained=pretrained, num_classes=0, **any_size)
    except TypeError:       # a model of a fixed image size does not know dynamic_img_size
        trunk = None
    except (OSError, RuntimeError) as error:
        if not name.startswith("local-dir:"):
            reason = str(error).split(". ")[0].split("\n")[0]
            raise UserError(f"The weights of {name} can't be had ({reason}); check the network, or "
                            "name a VFM that is here by --vfm_model, such as local-dir:toy/vfm."
                            ) from None
        raise UserError(f"{name} has no weights of a VFM in timm's format; name a folder that has "
                        "them, such as local-dir:toy/vfm.") from None
    if not isinstance(trunk, TIMM_VITS | SAM):
        raise UserError(f"{name} is no plain ViT whose patch tokens can be compared; use one, such "
                        "as vit_base_patch14_dinov2.lvd142m.")
    return trunk
