"""Interface, to be filled: F-ViT, an open-vocabulary detector on a frozen CLIP."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from downstream.detection import Detections
from model import DeCLIP


class Design(NamedTuple):
    """What a detector is and how it is trained; each is a setting of train.py, in capitals."""
    image_size: int = 640           # side of the square
    layers: tuple[int, ...] = ()    # blocks whose outputs are taken; (): the published ones, or even
    channels: int = 256
    masks: bool = False             # whether it has a mask head
    # ... more to come, all with defaults


class Target(NamedTuple):
    """The labelled objects of a training image, in pixels of that image."""
    boxes: Tensor       # float (k, 4) x0 y0 x1 y1
    labels: Tensor      # long (k,)
    masks: Tensor       # bool (k, h, w), or (k, 0, 0) where masks are not asked for
    key: str            # what is random about the image depends on this alone


class Rules(NamedTuple):
    """How detections are scored and chosen; the defaults are OV-COCO's."""
    a: float = 0.1              # exponent of the VLM's score for seen classes
    b: float = 0.8              # and for novel ones
    temperature: float = 45.0   # T, of the VLM's logits
    least: float = 0.01         # detections of a lower score are left out
    nms: float = 0.4            # overlap of two boxes of a class from which the lower one is removed
    most: int = 100             # detections of an image
    at_boxes: bool = False      # the VLM looks at the final boxes instead of the proposals


class FViT(nn.Module):
    """classes: names; seen: which of them may be trained. The backbone is frozen."""

    def __init__(self, backbone: DeCLIP, classes: Sequence[str], seen: Sequence[bool],
                 design: Design = Design(), templates: str = "vild", cache: str | None = None):
        super().__init__()
        self.classes: list[str]
        self.seen: list[bool]

    def forward(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Training: float [0, 1] (3, h, w) each, h and w at most image_size, *not* padded (padding
        is 0 after the normalisation, and boxes are clipped to h, w) -> losses by name."""

    def detect(self, images: list[Tensor], rules: Rules = Rules()) -> list[Detections]:
        """uint8 (3, H, W) of any size, on the model's device -> detections in their pixels."""

    def set_classes(self, names: Sequence[str], seen: Sequence[bool] | None = None,
                    templates: str = "vild", cache: str | None = None) -> None:
        """Names to detect from now on. seen: None for those that training has seen by this name."""

    def save(self, path: str | Path, settings: dict | None = None) -> None:
        """Writes a file that describes itself, without the backbone."""


def open_fvit(path: str | Path, backbone: DeCLIP | None = None) -> FViT:
    """The detector of a `fvit.safetensors`; backbone: None for the one that the file names."""
