"""util/towers.py: what a file may name is built from data alone."""

import json
import shutil

import pytest
from tiny import ROOT

from model import DeCLIP
from util import UserError, printable
from util.towers import create_vit, recorded_model


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "toy/clip", tmp_path / "toy/clip")
    return tmp_path / "toy/clip"


def configure(folder, part: str, **changes) -> str:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][part] |= changes
    path.write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_without_a_network_a_vfm_that_is_here_is_named(monkeypatch):
    """As tools.visualize needs one, also beside the toy world's checkpoint."""
    def fails(*_, **__):
        raise OSError("We couldn't connect to the hub. Try again")

    monkeypatch.setattr("timm.create_model", fails)
    with pytest.raises(UserError, match=r"connect to the hub\); check the network, or name a VFM "
                                        "that is here by --vfm_model, such as local-dir:toy/vfm"):
        create_vit("vit_base_patch14_dinov2.lvd142m", True)


@pytest.mark.parametrize("part, changes", [
    ("text_cfg", {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}),
    ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}),
    ("text_cfg", {"hf_model_name": "x"}),
    ("vision_cfg", {"timm_model_name": "hf-hub:somebody/model"}),
    ("vision_cfg", {"timm_model_pretrained": True})])
def test_a_file_names_no_hub_and_no_code(folder, part, changes):
    """A checkpoint's record that names a folder beside it, whose configuration names more."""
    name = f"local-dir:{folder}"
    assert recorded_model("x.safetensors", {"model": name}) == name
    configure(folder, part, **changes)
    with pytest.raises(ValueError, match="for which open_clip asks a hub or runs code"):
        recorded_model("x.safetensors", {"model": name})


def test_a_folder_without_weights_has_no_weights_of_its_own(folder):
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights beside its configuration"):
        DeCLIP(f"local-dir:{folder}", "own")
    DeCLIP(f"local-dir:{folder}")       # random ones can be asked for


def test_control_characters_do_not_reach_a_terminal():
    assert printable("photo\x1b[2J.jpg") == "photo\\x1b[2J.jpg"
    assert printable("föto\n漢") == "föto\n漢"
