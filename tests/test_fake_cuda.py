"""What runs on a GPU, run on a pretended one: tensors with shapes and a device, but no numbers.

A tensor that was left on the CPU raises there as on a GPU, and every wait for the GPU is found: the
functions that wait are listed below, each with its reason. Backward asks CUDA itself for a device,
and so is left out; it is PyTorch's own.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny  # noqa: F401
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval_region
import eval_seg
import train
from data import Grid, make_classes
from downstream.catseg import eval as catseg_eval
from downstream.catseg.model import CATSeg
from downstream.catseg.model import Design as SegmenterDesign
from downstream.fvit import model as fvit_model
from downstream.ov_dquo import model as ov_dquo_model
from model import DeCLIP
from tools.bench import hollow, without_numbers
from util import settings
from util.distributed import Ranks
from util.precision import autocast

ROOT = Path(__file__).parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten


# ---------------------------------------------------------------------------- the pretended GPU

class Waits(TorchDispatchMode):
    """Notes which functions of ours make a GPU wait, and by what; made-up answers let them go on.
    """

    def __init__(self):
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.numbers = cycle([1, 2, 3, 4])      # as x0 y0 x1 y1 they are a box

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.prim.device.default:
            return operation(*args)
        if operation._can_decompose():      # in inference mode those made of others arrive whole
            with self:
                return operation.decompose(*args, **kwargs)
        name = operation._schema.name.split("::")[1]
        if waits(name, args, kwargs) and any(map(is_on_gpu, tree_leaves((args, kwargs)))):
            self.found.add((caller(), name))
        answer = getattr(self, f"answer_{name}", None)
        return answer(*args) if answer else operation(*numbered(name, args), **kwargs)

    def answer__local_scalar_dense(self, x: Tensor) -> float:
        number = next(self.numbers)
        return float(number) if x.is_floating_point() else number

    def answer_nonzero(self, x: Tensor) -> Tensor:
        return torch.empty(quarter(x), x.ndim, dtype=torch.long, device=x.device)

    def answer_nms(self, boxes: Tensor, *_) -> Tensor:
        kept = min(12, len(boxes) // 4 * 4)
        return torch.empty(kept, dtype=torch.long, device=boxes.device)


def quarter(mask: Tensor) -> int:
    """How many places of a mask are taken as true: F-ViT's regions are divided among four levels.
    """
    return max(1, mask.numel() // 4)


def is_on_gpu(value: object) -> bool:
    return isinstance(value, Tensor | torch.device) and (
        value.device if isinstance(value, Tensor) else value).type == "cuda"


def waits(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether an operation makes the CPU wait for the GPU."""
    if name in ("_to_copy", "copy_"):       # copies between both that are not said to be free
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device", source.device)
        free = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        return source.device.type != target.type and not (free and target.type == "cuda")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        places = [place for place in args[1] if place is not None]
        is_fill = name != "index" and args[2].numel() == 1      # a mask that is only filled
        return any(place.device.type == "cpu" and place.ndim or (
            place.dtype == torch.bool and not is_fill) for place in places)
    return name in ("_local_scalar_dense", "nonzero", "nms", "masked_select", "unique_dim",
                    "_unique2", "equal", "is_nonzero") or (
        name == "repeat_interleave" and torch.is_tensor(args[-1]) and not kwargs)


def numbered(name: str, args: tuple) -> tuple:
    """The arguments of an operation, but for a mask that values are taken by, some places."""
    if name != "index":
        return args
    places = []
    for place in args[1]:
        is_mask = place is not None and place.dtype == torch.bool
        places += torch.empty(place.ndim, quarter(place), dtype=torch.long,
                              device=place.device).unbind() if is_mask else [place]
    return args[0], places


def caller() -> str:
    """The function of ours that is running: file and name."""
    frame = sys._getframe(2)
    while frame:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(ROOT) and not name.startswith("<") and not (
                {*path.relative_to(ROOT).parts} & {".venv", "tests"}):
            return f"{path.relative_to(ROOT).with_suffix('')} {name}"
        frame = frame.f_back
    return "?"


@contextmanager
def pretended(*modules: nn.Module) -> Iterator[Waits]:
    """Within it, tensors may be on GPU, and these modules are; what is found."""
    with without_numbers():
        for module in modules:
            hollow(module, GPU)
        with Waits() as found:
            yield found


