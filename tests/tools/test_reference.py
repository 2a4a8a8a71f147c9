"""tools/reference.py: fast forms return what plain ones do, and never wait for a device."""

import contextlib
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, options
from PIL import Image
from tiny import ROOT
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import eval_seg
import train
from data import make_classes
from eval_seg import Protocol
from model import DeCLIP, VisionTower, context_loss
from tools import bench, reference
from toy import world
from util import run, settings
from util.distributed import Ranks
from util.labels import VOID
from util.precision import grad_scaler
from util.weights import read_weights

CPU = torch.device("cpu")
TINY = {"model": "tiny-eva", "pretrained": "none", "vfm_model": "tiny_vfm",
        "vfm_pretrained": "false", "image_size": 64, "crop_size": 32}


def training(**changed):
    """Settings of train.py and its student, teacher and VFM, tiny."""
    cfg = settings.parse(options(**TINY | changed), train)
    clip, teacher, vfm = train.build(cfg, Ranks(0, 1, CPU))
    return cfg, clip.visual, teacher, vfm


def gradients(student: VisionTower, distill) -> dict[str, torch.Tensor]:
    """Of content plus context loss, by name."""
    student.zero_grad(set_to_none=True)
    sum(distill().values()).backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()
            if parameter.grad is not None}


# -------------------------------------------------------------------------------- the training step

@pytest.mark.parametrize("name", ["tiny-eva", "tiny-vit", "tiny-pool", "tiny-pe"])
@pytest.mark.parametrize("context", ["q", "qk", "clip"])
def test_a_step_has_the_losses_and_gradients_of_the_plain_one(name, context, monkeypatch):
    """Of the same images: what differs is attention, correlations, and what is computed when."""
    cfg, student, teacher, vfm = training(model=name, context=context)
    images, indices = [torch.randint(0, 256, (3, *size)).byte() for size in SIZES[:3]], [4, 9, 2]
    grids = train.sample_grids(cfg, 0, indices)
    of_clip = student.mean, student.std
    samples = [(data.student_image(image, 64, *of_clip),
                data.student_image(image, 56, vfm.mean, vfm.std),
                data.grid_crops(image, grid, 32, *of_clip), data.grid_boxes(image, grid, 64))
               for image, grid in zip(images, grids)]
    fast = train.distill(cfg, student, teacher, vfm, images, grids)
    with reference.whole_attention(student, teacher, vfm):
        # of which nothing must be left
        monkeypatch.setattr(F, "scaled_dot_product_attention", None)
        slow = reference.distill(student, teacher, vfm, samples)
        expected = gradients(student, partial(reference.distill, student, teacher, vfm, samples))
    monkeypatch.undo()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)
    found = gradients(student, partial(train.distill, cfg, student, teacher, vfm, images, grids))
    assert found.keys() == expected.keys()
    for weight, gradient in found.items():
        torch.testing.assert_close(gradient, expected[weight], rtol=1e-4, atol=1e-6)


def test_models_are_as_before_after_their_plain_time():
    _, student, teacher, vfm = training(checkpointing="true")
    modules = [module for model in (student, teacher, vfm) for module in model.modules()
               if hasattr(module, "fused_attn")]
    assert modules and all(module.fused_attn for module in modules)
    with reference.whole_attention(student, teacher, vfm):
        assert not any(module.fused_attn for module in modules)
        assert not student.checkpointing and student.attend is reference.attend
    assert all(module.fused_attn for module in modules)
    assert student.checkpointing and student.attend is VisionTower.attend


def test_images_and_crops_are_those_of_pil():
    """Cut and resized by PIL one by one; it rounds to whole pixels and levels, so nearly."""
    cfg, student, _, vfm = training(grid=(1, 3))
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (10, 15, 3), dtype=np.uint8))
    photo = small.resize((120, 90), Image.Resampling.BICUBIC)
    image, grid = torch.from_numpy(np.array(photo)).permute(2, 0, 1), data.Grid(2, 3, [0, 1, 3, 5])
    of_student, of_vfm, crops, boxes = reference.sample(photo, grid, cfg, student, vfm)
    fast = (data.student_image(image, 64, student.mean, student.std),
            data.student_image(image, 56, vfm.mean, vfm.std),
            data.grid_crops(image, grid, 32, student.mean, student.std))
    for ours, pils, std in zip(fast, (of_student, of_vfm, crops),
                               (student.std, vfm.std, student.std)):
        assert ours.shape == pils.shape
        levels = torch.tensor(std).view(3, 1, 1)
        assert ((ours - pils) * levels).abs().mean() < 0.01       # of the full scale
    assert torch.equal(boxes, data.grid_boxes(image, grid, 64))


