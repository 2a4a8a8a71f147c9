"""util/towers.py: what a file may name is built from data alone."""

import gzip
import json
import shutil

import open_clip
import pytest
import torch
from tiny import ROOT

from model import DeCLIP, load_vfm
from util import UserError, printable
from util.towers import create_open_clip, create_vit, recorded_model, tokenizer_of


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


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(bytes(2**25)), b"",
                                     gzip.compress(b"\xff\xfe"), gzip.compress(b"a b\n")[:-9]],
                         ids=["plain", "32 MB of zeros", "empty", "no text", "cut off"])
def test_a_vocabulary_is_a_few_megabytes_of_text(folder, content):
    (folder / "merges.txt.gz").write_bytes(content)
    with pytest.raises(UserError, match="merges.txt.gz is no vocabulary of open_clip's"):
        tokenizer_of(f"local-dir:{folder}")


@pytest.mark.parametrize("part, changes, sentence", [
    ("text_cfg", {"layers": 10**6}, "has layers 1000000, which no model has"),
    ("text_cfg", {"width": 2**40}, "has width 1099511627776"),
    ("text_cfg", {"heads": "many"}, "is no whole model of open_clip's"),
    ("vision_cfg", {"image_size": float("nan")}, "has image_size nan")])
def test_a_folder_describes_a_model_of_a_usual_size(folder, part, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        DeCLIP(configure(folder, part, **changes))


@pytest.mark.skipif(open_clip.hf_model.transformers is not None, reason="transformers is there")
@pytest.mark.parametrize("use", [lambda: create_open_clip("coca_roberta-ViT-B-32", None),
                                 lambda: tokenizer_of("ViT-H-14-worldwide")])
def test_a_package_that_is_missing_is_named(use):
    with pytest.raises(UserError, match="needs the package transformers; install it by pip"):
        use()


@pytest.mark.parametrize("part, use", [
    ("create_model", lambda: create_open_clip("mt5-base-ViT-B-32", None)),
    ("get_tokenizer", lambda: tokenizer_of("ViT-B-16-SigLIP2-384"))])
def test_without_a_network_a_model_that_needs_none_is_named(monkeypatch, part, use):
    def fails(*_, **__):
        raise OSError("We couldn't connect to the hub to load the files")

    monkeypatch.setattr(open_clip, part, fails)
    with pytest.raises(UserError, match="could not be downloaded; check the network, or use a "
                                        "model that needs neither, such as EVA02-B-16"):
        use()


@pytest.mark.parametrize("name, sentence", [
    ("vit_base_mci_224", "is no plain ViT .* .HybridEmbed."),
    ("vit_tiny_r_s16_p8_224", "is no plain ViT .* .HybridEmbed."),
    ("vitamin_small_224", "is no plain ViT .* .HybridEmbed."),
    ("naflexvit_base_patch16_gap", "is no plain ViT .* does not take dynamic_img_size"),
    ("vgg11", "is no plain ViT .* does not take dynamic_img_size"),
    ("vit_base_patch16_224.no_such_tag", "has no weights of a VFM")])
def test_a_vfm_is_refused_for_what_it_is(name, sentence):
    with torch.device("meta"), pytest.raises(UserError, match=sentence):
        load_vfm(name, pretrained="tag" in name)
