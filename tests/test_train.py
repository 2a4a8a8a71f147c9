"""train.py: the losses fall, ranks agree, a run goes on where it stopped, settings out of range are
refused."""

import json
import math
import shutil

import ddp_gradients
import pytest
import torch
import torch.nn.functional as F
import warm
from conftest import options, preset, succeeds
from tiny import ROOT

import eval_seg
import train
from data import Grid
from model import DeCLIP, VisionTower
from toy import world
from util import distributed, settings
from util.order import epoch_order
from util.run import Log
from util.weights import read_record

TINY = {"model": "tiny-eva", "pretrained": "none", "vfm_model": "tiny_vfm",
        "vfm_pretrained": "false", "image_size": 64,
        "crop_size": 32, "batch_size": 2, "num_workers": 0, "grid": (1, 3), "log_every": 1}
ALONE = distributed.Ranks(0, 1, torch.device("cpu"))


def run(images, out, **given) -> list[dict]:
    """Trains tiny models; returns the lines of log.jsonl."""
    train.main(options(**TINY | {"images": images, "out": out} | given))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------- it learns

@pytest.mark.parametrize("model", ["tiny-eva", "tiny-vit", "tiny-pool", "tiny-pe"])
def test_both_losses_fall(images, tmp_path, model):
    lines = run(images, tmp_path, model=model, epochs=15, lr=2e-3, weight_decay=0, log_every=20,
                **{"lambda": 1})
    first, last = lines[0], lines[-1]
    assert lines[-1]["step"] == 30
    assert last["content"] < 0.6 * first["content"], (first, last)
    assert last["context"] < 0.6 * first["context"], (first, last)


def test_declip_learns_to_see_the_toy_world(tmp_path, monkeypatch, capsys):
    """Ten steps are enough to segment better than the untrained block, which segments better
    than plain CLIP. Presets and models are found from any folder; the run says how to go on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    shutil.copy(ROOT / "toy/benchmark.json", "toy")     # its scenes are beside it
    world.main(options(train=80, dev=0, val=10, size=128))
    train.main(["@presets/toy.txt", *options(out="my run", num_workers=0)])
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        "python -m tools.segment data/toy/train/00000.png --classes \"cat, grass\" "
        "--ckpt 'my run/declip.safetensors'")
    evaluation = ["@presets/toy_seg.txt", *options(out=tmp_path, num_workers=0,
                                                   cache=tmp_path / "cache")]
    clip, untrained = (eval_seg.main([*evaluation, "--attention", name])["toy"]["mIoU"]
                       for name in ("clip", "q"))
    declip = eval_seg.main([*evaluation, "--ckpt", "my run/declip.safetensors"])["toy"]["mIoU"]
    assert clip < untrained - 10 and untrained < declip - 5, (clip, untrained, declip)


def test_lambda_0_is_self_distillation_without_a_vfm(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_vfm", lambda *_: pytest.fail("a VFM was loaded"))
    train.main([preset(tmp_path, **TINY), *options(images=images, out=tmp_path / "run", epochs=10,
                                                   lr=2e-3, **{"lambda": 0})])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(line["context"] == 0 and line["loss"] == line["content"] for line in lines)
    assert lines[-1]["content"] < 0.9 * lines[0]["content"]


class Recorder(torch.nn.Module):
    """Stands for a model: keeps what it is given, returns what it is told."""

    def __init__(self, answer, **attributes):
        super().__init__()
        self.answer, self.given = answer, []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *given):
        self.given.append(given)
        return self.answer

    encode_image = forward


def test_padding_may_be_left_out(images):
    """Of an image of 40 x 80, the lower half of the tokens is black."""
    cfg = settings.parse(options(**TINY | {"images": images, "padding": "false"}), train)
    context, tokens = torch.randn(1, 64, 48), torch.randn(1, 64, 40)
    student = Recorder((torch.randn(1, 32), context))
    teacher = Recorder(torch.randn(1, 32), mean=(0, 0, 0), std=(1, 1, 1), patch_size=8)
    vfm = Recorder(tokens, mean=(0, 0, 0), std=(1, 1, 1), patch_size=7)
    wide = torch.zeros(3, 40, 80, dtype=torch.uint8)
    losses = train.distill(cfg, student, teacher, vfm, [wide], [Grid(1, 1, [0])])
    torch.testing.assert_close(losses["context"],
                               train.context_loss(context[:, :32], tokens[:, :32]))


def test_each_model_sees_its_own_image(images):
    """Student and crops normalised for CLIP, the VFM's image for the VFM, with as many tokens."""
    cfg = settings.parse(options(**TINY | {"images": images, "grid": (2, 2), "max_crops": 3,
                                           "keep_aspect": "true"}), train)
    clip = DeCLIP("tiny-eva")
    grey = torch.full((3, 40, 80), 128, dtype=torch.uint8)
    regions, crops = torch.randn(3, 32), torch.randn(3, 32)
    context, tokens = torch.randn(1, 64, 48), torch.randn(1, 64, 40)
    student = Recorder((regions, context))
    teacher = Recorder(crops, mean=clip.mean, std=clip.std, patch_size=8)
    vfm = Recorder(tokens, mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1), patch_size=7)
    grids = train.sample_grids(cfg, 1, [4])
    losses = train.distill(cfg, student, teacher, vfm, [grey], grids)
    content = (1 - F.cosine_similarity(regions, crops)).mean()
    torch.testing.assert_close(losses["content"], content)
    torch.testing.assert_close(losses["context"], train.context_loss(context, tokens))
    (inputs, boxes), = student.given
    (crop_inputs,), = teacher.given
    (vfm_inputs,), = vfm.given
    assert inputs.shape == (1, 3, 64, 64) and vfm_inputs.shape == (1, 3, 56, 56)
    assert crop_inputs.shape == (3, 3, 32, 32)
    value = 128 / 255
    # The image is above the padding, a crop between two halves of it.
    for seen, mean, std, rows in ((inputs, clip.mean, clip.std, range(32)),
                                  (crop_inputs, clip.mean, clip.std, range(8, 24)),
                                  (vfm_inputs, vfm.mean, vfm.std, range(28))):
        padding = [row for row in range(seen.shape[2]) if row not in rows]
        for channel in range(3):
            level, black = ((x - mean[channel]) / std[channel] for x in (value, 0))
            assert seen[:, channel, rows].sub(level).abs().max() < 1e-4
            assert seen[:, channel, padding].sub(black).abs().max() < 1e-4
    assert len(boxes[0]) == 3 and boxes[0][:, 3].max() <= 0.5


