"""util/weights.py: every layout in and out, and a sentence about files that can't be read."""

import copy
import errno
import json
import random
import time

import open_clip
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_backbones import POOLED
from test_model import TOWERS, randomize
from timm.layers import resample_abs_pos_embed

from downstream.catseg.model import Design, open_catseg
from downstream.fvit import model as fvit_model
from downstream.fvit.model import open_fvit
from model import DeCLIP
from util import UserError, towers, weights
from util.weights import (
    eva_layout,
    from_published,
    fuse_split,
    open_clip_layout,
    read_record,
    read_weights,
    split_fused,
    write_checkpoint,
)

NUMBERS = [-1, 0, 10**6, 10**30, 1e300, float("nan"), float("inf")]
TEXTS = ["", "\ud800", "a\0b", "x" * 9999, "{}{0:>3000000000}", "local-dir:" + "x" * 300]
DEEP = json.loads("[" * 500 + "]" * 500)
WRONG = [None, True, *NUMBERS, *TEXTS, [], {}, [1], [None] * 3, DEEP, {"a": {"b": 1}}]
RECORD = {"model": "tiny-vit", "context": "q", "scale": None, "mean": [0.4, 0.5, 0.6],
          "settings": {"LR": 1e-5}}


def random_clip(name: str) -> DeCLIP:
    """A random CLIP without the bias of timm's head, which open_clip's towers do not have."""
    clip = randomize(DeCLIP(name))
    if name.startswith("tiny-vit"):
        torch.nn.init.zeros_(clip.visual.trunk.head.bias)
    return clip


