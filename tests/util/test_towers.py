"""util/towers.py: what a file may name is built from data alone."""

import gzip
import json
import shutil
import socket
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from tiny import ROOT, siglip_config, write_siglip

from model import DeCLIP, load_vfm
from util import UserError, printable
from util.towers import (
    Recorded,
    create_open_clip,
    create_vit,
    recorded_model,
    tokenizer_of,
)


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
    ("text_cfg", {"tokenizer_kwargs": {"clean": {"a": 1}}}),
    ("text_cfg", {"tokenizer_kwargs": ["clean"]}),
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


@pytest.mark.parametrize("use", [
    lambda folder: create_open_clip("coca_roberta-ViT-B-32", None),
    lambda folder: tokenizer_of("ViT-H-14-worldwide"),
    lambda folder: tokenizer_of(Recorded("ViT-B-16-SigLIP2-256")),
    lambda folder: DeCLIP(folder).encode_text(["cat"])])
def test_a_package_that_is_missing_is_named(use, tmp_path, monkeypatch):
    folder = write_siglip(tmp_path)
    monkeypatch.setattr(open_clip.hf_model, "transformers", None, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs the package transformers .*by pip install transf"):
        use(folder)


# ---------------------------------------------------------------------- transformers' tokenizers

@pytest.fixture
def asked(monkeypatch):
    """What transformers is asked for, (name, options) each; what would be downloaded is not there,
    and a use of the network fails."""
    transformers = pytest.importorskip("transformers")
    calls, load = [], transformers.AutoTokenizer.from_pretrained

    def ask(name, **options):
        calls.append((str(name), options))
        if name == "somebody/tokenizer":
            raise OSError("We couldn't connect to the hub. Try again")
        return load(name, **options)

    def fails(*where):
        raise AssertionError(f"the network was used: {where}")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", ask)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, fails)
    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return calls


@pytest.fixture
def siglip(monkeypatch):
    """The name of a model of open_clip's own whose tokenizer is on a hub."""
    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, "tiny-hub", siglip_config())
    return "tiny-hub"


def test_a_record_may_name_a_model_whose_tokenizer_is_elsewhere():
    for name in ("ViT-B-16-SigLIP2-256", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA"):
        assert recorded_model("x.safetensors", {"model": name}) == name
    for name in ("roberta-ViT-B-32", "nllb-clip-base-siglip", "mt5-base-ViT-B-32"):
        with pytest.raises(UserError, match="for which open_clip asks a hub or runs code"):
            recorded_model("x.safetensors", {"model": name})


def test_a_tokenizer_is_downloaded_for_a_command_not_for_a_file(siglip, asked, tmp_path):
    path = str(tmp_path / "declip.safetensors")
    DeCLIP(siglip).save(path)
    named, recorded = DeCLIP(siglip, path), DeCLIP(pretrained=path)
    assert not asked        # neither needs it for what it is
    with pytest.raises(UserError, match="tokenizer of tiny-hub can't be had; check the network"):
        named.encode_text(["cat"])
    for clip in (recorded, DeCLIP(recorded.source)):        # a copy of it, as of a teacher
        with pytest.raises(UserError, match="is not here, and a file downloads nothing; say "
                                            "--model tiny-hub, once"):
            clip.encode_text(["cat"])
    assert [options["local_files_only"] for _, options in asked] == [False, True, True]
    assert all(options["trust_remote_code"] is False for _, options in asked)


@pytest.mark.parametrize("source, sentence", [
    (Recorded("tiny-hub"), "is not here, and a file downloads nothing"),
    ("tiny-hub", "needs the package sentencepiece; pip install it")], ids=["record", "command"])
def test_a_cache_without_the_tokenizer(source, sentence, siglip, monkeypatch):
    """As after a download of the weights alone, which are in the same place on the hub."""
    def fails(*_, **__):
        raise ValueError("Couldn't instantiate: you need to have sentencepiece installed")

    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(UserError, match=sentence):
        tokenizer_of(source)


def test_a_folders_tokenizer_is_in_the_folder(asked, tmp_path):
    """A checkpoint that names the folder beside it, by the user's command or not."""
    name, path = write_siglip(tmp_path / "clip"), str(tmp_path / "declip.safetensors")
    clip = DeCLIP(name)
    clip.save(path)
    torch.testing.assert_close(DeCLIP(pretrained=path).encode_text(["cat"]),
                               clip.encode_text(["cat"]))
    (folder, options), = asked      # the second use found the first one's
    assert folder == str(tmp_path / "clip")
    assert (options["local_files_only"], options["trust_remote_code"]) == (True, False)


@pytest.mark.parametrize("changes, sentence", [
    ({"auto_map": {"AutoTokenizer": ["some/body--code.Tokenizer", None]}}, "has auto_map .*some/b"),
    ({"tokenizer_class": "RagTokenizer"}, "has tokenizer_class 'RagTokenizer', by which"),
    ({"tokenizer_class": None}, "has tokenizer_class None"),
    ({"tokenizer_file": "/etc/hostname"}, "has tokenizer_file '/etc/hostname', by which"),
    ({"pad_token": None}, "is no whole model of open_clip's .Asking to pad")])
def test_a_folders_tokenizer_is_data(changes, sentence, asked, tmp_path):
    """By its own configuration; the model's may not lead elsewhere, either."""
    name, path = write_siglip(tmp_path), tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=sentence):
        tokenizer_of(name)


@pytest.mark.parametrize("option", ["subfolder", "tokenizer_type", "tokenizer_file"])
def test_a_folders_model_leads_to_no_other_tokenizer(option, asked, tmp_path):
    name = configure(Path(write_siglip(tmp_path).removeprefix("local-dir:")), "text_cfg",
                     tokenizer_kwargs={"clean": "canonicalize", option: "../other"})
    with pytest.raises(UserError, match=f"has '{option}' among its tokenizer_kwargs, by which"):
        tokenizer_of(name)
    assert not asked


@pytest.mark.parametrize("file, content, sentence", [
    ("tokenizer.json", None, "has no tokenizer.json; name a folder"),
    ("tokenizer.json", "{}", "is no whole model of open_clip's"),
    ("tokenizer.json", '{"added_tokens": [], "model": 3}', "is no whole model of open_clip's"),
    ("tokenizer.json", "", "is no whole model of open_clip's"),
    ("tokenizer_config.json", None, "has no tokenizer_config.json; name a folder"),
    ("tokenizer_config.json", "[]", "is no whole model of open_clip's"),
    ("tokenizer_config.json", "{", "is not json")])
def test_a_folders_tokenizer_is_whole(file, content, sentence, asked, tmp_path):
    name = write_siglip(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=sentence):
        tokenizer_of(name)


def test_without_a_network_a_model_that_needs_none_is_named(monkeypatch):
    def fails(*_, **__):
        raise OSError("We couldn't connect to the hub to load the files")

    monkeypatch.setattr(open_clip, "create_model", fails)
    with pytest.raises(UserError, match="text tower of mt5-base-ViT-B-32 could not be downloaded; "
                                        "check the network, or use a model without, such as"):
        create_open_clip("mt5-base-ViT-B-32", None)


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
