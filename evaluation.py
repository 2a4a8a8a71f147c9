"""Which model an evaluation looks at, and where its result goes: the settings that all evaluation scripts share."""

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
from torch import Tensor

from data import Classes
from model import DeCLIP, read_record, write_whole

CKPT: str | None = None             # checkpoint of train.py, or a published .pt; None: the CLIP that MODEL names
MODEL: str | None = None            # open_clip model; None: the checkpoint's, else EVA02-B-16
PRETRAINED: str | None = "merged2b_s8b_b131k"           # MODEL's weights, unless CKPT describes itself; None: random
CONTEXT: str | None = None          # q, k or qk; None: the checkpoint's, else q
SCALE: float | None = None          # factor of the last block's logits; None: the checkpoint's, else 1/√d
ATTENTION: str | None = None        # clip, maskclip, sclip, clearclip: a baseline; None: the decoupled block of CONTEXT
TEMPLATE = "imagenet"               # imagenet: 80 sentences (paper); simple: 7; or a sentence with {}
WORKERS = 4                         # processes that decode images, for each GPU
OUT: str | None = None              # folder of the result; None: the checkpoint's, or out/ without one

TEMPLATES = {"imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def open_model(cfg: SimpleNamespace) -> DeCLIP:
    """The model that the settings name.

    A `declip.safetensors` says itself what it is; any other CKPT is loaded over MODEL with PRETRAINED.
    Raises ValueError if there is no such file, or if CONTEXT, SCALE or MODEL contradict it.
    """
    if cfg.CKPT and not Path(cfg.CKPT).is_file():
        raise ValueError(f"There is no checkpoint {cfg.CKPT}; train.py writes declip.safetensors into its OUT folder.")
    if cfg.CKPT and read_record(cfg.CKPT):
        return DeCLIP(cfg.MODEL, cfg.CKPT, cfg.CONTEXT, cfg.SCALE)
    clip = DeCLIP(cfg.MODEL, cfg.PRETRAINED, cfg.CONTEXT, cfg.SCALE)
    if cfg.CKPT:
        clip.load_weights(cfg.CKPT)
    return clip


def encode_classes(cfg: SimpleNamespace, clip: DeCLIP, classes: Classes) -> Tensor:
    """All names of a class list, synonyms too -> (prompts, C), L2-normalised, by the sentences that TEMPLATE names."""
    if cfg.TEMPLATE not in TEMPLATES and "{}" not in cfg.TEMPLATE:
        raise ValueError(f"TEMPLATE is {cfg.TEMPLATE!r}; it must be {', '.join(TEMPLATES)} or a sentence with {{}}.")
    return clip.encode_text(classes.prompts, TEMPLATES.get(cfg.TEMPLATE, (cfg.TEMPLATE,)))


def title(cfg: SimpleNamespace, clip: DeCLIP) -> str:
    """One line that says what was evaluated."""
    return f"{clip.model_name}, attention {cfg.ATTENTION or clip.context}, {cfg.CKPT or f'weights {cfg.PRETRAINED}'}"


def write_result(cfg: SimpleNamespace, clip: DeCLIP, name: str, result: dict) -> None:
    """Writes `result`, with the model and the settings that led to it, as a json beside the checkpoint or into OUT."""
    path = Path(cfg.OUT or (Path(cfg.CKPT).parent if cfg.CKPT else "out")) / name
    about = {"model": clip.model_name, "context": clip.context, "scale": clip.scale, "settings": vars(cfg)}
    text = json.dumps(result | about, indent=2)
    write_whole(path, lambda file: Path(file).write_text(text + "\n"))
    print(f"written to {path}")
