"""export.py: what it writes is what the other code expects, and comes back bit for bit."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import options
from test_model import randomize
from tiny import ROOT, undrawn, write_siglip

import eval_region
from model import DeCLIP
from tools import export, model_card
from util.files import last_part
from util.towers import tokenizer_of
from util.weights import eva_layout, state_checksum, write_checkpoint

yaml = pytest.importorskip("yaml")

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
    ("tiny-eva", {"layout": "gguf"}, "LAYOUT is 'gguf'; it must be eva or open_clip or onnx"),
    ("tiny-eva", {"ckpt": GOLDEN}, "does not say which model it is"),
    ("tiny-eva", {"layout": "hub", "ckpt": GOLDEN}, "does not say which model it is"),
    ("tiny-eva", {"layout": "hub", "ckpt": "nothing.safetensors"}, "There is no"),
    ("tiny-eva", {"ckpt": "nothing.safetensors"}, "There is no")])
def test_refusals_are_one_sentence(trained, tmp_path, name, given, words):
    _, path = trained(name)
    with pytest.raises(SystemExit) as error:
        export.main(options(**{"ckpt": path, "out": tmp_path / "out"} | given))
    assert words in str(error.value) and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ the hub

MADE = {"IMAGES": "/home/me/secret/val2017", "PRETRAINED": "merged2b_s8b_b131k", "step": 44_000,
        "VFM_MODEL": "vit_base_patch14_dinov2.lvd142m", "LAMBDA": 0.25, "LR": 1e-5,
        "BATCH_SIZE": 16, "IMAGE_SIZE": 560}


def card_of(folder: Path) -> tuple[dict, str]:
    """The front matter and the text of a folder's model card."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_folder_for_the_hub(tmp_path, capsys):
    """The checkpoint as it is, open_clip's files, and a card of what the checkpoint says."""
    clip = randomize(DeCLIP("tiny-eva", context="qk", scale=0.5))
    clip.save(tmp_path / "any.safetensors", MADE)
    export.main(options(layout="hub", ckpt=tmp_path / "any.safetensors", out=tmp_path / "hub"))
    copy = tmp_path / "hub" / "declip.safetensors"
    assert copy.read_bytes() == (tmp_path / "any.safetensors").read_bytes()
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'hub'}")
    assert torch.equal(theirs.logit_scale, clip.text.logit_scale)
    front, text = card_of(tmp_path / "hub")
    assert (front["library_name"], front["pipeline_tag"]) == ("open_clip", "image-segmentation")
    assert front["tags"] == ["declip", "open-vocabulary", "tiny-eva"]
    for row in ("| context | `qk` |", "| scale | 0.5 |", "| patch | 8 |", "| images | `val2017` |",
                "| steps | `44000` |", "| learning rate | `1e-05` |",
                "| `vit_base_patch14_dinov2.lvd142m` | apache-2.0 |"):
        assert row in text
    assert "secret" not in text and 'DeCLIP("hf-hub:you/declip")' in text
    out = capsys.readouterr().out
    assert "where this machine keeps IMAGES" in out and "with context qk and scale 0.5" in out
    export.main(options(layout="hub", ckpt=copy, out=tmp_path / "hub"))     # again, from itself
    assert same(DeCLIP(pretrained=str(copy)), clip)


def test_a_card_has_the_figures_of_these_weights_alone(trained, tmp_path, capsys):
    clip, path = trained("tiny-eva")
    of = {"checksum": state_checksum(clip.state_dict(), ""), "attention": "qk", "scale": 0.5}
    seg = {"benchmark": "a|b/voc20.json", "pamr": 0}
    results = [({}, 44.04), ({"pamr": 10}, 55.0), ({"checksum": "0"}, 66.0),
               ({"attention": "clip"}, 77.0), ({"scale": None}, 88.0)]
    (tmp_path / "seg.json").write_text(json.dumps({"results": [
        {"of": of | seg | other, "mIoU": figure} for other, figure in results]}))
    means = {"box thing": {"top1": 75.0}, "box stuff": {"top1": None}}
    (tmp_path / "region.json").write_text(json.dumps({"results": [
        {"of": of | {"size": 560, "annotations": eval_region.ANNOTATIONS}, "mAcc": means},
        {"of": of | {"size": 560, "annotations": "my/own.json"}, "mAcc": means}]}))
    export.main(options(layout="hub", ckpt=path, out=tmp_path / "hub"))
    _, text = card_of(tmp_path / "hub")
    rows = text.partition("## Figures")[2].partition("##")[0].strip().splitlines()
    assert rows[4:] == ["| regions of COCO panoptic at 560 px, mAcc | `box thing` 75.0 |",
                        "| regions of `own.json` at 560 px, mAcc | `box thing` 75.0 |",
                        "| `voc20.json`, mIoU | 44.0 |",
                        "| `voc20.json`, PAMR 10, mIoU | 55.0 |"]
    (tmp_path / "seg.json").write_text(json.dumps({"results": [{"of": of | seg, "mIoU": "best"}]}))
    export.main(options(layout="hub", ckpt=path, out=tmp_path / "hub"))
    assert "the card has no figures: " in capsys.readouterr().out
    assert "## Figures" not in card_of(tmp_path / "hub")[1]
    assert "## Figures" not in model_card.card({"model": "tiny-eva", "context": "q", "scale": 1.0},
                                               clip, {})