def test_context_loss_has_memory_linear_in_the_tokens():
    """From 1024 to 4096 tokens: the same for each token within a tenth; the plain form's grows with
    their number."""
    def peak(loss, tokens: int) -> float:
        context = torch.randn(1, tokens, 192, requires_grad=True)
        of_vfm = torch.randn(1, tokens, 192)
        return bench.peak_bytes(lambda: torch.autograd.grad(loss(context, of_vfm), context),
                                CPU) / tokens

    ours, plains = ([peak(loss, tokens) for tokens in (1024, 2304, 4096)]
                    for loss in (context_loss, reference.context_loss))
    assert max(ours) / min(ours) < 1.1, ours
    assert plains[-1] > 3 * plains[0]


def test_checkpointing_saves_memory_and_keeps_the_gradients():
    _, student, *_ = training(model="tiny-vit")
    images = torch.randn(2, 3, 128, 128)

    def losses():
        content, context = student.encode_dense(images)
        return {"content": content.square().mean(), "context": context.square().mean()}

    def both() -> tuple[dict, int]:
        work = partial(gradients, student, losses)
        return work(), bench.peak_bytes(work, CPU)

    expected, kept = both()
    student.checkpointing = True
    found, recomputed = both()
    assert recomputed < 0.8 * kept
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_checkpointing_is_a_setting():
    assert not training()[1].checkpointing and training(checkpointing="true")[1].checkpointing


@pytest.mark.parametrize("checkpointing", [
    "false", pytest.param("true", marks=pytest.mark.slow)], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_serve_any_number_of_crops(backend, checkpointing, monkeypatch):
    """The same losses; after the first step nothing is compiled again, though every step has other
    grids."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    cfg, student, teacher, vfm = training(grid=(2, 4), checkpointing=checkpointing)
    images, calls = [torch.randint(0, 256, (3, *size)).byte() for size in SIZES[:2]], 4
    grids = [train.sample_grids(cfg, 0, [call, call + 9]) for call in range(calls)]
    expected = [train.distill(cfg, student, teacher, vfm, images, of_call)
                for of_call in grids]
    train.compile_blocks(student, teacher, vfm)
    found = []
    for call in range(calls):
        with torch._dynamo.config.patch(error_on_recompile=call > 0):
            found.append(train.distill(cfg, student, teacher, vfm, images, grids[call]))
            sum(found[-1].values()).backward()
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0     # something was compiled
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_compiled_run_saves_a_checkpoint_like_any(images, tmp_path, monkeypatch):
    """Also one that computes blocks again in backward."""
    made, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda work, **how: made.append(work)
                        or compile(work, backend="eager", **how))
    for name, compiles, blocks in (("eager", "false", 0), ("compiled", "true", 3 + 3 + 2)):
        train.main(options(**TINY | {"images": images, "out": tmp_path / name, "batch_size": 2,
                                     "num_workers": 0, "epochs": 1,
                                     "compile": compiles, "checkpointing": compiles}))
        assert len(made) == blocks       # of student, teacher and VFM
    eager, compiled = (read_weights(tmp_path / name / "declip.safetensors")[0]
                       for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name, weight in eager.items():
        torch.testing.assert_close(compiled[name], weight)


# -------------------------------------------------------------------------- nothing waits for a GPU

class Waits(contextlib.ExitStack):
    """Within it, `found` lists the operations for which a host would wait for its device, "meta"
    playing the device.

    A number read from it is an error by itself, because there is none.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __enter__(self):
        self.enter_context(Copies(self.found))
        self.enter_context(Constants(self.found))
        return self


class Finder:
    """A mode that notes down what it finds."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found


class Copies(Finder, TorchDispatchMode):
    """Between host and device, in turn with all that was sent before."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out))
                   if isinstance(x, torch.Tensor)}
        # the second in inference mode
        is_copy = any(name in str(operation) for name in ("copy", "aten.to."))
        waits = not (kwargs or {}).get("non_blocking") and not any(x is True for x in args)
        copies = is_copy and len(devices) > 1 and waits
        # as indices; unseen with torch 2.11
        lists = operation is torch.ops.aten.lift_fresh.default and "meta" in devices
        if copies or lists:
            self.found.append(str(operation))
        return out