def as_open_clip(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """A model's state as open_clip names it."""
    vision = open_clip.get_model_config(name)["vision_cfg"]
    return open_clip_layout(state, is_timm="timm_model_name" in vision)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same names, shapes and values, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("name", [*TOWERS, *POOLED])
def test_open_clip_layout_is_the_reverse_of_reading_it(name):
    """Its names and shapes are those of open_clip's own model, no more and no fewer."""
    clip = random_clip(name)
    trunk, state = clip.visual.trunk, clip.state()
    published = as_open_clip(state, name)
    theirs = open_clip.create_model(name, force_custom_text=True).state_dict()
    assert {key: value.shape for key, value in published.items()} == {
        key: value.shape for key, value in theirs.items()}
    assert same(from_published(published, trunk), state)


def test_eva_layout_is_the_reverse_of_reading_it():
    clip = random_clip("tiny-eva")
    published = eva_layout(clip.state())
    assert {"visual.blocks.2.mlp.w1.weight", "visual.blocks.2.attn.q_bias"} < published.keys()
    assert not any("k_bias" in name or "fc1" in name for name in published
                   if name.startswith("visual."))
    assert same(from_published(published, clip.visual.trunk), clip.state())


def test_only_the_last_fused_qkv_is_split():
    fused = {f"blocks.{block}.attn.qkv.{kind}": torch.randn(12, *shape) for block in range(3)
             for kind, shape in (("weight", (4,)), ("bias", ()))}
    split = split_fused(fused, DeCLIP("tiny-vit").visual.trunk)
    assert split.keys() - fused.keys() == {f"blocks.2.attn.qkv.{letter}.{kind}" for letter in "qkv"
                                           for kind in ("weight", "bias")}
    assert fused.keys() - split.keys() == {"blocks.2.attn.qkv.weight", "blocks.2.attn.qkv.bias"}
    assert torch.equal(split["blocks.2.attn.qkv.k.bias"], fused["blocks.2.attn.qkv.bias"][4:8])
    assert same(fuse_split(split), fused)


def test_towers_without_a_fused_qkv_stay_as_they_are():
    trunk = DeCLIP("tiny-eva").visual.trunk
    vision = trunk.state_dict()
    assert same(split_fused(vision, trunk), vision) and same(fuse_split(vision), vision)


@pytest.mark.parametrize("name", ["tiny-eva", "tiny-vit", *POOLED])
def test_positions_of_another_image_size_are_resampled_without_antialiasing(name):
    """Weights for images of 64 px, with 8x8 patches, read for towers of 32 px."""
    clip = random_clip(name)
    trunk, state = clip.visual.trunk, clip.state()
    larger = torch.randn(1, trunk.num_prefix_tokens + 64, trunk.embed_dim)
    published = as_open_clip(state | {"visual.pos_embed": larger}, name)
    found = from_published(published, trunk)["visual.pos_embed"]
    plain, smooth = (resample_abs_pos_embed(
        larger, [4, 4], num_prefix_tokens=trunk.num_prefix_tokens, antialias=antialias)
                     for antialias in (False, True))
    torch.testing.assert_close(found, plain)
    assert not torch.allclose(found, smooth, atol=1e-3)


@pytest.mark.parametrize("name", ["tiny-eva", "tiny-vit"])
def test_a_text_tower_alone_brings_no_vision_weights(name):
    clip = DeCLIP(name)
    text = {name: value for name, value in clip.state().items() if name.startswith("text.")}
    given = text | {"text.attn_mask": torch.zeros(8, 8), "logit_scale": torch.ones(1)}
    found = from_published(given, clip.visual.trunk)
    assert found.keys() == text.keys() | {"logit_scale"} and found["logit_scale"].shape == ()


# --------------------------------------------------------------------------------------- files

def test_a_checkpoint_comes_back_with_its_record(tmp_path):
    path, state = tmp_path / "out/declip.safetensors", {"visual.norm.weight": torch.randn(4)}
    write_checkpoint(path, state, RECORD)
    found, record = read_weights(path)
    assert same(found, state) and record == RECORD == read_record(path)


def test_other_files_have_no_record(tmp_path):
    state = {"visual.norm.weight": torch.randn(4)}
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    for name in ("plain.safetensors", "plain.pt"):
        assert read_record(tmp_path / name) == {}
        found, record = read_weights(tmp_path / name)
        assert same(found, state) and record == {}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_wrapping_and_all_but_tensors_is_left_out(tmp_path, wrapper):
    weight = torch.randn(4)
    torch.save({wrapper: {"module.visual.norm.weight": weight, "step": 3}, "epoch": 1},
               tmp_path / "wrapped.pt")
    assert same(read_weights(tmp_path / "wrapped.pt")[0], {"visual.norm.weight": weight})


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    def fail(state, file, metadata):
        raise SafetensorError("No space left on device")

    path, state = tmp_path / "declip.safetensors", {"visual.norm.weight": torch.randn(4)}
    write_checkpoint(path, state, RECORD)
    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*declip.safetensors'") as full:
        write_checkpoint(path, {"visual.norm.weight": torch.zeros(4)}, {})
    assert full.value.errno == errno.ENOSPC     # by which scripts say what to do
    assert same(read_weights(path)[0], state) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("read", [read_record, read_weights])
@pytest.mark.parametrize("length", [0, 4, 40, -3], ids=["empty", "size", "header", "tensors"])
def test_damaged_safetensors_are_refused(tmp_path, read, length):
    """Files that end early: in the number that begins them, in their header, in their tensors."""
    path = tmp_path / "declip.safetensors"
    write_checkpoint(path, {"visual.norm.weight": torch.randn(400)}, RECORD)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError) as error:
        read(path)
    assert "is not a whole safetensors file" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, sentence", [
    (None, "There is no weights file"),
    (b"", "is not a plain file of tensors, and nothing else is read"),
    (b"<!DOCTYPE html>", "is not a plain file of tensors, and nothing else is read"),
    ({"vision_model.embeddings.class_embedding": torch.zeros(2)}, "the layout of Hugging Face's"),
    ([torch.zeros(2)], "holds a list, not weights by name; give a file with a state dict"),
    (torch.zeros(2), "holds a Tensor, not weights by name; give a file with a state dict")],
    ids=["absent", "empty", "html", "transformers", "list", "tensor"])