@pytest.mark.parametrize("kind, tool", [("fvit", "detect"), ("ov_dquo", "detect"),
                                        ("catseg", "segment")])
def test_detectors_and_segmenters_have_a_card_too(tmp_path, kind, tool):
    """The file keeps the name that is fetched; no model is built for it, so nothing downloaded."""
    about = {"classes": ["cat"], "seen": [True], "tau": 0.1, "design": {}, "backbone": "0"}
    write_checkpoint(tmp_path / "x.safetensors", {"weight": torch.ones(2)}, {
        "model": "hf-hub:some/body", "context": "q", "scale": None, kind: about,
        "settings": {"CKPT": "/home/me/declip.safetensors"}, "use": f"tools.{tool}"})
    export.main(options(layout="hub", ckpt=tmp_path / "x.safetensors", out=tmp_path / "hub"))
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        "README.md", f"{kind}.safetensors"}
    # A folder is one model's: of two files, `hf-hub:` would take the first.
    DeCLIP("tiny-eva").save(tmp_path / "declip.safetensors")
    with pytest.raises(SystemExit, match=f"has a {kind}.safetensors, and a model of the hub is"):
        export.main(options(layout="hub", ckpt=tmp_path / "declip.safetensors",
                            out=tmp_path / "hub"))
    front, text = card_of(tmp_path / "hub")
    assert f"python -m tools.{tool} photo.jpg" in text and f"--ckpt hf-hub:you/{kind}" in text
    assert ("--backbone" in text) == (kind != "catseg") and "/home/me" not in text
    assert (front["license"], front["tags"][-1]) == ("other", "hf-hub:some/body")
    for given, words in (({"layout": "eva"}, "is more than a CLIP; use it by tools."),
                         ({"layout": "hub", "model": "tiny-eva"}, "MODEL is for a CLIP")):
        with pytest.raises(SystemExit, match=words):
            export.main(options(ckpt=tmp_path / "x.safetensors", **given))
    damaged = bytearray((tmp_path / "x.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "x.safetensors").write_bytes(damaged)
    with pytest.raises(SystemExit, match="is damaged: its content does not have its checksum"):
        export.main(options(layout="hub", ckpt=tmp_path / "x.safetensors", out=tmp_path / "hub2"))


def test_a_model_in_a_folder_leaves_no_path_behind(trained, tmp_path):
    """open_clip's files would name the folders of this machine, so they are left out."""
    _, path = trained(write_siglip(tmp_path / "my: \"clip\"", "tiny-eva"))
    export.main(options(layout="hub", ckpt=path, out=tmp_path / "hub"))
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        "README.md", "declip.safetensors"}
    front, text = card_of(tmp_path / "hub")
    assert front["tags"][-1] == 'my: "clip"' and front["license"] == "other"
    assert "described by a folder that is not here" in text and str(tmp_path) not in text
    assert "open_clip.create_model" not in text


def test_a_readme_of_others_is_kept(trained, tmp_path):
    _, path = trained("tiny-eva")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SystemExit, match="README.md is there and not of this tool; choose another"):
        export.main(options(layout="hub", ckpt=path, out=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "declip.safetensors"}
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("model, made, licence, base", [
    ("EVA02-B-16", MADE, "mit", "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"),
    ("ViT-B-16-quickgelu", MADE | {"PRETRAINED": "openai"}, "mit",
     "timm/vit_base_patch16_clip_224.openai"),
    ("ViT-B-16-SigLIP2-256", MADE | {"PRETRAINED": "webli"}, "apache-2.0",
     "timm/ViT-B-16-SigLIP2-256"),
    ("ViT-B-16", MADE | {"PRETRAINED": "datacomp_xl_s13b_b90k"}, "other",
     "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K"),
    ("EVA02-B-16", MADE | {"VFM_MODEL": "vit_base_patch16_dinov3.lvd1689m"}, "other",
     "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"),
    ("EVA02-B-16", MADE | {"VFM_MODEL": "local-dir:my/vfm"}, "other",
     "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"),
    ("EVA02-B-16", MADE | {"VFM_MODEL": "unknown", "LAMBDA": 0}, "mit",
     "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"),
    ("EVA02-B-16", MADE | {"PRETRAINED": "/home/me/own.pt"}, "other", None),
    ("EVA02-B-16", {}, "other", None)])
def test_a_licence_is_said_only_where_all_parents_are_known(model, made, licence, base):
    parents = model_card.licences(model, made)
    front = yaml.safe_load("\n".join(model_card.front_matter(model, made, parents, "a CLIP")))
    assert (front["license"], front.get("base_model")) == (licence, base)


@pytest.mark.parametrize("text", ["plain", 'a: "b"', "it's #1", "- x", "back\\slash", "Hündchen 🐶",
                                  "\u2028\x85\x7f\uffff", "null", "{}", "---"])
def test_odd_names_survive_yaml(text):
    assert yaml.safe_load(f"tags: [{model_card.quoted(text)}]") == {"tags": [text]}


def test_odd_names_stay_code_of_one_cell():
    assert model_card.code("a`b|c\n# d\x1b") == "`a_b_c # d\\x1b`"
    names = {"a/b/": "b", "local-dir:/x/clip": "clip", "hf-hub:owner/name": "hf-hub:owner/name",
             "ViT-B-16": "ViT-B-16"}
    assert {name: last_part(name) for name in names} == names