@pytest.fixture(autouse=True)
def supported(monkeypatch) -> None:
    """PyTorch believes that CUDA has autocast; random numbers come from the CPU's generator."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    generator = torch.Generator
    monkeypatch.setattr("torch.Generator", lambda device: generator())


def blank(*shape: int, dtype: torch.dtype = torch.float) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def photos(count: int = 2) -> list[Tensor]:
    return [blank(3, 48, 64 + 16 * number, dtype=torch.uint8) for number in range(count)]




# ---------------------------------------------------------------------- what waits, and why it may

SENT_ONCE = {("data constant", "_to_copy")}     # and kept: the next steps don't wait
NMS = {"_to_copy", "nms"}                       # torchvision's sends a 1, and gets the kept ones
DETECTOR = "downstream/detector"
FVIT_WAITS = SENT_ONCE | {      # how many there are decides the shapes of what follows
    ("downstream/fvit/model propose", "index"),             # boxes without area are left out
    *(("downstream/fvit/model propose", way) for way in NMS),
    ("downstream/fvit/model pool_regions", "nonzero")}      # the regions of each level
FVIT_TRAINING = FVIT_WAITS | {
    ("downstream/fvit/model only_seen", "index"),           # objects that training may see
    ("downstream/fvit/model sample", "nonzero")}            # some of those that an object owns
CHOICE = {(f"{DETECTOR} choose", way) for way in NMS | {"nonzero"}}     # the detections
OV_DQUO_TRAINING = SENT_ONCE | {
    ("downstream/ov_dquo/model in_shares", "index"),        # objects that training may see
    ("downstream/ov_dquo/model make_noise", "nonzero"),     # unknown ones, classes to draw from
    ("downstream/ov_dquo/model forward", "index"),          # boxes of unknown ones
    ("downstream/ov_dquo/model match", "_to_copy"),         # scipy matches on the CPU
    ("downstream/ov_dquo/model layer_losses", "index")}     # matches with true objects
SEEN = [True, True, False]


def step_settings(**changed: object):
    """train.py's, of tiny models."""
    cfg = settings.parse([], train)
    vars(cfg).update(PRETRAINED=None, VFM_MODEL="tiny_vfm", VFM_PRETRAINED=False, IMAGE_SIZE=64,
                     CROP_SIZE=32, **changed)
    return cfg


def build(model: str) -> tuple[SimpleNamespace, DeCLIP, list[nn.Module]]:
    """train.py's settings, CLIP and three towers."""
    cfg = step_settings(MODEL=model)
    clip, *teachers = train.build(cfg, Ranks(0, 1, CPU))
    return cfg, clip, [clip.visual, *teachers]


GRIDS = [Grid(2, 2, [0, 1, 3]), Grid(1, 3, [0, 1, 2])]


@pytest.mark.parametrize("model", ["tiny-eva", "tiny-vit", "tiny-pool", "tiny-pe"])
def test_a_training_step_never_waits(model):
    cfg, clip, towers = build(model)
    with pretended(*towers) as waits:
        for context in {*train.CONTEXTS} - {*clip.visual.family.REFUSED}:
            clip.visual.context = context
            # The context loss by Gram matrices where tokens are many; once without padding
            cfg.IMAGE_SIZE, cfg.PADDING = (128 if context == "k" else 64), context != "qk"
            for precision in ("fp32", "bf16") if context == "q" else ("bf16",):
                with autocast(precision, GPU):
                    losses = train.distill(cfg, *towers, photos(), GRIDS)
                assert all((loss.device, loss.dtype, loss.requires_grad) ==
                           (GPU, torch.float, True) for loss in losses.values())
    assert waits.found == SENT_ONCE


@pytest.mark.parametrize("wrong", [
    lambda content: content.sum().item(), lambda content: content[content > 0],
    lambda content: 1 if content.sum() > 0 else 0, lambda content: content.cpu(),
    lambda content: content[[0, 1]], lambda content: content.new_tensor([1.0, 2.0])])
def test_what_waits_is_found(wrong, monkeypatch):
    cfg, _, towers = build("tiny-vit")
    own = train.content_loss
    monkeypatch.setattr(train, "content_loss",
                        lambda regions, *more: (wrong(regions), own(regions, *more))[1])
    with pretended(*towers) as waits:
        train.distill(cfg, *towers, photos(), GRIDS)
    assert {name for name, _ in waits.found - SENT_ONCE} == {"train distill"}


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_stayed_on_the_cpu_is_found(is_kept):
    """A plain attribute, which no .to(device) moves, and what is made without a device."""
    cfg, _, towers = build("tiny-vit")
    project, kept = towers[0].project, torch.ones(1, 1, 32)
    towers[0].project = lambda tokens: project(tokens) + (kept if is_kept else torch.ones(32))
    error = (AssertionError, "convert all Tensors") if is_kept else (RuntimeError, "two.*devices")
    with pretended(*towers), pytest.raises(error[0], match=error[1]):
        train.distill(cfg, *towers, photos(), GRIDS)


