"""The entries of torch.hub, for programs that have a data.py or a model.py of their own.

    clip = torch.hub.load("path/to/declip", "declip", source="local", ckpt="declip.safetensors")
    classes, scores = clip.segment("photo.jpg", ["cat", "grass"])

Save state dicts: a model itself can't be pickled, since its module has no name in your program.
"""

import importlib
import sys
from pathlib import Path

from PIL import Image

dependencies = ["torch", "torchvision", "open_clip", "timm", "pycocotools", "scipy", "matplotlib"]
ROOT, KEPT = Path(__file__).parent, "declip_modules"      # name of what holds ours between calls


def _library():
    """tools.library, imported with modules of our names out of the way, and put back after."""
    names = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    theirs = {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}
    kept = sys.modules.setdefault(KEPT, type(sys)(KEPT)).__dict__.setdefault(str(ROOT), {})
    path = [*sys.path]
    try:
        for name in theirs:
            del sys.modules[name]
        sys.modules.update(kept)
        sys.path.insert(0, str(ROOT))
        return importlib.import_module("tools.library")
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            kept[name] = sys.modules.pop(name)
        sys.modules.update(theirs)


_limit, _ours = Image.MAX_IMAGE_PIXELS, _library()
Image.MAX_IMAGE_PIXELS = _limit     # what we read has a limit of its own
declip, detector, segmenter = _ours.declip, _ours.detector, _ours.segmenter
