"""train.py: the losses fall, ranks agree, a run goes on where it stopped, settings out of range are refused."""

import json
import math

import ddp_gradients
import pytest
import torch
from conftest import options, torchrun

import distributed
import settings
import train
from model import DeCLIP, read_record

TINY = {"model": "tiny-eva", "pretrained": "none", "vfm_model": "tiny_vfm", "vfm_pretrained": "false", "image_size": 64,
        "batch_size": 2, "workers": 0, "grid": (1, 3), "log_every": 1}
ALONE = distributed.Ranks(0, 1, torch.device("cpu"))


def run(images, out, **given) -> list[dict]:
    """Trains tiny models; returns the lines of log.jsonl."""
    train.main(options(**TINY | {"images": images, "out": out} | given))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ it learns

@pytest.mark.parametrize("model", ["tiny-eva", "tiny-vit"])
def test_both_losses_fall(images, tmp_path, model):
    lines = run(images, tmp_path, model=model, epochs=100, lr=1e-3, weight_decay=0, log_every=20, **{"lambda": 1})
    first, last = lines[0], lines[-1]
    assert lines[-1]["step"] == 200
    assert last["content"] < 0.6 * first["content"], (first, last)
    assert last["context"] < 0.6 * first["context"], (first, last)


def test_lambda_0_is_self_distillation_without_a_vfm(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_vfm", lambda *_: pytest.fail("a VFM was loaded"))
    lines = run(images, tmp_path, epochs=40, lr=1e-3, **{"lambda": 0})
    assert all(line["context"] == 0 and line["loss"] == line["content"] for line in lines)
    assert lines[-1]["content"] < 0.9 * lines[0]["content"]


def test_only_the_attention_blocks_change(images, tmp_path):
    run(images, tmp_path, epochs=2, lr=1e-2, weight_decay=1, model="tiny-vit")
    torch.manual_seed(0)
    before = DeCLIP("tiny-vit").clip.state_dict()
    after = DeCLIP("tiny-vit", str(tmp_path / "declip.safetensors")).clip.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "visual.blocks.2.attn.qkv.q.weight" in changed and "visual.blocks.0.mlp.fc1.weight" in changed
    assert all(name.startswith("visual.blocks.") for name in changed)
    assert not any(part in name for name in changed for part in ("blocks.2.mlp", "blocks.2.norm2", "qkv.k."))


def test_log_and_checkpoint_tell_of_the_run(images, tmp_path):
    lines = run(images, tmp_path, epochs=2, context="qk", scale=1.0)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["epoch"] for line in lines] == [0, 0, 1, 1]
    assert set(lines[0]) == {"step", "epoch", "loss", "content", "context", "lr", "images_per_second", "memory_mb"}
    assert math.isclose(lines[0]["loss"], lines[0]["content"] + 0.25 * lines[0]["context"], rel_tol=1e-6)
    record = read_record(tmp_path / "declip.safetensors")
    assert (record["model"], record["context"], record["scale"]) == ("tiny-eva", "qk", 1.0)
    assert record["settings"]["IMAGE_SIZE"] == 64 and record["settings"]["step"] == 4


def test_presets_published_runs(images, tmp_path):
    train.main(["@presets/published.txt", *options(**TINY | {"images": images, "out": tmp_path, "epochs": 1})])
    assert read_record(tmp_path / "declip.safetensors")["scale"] == 1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precisions(images, tmp_path, precision):
    assert all(math.isfinite(line["loss"]) for line in run(images, tmp_path, epochs=1, precision=precision))


# ---------------------------------------------------------------------------------------------- one process and many

def test_two_ranks_have_the_gradients_of_one(images, tmp_path):
    """Each of two ranks with one image ends with the gradients that one process gets from both."""
    torchrun("tests/ddp_gradients.py", str(images), str(tmp_path / "gradients"))
    alone = ddp_gradients.gradients(ddp_gradients.settings_for(str(images)), ALONE)
    for rank in range(2):
        together = torch.load(tmp_path / f"gradients.{rank}", weights_only=True)
        assert together.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name], gradient, rtol=0, atol=1e-5)


def test_ranks_that_bypass_ddp_do_not_agree(images, tmp_path):
    """The test above can fail: this is what the published code does."""
    torchrun("tests/ddp_gradients.py", str(images), str(tmp_path / "gradients"), "bypass")
    first, second = (torch.load(tmp_path / f"gradients.{rank}", weights_only=True) for rank in range(2))
    assert max((first[name] - second[name]).abs().max() for name in first) > 1e-3


def test_accumulation_does_not_change_the_gradients(images):
    cfg = ddp_gradients.settings_for(str(images))
    at_once = ddp_gradients.gradients(cfg, ALONE)
    cfg.MICRO_BATCH = 1
    for name, gradient in ddp_gradients.gradients(cfg, ALONE).items():
        torch.testing.assert_close(gradient, at_once[name], rtol=0, atol=1e-6)