def test_files_that_hold_no_weights_are_refused(tmp_path, content, sentence):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_flipped_bits_are_noticed(tmp_path):
    """A checkpoint with any one bit flipped is refused, or has the content that was written."""
    path, rng, refused = tmp_path / "declip.safetensors", random.Random(0), 0
    state = {"text.w": torch.randn(40), "visual.w": torch.randn(3, 5)}
    write_checkpoint(path, state, RECORD)
    good = path.read_bytes()
    for _ in range(200):
        flipped = bytearray(good)
        flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            found, record = read_weights(path)
        except UserError:
            refused += 1
        else:       # the checksum's own name, or blanks
            assert same(found, state) and record == RECORD
    assert refused > 180


@pytest.mark.parametrize("metadata", ["no json", "[1, 2]", '"text"', '{"model": "tiny-eva"}',
                                      "[" * 100_000])
def test_records_that_train_does_not_write_are_refused(tmp_path, metadata):
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors", {"declip": metadata})
    with pytest.raises(UserError, match="x.safetensors has metadata that train.py does not write"):
        read_record(tmp_path / "x.safetensors")


def mutants(record: dict) -> list[dict]:
    """The record with each field, at any depth, replaced by what it can't be, or left out."""
    out = []
    for name, value in record.items():
        out += [{**record, name: wrong} for wrong in WRONG]
        out += [{key: other for key, other in record.items() if key != name}]
        if isinstance(value, dict):
            out += [{**record, name: mutant} for mutant in mutants(value)]
    return out


OPENERS = {"declip": (lambda path: DeCLIP(pretrained=str(path)), {}),
           "catseg": (open_catseg, {"catseg": Design(64)._asdict(), "use": "tools.segment"}),
           "fvit": (open_fvit, {"use": "tools.detect", "fvit": {
               "classes": ["cat"], "seen": [True], "tau": 50.0, "backbone": "0" * 8,
               "design": fvit_model.Design()._asdict()}})}


@pytest.mark.parametrize("kind", OPENERS)
def test_mutated_records_are_opened_or_refused(kind, tmp_path, monkeypatch):
    """Each field of each kind of record by wrong types, sizes, depths and letters: one sentence,
    in less than a second, and nothing else. The model is made but once."""
    made = towers.create_open_clip("tiny-eva", None)
    monkeypatch.setattr("model.create_open_clip", lambda name, tag: (
        copy.deepcopy(made) if name == "tiny-eva" else towers.create_open_clip(name, tag)))
    use, more = OPENERS[kind]
    path, ends = tmp_path / "x.safetensors", []
    settings = {"LR": 1e-5, "MODEL": "tiny-eva", "PRETRAINED": None, "step": 3}
    records = mutants(RECORD | {"model": "tiny-eva", "settings": settings} | more)
    for record in random.Random(0).sample(records, 70):
        save_file({"visual.norm.weight": torch.zeros(2)}, path, {"declip": json.dumps(record)})
        began = time.process_time()
        with pytest.raises(UserError) as error:     # the file has no weights, if nothing else
            use(path)
        assert time.process_time() - began < 1 and "\n" not in str(error.value)
        ends.append("does not write" in str(error.value))
    assert sum(ends) > len(ends) / 2


def test_a_record_of_another_model_is_refused_before_that_is_made(tmp_path):
    DeCLIP("tiny-eva").save(tmp_path / "x.safetensors")
    state, record = read_weights(tmp_path / "x.safetensors")
    write_checkpoint(tmp_path / "x.safetensors", state, record | {"model": "ViT-e-14"})
    with pytest.raises(UserError, match="its embeddings have another width"):
        DeCLIP(pretrained=str(tmp_path / "x.safetensors"))


def test_weights_are_numbers_of_the_models_kind(tmp_path):
    DeCLIP("tiny-eva").save(tmp_path / "x.safetensors")
    state, record = read_weights(tmp_path / "x.safetensors")
    write_checkpoint(tmp_path / "x.safetensors", state | {
        "visual.cls_token": state["visual.cls_token"].long()}, record)
    with pytest.raises(UserError, match="1 are unknown or of another shape.*visual.cls_token"):
        DeCLIP(pretrained=str(tmp_path / "x.safetensors"))
