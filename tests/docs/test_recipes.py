"""docs/recipes.md: its commands are options that exist, and what it says of weights and images
holds, with tiny models."""

import importlib
import re
import shlex

import numpy as np
import open_clip
import pytest
import torch
from conftest import options
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT

import eval_seg
import train
from model import DeCLIP
from util import settings
from util.images import read_image
from util.results import read_results

TEXT = (ROOT / "docs/recipes.md").read_text()
COMMANDS = [line for line in TEXT.splitlines() if line.startswith("python ")]
POSITIONAL = {"tools.segment": "PHOTOS", "docs.segment_geotiff": "IMAGES"}


def parse(command: str) -> tuple[str, settings.Settings]:
    """A line of the text -> its script, and the settings that it gives."""
    words = shlex.split(command)[1:]
    script = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    module = importlib.import_module(script)
    given = words[2:] if words[0] == "-m" else words[1:]
    return script, settings.parse(given, module, POSITIONAL.get(script))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    """Every option exists; patches divide the sides."""
    script, cfg = parse(command)
    if script == "train":
        patch = open_clip.get_model_config(cfg.MODEL)["vision_cfg"]["patch_size"]
        assert cfg.IMAGE_SIZE % patch == cfg.CROP_SIZE % patch == 0


def test_the_table_of_weights_names_models_and_sizes():
    rows = re.findall(r"^\| .*\.pt` \| `(\S+)` \| (\d+) \| (.+) \|$", TEXT, re.M)
    assert len(rows) == 3
    for name, patch, sizes in rows:
        assert open_clip.get_model_config(name)["vision_cfg"]["patch_size"] == int(patch)
        assert not [size for size in re.findall(r"\d+", sizes) if int(size) % int(patch)]


@pytest.fixture
def weights(tmp_path):
    """Writes weights of a tiny open_clip model as such files have them -> (path, the model)."""
    def write(form: str) -> tuple:
        own = open_clip.create_model("tiny-vit-quickgelu").eval()
        state = own.state_dict()
        if form == "half":
            state = {name: value.half() for name, value in state.items()}
        if form == "training":
            state = {"epoch": 5, "name": "run", "optimizer": {"state": {}, "param_groups": []},
                     "state_dict": {f"module.{name}": value for name, value in state.items()}}
        torch.save(state, tmp_path / "Remote.pt")
        return tmp_path / "Remote.pt", own
    return write


@pytest.mark.parametrize("form", ["plain", "half", "training"])
def test_such_weights_are_trained_and_evaluated(weights, images, voc, tmp_path, form):
    """One step from the file, as open_clip computes it; the result says what it is."""
    path, own = weights(form)
    clip, pixels = DeCLIP("tiny-vit-quickgelu", str(path)), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(clip.encode_image(pixels), own.encode_image(pixels), rtol=0,
                                   atol=2e-3 if form == "half" else 1e-5)
    train.main(options(model="tiny-vit-quickgelu", pretrained=path, images=images, image_size=64,
                       crop_size=32, vfm_model="tiny_vfm", vfm_pretrained="false", batch_size=1,
                       steps=1, num_workers=0, grid=(1, 2), out=tmp_path / "run"))
    trained = tmp_path / "run/declip.safetensors"
    assert {value.dtype for value in load_file(trained).values()} == {torch.float32}
    given = {"data": voc, "benchmarks": "voc20", "num_workers": 0, "templates": "simple"}
    eval_seg.main(options(ckpt=trained, **given))
    result, = read_results(tmp_path / "run/seg.json")
    assert result["of"]["model"] == "tiny-vit-quickgelu" and result["of"]["context"] == "q"


def test_a_file_that_does_not_say_what_it_is_must_be_described(weights, voc, tmp_path):
    path, _ = weights("plain")
    given = {"ckpt": path, "data": voc, "benchmarks": "voc20", "num_workers": 0,
             "templates": "simple", "out": tmp_path / "out"}
    with pytest.raises(SystemExit, match="give --model, --context and --scale .* or --attention"):
        eval_seg.main(options(**given))
    eval_seg.main(options(**given, model="tiny-vit-quickgelu", pretrained="none",
                          attention="clip"))


def test_the_wrong_activation_is_no_error(weights):
    """Which is why the text says what is known."""
    path, own = weights("plain")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        wrong = DeCLIP("tiny-vit", str(path)).encode_image(pixels)
        assert not torch.allclose(wrong, own.encode_image(pixels), atol=1e-3)


def test_of_16_bits_the_upper_8_count(tmp_path):
    values = np.linspace(29_000, 31_000, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "thermal.png")
    assert torch.equal(read_image(tmp_path / "thermal.png"),
                       torch.from_numpy((values // 256).astype(np.uint8)).expand(3, 8, 8))


def test_an_image_that_is_too_large_is_sent_here(tmp_path, monkeypatch):
    Image.new("L", (11, 10)).save(tmp_path / "large.png")
    monkeypatch.setattr("util.images.MAX_DECODED", 100)
    words = r"it is 11 x 10, and at most 100 pixels are decoded: cut it into tiles, as docs/recipes"
    with pytest.raises(ValueError, match=words):
        read_image(tmp_path / "large.png")
