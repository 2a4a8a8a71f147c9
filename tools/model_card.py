"""The README.md of a model on the Hugging Face hub: what it is, how it was made, how to use it."""

import re
from pathlib import Path

import open_clip
import timm

import eval_region
from model import DeCLIP
from util import UserError, printable
from util.files import last_part
from util.results import as_written, read_results
from util.weights import state_checksum

MARK = "<!-- Written by tools.export; without this line it is not written over. -->"
DETECTOR = ("A detector of any class names", "zero-shot-object-detection", "detect")
# By a record's field: title, what it is, the hub's task, the tool.
KINDS = {"fvit": ("F-ViT", *DETECTOR), "ov_dquo": ("OV-DQUO", *DETECTOR),
         "catseg": ("CAT-Seg", "A segmenter of any class names", "image-segmentation", "segment"),
         "declip": ("DeCLIP", "A CLIP for dense features", "image-segmentation", "segment")}
# Models of open_clip by name and tag: whose they are, and the licence of their weights.
PARENTS = ((r"EVA\d\d-", "EVA-CLIP", "mit"), (r".* openai$", "OpenAI's CLIP", "mit"),
           (r".* laion", "LAION's OpenCLIP", "mit"), (r"ViT-\S*-SigLIP", "SigLIP", "apache-2.0"),
           (r"PE-Core-", "Perception Encoder", "apache-2.0"))
# Settings of a training that a card has.
TRAINING = {"IMAGES": "images", "DATASET": "data set", "PRETRAINED": "CLIP's weights",
            "CKPT": "CLIP's file", "BACKBONE": "CLIP's file", "VFM_MODEL": "VFM", "step": "steps",
            "BATCH_SIZE": "images a step", "IMAGE_SIZE": "image size", "LR": "learning rate",
            "LAMBDA": "weight of the context loss"}
CARD = """---
{front}
pipeline_tag: {task}
tags: [{tags}]
---
{mark}

# {title} of {model}

{what}, as in [DeCLIP](https://arxiv.org/abs/2505.04410) (Wang et al.,
CVPR 2025).

{about}

## Training

{training}
{figures}
## Use

{note}
{use}
## Licences

{licences}

Check them where the weights are, and what they ask of models that were made from them.
"""
USE = """
```
python -m tools.{tool} photo.jpg --classes "cat, grass" --ckpt hf-hub:you/{kind}
```
"""
FIGURES = """
## Figures

Of these weights, in per cent.

{}
"""
USE_CLIP = """
```python
clip = DeCLIP("hf-hub:you/declip")      # from model import DeCLIP
```
```
python eval_seg.py --ckpt hf-hub:you/declip
```
"""
USE_OPEN_CLIP = """
open_clip reads it, too, but loses the attention: its patches are a plain CLIP's.

```python
open_clip.create_model("hf-hub:you/declip")
```
"""


def kind_of(record: dict) -> str:
    """The key of KINDS that a checkpoint is of, which is its file's name, too."""
    return next((kind for kind in KINDS if kind in record), "declip")


def card(record: dict, clip: DeCLIP | None, figures: dict[str, str]) -> str:
    """The text for a checkpoint. clip: None for a detector or CAT-Seg. figures: as figures_of."""
    model, made, kind = record["model"], record.get("settings", {}), kind_of(record)
    title, what, task, tool = KINDS[kind]
    scale = "1/√d" if record["scale"] is None else f"{record['scale']:.10g}"
    about = {"CLIP": code(model), "context": code(record["context"]), "scale": scale}
    use, is_folder = USE.format(tool=tool, kind=kind), model.startswith("local-dir:")
    note = "In a folder with the code that wrote this card:"
    parents = licences(model, made) if clip else {"its CLIP, the teachers, the images": ""}
    if clip:
        about |= {"patch": clip.patch_size, "width of embeddings": clip.visual.embed_dim}
        use = USE_CLIP + use + ("" if is_folder else USE_OPEN_CLIP)
    elif kind != "catseg":
        note = f"Its CLIP is not in the file; if it is not found, name it by `--backbone`. {note}"
    if is_folder:
        note = f"Its CLIP is described by a folder that is not here; get that, too. {note}"
    training = {words: code(made[name]) for name, words in TRAINING.items()
                if made.get(name) is not None and (name != "VFM_MODEL" or made.get("LAMBDA") != 0)
                and not (name == "PRETRAINED" and is_folder)}      # a folder has weights of its own
    rows = {"the code": "mit"} | {name: of or "see its own" for name, of in parents.items()}
    tags = dict.fromkeys(["declip", "open-vocabulary", kind, quoted(last_part(model))])
    return CARD.format(
        front="\n".join(front_matter(model, made, parents, clip)), task=task, tags=", ".join(tags),
        mark=MARK, title=title, model=code(model), what=what, about=table(about),
        training=table(training) or "The file does not say how.", note=note, use=use,
        figures=FIGURES.format(table(figures)) if figures else "", licences=table(rows))