def test_grids_change_with_the_epoch(images, monkeypatch):
    """The grid of image 4 is sampled anew in each epoch, from seed, epoch and image alone."""
    cfg, keys = settings.parse(options(**TINY | {"images": images, "seed": 3}), train), []
    monkeypatch.setattr(train, "sample_grid", lambda key, *_: keys.append(key) or Grid(1, 1, [0]))
    for epoch in range(3):
        train.sample_grids(cfg, epoch, [4])
    assert keys == ["3-0-4", "3-1-4", "3-2-4"]


def test_a_run_samples_its_grids_by_epoch_and_image(images, tmp_path, monkeypatch):
    """Five images, two a step: the loop asks for each epoch's grids of the images it reads."""
    asked, sample_grids = [], train.sample_grids
    monkeypatch.setattr(train, "sample_grids", lambda cfg, epoch, indices:
                        asked.append((epoch, *indices)) or sample_grids(cfg, epoch, indices))
    run(images, tmp_path, epochs=2)
    order = [epoch_order(5, 2, epoch, 0).tolist() for epoch in range(2)]
    assert asked == [(epoch, *batch) for epoch in range(2) for batch in order[epoch]]


def test_the_teacher_is_the_student_at_its_start(images):
    cfg = settings.parse(options(**TINY | {"images": images, "precision": "fp32"}), train)
    clip, teacher, _ = train.build(cfg, ALONE)
    student = clip.visual
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters()))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in clip.text.parameters())
    with torch.no_grad():
        student.trunk.blocks[0].attn.q_proj.weight.add_(1)
    assert not torch.equal(student.trunk.blocks[0].attn.q_proj.weight,
                           teacher.trunk.blocks[0].attn.q_proj.weight)


def test_gradients_are_of_equation_10(images):
    """The gradient at λ is that of the content loss plus λ times that of the context loss."""
    cfg = ddp_gradients.settings_for(str(images))
    by_lambda = {}
    for cfg.LAMBDA in (0.25, 1.25, 2.25):
        by_lambda[cfg.LAMBDA] = ddp_gradients.gradients(cfg, ALONE)
    for name in by_lambda[0.25]:
        of_context = by_lambda[2.25][name] - by_lambda[1.25][name]
        torch.testing.assert_close(by_lambda[1.25][name] - by_lambda[0.25][name], of_context,
                                   rtol=1e-3, atol=1e-6)
    assert max((by_lambda[2.25][name] - by_lambda[0.25][name]).abs().max()
               for name in by_lambda[0.25]) > 1e-3