def test_two_ranks_train_the_model_of_one(images, tmp_path):
    """A whole run under torchrun, accumulation included, against the same run in one process."""
    given = TINY | {"images": images, "batch_size": 4, "micro_batch": 1, "epochs": 3}
    train.main(options(**given, out=tmp_path / "one"))
    torchrun("tests/tiny.py", "train", *options(**given, out=tmp_path / "two"))
    one, two = (DeCLIP("tiny-eva", str(tmp_path / name / "declip.safetensors")).clip.state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)
    one, two = ([json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert all(math.isclose(a["loss"], b["loss"], rel_tol=1e-4) for a, b in zip(one, two))


@pytest.mark.parametrize("batch, micro, world, expected", [(16, 2, 8, (2, 1)), (16, 2, 1, (2, 8)), (16, 2, 16, (1, 1)),
                                                           (12, 8, 2, (6, 1)), (14, 4, 2, (1, 7))])
def test_total_batch_is_kept_on_any_number_of_gpus(batch, micro, world, expected):
    cfg = settings.parse(options(batch_size=batch, micro_batch=micro), train)
    assert train.divide_batch(cfg, world) == expected
    assert expected[0] * expected[1] * world == batch


# ------------------------------------------------------------------------------------------------------- going on

@pytest.mark.parametrize("stop", [1, 2, 3])     # in the middle of an epoch, at its end, in the next
def test_a_resumed_run_is_the_uninterrupted_run(images, tmp_path, stop):
    whole = run(images, tmp_path / "whole", epochs=3)
    run(images, tmp_path / "parts", epochs=3, steps=stop)
    parts = run(images, tmp_path / "parts", epochs=3, resume="true")
    keep = ("step", "epoch", "loss", "content", "context", "lr")
    assert [[line[key] for key in keep] for line in parts] == [[line[key] for key in keep] for line in whole]
    whole, parts = (DeCLIP("tiny-eva", str(tmp_path / name / "declip.safetensors")) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_resume_without_a_checkpoint_begins(images, tmp_path):
    assert run(images, tmp_path, epochs=1, resume="true")[0]["step"] == 1


def test_schedule():
    cfg = settings.parse(options(lr=1, warmup=10), train)
    rates = [train.learning_rate(cfg, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[60] == pytest.approx(0.5) and rates[109] < 1e-3
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_norms_and_biases_have_no_weight_decay():
    clip = DeCLIP("tiny-eva")
    clip.freeze(3)
    decayed, exempt = train.build_optimizer(settings.parse([], train), clip).param_groups
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in exempt["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == sum(p.requires_grad for p in clip.parameters())


# -------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("given, sentence", [
    ({"images": "no/such"}, "no/such does not exist; put images there"),
    ({"context": "v"}, "CONTEXT is 'v'; it must be one of q, k, qk"),
    ({"image_size": 60}, "IMAGE_SIZE 60 is no multiple of tiny-eva's patch size, 8; the nearest that is is 64"),
    ({"grid": (3, 2)}, "GRID is (3, 2); it must be two numbers"),
    ({"ensemble": 1.5}, "ENSEMBLE is 1.5"),
    ({"batch_size": 0}, "BATCH_SIZE is 0; it must be at least 1"),
    ({"precision": "fp8"}, "PRECISION is 'fp8'"),
    ({"unlocked_blocks": 9}, "9 blocks were to be unlocked"),
    ({"vfm_model": "dinov9"}, "timm has no model named 'dinov9'"),
    ({"model": "tiny-evo"}, "open_clip has no model named 'tiny-evo'"),
])
def test_refusals_say_what_to_do(images, tmp_path, given, sentence):
    with pytest.raises(SystemExit) as error:
        train.main(options(**TINY | {"images": images, "out": tmp_path} | given))
    assert str(error.value).startswith("train.py: ") and sentence in str(error.value) and "\n" not in str(error.value)


def test_batch_that_cannot_be_divided():
    with pytest.raises(ValueError, match="can't be divided over 3 processes; set it to 18"):
        train.divide_batch(settings.parse([], train), 3)


def test_a_run_is_not_overwritten_nor_continued_as_another(images, tmp_path):
    run(images, tmp_path, epochs=2, steps=1)
    with pytest.raises(SystemExit, match="already holds a run; go on with it by --resume"):
        run(images, tmp_path, epochs=2)
    with pytest.raises(SystemExit, match="was begun with LR 1e-05, but now it is 0.1"):
        run(images, tmp_path, epochs=2, resume="true", lr=0.1)
    run(images, tmp_path, epochs=2, resume="true", log_every=2)      # harmless
