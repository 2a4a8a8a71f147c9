"""Which model an evaluation looks at, and where its result goes: the settings that all evaluation scripts share."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

import distributed
from data import Classes, workers
from model import ATTENTIONS, DECOUPLED, PRECISIONS, DeCLIP, autocast, find_precision, read_record, read_weights, write_whole
from settings import UserError

CKPT: str | None = None             # checkpoint of train.py, or a published .pt; None: the CLIP that MODEL names
MODEL: str | None = None            # open_clip model, or local-dir:FOLDER; None: the checkpoint's, else EVA02-B-16
PRETRAINED: str | None = "merged2b_s8b_b131k"           # MODEL's weights, unless CKPT describes itself; None: random
CONTEXT: str | None = None          # q, k, qk, clip or maskclip; None: the checkpoint's, else q
SCALE = "auto"                      # factor of the decoupled block's logits: sqrt_d (1/√d), a number; auto: the checkpoint's
ATTENTION: str | None = None        # clip, maskclip, sclip, clearclip: a baseline; None: the decoupled block of CONTEXT
TEMPLATE = "imagenet"               # imagenet: 80 sentences (paper); simple: 7; or a sentence with {}
PRECISION = "fp32"                  # of regions and segmentation; bf16, fp16: faster on a GPU, but rounded; auto: as train.py
WORKERS = 4                         # processes that decode images, for each GPU
CACHE: str | None = "out/cache"     # folder where embeddings of class names are kept; None: computed at every run
OUT: str | None = None              # folder of the result; None: the checkpoint's, or out/ without one

TEMPLATES = {"imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def open_model(cfg: SimpleNamespace) -> DeCLIP:
    """The model that the settings name.

    A `declip.safetensors` says itself what it is; any other CKPT is loaded over MODEL with PRETRAINED, and its attention
    must be named. Raises UserError if there is no such file, if MODEL, CONTEXT or SCALE contradict it, or are needed.
    """
    if cfg.ATTENTION not in (None, *ATTENTIONS):
        raise UserError(f"ATTENTION is {cfg.ATTENTION!r}; it must be one of {', '.join(ATTENTIONS)}.")
    if cfg.CKPT and not Path(cfg.CKPT).is_file():
        raise UserError(f"There is no checkpoint {cfg.CKPT}; train.py writes declip.safetensors into its OUT folder.")
    scale = None if cfg.SCALE in ("auto", "sqrt_d") else number(cfg.SCALE)
    recorded = read_record(cfg.CKPT) if cfg.CKPT else {}
    if recorded and cfg.SCALE == "sqrt_d" and recorded["scale"] is not None:
        raise UserError(f"{cfg.CKPT} was trained with scale {recorded['scale']}, but sqrt_d was asked for; leave --scale out.")
    if recorded:
        return DeCLIP(cfg.MODEL, cfg.CKPT, cfg.CONTEXT, scale)
    if cfg.CKPT and cfg.ATTENTION is None and (None in (cfg.MODEL, cfg.CONTEXT) or cfg.SCALE == "auto"):
        raise UserError(f"{cfg.CKPT} does not say which model and attention it was trained with; give --model, --context and "
                        "--scale (the authors' checkpoints: --model EVA02-B-16 --context qk --scale 1), or --attention.")
    weights = read_weights(cfg.CKPT) if cfg.CKPT else ()        # before anything is downloaded
    torch.manual_seed(0)        # random weights, if that is what is asked for, are the same at every run
    clip = DeCLIP(cfg.MODEL, cfg.PRETRAINED, cfg.CONTEXT, scale)
    if cfg.CKPT:
        clip.load_weights(cfg.CKPT, *weights)
    return clip


def open_original(cfg: SimpleNamespace, clip: DeCLIP) -> DeCLIP:
    """The CLIP that the checkpoint was made from, on the same device; `clip` itself where no checkpoint was loaded."""
    return DeCLIP(clip.model_name, cfg.PRETRAINED).to(clip.visual.pos_embed.device) if cfg.CKPT else clip


def check_precision(cfg: SimpleNamespace) -> None:
    """Raises UserError if PRECISION is unknown."""
    if cfg.PRECISION not in PRECISIONS:
        raise UserError(f"PRECISION is {cfg.PRECISION!r}; it must be one of {', '.join(PRECISIONS)}.")


def encode_dense(cfg: SimpleNamespace, clip: DeCLIP, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> content (B, C, h, w) by ATTENTION, computed in PRECISION, returned in float32."""
    with autocast(cfg.PRECISION, images.device):
        return clip.encode_dense(images, cfg.ATTENTION)[0].float()