def test_optimizer_has_the_settings(images, tmp_path, monkeypatch):
    """Betas and eps as given, and at each step the learning rate of the schedule."""
    made, rates, build = [], [], train.build_optimizer
    monkeypatch.setattr(train, "build_optimizer", lambda *given: made.append(build(*given))
                        or made[-1])
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self: rates.append(self.param_groups[0]["lr"]))
    lines = run(images, tmp_path, epochs=4, lr=0.5, betas=(0.7, 0.8), eps=0.1)
    assert (made[0].defaults["betas"], made[0].defaults["eps"]) == ((0.7, 0.8), 0.1)
    cfg = settings.parse(options(lr=0.5), train)
    assert rates == [line["lr"] for line in lines] == [train.learning_rate(cfg, step, 8)
                                                       for step in range(8)]


def test_only_the_attention_blocks_change(images, tmp_path):
    run(images, tmp_path, epochs=2, lr=1e-2, weight_decay=1, model="tiny-vit")
    torch.manual_seed(0)
    before = DeCLIP("tiny-vit").state()
    after = DeCLIP("tiny-vit", str(tmp_path / "declip.safetensors")).state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"visual.blocks.2.attn.qkv.q.weight", "visual.blocks.0.mlp.fc1.weight"} <= changed
    assert all(name.startswith("visual.blocks.") for name in changed)
    assert not any(part in name for name in changed
                   for part in ("blocks.2.mlp", "blocks.2.norm2", "qkv.k."))


def test_log_and_checkpoint_tell_of_the_run(images, tmp_path):
    lines = run(images, tmp_path, epochs=2, context="qk", scale=1.0)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [line["epoch"]
                                                                 for line in lines] == [0, 0, 1, 1]
    assert set(lines[0]) == {"step", "epoch", "loss", "content", "context", "lr",
                             "images_per_second", "memory_mb",
                             "bad_steps", "bad_files"}
    assert math.isclose(lines[0]["loss"], lines[0]["content"] + 0.25 * lines[0]["context"],
                        rel_tol=1e-6)
    record = read_record(tmp_path / "declip.safetensors")
    assert (record["model"], record["context"], record["scale"]) == ("tiny-eva", "qk", 1.0)
    assert record["settings"]["IMAGE_SIZE"] == 64 and record["settings"]["step"] == 4


def test_presets_published_runs(images, tmp_path):
    train.main(["@presets/published.txt",
                *options(**TINY | {"images": images, "out": tmp_path, "epochs": 1})])
    assert read_record(tmp_path / "declip.safetensors")["scale"] == 1


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16),
                                              ("fp32", torch.float32)])
def test_precisions(images, tmp_path, precision, dtype, monkeypatch):
    seen = []
    project = VisionTower.project
    monkeypatch.setattr(VisionTower, "project", lambda self, tokens:
                        seen.append(project(self, tokens)) or seen[-1])
    assert all(math.isfinite(line["loss"])
               for line in run(images, tmp_path, epochs=1, precision=precision))
    assert {tensor.dtype for tensor in seen} == {dtype}


def test_ensemble_is_what_is_saved(images, tmp_path):
    """Saved: 0.5 student + 0.5 CLIP; resumed: the student alone."""
    run(images, tmp_path / "student", epochs=2, lr=1e-2)
    run(images, tmp_path / "mixed", epochs=2, lr=1e-2, ensemble=0.5)
    torch.manual_seed(0)
    clip = DeCLIP("tiny-eva")
    student, mixed = (DeCLIP(pretrained=str(tmp_path / name / "declip.safetensors"))
                      for name in ("student", "mixed"))
    for a, b, c in zip(clip.parameters(), student.parameters(), mixed.parameters()):
        torch.testing.assert_close(c, (a + b) / 2)
    states = [torch.load(tmp_path / name / "resume-00000004.pt", weights_only=True)["model"]
              for name in ("student", "mixed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ----------------------------------------------------------------------------- one process and many

@pytest.mark.cpu
def test_two_ranks_have_the_gradients_of_one(images, tmp_path):
    """Each of two ranks with one image ends with the gradients that one process gets from both."""
    succeeds(warm.ranks("tests/ddp_gradients.py", str(images), str(tmp_path / "gradients")))
    alone = ddp_gradients.gradients(ddp_gradients.settings_for(str(images)), ALONE)
    for rank in range(2):
        together = torch.load(tmp_path / f"gradients.{rank}", weights_only=True)
        assert together.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name], gradient, rtol=0, atol=1e-5)


