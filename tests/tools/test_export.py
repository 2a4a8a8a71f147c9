"""export.py: what it writes is what the other code expects, and comes back bit for bit."""

from pathlib import Path

import open_clip
import pytest
import torch
from conftest import options
from test_model import randomize
from tiny import ROOT, undrawn, write_siglip

from model import DeCLIP
from tools import export
from util.towers import tokenizer_of
from util.weights import eva_layout

GOLDEN = ROOT / "tests/golden_b16.pt"


@pytest.fixture
def trained(tmp_path):
    """Writes a random model as a checkpoint of train.py: (name, context) -> (model, path)."""
    def write(name: str, context: str = "qk") -> tuple[DeCLIP, Path]:
        clip = randomize(DeCLIP(name, context=context, scale=0.5))
        if name.lower().startswith(("vit", "tiny-vit")):
            # open_clip's projection has no bias; timm's head has one
            torch.nn.init.zeros_(clip.visual.trunk.head.bias)
        clip.save(tmp_path / "declip.safetensors")
        return clip, tmp_path / "declip.safetensors"
    return write


def same(one: DeCLIP, other: DeCLIP) -> bool:
    """Whether all weights are equal, bit for bit."""
    state, of_other = one.state(), other.state()
    return state.keys() == of_other.keys() and all(torch.equal(state[key], of_other[key])
                                                   for key in state)


def test_eva_layout_comes_back(trained, tmp_path, capsys):
    clip, path = trained("tiny-eva")
    export.main(options(ckpt=path, out=tmp_path / "eva.pt"))
    assert same(clip, DeCLIP("tiny-eva", str(tmp_path / "eva.pt")))
    assert "tiny-eva, to be used with context qk and scale 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny-eva", "tiny-vit", "tiny-vit-quickgelu", "tiny-pool",
                                  "tiny-pe"])
def test_open_clip_layout_comes_back(trained, tmp_path, name):
    """open_clip's own loader takes the folder strictly, and its [CLS] equals ours.

    Read again, the weights are the same.
    """
    if name == "tiny-pool":       # with a tokenizer of its own
        name = write_siglip(tmp_path / "clip", name)
    clip, path = trained(name)
    export.main(options(ckpt=path, layout="open_clip", out=tmp_path / "folder"))
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'folder'}")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval().encode_image(images), clip.encode_image(images),
                                   rtol=0, atol=1e-5)
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'folder'}")(["a cat"])
        assert torch.equal(tokens, tokenizer_of(clip.source)(["a cat"]))
        torch.testing.assert_close(theirs.encode_text(tokens), clip.text.encode_text(tokens))
    again = DeCLIP(f"local-dir:{tmp_path / 'folder'}", "own")
    assert same(clip, again) and (again.mean, again.std) == (clip.mean, clip.std)


def eva_shapes() -> dict[str, tuple]:
    shapes = torch.load(GOLDEN, weights_only=True)["shapes"]
    return {key: tuple(shape) for key, shape in shapes.items()}


def test_eva_layout_has_the_published_names():
    """EVA02-B-16's vision weights have exactly the names and shapes of EVA-CLIP's files."""
    with undrawn():
        state = eva_layout(DeCLIP("EVA02-B-16").state())
    assert {key: tuple(value.shape) for key, value in state.items()
            if key.startswith("visual.")} == eva_shapes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EVA02-B-16", "EVA02-L-14-336", "ViT-B-16", "ViT-L-14"])
def test_full_size_models_come_back(trained, tmp_path, name):
    clip, path = trained(name)
    for layout in ("eva", "open_clip") if "EVA" in name else ("open_clip",):
        export.main(options(ckpt=path, layout=layout, out=tmp_path / layout))
        is_eva = layout == "eva"
        again = (DeCLIP(name, str(tmp_path / "eva")) if is_eva else
                 DeCLIP(f"local-dir:{tmp_path / layout}", "own"))
        assert same(clip, again)


@pytest.mark.parametrize("name, given, words", [
    ("tiny-vit", {"layout": "eva"},
     "EVA-CLIP's layout has no names for the tower of tiny-vit; use --layout open_clip"),
    ("tiny-pe", {"layout": "eva"}, "EVA-CLIP's layout has no names for the tower of tiny-pe"),
    ("tiny-eva", {"layout": "onnx"}, "LAYOUT is 'onnx'; it must be eva or open_clip"),
    ("tiny-eva", {"ckpt": GOLDEN}, "does not say which model it is"),
    ("tiny-eva", {"ckpt": "nothing.safetensors"}, "There is no")])
def test_refusals_are_one_sentence(trained, tmp_path, name, given, words):
    _, path = trained(name)
    with pytest.raises(SystemExit) as error:
        export.main(options(**{"ckpt": path, "out": tmp_path / "out"} | given))
    assert words in str(error.value) and not (tmp_path / "out").exists()
