"""A trained image tower as one ONNX file for images of one size: `--layout onnx` of tools.export.

    session = onnxruntime.InferenceSession("declip.onnx")
    about = session.get_modelmeta().custom_metadata_map     # texts: mean, std, size, classes, ...
    content, = session.run(None, {"images": images})        # float32, (B, 3, H, W) -> (B, C, h, w)
"""

import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Classes
from model import DeCLIP, VisionTower
from tools.names import typed_classes
from util import UserError, settings
from util.files import atomic_write, last_part
from util.text import find_templates

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 2 * 10**9       # a protobuf, which the file is, holds 2 GiB
# Largest differences from PyTorch in fp32, by the largest value; B/16 at 448 px: 2e-6 and 2e-3.
MAX_DIFFERENCE = {"fp32": 1e-4, "fp16": 2e-2}
OUTPUTS = {"content": "dense features in the space of texts (B, C, h, w), not normalised",
           "logits": "cosines with the classes (B, K, h, w), of several synonyms the best"}


class Dense(nn.Module):
    """Normalised images (B, 3, H, W) -> content (B, C, h, w) or, with a text, logits (B, K, h, w).

    text: embeddings of the prompts of `classes`, (prompts, C), L2-normalised.
    """

    def __init__(self, tower: VisionTower, classes: Classes | None = None,
                 text: Tensor | None = None):
        super().__init__()
        self.tower, self.text, self.dtype = tower, text, torch.float32
        prompts = [[number for number, of in enumerate(classes.class_of_prompt) if of == k]
                   for k in range(len(classes))] if classes else []
        # Each class's prompts, (K, most); where it has fewer, the first one again
        most = max(map(len, prompts), default=0)
        self.prompts = torch.tensor([(some + some[:1] * most)[:most] for some in prompts])

    def forward(self, images: Tensor) -> Tensor:
        content = self.tower.encode_dense(images.to(self.dtype))[0].float()
        if self.text is None:
            return content
        cosines = torch.einsum("bchw,pc->bphw", F.normalize(content, dim=1), self.text)
        return cosines[:, self.prompts.flatten()].unflatten(1, self.prompts.shape).amax(dim=2)

    @torch.no_grad()
    def fix(self, size: tuple[int, int], half: bool) -> None:
        """From now on for images of one size (H, W), whose positions are constants; `half`: inside
        in fp16."""
        self.dtype = torch.float16 if half else torch.float32
        grid = [side // self.tower.patch_size for side in size]
        position, extra = self.tower.family.positions(grid)     # rounded after all is computed
        fixed = position.to(self.dtype), {name: x.to(self.dtype) for name, x in extra.items()}
        self.tower.family.positions = lambda _: fixed
        self.tower.to(self.dtype)


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError, before a model is loaded, for settings and packages that are missing."""
    settings.check(cfg, SIZE=(len(cfg.SIZE) in (1, 2) and all(1 <= s <= 2**13 for s in cfg.SIZE),
                              "one side in pixels or height and width, of at most 8192"))
    settings.refuse_unused(cfg, **dict.fromkeys(
        ("TEMPLATES", "CACHE"), not cfg.CLASSES and "is for --classes, which names none"))
    find_templates(cfg.TEMPLATES)
    if cfg.CLASSES and not typed_classes(cfg.CLASSES).names:
        raise UserError('CLASSES names no class; say --classes "cat, grass", or give a class file.')
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"--layout onnx needs the package {name}, which is not installed; "
                            f"pip install {' '.join(PACKAGES)}.") from None


def write_onnx(cfg: SimpleNamespace, clip: DeCLIP, path: Path) -> None:
    """Writes the tower for images of SIZE, if onnxruntime makes of the file what PyTorch makes of
    the model.

    Raises UserError, and leaves the path as it is, if not; if the patch does not divide the size;
    and if the tower is too large for one file.
    """
    size, precision = find_size(cfg, clip), "fp16" if cfg.HALF else "fp32"
    count = sum(weight.numel() for weight in clip.visual.parameters())
    if count * (2 if cfg.HALF else 4) > MAX_BYTES:
        raise UserError(f"The tower of {clip.model_name} has {count / 1e6:.0f} million weights, in "
                        f"{precision} more than the 2 GB that an ONNX file holds; "
                        f"{'use a smaller model' if cfg.HALF else 'say --half true'}.")
    about = {"model": last_part(clip.model_name), "context": clip.context, "precision": precision,
             "attention_scale": f"{clip.visual.attention_scale:.10g}",
             "input": "RGB from 0 to 1, less mean, by std", "patch_size": str(clip.patch_size),
             **{name: json.dumps(getattr(clip, name)) for name in ("mean", "std")},
             "size": json.dumps(size), "output": OUTPUTS["logits" if cfg.CLASSES else "content"]}
    classes, text = None, None
    if cfg.CLASSES:
        classes = typed_classes(cfg.CLASSES)
        text = clip.encode_text(classes.prompts, find_templates(cfg.TEMPLATES), cfg.CACHE)
        about |= {"classes": json.dumps(classes.names), "templates": cfg.TEMPLATES}
    dense = Dense(clip.visual, classes, text).eval().requires_grad_(False)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = dense(images)        # of the model as it is, before anything is made constant
    dense.fix(size, cfg.HALF)

    def write(file: str) -> None:
        save(dense, images, about, file)
        compare(file, images, expected, MAX_DIFFERENCE[precision])

    atomic_write(path, write)


def find_size(cfg: SimpleNamespace, clip: DeCLIP) -> tuple[int, int]:
    """Height and width that SIZE says; UserError if the patch does not divide them."""
    nearest = [max(1, round(side / clip.patch_size)) * clip.patch_size for side in cfg.SIZE]
    if [*cfg.SIZE] != nearest:
        raise UserError(f"SIZE is {' '.join(map(str, cfg.SIZE))}, no multiple of "
                        f"{clip.model_name}'s patch size, {clip.patch_size}; the nearest that "
                        f"works is {' '.join(map(str, nearest))}.")
    return cfg.SIZE[0], cfg.SIZE[-1]


def save(dense: Dense, images: Tensor, about: dict[str, str], file: str) -> None:
    """Writes and checks an ONNX file for any number of images of this size."""
    import onnx
    logging.disable(logging.WARNING)        # of what is not simplified
    try:
        program = torch.onnx.export(
            dense, (images,), dynamo=True, verbose=False, input_names=["images"],
            output_names=["content" if dense.text is None else "logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:      # of whatever these versions can't do
        raise UserError(f"The exporter of torch {torch.__version__} fails at this model "
                        f"({' '.join(str(error).split())[:200]}); try other versions of torch and "
                        "onnxscript.") from None
    finally:
        logging.disable(logging.NOTSET)
    for node in program.model.graph.all_nodes():    # it would say where this machine keeps code
        node.metadata_props.clear()
    program.model.metadata_props.update(about)
    program.save(file, external_data=False)
    onnx.checker.check_model(file, full_check=True)


def compare(file: str, images: Tensor, expected: Tensor, bound: float) -> None:
    """Prints the largest difference of onnxruntime's outputs for batches of two and of one from
    those expected, as a share of the largest value; UserError if it is more than the bound."""
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(session.run(None, {"images": some.numpy()})[0])
             for some in (images, images[:1])]
    differences = torch.cat(found) - torch.cat([expected, expected[:1]])
    difference = (differences.abs().max() / expected.abs().max()).item()
    if not difference <= bound:     # also if it is nan
        raise UserError(f"What onnxruntime makes of the file differs from PyTorch by "
                        f"{difference:.1e} of the largest value, more than {bound:g}, so nothing "
                        "was written; leave --half out, or try other versions of both.")
    print(f"onnxruntime differs from PyTorch by {difference:.1e} of the largest value, at most")