@pytest.mark.cpu
def test_ranks_that_bypass_ddp_do_not_agree(images, tmp_path):
    """The test above can fail: this is what the published code does."""
    succeeds(warm.ranks("tests/ddp_gradients.py", str(images), str(tmp_path / "gradients"),
                        "bypass"))
    first, second = (torch.load(tmp_path / f"gradients.{rank}", weights_only=True)
                     for rank in range(2))
    assert max((first[name] - second[name]).abs().max() for name in first) > 1e-3


def test_accumulation_does_not_change_the_gradients(images):
    cfg = ddp_gradients.settings_for(str(images))
    at_once = ddp_gradients.gradients(cfg, ALONE)
    cfg.MICRO_BATCH = 1
    for name, gradient in ddp_gradients.gradients(cfg, ALONE).items():
        torch.testing.assert_close(gradient, at_once[name], rtol=0, atol=1e-6)


@pytest.mark.cpu
@pytest.mark.parametrize("model", ["tiny-eva", "tiny-pool"])
def test_two_ranks_train_the_model_of_one(images, tmp_path, model):
    """A whole run of two ranks, accumulation included, against the same run in one process."""
    given = TINY | {"images": images, "model": model, "batch_size": 4, "micro_batch": 1,
                    "epochs": 3}
    train.main(options(**given, out=tmp_path / "one"))
    succeeds(warm.ranks("tests/tiny.py", "train", *options(**given, out=tmp_path / "two")))
    one, two = (DeCLIP(model, str(tmp_path / name / "declip.safetensors")).state()
                for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)
    one, two = ([json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
                for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert all(math.isclose(a["loss"], b["loss"], rel_tol=1e-4) for a, b in zip(one, two))


@pytest.mark.parametrize("batch, micro, world, expected",
                         [(16, 2, 8, (2, 1)), (16, 2, 1, (2, 8)), (16, 2, 16, (1, 1)),
                                                           (12, 8, 2, (6, 1)), (14, 4, 2, (1, 7))])
def test_total_batch_is_kept_on_any_number_of_gpus(batch, micro, world, expected):
    assert distributed.divide_batch(batch, micro, world) == expected
    assert expected[0] * expected[1] * world == batch


# ----------------------------------------------------------------------------------------- going on

@pytest.mark.cpu
@pytest.mark.parametrize("stop, model", [   # in the middle of an epoch, at its end, in the next
    (1, "tiny-eva"), (2, "tiny-pool"), (3, "tiny-pe")])
def test_a_resumed_run_is_the_uninterrupted_run(images, tmp_path, stop, model):
    whole = run(images, tmp_path / "whole", epochs=3, model=model)
    run(images, tmp_path / "parts", epochs=3, steps=stop, model=model)
    parts = run(images, tmp_path / "parts", epochs=3, resume="true", model=model)
    keep = ("step", "epoch", "loss", "content", "context", "lr")
    assert [[line[key] for key in keep] for line in parts] == [[line[key] for key in keep]
                                                               for line in whole]
    whole, parts = (DeCLIP(model, str(tmp_path / name / "declip.safetensors"))
                    for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_resume_without_a_checkpoint_begins(images, tmp_path, capsys):
    assert run(images, tmp_path, epochs=1, resume="true")[0]["step"] == 1
    assert "has no checkpoint, so the run begins" in capsys.readouterr().out


def test_a_run_goes_on_from_its_last_checkpoint(images, tmp_path, monkeypatch, capsys):
    """Killed in the middle of an epoch, with half a line in the log: the steps since the last
    SAVE_EVERY are made again."""
    whole = run(images, tmp_path / "whole", epochs=2, batch_size=1)
    monkeypatch.setattr(Log, "write", lambda self, step, *given, own=Log.write:
                        exit("killed") if step == 4 else own(self, step, *given))
    with pytest.raises(SystemExit, match="killed"):
        run(images, tmp_path / "parts", epochs=2, batch_size=1, save_every=2)
    monkeypatch.undo()
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "ep')
    parts = run(images, tmp_path / "parts", epochs=2, batch_size=1, save_every=2, resume="true")
    assert "going on at step 2" in capsys.readouterr().out
    assert [(line["step"], line["loss"]) for line in parts] == [(line["step"], line["loss"])
                                                                for line in whole]


@pytest.mark.cpu
def test_ranks_must_see_one_checkpoint(images, tmp_path):
    """Two machines without a shared disk would train from different steps, unnoticed."""
    run(images, tmp_path / "0", epochs=3, steps=1)
    given = {"images": images, "epochs": 3, "resume": "true", "out": tmp_path / "RANK"}
    done = warm.ranks("tests/tiny.py", "train", *options(**TINY | given))
    assert done.returncode != 0 and "put OUT on a disk that all machines share" in done.stdout


def test_schedule():
    cfg = settings.parse(options(lr=1, warmup=10), train)
    rates = [train.learning_rate(cfg, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[60] == pytest.approx(0.5) and rates[109] < 1e-3
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_norms_and_biases_have_no_weight_decay():
    student = DeCLIP("tiny-eva").visual
    student.freeze(3)
    decayed, exempt = train.build_optimizer(settings.parse([], train), student).param_groups
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in exempt["params"])
    trained = sum(p.requires_grad for p in student.parameters())
    assert len(decayed["params"]) + len(exempt["params"]) == trained


# ----------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("given, sentence", [
    ({"images": "no/such"}, "no/such does not exist; put images there"),
    ({"context": "v"}, "CONTEXT is 'v'; it must be one of q, k, qk"),
    ({"lambda": -1}, "LAMBDA is -1.0; it must be at least 0"),
    ({"unlocked_blocks": 0}, "UNLOCKED_BLOCKS is 0; it must be at least 1"),
    ({"betas": 0.9}, "BETAS is (0.9,); it must be two numbers"),
    ({"grid_aspect": 0.5}, "GRID_ASPECT is 0.5; it must be at least 1"),
    ({"crop_size": 30},
     "CROP_SIZE 30 is no multiple of tiny-eva's patch size, 8; set it to 32"),
    ({"out": "README.md"}, "File exists: 'README.md'"),
    ({"image_size": 60},
     "IMAGE_SIZE 60 is no multiple of tiny-eva's patch size, 8; set it to 64"),
    ({"grid": (3, 2)}, "GRID is (3, 2); it must be two numbers"),
    ({"grid": (1, 1000000)}, "GRID is (1, 1000000); it must be two numbers"),
    ({"seed": 10**20}, "SEED is 100000000000000000000; it must be from 0"),
    ({"eps": -1}, "EPS is -1.0; it must be at least 0"),
    ({"ensemble": 1.5}, "ENSEMBLE is 1.5"),
    ({"batch_size": 0}, "BATCH_SIZE is 0; it must be at least 1"),
    ({"batch_size": 6}, "There are 5 images, fewer than BATCH_SIZE, 6; add images, or set"),
    ({"precision": "fp8"}, "PRECISION is 'fp8'"),
    ({"unlocked_blocks": 9}, "9 blocks were to be unlocked"),
    ({"model": "tiny-pe", "context": "values"},
     "There is no values in tiny-pe, whose last block is no block of the residual stream"),
    ({"vfm_model": "dinov9"}, "timm has no model named 'dinov9'"),
    ({"model": "tiny-evo"}, "open_clip has no model named 'tiny-evo'"),
])
def test_refusals_say_what_to_do(images, tmp_path, given, sentence):
    with pytest.raises(SystemExit) as error:
        train.main(options(**TINY | {"images": images, "out": tmp_path} | given))
    found = str(error.value)
    assert found.startswith("train.py: ") and sentence in found and "\n" not in found


def test_batch_that_cannot_be_divided():
    with pytest.raises(ValueError, match="can't be divided over 3 processes; set it to 18"):
        distributed.divide_batch(16, 4, 3)


def images_without_one(images, folder):
    copy = shutil.copytree(images, folder / "images")
    (copy / "1.png").unlink()
    return copy


def test_a_run_is_not_overwritten_nor_continued_as_another(images, tmp_path):
    run(images, tmp_path, epochs=2, steps=1)
    with pytest.raises(SystemExit, match="already holds a run; go on with it by --resume"):
        run(images, tmp_path, epochs=2)
    with pytest.raises(SystemExit, match="was begun with 5 images, .* but now there are 4 images"):
        run(images_without_one(images, tmp_path), tmp_path, epochs=2, resume="true")
    with pytest.raises(SystemExit, match="can teach no more; give the weights of a CLIP"):
        run(images, tmp_path / "other", pretrained=tmp_path / "declip.safetensors")
    with pytest.raises(SystemExit, match="was begun with LR 1e-05, but now it is 0.1"):
        run(images, tmp_path, epochs=2, resume="true", lr=0.1)
    run(images, tmp_path, epochs=2, resume="true", log_every=2)      # harmless
