"""Writes a trained model in the layout that other code reads, bit for bit the same weights.

    python -m tools.export --ckpt out/declip/declip.safetensors --layout eva --out declip_b16.pt
    python -m tools.export --ckpt out/declip/declip.safetensors --layout open_clip --out declip-b16

eva: EVA-CLIP's names in a `.pt`, as CLIPSelf, F-ViT, OV-DQUO, CAT-Seg and the authors' DeCLIP read.
open_clip: a folder that open_clip.create_model("local-dir:declip-b16") loads, with its tokenizer.
Neither layout has a place for the attention that the model was trained with, so it is printed: use
it there.
"""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from safetensors.torch import save_file

from model import DeCLIP
from util import UserError, distributed, settings
from util.backbones import is_eva_clip
from util.files import atomic_write, write_json
from util.towers import paths_inside, tokenizer_of
from util.weights import eva_layout, open_clip_layout, read_record

CKPT = "out/declip/declip.safetensors"      # checkpoint of train.py
MODEL: str | None = None            # its model, where that needs a download; None: the file's own
LAYOUT = "eva"                      # eva or open_clip
OUT: str | None = None              # file (eva) or folder (open_clip); None: beside the checkpoint


def main(argv: list[str] | None = None) -> None:
    """Writes what the command line (or `argv`) asks for."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__):
        run(cfg)


def run(cfg: SimpleNamespace) -> None:
    """Reads the checkpoint and writes it in another layout."""
    settings.check(cfg, LAYOUT=(cfg.LAYOUT in LAYOUTS, " or ".join(LAYOUTS)))
    if Path(cfg.CKPT).is_file() and not read_record(cfg.CKPT):
        raise UserError(f"{cfg.CKPT} does not say which model it is; give a declip.safetensors "
                        "that train.py wrote.")
    clip = DeCLIP(cfg.MODEL, cfg.CKPT)
    write, name = LAYOUTS[cfg.LAYOUT]
    path = Path(cfg.OUT or Path(cfg.CKPT).with_name(name))
    write(clip, path)
    meaning = " (1/√d)" if clip.scale is None else ""
    print(f"written to {path}; it is {clip.model_name}, to be used with context {clip.context} and "
          f"scale {clip.visual.attention_scale:.10g}{meaning}")


def write_eva(clip: DeCLIP, path: Path) -> None:
    """A file in EVA-CLIP's layout; UserError for a tower that is not EVA02-CLIP's."""
    if not is_eva_clip(clip.visual.trunk):
        raise UserError(f"EVA-CLIP's layout has no names for the tower of {clip.model_name}; use "
                        "--layout open_clip.")
    state = eva_layout(clip.state())
    atomic_write(path, lambda file: torch.save({"state_dict": state}, file))


def write_open_clip(clip: DeCLIP, folder: Path) -> None:
    """open_clip_config.json, open_clip_model.safetensors, and files that the config points to."""
    config, folder = open_clip.get_model_config(clip.source), folder.absolute()
    with paths_inside(clip.source):
        merges = config["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path")
        if merges:      # a tokenizer of its own
            config["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = copy_into(folder, Path(merges))
        tower = config["vision_cfg"].get("timm_model_name") or ""
        if tower.startswith("local-dir:"):      # a timm tower of its own
            copy_into(folder, Path(tower.removeprefix("local-dir:")) / "config.json")
            config["vision_cfg"]["timm_model_name"] = f"local-dir:{folder}"
    if config["text_cfg"].get("hf_tokenizer_name"):     # open_clip looks for it in the folder
        tokenizer_of(clip.source).tokenizer.save_pretrained(folder)
    state = open_clip_layout(clip.state(), is_timm=bool(tower))
    state = {name: value.contiguous() for name, value in state.items()}
    atomic_write(folder / "open_clip_model.safetensors", lambda file: save_file(state, file))
    preprocess = clip.preprocess | {"mean": clip.mean, "std": clip.std}
    write_json(folder / "open_clip_config.json", {
        "model_cfg": config | {"custom_text": True}, "preprocess_cfg": preprocess})


def copy_into(folder: Path, file: Path) -> str:
    """Copies a file into a folder -> its path there."""
    atomic_write(folder / file.name, lambda copy: shutil.copyfile(file, copy))
    return str(folder / file.name)


LAYOUTS = {"eva": (write_eva, "declip_eva.pt"), "open_clip": (write_open_clip, "open_clip")}

if __name__ == "__main__":
    main()