def front_matter(model: str, made: dict, parents: dict[str, str], clip: DeCLIP | None) -> list[str]:
    """The licence, if it is plain; the hub's name of the weights that training began with."""
    known = [*parents.values()]
    lines = [f"license: {known[0]}"] if {*known} <= {"mit", "apache-2.0"} else [
        "license: other", "license_name: see-the-parents"]
    config = open_clip.get_pretrained_cfg(model, made.get("PRETRAINED") or "") or {}
    if clip and config.get("hf_hub"):
        lines.append(f"base_model: {quoted('/'.join(config['hf_hub'].split('/')[:2]))}")
    return [*lines, "library_name: open_clip"] if clip and ":" not in model else lines


def licences(model: str, made: dict) -> dict[str, str]:
    """What a DeCLIP was made from, and the licence of each; "" where it is not known here."""
    pretrained, vfm = made.get("PRETRAINED"), made.get("VFM_MODEL")
    key = f"{model} {pretrained}" if (model, pretrained) in open_clip.list_pretrained() else ""
    parents = dict([next(((whose, licence) for pattern, whose, licence in PARENTS
                          if re.match(pattern, key)), (code(model), ""))])
    if vfm and made.get("LAMBDA") != 0:
        try:
            parents[code(vfm)] = timm.get_pretrained_cfg(vfm).license or ""
        except (RuntimeError, AttributeError):      # of a folder, or unknown to timm
            parents[code(vfm)] = ""
    return parents


def figures_of(clip: DeCLIP, folder: Path) -> dict[str, str]:
    """What the newest results in a folder say of exactly these weights and their attention."""
    wanted = {"checksum": state_checksum(clip.state_dict(), ""), "attention": clip.context,
              "scale": clip.scale}
    region, seg = folder / "region.json", folder / "seg.json"
    try:
        return rows_of(region, seg, wanted)
    except UserError as error:
        print(f"the card has no figures: {error}")
        return {}


def rows_of(region: Path, seg: Path, wanted: dict) -> dict[str, str]:
    """The rows of the figures. UserError for a file that is not as evaluations write it."""
    rows = {}
    with as_written(region):
        for result in read_results(region, **wanted) if region.is_file() else ():
            data = result["of"]["annotations"]
            data = "COCO panoptic" if data == eval_region.ANNOTATIONS else code(data)
            rows[f"regions of {data} at {result['of']['size']:d} px, mAcc"] = ", ".join(
                f"{code(way)} {means['top1']:.1f}" for way, means in result["mAcc"].items()
                if means["top1"] is not None)
    with as_written(seg):
        for result in read_results(seg, **wanted) if seg.is_file() else ():
            pamr = f", PAMR {result['of']['pamr']:d}" if result["of"]["pamr"] else ""
            rows[f"{code(result['of']['benchmark'])}{pamr}, mIoU"] = f"{result['mIoU']:.1f}"
    return rows


def table(rows: dict[str, object]) -> str:
    """Names and values as a table; "" for none."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if rows else ""


def code(value: object) -> str:
    """A value of a file as code of one line, which it can't leave; of paths the last part."""
    text = " ".join(printable(last_part(str(value))).split())
    return f"`{text.replace('`', '_').replace('|', '_')}`"


def quoted(text: str) -> str:
    """A text as a scalar of YAML, whose escapes are Python's."""
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'
