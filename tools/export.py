"""Writes a trained model in the layout that other code reads, bit for bit the same weights.

    python export.py --ckpt out/declip/declip.safetensors --layout eva --out declip_b16.pt
    python export.py --ckpt out/declip/declip.safetensors --layout open_clip --out declip-b16

eva: EVA-CLIP's names in a `.pt`, as CLIPSelf, F-ViT, OV-DQUO, CAT-Seg and the authors' DeCLIP load them.
open_clip: a folder that open_clip.create_model("local-dir:declip-b16") loads, tokenizer and all.
Neither layout has a place for the attention that the model was trained with, so it is printed: use it there.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor

import settings
from model import DeCLIP, read_record, write_whole
from settings import UserError

CKPT = "out/declip/declip.safetensors"      # checkpoint of train.py
LAYOUT = "eva"                      # eva or open_clip
OUT: str | None = None              # file (eva) or folder (open_clip) to write; None: beside the checkpoint

# timm's names of an EVA02 tower and EVA-CLIP's; the key's bias, which EVA does not have, is in neither.
EVA_NAMES = (("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3"), ("mlp.norm", "mlp.ffn_ln"),
             ("attn.norm", "attn.inner_attn_ln"), ("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias"))
# timm's names of an OpenAI-style tower and open_clip's.
VIT_NAMES = ((r"^patch_embed\.proj", "conv1"), (r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
             (r"\.norm(?=[12]\.)", ".ln_"), (r"^blocks", "transformer.resblocks"), (r"attn\.qkv\.", "attn.in_proj_"),
             (r"attn\.proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"))


def main(argv: list[str] | None = None) -> None:
    """Writes what the command line (or `argv`) asks for."""
    cfg = settings.parse(argv, sys.modules[__name__])
    try:
        run(cfg)
    except (UserError, OSError) as error:
        raise SystemExit(f"export.py: {error}") from None


def run(cfg: SimpleNamespace) -> None:
    """Reads the checkpoint and writes it anew."""
    if cfg.LAYOUT not in ("eva", "open_clip"):
        raise UserError(f"LAYOUT is {cfg.LAYOUT!r}; it must be eva or open_clip.")
    if Path(cfg.CKPT).is_file() and not read_record(cfg.CKPT):
        raise UserError(f"{cfg.CKPT} does not say which model it is; give a declip.safetensors that train.py wrote.")
    clip = DeCLIP(pretrained=cfg.CKPT)
    if cfg.LAYOUT == "eva":
        path = Path(cfg.OUT or Path(cfg.CKPT).with_name("declip_eva.pt"))
        state = eva_layout(clip)
        write_whole(path, lambda file: torch.save({"state_dict": state}, file))
    else:
        path = Path(cfg.OUT or Path(cfg.CKPT).with_name("open_clip"))
        write_open_clip(clip, path)
    scale = "1/√d (--scale sqrt_d)" if clip.scale is None else f"{clip.scale:g}"
    print(f"written to {path}; it is {clip.model_name}, to be used with context {clip.context} and scale {scale}")


def with_fused_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state whose last block has q, k and v apart (model.SplitQKV) -> with timm's one qkv."""
    out = {}
    for key, value in state.items():
        part = re.fullmatch(r"(.*\.qkv\.)([qkv])\.(weight|bias)", key)
        if not part:
            out[key] = value
        elif part[2] == "q":
            out[part[1] + part[3]] = torch.cat([state[f"{part[1]}{name}.{part[3]}"] for name in "qkv"])
    return out


def eva_layout(clip: DeCLIP) -> dict[str, Tensor]:
    """Both towers under EVA-CLIP's names. UserError for a tower that is no EVA02."""
    if not isinstance(clip.visual, Eva):
        raise UserError(f"EVA-CLIP's layout has no names for the tower of {clip.model_name}; use --layout open_clip.")
    out = {}
    for key, value in clip.clip.state_dict().items():
        for ours, theirs in EVA_NAMES if key.startswith("visual.") else ():
            key = key.replace(ours, theirs)
        out[key] = value
    return out


def open_clip_layout(clip: DeCLIP) -> dict[str, Tensor]:
    """Both towers under the names of open_clip's CustomTextCLIP."""
    state = clip.clip.state_dict()
    vision = with_fused_qkv({key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")})
    if isinstance(clip.visual, Eva):
        vision = {f"trunk.{key}": value for key, value in vision.items()}
    else:
        # timm's head has a bias, which is 0 and never trained.
        vision = {vit_name(key): vit_value(key, value) for key, value in vision.items() if key != "head.bias"}
    return {f"visual.{key}": value for key, value in vision.items()} | {
        key: value for key, value in state.items() if not key.startswith("visual.")}


def vit_name(key: str) -> str:
    """timm's name of a weight of an OpenAI-style tower -> open_clip's."""
    key = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "head.weight": "proj"}.get(key, key)
    for ours, theirs in VIT_NAMES:
        key = re.sub(ours, theirs, key)
    return key


def vit_value(key: str, value: Tensor) -> Tensor:
    """The weight as open_clip shapes it."""
    return value.T if key == "head.weight" else value[0, 0] if key == "cls_token" else value[0] if key == "pos_embed" else value


def write_open_clip(clip: DeCLIP, folder: Path) -> None:
    """open_clip_config.json and open_clip_model.safetensors."""
    config = open_clip.get_model_config(clip.model_name)
    merges = config["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path")
    if merges:      # a tokenizer of its own goes along
        write_whole(folder / Path(merges).name, lambda file: shutil.copyfile(merges, file))
        config["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = str(folder / Path(merges).name)
    preprocess = clip.preprocess | {"mean": clip.mean, "std": clip.std}
    text = json.dumps({"model_cfg": config | {"custom_text": True}, "preprocess_cfg": preprocess}, indent=2)
    state = {key: value.contiguous() for key, value in open_clip_layout(clip).items()}
    write_whole(folder / "open_clip_model.safetensors", lambda file: save_file(state, file))
    write_whole(folder / "open_clip_config.json", lambda file: Path(file).write_text(text + "\n"))


if __name__ == "__main__":
    main()
