"""onnx_layout.py: an ONNX file computes what the model computes, and says what it needs."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import options
from test_model import randomize
from tiny import ROOT

from model import DeCLIP
from tools import export, onnx_layout
from tools.names import typed_classes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def written(tmp_path, name: str, context: str = "q", **given) -> tuple[DeCLIP, object]:
    """A random model, and onnxruntime's session of the file that export makes of it."""
    clip = randomize(DeCLIP(name, context=context, scale=0.5))
    clip.save(tmp_path / "declip.safetensors")
    export.main(options(layout="onnx", ckpt=tmp_path / "declip.safetensors",
                        out=tmp_path / "model.onnx", **given))
    assert {path.name for path in tmp_path.iterdir()} == {"declip.safetensors", "model.onnx"}
    return clip, onnxruntime.InferenceSession(tmp_path / "model.onnx",
                                              providers=["CPUExecutionProvider"])


def run(session, images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def about(session) -> dict[str, str]:
    return session.get_modelmeta().custom_metadata_map


@torch.no_grad()
def test_content_of_any_number_of_images(tmp_path):
    """A tower with rotary embedding, on images that are not square."""
    clip, session = written(tmp_path, "tiny-eva", "qk", size=(48, 32))
    for count in (1, 3):
        images = torch.randn(count, 3, 48, 32)
        found, expected = run(session, images), clip.encode_dense(images)[0]
        assert found.shape == (count, clip.visual.embed_dim, 6, 4)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [output.name for output in session.get_outputs()] == ["content"]
    assert about(session) == {
        "model": "tiny-eva", "context": "qk", "attention_scale": "0.5", "patch_size": "8",
        "input": "RGB from 0 to 1, less mean, by std",
        "precision": "fp32", "size": "[48, 32]", "mean": json.dumps(clip.mean),
        "std": json.dumps(clip.std), "output": onnx_layout.OUTPUTS["content"]}
    # Where this machine keeps code is not said
    assert str(ROOT).encode() not in (tmp_path / "model.onnx").read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-eva", "tiny-vit", "tiny-pool", "tiny-pe"])
def test_positions_of_one_size_are_constants(name):
    """Nothing is resampled, and no angle computed, when a file runs."""
    clip, images = randomize(DeCLIP(name)), torch.randn(2, 3, 48, 32)
    dense = onnx_layout.Dense(clip.visual)
    expected = dense(images)
    dense.fix((48, 32), half=False)
    torch.nn.init.zeros_(clip.visual.trunk.pos_embed)
    clip.visual.trunk.rope = None
    assert torch.equal(dense(images), expected)


@torch.no_grad()
def test_logits_are_cosines_with_the_best_synonym(tmp_path):
    names = "cat, dog | puppy | Hündchen, the \"red\" kite"
    clip, session = written(tmp_path, "tiny-vit", size=32, classes=names, templates="a {}.",
                            cache="none")
    assert json.loads(about(session)["classes"]) == ["cat", "dog", "the \"red\" kite"]
    assert [output.name for output in session.get_outputs()] == ["logits"]
    images, classes = torch.randn(1, 3, 32, 32), typed_classes(names)
    content = F.normalize(clip.encode_dense(images)[0], dim=1)[0]
    cosines = torch.einsum("pc,chw->phw", clip.encode_text(classes.prompts, ["a {}."]), content)
    torch.testing.assert_close(run(session, images)[0], classes.best(cosines), rtol=0, atol=1e-5)


@torch.no_grad()
def test_half_is_fp16_inside(tmp_path, capsys):
    """A tower with a pooling head, whose file is half as large and rounded; in and out stay
    float32."""
    clip, session = written(tmp_path, "tiny-pool", size=64, half=True)
    images = torch.randn(1, 3, 64, 64)
    expected = clip.encode_dense(images)[0]
    difference = (run(session, images) - expected).abs().max() / expected.abs().max()
    assert 1e-5 < difference < 1e-2 and about(session)["precision"] == "fp16"
    weights = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert {weight.data_type for weight in weights} <= {onnx.TensorProto.FLOAT16,
                                                        onnx.TensorProto.INT64}
    assert "onnxruntime differs from PyTorch by" in capsys.readouterr().out


def refused(tmp_path, **given) -> str:
    """What is said of options that fail; nothing is left behind."""
    path = tmp_path / "declip.safetensors"
    if not path.exists():
        DeCLIP("tiny-vit").save(path)
    with pytest.raises(SystemExit) as error:
        export.main(options(**{"layout": "onnx", "ckpt": path, "size": 32, "cache": "none",
                               "out": tmp_path / "model.onnx"} | given))
    assert [file for file in tmp_path.iterdir() if file.is_file()] == [path]
    return str(error.value)


@pytest.mark.parametrize("given, words", [
    ({"size": 450}, "SIZE is 450, no multiple of tiny-vit's patch size, 8; the nearest that works "
                    "is 448"),
    ({"size": (30, 64)}, "SIZE is 30 64, no multiple of tiny-vit's patch size, 8; the nearest that "
                         "works is 32 64"),
    ({"size": (1, 2, 3)}, "SIZE is (1, 2, 3); it must be one side in pixels or height and width"),
    ({"size": 0}, "SIZE is (0,); it must be"),
    ({"classes": "cat, Cat"}, "CLASSES names 'cat' twice"),
    ({"classes": "cat", "templates": "none of it"}, "TEMPLATES is 'none of it'; it must be"),
    ({"templates": "simple"}, "TEMPLATES is for --classes, which names none, so it has no effect"),
    ({"classes": " , "}, "CLASSES names no class; say --classes"),
    ({"classes": "nowhere.txt"}, "There is no"),
    ({"layout": "eva"}, "SIZE is for onnx, so it has no effect; leave --size out")])
def test_refusals_are_one_sentence(tmp_path, given, words):
    assert words in refused(tmp_path, **given)


@pytest.mark.parametrize("package", onnx_layout.PACKAGES)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert (f"needs the package {package}, which is not installed; pip install onnx onnxscript "
            "onnxruntime.") in refused(tmp_path)


def test_a_tower_too_large_for_one_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_layout, "MAX_BYTES", 300_000)
    assert "in fp32 more than the 2 GB that an ONNX file holds; say --half true" in refused(
        tmp_path)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_file_that_computes_something_else_is_not_left(tmp_path, monkeypatch, wrong):
    """Its export is left out, which takes seconds; onnxruntime returns what is `wrong` times."""
    saved = []

    class Session:
        def __init__(self, *_, **__): ...

        def run(self, _, given):
            return [saved[0](torch.from_numpy(given["images"])).mul(wrong).numpy()]

    monkeypatch.setattr(onnx_layout, "save", lambda dense, *_: saved.append(dense))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert "of the largest value, more than 0.0001, so nothing was written" in refused(tmp_path)


def test_a_path_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").touch()
    assert "make room or choose another path" in refused(
        tmp_path, out=tmp_path / "sub" / "file" / "model.onnx")
