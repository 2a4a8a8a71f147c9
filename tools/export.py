"""Writes a trained model in the layout that other code reads, or that the Hugging Face hub takes.

    python -m tools.export --ckpt out/declip/declip.safetensors --layout eva --out declip_b16.pt
    python -m tools.export --ckpt out/declip/declip.safetensors --layout open_clip --out declip-b16
    python -m tools.export --ckpt out/declip/declip.safetensors --layout onnx --size 448 \\
        --classes "cat, dog | puppy, grass"     # or names.txt; without: dense features
    python -m tools.export --ckpt out/declip/declip.safetensors --layout hub --out declip-b16

eva: EVA-CLIP's names in a `.pt`, as CLIPSelf, F-ViT, OV-DQUO, CAT-Seg and the authors' DeCLIP read.
open_clip: a folder that open_clip.create_model("local-dir:declip-b16") loads, with its tokenizer.
Both have the same weights, bit for bit, and no place for the attention that the model was trained
with, so it is printed: use it there.

onnx: one file with the image tower and its attention, from normalised images (B, 3, *SIZE) to
`content` (B, C, h, w) or, with --classes, to `logits` (B, K, h, w): cosines of patches and classes,
of synonyms the best. All are float32, B is free, and the metadata says the rest: mean, std, classes
and so on, lists as json. onnxruntime runs the file before it gets its name, and has to agree with
PyTorch. Needs pip install onnx onnxscript onnxruntime. Not for detectors and CAT-Seg: in the middle
of them is RoIAlign or deformable attention, or texts that are given later.

hub: a folder to upload, with the checkpoint of a DeCLIP, F-ViT, OV-DQUO or CAT-Seg; a model card,
with what region.json and seg.json beside the checkpoint say of these weights; and open_clip's
files of a DeCLIP, unless its model is a folder of your own.
"""

import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from safetensors.torch import save_file

from model import DeCLIP
from tools import model_card, onnx_layout
from util import UserError, distributed, hub, settings
from util.backbones import is_eva_clip
from util.files import atomic_write, write_json
from util.towers import paths_inside, tokenizer_of
from util.weights import (
    eva_layout,
    open_clip_layout,
    read_clip_record,
    read_record,
    read_weights,
)

# What is written
CKPT = "out/declip/declip.safetensors"      # checkpoint of train.py; hub: any
MODEL: str | None = None            # its model, where that needs a download; None: the file's own
LAYOUT = "eva"                      # eva, open_clip, onnx or hub
OUT: str | None = None              # file (eva, onnx) or folder; None: beside the checkpoint

# The ONNX file
SIZE: tuple[int, ...] = (448,)      # of its images in pixels: the side, or height and width
CLASSES = ""                        # names with commas between, synonyms with |; or a .txt file
TEMPLATES = "imagenet"              # imagenet: 80 templates (paper); simple: 7; or one with {}
CACHE: str | None = "out/cache"     # folder that keeps embeddings of class names; None: none
HALF = False                        # fp16 inside: half the file, rounded; in and out stay float32


def main(argv: list[str] | None = None) -> None:
    """Writes what the command line (or `argv`) asks for."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__):
        run(cfg)


@torch.no_grad()
def run(cfg: SimpleNamespace) -> None:
    """Reads the checkpoint and writes it in another layout."""
    settings.check(cfg, LAYOUT=(cfg.LAYOUT in LAYOUTS, " or ".join(LAYOUTS)))
    settings.refuse_unread(cfg, sys.modules[__name__], [cfg.LAYOUT], {"The ONNX file": "onnx"})
    if cfg.LAYOUT == "onnx":
        onnx_layout.check(cfg)
    ckpt = hub.local(cfg.CKPT)
    is_hub = cfg.LAYOUT == "hub" and Path(ckpt).is_file()
    record = read_record(ckpt) if is_hub else read_clip_record(ckpt)
    if not record:
        raise UserError(f"{cfg.CKPT} does not say which model it is; give a declip.safetensors "
                        "that train.py wrote.")
    path = Path(cfg.OUT or hub.home(cfg.CKPT) / LAYOUTS[cfg.LAYOUT])
    if "use" in record:
        settings.refuse_unused(cfg, MODEL="is for a CLIP, which is not opened here")
    clip = None if "use" in record else DeCLIP(cfg.MODEL, ckpt)
    {"eva": write_eva, "open_clip": write_open_clip, "hub": partial(write_hub, ckpt, record),
     "onnx": partial(onnx_layout.write_onnx, cfg)}[cfg.LAYOUT](clip, path)
    print(f"written to {path}")
    if clip:
        meaning = " (1/√d)" if clip.scale is None else ""
        print(f"it is {clip.model_name}, to be used with context {clip.context} and scale "
              f"{clip.visual.attention_scale:.10g}{meaning}")


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


def write_hub(ckpt: str | Path, record: dict, clip: DeCLIP | None, folder: Path) -> None:
    """The checkpoint, a model card and, of a CLIP, open_clip's files.

    Raises UserError if the folder has a README.md that is not this tool's.
    """
    card = folder / "README.md"
    if card.exists() and model_card.MARK not in card.read_text(errors="replace"):
        raise UserError(f"{card} is there and not of this tool; choose another OUT, or move it.")
    if clip is None:
        read_weights(ckpt)      # UserError for a damaged file
    figures = model_card.figures_of(clip, Path(ckpt).parent) if clip else {}
    text = model_card.card(record, clip, figures)
    if clip and not record["model"].startswith("local-dir:"):   # parts would not be found elsewhere
        write_open_clip(clip, folder)
    file = folder / f"{model_card.kind_of(record)}.safetensors"     # what `hf-hub:` names fetch
    atomic_write(file, lambda copy: shutil.copyfile(ckpt, copy))
    atomic_write(card, lambda copy: Path(copy).write_text(text, encoding="utf-8"))
    private = [name for name, value in record.get("settings", {}).items()
               if isinstance(value, str) and value.removeprefix("local-dir:").startswith("/")]
    print("read README.md, the licences above all, before you upload it" + (
        f"; its checkpoint says where this machine keeps {', '.join(private)}" if private else ""))


LAYOUTS = {"eva": "declip_eva.pt", "open_clip": "open_clip", "onnx": "declip.onnx", "hub": "hub"}

if __name__ == "__main__":
    main()
