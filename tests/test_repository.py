"""The names that scripts, presets and README give are names that open_clip and timm know; large
models build."""

import ast
import json
import re
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from conftest import options

import eval_seg
import train
from model import DeCLIP, load_vfm

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("*.py")), *sorted((ROOT / "presets").glob("*.txt"))]


def named(pattern: str) -> set[str]:
    """All words of the repository's texts that match."""
    return {word for path in TEXTS for word in re.findall(pattern, path.read_text())}


def test_default_weights_exist():
    assert (train.MODEL, train.PRETRAINED) in open_clip.list_pretrained()
    assert (train.MODEL, eval_seg.PRETRAINED) in open_clip.list_pretrained()
    assert train.VFM_MODEL in timm.list_pretrained()


def test_models_that_are_named_exist():
    clips = named(r"\b(?:EVA02|ViT)-[BLH]-\d+(?:-[a-z0-9]+)*\b")
    assert {"EVA02-B-16", "EVA02-L-14-336", "ViT-B-16-quickgelu"} <= clips
    assert clips <= set(open_clip.list_models())
    vfms = named(r"\b(?:sam)?vit_[a-z]+_patch\d+\w*(?:\.\w+)?")
    assert {"vit_base_patch14_dinov2.lvd142m", "vit_large_patch14_dinov2.lvd142m"} <= vfms
    assert vfms <= {*timm.list_models(), *timm.list_pretrained()}


def test_tags_that_are_named_belong_to_their_models():
    pairs = named(r"--model (\S+) --pretrained ([a-z0-9_]+)")
    assert ("EVA02-L-14-336", "merged2b_s6b_b61k") in pairs
    assert {pair for pair in pairs if pair[1] != "none"} <= set(open_clip.list_pretrained())


def test_scripts_that_are_named_exist():
    scripts, presets = named(r"(?:python|torchrun[^`\n]*?) (\w+\.py)"), named(r"@(presets/\w+\.txt)")
    assert {"train.py", "eval_seg.py"} <= scripts and all((ROOT / name).exists()
                                                          for name in scripts)
    assert "presets/published.txt" in presets and all((ROOT / name).exists() for name in presets)


def test_nothing_is_executed_that_was_only_to_be_read():
    """No eval, exec or shell in any script, and every torch.load takes tensors alone."""
    for path in ROOT.glob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call)):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert ast.unparse(call.func) not in ("eval", "exec", "os.system", "pickle.load",
                                                  "pickle.loads"), path
            assert keywords.get("shell") != "True", path
            assert ast.unparse(call.func) != "torch.load" or keywords.get("weights_only") == "True", path


def test_means_are_the_models_own():
    tag = open_clip.get_pretrained_cfg(train.MODEL, train.PRETRAINED)
    clip = DeCLIP(train.MODEL)
    assert (clip.mean, clip.std, clip.image_size) == (tag["mean"], tag["std"], 224)
    vfm, config = load_vfm(train.VFM_MODEL,
                           pretrained=False), timm.get_pretrained_cfg(train.VFM_MODEL)
    assert (vfm.mean, vfm.std, vfm.patch_size) == (config.mean, config.std, 14)


STEP = {"vfm_model": "tiny_vfm", "vfm_pretrained": "false", "pretrained": "none", "batch_size": 1,
        "epochs": 1, "steps": 1,
        "num_workers": 0, "grid": (1, 2)}


def one_step(images, tmp_path, **given) -> dict:
    """Trains one step as the options say; returns the line of log.jsonl."""
    train.main(options(**STEP | {"images": images, "out": tmp_path / "run"} | given))
    return json.loads((tmp_path / "run" / "log.jsonl").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336", "ViT-B-16",
                                  "ViT-B-16-quickgelu", "ViT-L-14",
                                  "ViT-L-14-336"])
def test_backbones_of_full_size(images, tmp_path, name):
    """Built with random weights: content and context of a picture that is not square, and one step
    of training."""
    clip = DeCLIP(name)
    p = clip.patch_size
    with torch.inference_mode():
        content, context = clip.encode_dense(torch.randn(1, 3, 4 * p, 6 * p))
    assert content.shape == (1, 768 if "-L-" in name else 512, 4, 6) and context.shape[1] == 24
    line = one_step(images, tmp_path, model=name, image_size=8 * p, crop_size=4 * p)
    print(f"{name}: {line['memory_mb']} MB, {1 / line['images_per_second']:.1f} s a step")
    assert line["content"] > 0 and line["context"] > 0 and line["bad_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "vit_base_patch8_224.dino", "vit_base_patch16_224.dino", "vit_base_patch14_dinov2.lvd142m",
    "vit_large_patch14_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_large_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_dinov3.lvd1689m", "vit_large_patch16_dinov3.lvd1689m",
    "samvit_base_patch16.sa1b",
    "samvit_large_patch16.sa1b"])
def test_vfms_of_full_size(images, tmp_path, name):
    """Built with random weights: one step of training, in which the VFM has the student's number of
    tokens."""
    line = one_step(images, tmp_path, model="tiny-eva", vfm_model=name, image_size=64, crop_size=32)
    print(f"{name}: {line['memory_mb']} MB, {1 / line['images_per_second']:.1f} s a step")
    assert line["context"] > 0 and line["bad_steps"] == 0
    assert name in timm.list_pretrained()