def load_share(cfg: SimpleNamespace, dataset: Dataset, ranks: distributed.Ranks) -> DataLoader:
    """This rank's share of a data set, in lists of BATCH_SIZE samples."""
    share = Subset(dataset, range(ranks.rank, len(dataset), ranks.world))
    return DataLoader(share, cfg.BATCH_SIZE, num_workers=workers(cfg.WORKERS), collate_fn=list,
                      pin_memory=ranks.device.type == "cuda")


def number(text: str) -> float:
    """SCALE as a number; UserError if it is none."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"SCALE is {text!r}; it must be auto, sqrt_d or a number.") from None


def encode_classes(cfg: SimpleNamespace, clip: DeCLIP, classes: Classes) -> Tensor:
    """All names of a class list, synonyms too -> (prompts, C), L2-normalised, by the sentences that TEMPLATE names.

    Kept in CACHE under a checksum of the text tower, the names and the sentences; so whatever changes is a new entry.
    """
    if cfg.TEMPLATE not in TEMPLATES and not re.fullmatch(r"[^{}]*\{\}[^{}]*", cfg.TEMPLATE):
        raise UserError(f"TEMPLATE is {cfg.TEMPLATE!r}; it must be {', '.join(TEMPLATES)} or a sentence with {{}}.")
    templates = TEMPLATES.get(cfg.TEMPLATE, (cfg.TEMPLATE,))
    if cfg.CACHE is None or not clip.has_text:
        return clip.encode_text(classes.prompts, templates)
    sentences = [template.format("\0") if isinstance(template, str) else template("\0") for template in templates]
    tower = open_clip.get_model_config(clip.model_name) or clip.model_name      # its activation, its tokenizer
    key = hashlib.sha256(json.dumps([tower, classes.prompts, sentences], default=str).encode())
    for name, value in sorted(clip.clip.text.state_dict().items()):
        key.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    path = Path(cfg.CACHE) / f"text-{key.hexdigest()[:24]}.safetensors"
    device = clip.visual.pos_embed.device
    if path.is_file():
        return read_weights(path)[0]["text"].to(device)
    text = clip.encode_text(classes.prompts, templates)
    write_whole(path, lambda file: save_file({"text": text.cpu().contiguous()}, file))
    return text


def title(cfg: SimpleNamespace, clip: DeCLIP) -> str:
    """One line that says what was evaluated."""
    attention = cfg.ATTENTION or clip.context
    if attention in DECOUPLED:
        attention += f", scale {'1/√d' if clip.scale is None else clip.scale}"
    weights = cfg.CKPT or ("its own weights" if cfg.PRETRAINED and ":" in clip.model_name else cfg.PRETRAINED)
    precision = find_precision(cfg.PRECISION, clip.visual.pos_embed.device)
    rounded = "" if precision == "fp32" else f", {precision}"
    return f"{clip.model_name}, attention {attention}, {weights or 'random weights'}{rounded}"


def write_result(cfg: SimpleNamespace, clip: DeCLIP, name: str, result: dict) -> Path:
    """Writes `result`, with the model and the settings that led to it, as `name`.json beside the checkpoint or into OUT.

    A baseline's file has its attention in its name, so that it does not replace the model's own. Returns the path.
    """
    folder = Path(cfg.OUT or (Path(cfg.CKPT).parent if cfg.CKPT else "out"))
    path = folder / (f"{name}.{cfg.ATTENTION}.json" if cfg.ATTENTION else f"{name}.json")
    about = {"model": clip.model_name, "context": clip.context, "scale": clip.scale, "settings": vars(cfg)}
    text = json.dumps(result | about, indent=2)
    write_whole(path, lambda file: Path(file).write_text(text + "\n"))
    print(f"written to {path}")
    return path