@pytest.mark.parametrize("protocol", [{}, {"threshold": 0.2}, {"pamr": 2}, {"precision": "bf16"}])
def test_segmentation_never_waits(protocol):
    clip = DeCLIP("tiny-eva")
    how = eval_seg.Protocol(short_side=48, window=32, stride=16, **protocol).fit(clip)
    with pretended(clip.visual) as waits:
        found = eval_seg.predict(how, clip, make_classes(["a, b", "c"]), blank(3, 32), photos())
        assert [(one.device, one.shape) for one in found] == [
            (GPU, photo.shape[1:]) for photo in photos()]
    assert waits.found - {("util/windows side_weights", "_to_copy")} == SENT_ONCE


@pytest.mark.parametrize("binary", [False, True])
def test_classifying_regions_never_waits(binary):
    clip = DeCLIP("tiny-eva")
    cfg = SimpleNamespace(PRECISION="bf16", ATTENTION=None, BINARY_MASKS=binary, CROP_BATCH=2)
    with pretended(clip.visual) as waits:
        sample = eval_region.LabelledRegions(       # as workers send it
            torch.empty(3, 48, 64, dtype=torch.uint8), torch.empty(48, 64, dtype=torch.int16),
            torch.empty(3, 4), torch.empty(3, dtype=torch.long))
        found = eval_region.encode_regions(cfg, clip, clip, [sample], 64, GPU)
        assert {way: (one.device, one.shape) for way, one in found.items()} == {
            way: (GPU, (3, 32)) for way in ("box", "mask", "crop")}
    assert waits.found == SENT_ONCE


def views() -> list[Tensor]:
    return [blank(3, 64, 48), blank(3, 40, 64)]


def objects(view: Tensor) -> tuple[Tensor, Tensor]:
    """16 boxes and labels, of which training sees a quarter."""
    return blank(16, 4), blank(16, dtype=torch.long)


def test_fvit_waits_where_numbers_of_regions_are_not_known():
    design = fvit_model.Design(image_size=64, channels=16, anchors=32, regions=16, candidates=100,
                               proposals=50, templates="{}", masks=True, keep_best=True)
    fvit = fvit_model.FViT(DeCLIP("tiny-eva"), ["a", "b", "c"], SEEN, design)
    with pretended(fvit) as training, autocast("bf16", GPU):
        targets = [fvit_model.Target(*objects(view), blank(16, *view.shape[1:], dtype=torch.bool),
                                     "key") for view in views()]
        losses = fvit.train()(views(), targets)
        assert len(losses) == 5 and {loss.device for loss in losses.values()} == {GPU}
    assert training.found == FVIT_TRAINING
    with pretended(fvit) as using:
        for found in fvit.eval().detect(photos()):
            assert found.boxes.device == GPU and found.masks
        fvit.objects(photos())
    # Masks are pasted at boxes, whose corners are numbers.
    assert using.found == FVIT_WAITS | CHOICE | {
        ("downstream/fvit/model add_masks", "_local_scalar_dense")}


@pytest.mark.parametrize("more", [{}, {"map_only": True, "text_queries": 1}])
def test_ov_dquo_waits_where_numbers_of_objects_are_not_known(more, monkeypatch):
    monkeypatch.setattr(ov_dquo_model, "linear_sum_assignment",
                        lambda cost: (torch.arange(min(cost.shape)),) * 2)
    design = ov_dquo_model.Design(image_size=64, width=16, heads=2, points=2, layers=2, ffn=16,
                                  queries=20, denoising=6, templates="{}", **more)
    model = ov_dquo_model.OVDQUO(DeCLIP("tiny-eva"), ["a", "b", "c"], SEEN, design)
    with pretended(model) as training, autocast("bf16", GPU):
        targets = [ov_dquo_model.Target(*objects(view), blank(16), "key") for view in views()]
        losses = model.train()(views(), targets)
        assert len(losses) == 7 and {loss.device for loss in losses.values()} == {GPU}
    assert training.found == OV_DQUO_TRAINING
    with pretended(model) as using:
        assert all(found.boxes.device == GPU for found in model.eval().detect(photos()))
    assert using.found == SENT_ONCE | CHOICE


def test_cat_seg_never_waits():
    segmenter = CATSeg(DeCLIP("tiny-eva"), SegmenterDesign(image_size=64, width=32, max_classes=8))
    segmenter.set_classes(["a", "b", "c"])
    how = catseg_eval.Protocol.of(segmenter)
    with pretended(segmenter) as waits:
        with autocast("bf16", GPU):
            labels = blank(2, 64, 64, dtype=torch.long)
            assert segmenter.train()(blank(2, 3, 64, 64), labels).device == GPU
        found = catseg_eval.predict(how, segmenter.eval(), make_classes(["a, b", "c"]),
                                    blank(3, 32), photos())
        assert all(one.device == GPU for one in found)
    assert waits.found == SENT_ONCE
