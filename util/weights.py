"""Weight files in every layout, in and out.

A state has this project's own names: visual.* (the timm trunk), text.*, logit_scale and SigLIP's
logit_bias (open_clip's CustomTextCLIP). A record is what a `declip.safetensors` says of itself.
"""

import json
import os
import re
import zlib
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from open_clip.model import convert_to_custom_text_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from util import UserError, hub, settings
from util.backbones import Split
from util.files import (
    Schema,
    atomic_write,
    is_list,
    is_number,
    is_of,
    schema_of,
    wrong_field,
)
from util.towers import locate

# timm's names of an EVA02 tower and EVA-CLIP's. The key has no bias in either.
EVA_NAMES = (("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3"),
             ("mlp.norm", "mlp.ffn_ln"), ("attn.norm", "attn.inner_attn_ln"),
             ("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias"))
# timm's names of an OpenAI-style tower and open_clip's.
VIT_NAMES = (("^cls_token$", "class_embedding"), ("^pos_embed$", "positional_embedding"),
             (r"^head\.weight$", "proj"),
             (r"^patch_embed\.proj", "conv1"), (r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
             (r"\.norm(?=[12]\.)", ".ln_"), (r"^blocks", "transformer.resblocks"),
             (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj", "attn.out_proj"),
             (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"))


# ------------------------------------------------------------------------------------------- in

def read_record(path: str | Path) -> dict:
    """What a safetensors file of this project says of itself, checked against RECORD.

    {} for other files, and where there is none. Raises UserError for a damaged safetensors file or
    record, and for one of the hub that can't be had.
    """
    path = hub.local(path)
    if Path(path).suffix != ".safetensors" or not os.path.isfile(path):
        return {}
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("declip", "{}"))
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); write or download it "
                        "again.") from None
    except (ValueError, RecursionError) as error:
        record = str(error)
    if record != {}:
        check_fields(path, record, RECORD, ("model", "context", "scale"))
    if "settings" in record:
        record["settings"] = {name: hub.Recorded(value) if isinstance(value, str) else value
                              for name, value in record["settings"].items()}
    return record


def read_design(path: str | Path, content: dict, design: type[tuple]) -> tuple:
    """Fields of a record as a NamedTuple, whose annotations are their schema; else UserError."""
    check_fields(path, content, schema_of(design), design._fields)
    return design(**content)


def check_fields(path: str | Path, record: object, schema: Schema, needed: Collection[str]) -> None:
    """Raises UserError unless a record, or a part of one, fits its schema."""
    wrong = wrong_field(record, schema, needed)
    if wrong:
        raise UserError(f"{path} has metadata that train.py does not write ({wrong}); write or "
                        "copy it again.")


def is_settings(value: object) -> bool:
    """Whether a value is a training's settings: plain values, of the types that are read again."""
    return isinstance(value, dict) and all(SETTINGS.get(name, is_setting)(setting)
                                           for name, setting in value.items())


def is_setting(value: object) -> bool:
    """Whether a value is a plain one, or a list of them."""
    return all(isinstance(part, str | int | float | None)
               for part in (value if isinstance(value, list) else [value]))


# What is read again of a training's settings; of the others only the kind is known.
SETTINGS = {"step": lambda value: is_number(value, 0, 2**53), "SCALE": partial(is_of, float | None),
            **dict.fromkeys(("MODEL", "PRETRAINED", "CONTEXT", "ATTENTION", "BACKBONE", "DATASET"),
                            partial(is_of, str | None))}
# The fields of every record of this project.
RECORD = {
    "model": partial(is_of, str), "context": partial(is_of, str),
    "scale": partial(is_of, float | None), "use": partial(is_of, str), "settings": is_settings,
    "mean": partial(is_list, fits=is_number, length=3),
    "std": partial(is_list, fits=partial(is_number, least=1e-6), length=3),
    "catseg": lambda value: isinstance(value, dict),
    "fvit": lambda value: not wrong_field(value, DETECTOR, DETECTOR),
    "ov_dquo": lambda value: not wrong_field(value, DETECTOR, DETECTOR.keys() - {"tau"})}
DETECTOR = {"classes": partial(is_list, fits=partial(is_of, str)),
            "seen": partial(is_list, fits=partial(is_of, bool)), "tau": is_number,
            "design": lambda value: isinstance(value, dict), "backbone": partial(is_of, str)}


def read_clip_record(path: str | Path) -> dict:
    """As read_record, of a checkpoint that is to be used as a CLIP.

    Raises UserError also if there is no such file, or if it is more than a CLIP.
    """
    path = hub.local(path)
    if not os.path.isfile(path):
        raise UserError(f"There is no checkpoint {path}; train.py writes declip.safetensors into "
                        "its OUT folder.")
    record = read_record(path)
    if "use" in record:
        raise UserError(f"{path} is more than a CLIP; use it by {record['use']}.")
    return record


def used_record(cfg: SimpleNamespace, path: str | None, attention: str | None,
                decoupled: Sequence[str]) -> dict:
    """As read_clip_record, {} without a path; UserError also for settings of the model in vain.

    attention: what alone is computed, None for the context. decoupled: those that have a SCALE.
    """
    record = read_clip_record(path) if path else {}
    used = attention or cfg.CONTEXT or record.get("context", "q")
    settings.refuse_unused(
        cfg, CONTEXT=attention and f"is for a model without ATTENTION, which is {attention}",
        SCALE=used not in decoupled and f"is of decoupled blocks, but {used} always has 1/√d",
        PRETRAINED=record and f"is for files that don't say what they are, but {path} does")
    return record


def is_weights_file(name: str) -> bool:
    """Whether a name is a file of weights, there or not, and no tag."""
    return Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors") or os.path.isfile(name)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """A weights file -> (its state dict without wrapping, its record). Executes nothing it reads.

    Raises UserError if there is no such file, or if it holds anything but tensors by name.
    """
    path = hub.local(path)
    if not os.path.isfile(path):
        raise UserError(f"There is no weights file {path}; give an existing file, an open_clip "
                        "tag, or none.")
    is_safe = Path(path).suffix == ".safetensors"
    state, record = read_safetensors(path) if is_safe else (read_torch(path), {})
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        raise UserError(f"{path} has the layout of Hugging Face's transformers (vision_model.*), "
                        "which is not read; give the same weights in open_clip's or the authors' "
                        "own layout.")
    return state, record


def read_torch(path: str | Path) -> dict[str, Tensor]:
    """The weights by name in a file of torch.save; UserError if it is none, or one to resume."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:       # not written by torch.save, or more than tensors
        raise UserError(f"{path} is not a plain file of tensors, and nothing else is read; save "
                        "its state dict with torch.save, or convert it to safetensors.") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not weights by name; give a file "
                        "with a state dict.")
    if {"step", "optimizer", "scaler"} <= set(state):
        raise UserError(f"{path} is a checkpoint to resume training from, not a model; give the "
                        "declip.safetensors beside it.")
    for wrapper in ("state_dict", "model", "module"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    return {name.removeprefix("module."): value for name, value in state.items()
            if isinstance(name, str) and isinstance(value, Tensor)}


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """As read_weights; UserError also if the file has a checksum that its content does not have."""
    record = read_record(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}
    expected = metadata.get("checksum")
    if expected and expected != state_checksum(state, metadata.get("declip", "{}")):
        raise UserError(f"{path} is damaged: its content does not have its checksum; write or copy "
                        "it again.")
    return state, record


def read_published(path: str | Path, is_described: bool) -> dict[str, Tensor]:
    """The weights of a checkpoint that does not say what it is.

    is_described: whether the user does. Raises UserError otherwise, and without a vision tower.
    """
    state, _ = read_weights(path)
    if not any(name.startswith("visual.") for name in state):
        raise UserError(f"{path} holds no vision tower of a CLIP (no name begins with visual.); "
                        "give a declip.safetensors of train.py or a published checkpoint.")
    if not is_described:
        raise UserError(f"{path} does not say which model and attention it was trained with; give "
                        "--model, --context and --scale (the authors' checkpoints: --model "
                        "EVA02-B-16 --context qk --scale 1; 1/√d is 0.125 for heads 64 wide), or "
                        "--attention.")
    return state


def check_record(path: str | Path, record: dict, model: dict, source: str) -> None:
    """Raises UserError if a checkpoint says that it is another model than this one.

    model: what the model says of itself. source: its name as open_clip finds it.
    """
    for name, asked in model.items():
        is_folder = name == "model" and source == locate(record[name], path)    # by another path
        if asked != record[name] and not is_folder:
            raise UserError(f"{path} was trained with {name} {record[name]}, but {name} {asked} "
                            f"was asked for; leave {name} out, or set it to {record[name]}.")


def check_fit(path: str | Path, state: dict[str, Tensor], own: dict[str, Tensor], model: str,
              may_lack: tuple[str, ...] = ()) -> None:
    """Raises UserError unless a file's state has the names and shapes of a model's `own`.

    model: its name. may_lack: what begins the names of weights that may be missing.
    """
    missing = [name for name in own if name not in state and not name.startswith(may_lack)]
    alien = [name for name in state if name not in own or state[name].shape != own[name].shape
             or state[name].is_floating_point() != own[name].is_floating_point()]
    if missing or alien:
        raise UserError(f"{path} does not fit {model}: {len(missing)} weights are missing and "
                        f"{len(alien)} are unknown or of another shape, the first being "
                        f"{(missing + alien)[0]}; name the model that the file was made with.")


def from_published(state: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Weights under EVA-CLIP's or open_clip's names -> a state, for the trunk of a VisionTower.

    Position embeddings of another image size are resampled without antialiasing.
    """
    state = convert_to_custom_text_state_dict(state)
    to_timm = eva if isinstance(trunk, eva.Eva) else vision_transformer
    # Without vision weights under a known name the filter would return the text tower's.
    known = {name: value for name, value in state.items() if name.startswith("visual.")}
    vision = split_fused(to_timm.checkpoint_filter_fn(known, trunk, antialias=False), trunk)
    out = {f"visual.{name}": value for name, value in vision.items()}
    out |= {name: value for name, value in state.items()
            if name.startswith("text.") and name != "text.attn_mask"}
    return out | {name: state[name].reshape(()) for name in ("logit_scale", "logit_bias")
                  if name in state}


def split_fused(vision: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Splits what is fused in a file and, by backbones.Split, not in the trunk."""
    out = dict(vision)
    for fused, module in trunk.named_modules():
        for kind in ("weight", "bias") if isinstance(module, Split) else ():
            if f"{fused}.{kind}" in out:
                parts = out.pop(f"{fused}.{kind}").chunk(len(module.letters))
                out |= {f"{fused}.{name}.{kind}": part
                        for name, part in zip(module.letters, parts)}
    return out


# ------------------------------------------------------------------------------------------ out

def write_checkpoint(path: str | Path, state: dict[str, Tensor], record: dict) -> None:
    """Writes a safetensors file with `record` and a checksum of everything as its metadata."""
    text = json.dumps(record)
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {"declip": text, "checksum": state_checksum(state, text)}
    atomic_write(path, lambda file: save_file(state, file, metadata))


def state_checksum(state: dict[str, Tensor], record: str) -> str:
    """CRC-32 of a record and of all names, shapes and values of a state, as 8 digits."""
    crc = zlib.crc32(record.encode())
    for name, value in sorted(state.items()):
        crc = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), crc)
        crc = zlib.crc32(value.cpu().contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def eva_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with an EVA02 tower -> EVA-CLIP's names."""
    out = {}
    for name, value in state.items():
        for ours, theirs in EVA_NAMES if name.startswith("visual.") else ():
            name = name.replace(ours, theirs)
        out[name] = value
    return out


def open_clip_layout(state: dict[str, Tensor], is_timm: bool) -> dict[str, Tensor]:
    """A state -> the names of open_clip's CustomTextCLIP, whose tower may be timm's, too."""
    vision = fuse_split({name.removeprefix("visual."): value for name, value in state.items()
                         if name.startswith("visual.")})
    if is_timm:
        vision = {f"trunk.{name}": value for name, value in vision.items()}
    else:
        # timm's head has a bias, which is 0 and never trained.
        vision = {vit_name(name): vit_value(name, value) for name, value in vision.items()
                  if name != "head.bias"}
    others = {name: value for name, value in state.items() if not name.startswith("visual.")}
    return {f"visual.{name}": value for name, value in vision.items()} | others


def fuse_split(vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of split_fused."""
    out = {}
    for name, value in vision.items():
        part = re.fullmatch(r"(.*\.(q?kv)\.)([qkv])\.(weight|bias)", name)
        if not part:
            out[name] = value
        elif part[3] == part[2][0]:
            out[part[1] + part[4]] = torch.cat([vision[f"{part[1]}{letter}.{part[4]}"]
                                                for letter in part[2]])
    return out


def vit_name(name: str) -> str:
    """timm's name of a weight of an OpenAI-style tower -> open_clip's."""
    for ours, theirs in VIT_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def vit_value(name: str, value: Tensor) -> Tensor:
    """The weight as open_clip shapes it."""
    if name == "head.weight":
        return value.T
    if name == "cls_token":
        return value[0, 0]
    return value[0] if name == "pos_embed" else value