class Constants(Finder, TorchFunctionMode):
    """Numbers of the host's made a tensor on the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor", "new_tensor") and out.device.type == "meta":
            self.found.append(name)
        return out


@pytest.fixture
def on_meta(monkeypatch):
    """There is no autocast for meta tensors."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def test_a_training_step_does_not_wait_for_the_device(on_meta, tmp_path, monkeypatch):
    """Once the constants are there. That the test can fail is seen in the first step, which sends
    them."""
    cfg, *models = training(max_crops=3, out=tmp_path)
    student, teacher, vfm = (model.to("meta") for model in models)
    ranks, optimizer = Ranks(0, 1, torch.device("meta")), train.build_optimizer(cfg, student)
    images = [torch.empty(3, *size, dtype=torch.uint8, device="meta") for size in SIZES[:2]]
    data.constant.cache_clear()
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    scaler = grad_scaler("fp32", ranks.device)
    guard, log = run.Guard(cfg, ranks, []), run.Log(cfg, ranks, 20, 0)
    waits = []
    for step in range(2):
        grids = train.sample_grids(cfg, 0, [step, step + 5])
        with Waits() as seen:
            losses = train.distill(cfg, student, teacher, vfm, images, grids)
            scaler.scale(sum(losses.values())).backward()
            losses = {name: loss.detach() for name, loss in losses.items()}
            guard.watch(step, run.is_bad_step(optimizer, scaler, [losses]), [])
            log.add(losses, [])
        waits.append(seen.found)
    assert waits[0] and not waits[1]
    with pytest.raises(RuntimeError, match="meta"):
        guard.look(last=True)


def test_segmentation_does_not_wait_for_the_device(on_meta):
    """From the image on the device to the confusion matrix, once the constants are there."""
    protocol = Protocol(48, window=32, stride=16, threshold=0.4)
    clip, classes = DeCLIP("tiny-eva").to("meta"), make_classes(["a, b", "c"])
    text = torch.empty(3, 32, device="meta")
    images = [torch.empty(3, *size, dtype=torch.uint8, device="meta") for size in SIZES[:3]]
    waits = []
    for turn in range(2):
        images = [image[:, turn:] for image in images]      # of other shapes
        with Waits() as seen:
            for prediction in eval_seg.predict(protocol, clip, classes, text, images):
                eval_seg.confusion_matrix(torch.empty_like(prediction, dtype=torch.uint8),
                                          prediction, 2)
        waits.append(seen.found)
    assert waits[0] and not waits[1]


# ------------------------------------------------------------------------------------- segmentation

@pytest.mark.parametrize("threshold", [None, 0.36])
@pytest.mark.parametrize("lines", [["ground", "cat, kitten", "dog"], ["ground", "cat", "dog"]],
                         ids=["synonyms", "names"])
def test_segmentation_is_that_of_the_plain_form(threshold, lines):
    """Images of several shapes together, one smaller than a window: every pixel's class, but for
    ties of rounding."""
    protocol = Protocol(40, window=32, stride=16, logit_scale=8, threshold=threshold,
                        window_batch=5)
    clip, classes = DeCLIP("tiny-eva"), make_classes(lines)
    text = F.normalize(torch.randn(len(classes.prompts), 32), dim=-1)
    images = [F.interpolate(torch.rand(1, 3, 6, 7), size,
                            mode="bicubic").mul(255).clamp(0, 255).byte()[0]
              for size in [*SIZES, (300, 200)]]
    same, seen = [], set()
    for image, prediction in zip(images, eval_seg.predict(protocol, clip, classes, text, images)):
        expected = reference.predict(protocol, clip, classes, text, image)
        assert prediction.shape == image.shape[1:]
        same.append((prediction == expected).flatten())
        seen |= set(prediction.unique().tolist())
    assert torch.cat(same).float().mean() >= 0.9999
    assert seen == {0, 1, 2}


def test_confusion_matrix_leaves_void_out():
    label = torch.tensor([[0, 1, VOID], [1, 1, VOID]]).short()
    prediction = torch.tensor([[0, 1, 1], [0, 1, 0]])
    assert eval_seg.confusion_matrix(label, prediction, 2).tolist() == [[1, 0], [1, 2]]


# ----------------------------------------------------------------------------------- what it learns

def curve(out, seed: int) -> list[float]:
    """The losses of a training run in the toy world, a mean of each eight steps."""
    train.main(["@presets/toy.txt",
                *options(out=out, images=out.parent / "toy" / "train", seed=seed, log_every=8)])
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()[1:]]


@pytest.mark.slow
def test_training_is_as_good_as_the_plain_form(tmp_path, monkeypatch):
    """The loss curve of a seed differs less from the plain form's than that one's from the plain
    form's with another seed."""
    monkeypatch.chdir(ROOT)
    world.main(options(out=tmp_path / "toy", train=1024, dev=0, val=0, size=128))
    fast = curve(tmp_path / "fast", 0)

    def distill(cfg, student, teacher, vfm, images, grids):
        photos = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        samples = [reference.sample(photo, grid, cfg, teacher, vfm)
                   for photo, grid in zip(photos, grids)]
        with reference.whole_attention(student, teacher, vfm):
            return reference.distill(student, teacher, vfm, samples)

    monkeypatch.setattr(train, "distill", distill)
    same, other = curve(tmp_path / "plain", 0), curve(tmp_path / "other", 1)
    difference, noise = (np.abs(np.subtract(losses, same)) for losses in (fast, other))
    print("fast", fast, "plain", same, "other seed", other, sep="\n")
    assert difference.mean() < noise.mean() and difference.max() < noise.max(), (difference, noise)
