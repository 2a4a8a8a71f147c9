"""All that waits for a GPU, in one run of at most 25 minutes on one card, offline.

    make gpu                                    # or python -m tools.gpu
    python -m tools.gpu --checks memory ranks   # some of it

Weights are random, but for the toy world's. Each check is a process of its own with a time limit:
after one that fails the next begins. OUT gets report.md, in the form of docs/performance.md,
results.json, and log.txt with all that was printed. Without a GPU the same checks run with the toy
models and small sizes, which tells whether they work and nothing else.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, TextIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

import eval_seg
import train
from data import Grid, make_classes
from tools import bench, reference
from util import UserError, distributed, settings
from util.files import ROOT, atomic_write, write_json
from util.precision import autocast, fp32_products

CHECKS: tuple[str, ...] = ()        # which to run; none: all
ONLY: str | None = None             # one check, in this process, and nothing is written
MINUTES = 25.0                      # for all of them
OUT = "out/gpu"                     # folder of the report


class Check(NamedTuple):
    """Something to run.

    words: of a command, `python -m`; {n} is the number of GPUs, {batch} some 8 images that they can
    share, {out} a folder. bench: in their place, options of tools.bench. function: in their place,
    a function -> figures by name. small: options for a machine without a GPU. limit: in seconds.
    """
    words: str = ""
    bench: str = ""
    function: Callable[[], dict[str, str]] | None = None
    small: str = ""
    limit: int = 120


def main(argv: list[str] | None = None) -> None:
    """Runs the checks that the command line (or `argv`) asks for."""
    cfg, known = settings.parse(argv, sys.modules[__name__]), checks()
    with distributed.session(__file__):
        asked = (*cfg.CHECKS, *filter(None, [cfg.ONLY]))
        settings.check(cfg, CHECKS=({*asked} <= {*known}, f"some of {shlex.join(known)}"))
        settings.check(cfg, MINUTES=(cfg.MINUTES > 0, "above 0"))
        if cfg.ONLY:
            print(f"\n{json.dumps(figures_of(known[cfg.ONLY]))}", flush=True)
        else:
            distributed.heed_signals()
            run({name: known[name] for name in known if name in (cfg.CHECKS or known)},
                Path(cfg.OUT), time.monotonic() + 60 * cfg.MINUTES)


def run(wanted: dict[str, Check], out: Path, end: float) -> None:
    """Every check in a process of its own, until `end`, then the report. UserError if one has
    failed."""
    results: dict[str, dict] = {}
    out.mkdir(parents=True, exist_ok=True)
    if len(wanted) < len(checks()) and (out / "results.json").exists():     # the others stay
        results = json.loads((out / "results.json").read_text())
    with (open(out / "log.txt", "a+" if results else "w+", errors="replace") as log,
          tempfile.TemporaryDirectory() as folder):
        for name, check in tqdm(wanted.items(), desc="checks", unit="check"):
            left = round(end - time.monotonic())
            results[name] = result = (
                run_check(command_of(name, check, folder), min(check.limit, left), log) if left > 0
                else {"state": "no time left", "seconds": 0, "figures": {"": ""}})
            tqdm.write(f"{name}: {result['state']}, {result['seconds']:.0f} s")
            write_json(out / "results.json", results)
            atomic_write(out / "report.md", lambda file: Path(file).write_text(report(results)))
    print(f"written to {out / 'report.md'}")
    failed = [name for name in wanted if results[name]["state"] != "ok"]
    if failed:
        raise UserError(f"{len(failed)} of {len(wanted)} checks failed, {', '.join(failed)}; read "
                        f"{out / 'log.txt'}.")


def command_of(name: str, check: Check, folder: str) -> list[str]:
    """The words of the process that makes a check; trainings go into `folder`."""
    if not check.words:
        return [sys.executable, "-m", "tools.gpu", "--only", name]
    words = check.words if torch.cuda.is_available() else f"{check.words} {check.small}"
    count = max(1, torch.cuda.device_count())
    return [sys.executable, "-m", *shlex.split(words.format(
        n=count, batch=count * max(1, 8 // count), out=folder))]


def run_check(command: list[str], limit: int, log: TextIO) -> dict:
    """Runs a command -> its state, seconds, and figures, or its last line; `log` gets what it
    prints."""
    print(f"\n##### python {' '.join(command[1:])}", file=log, flush=True)
    begin = log.tell()
    start, env = time.perf_counter(), os.environ | {"HF_HUB_OFFLINE": "1"}
    if "pytest" in command and torch.cuda.is_available():       # the suite would hide it
        env.setdefault("CUDA_VISIBLE_DEVICES", "0")
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        state = f"failed ({process.wait(limit)})"
    except subprocess.TimeoutExpired:
        state = f"not done in {limit} s"
        stop(process)
    except BaseException:       # Ctrl-C, or a scheduler's signal
        stop(process)
        raise
    state = "ok" if process.returncode == 0 else state
    seconds = time.perf_counter() - start
    log.seek(begin)
    printed = log.read().strip().splitlines() or [""]       # to its end, where the next one writes
    found = [json.loads(line) for line in printed if line.startswith('{"')]
    figures = found[-1] if state == "ok" and found else {"": printed[-1][:100]}
    return {"state": state, "seconds": seconds, "figures": figures}


def stop(process: subprocess.Popen) -> None:
    """Ends a process and those that it started. The ranks of torchrun are in sessions of their own,
    so it must end them itself, for which it takes 30 s if they don't listen."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(40)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def figures_of(check: Check) -> dict[str, str]:
    """Makes a check in this process -> its figures; raises what makes it fail."""
    if check.function:
        return check.function()
    small = "" if torch.cuda.is_available() else check.small
    rows = bench.main(f"{check.bench} {small}".split())
    return {f"{part}: {row.name}": f"{[*row.values.values()][0]:,.4g}"
            + (f" ({row.ratio:.3g} times as good as plain)" if row.ratio else "")
            for part, found in rows.items() for row in found}


def report(results: dict[str, dict]) -> str:
    """The page: machine and versions, what each check said, what has failed."""
    is_gpu = torch.cuda.is_available()
    place = (f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if is_gpu
             else "no GPU: toy models and small sizes, which show only that the checks work")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in (
        "torch", "torchvision", "timm", "open_clip_torch"))
    lines = ["# What a GPU says", "", f"{place}; {versions}.", "",
             "| check | state | seconds |", "|---|---|---|"]
    for name, result in results.items():
        reason = result["figures"].get("", "").replace("|", "/") if result["state"] != "ok" else ""
        state = f"{result['state']}: {reason}" if reason else result["state"]
        lines.append(f"| {name} | {state} | {result['seconds']:.0f} |")
    for name, result in results.items():
        if result["state"] == "ok" and "" not in result["figures"]:
            lines += ["", f"## {name}", "", "| | |", "|---|---|"]
            lines += [f"| {what} | {value} |" for what, value in result["figures"].items()]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- checks beyond commands

def small_or(words: str, small: str) -> list[str]:
    """Options of a script: those for a GPU, or those for a machine without one."""
    return (words if torch.cuda.is_available() else small).split()


SMALL_MODELS = "--model local-dir:toy/clip --vfm_model local-dir:toy/vfm --crop_size 64"


def build(words: str, small: str, device: torch.device) -> tuple:
    """Settings of train.py, and its three models on a device, with random weights."""
    cfg = settings.parse(small_or(f"--pretrained none --vfm_pretrained false {words}",
                                  f"{SMALL_MODELS} --pretrained own {small}"), train)
    clip, teacher, vfm = train.build(cfg, distributed.Ranks(0, 1, device))
    return cfg, clip, (clip.visual, teacher, vfm)


def photos(count: int, device: torch.device) -> list[Tensor]:
    """Smooth random photographs of 640x480, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 24, 32, generator=generator)
    fine = nn.functional.interpolate(coarse, (480, 640), mode="bicubic").clamp(0, 1)
    return [photo.to(device) for photo in (255 * fine).to(torch.uint8)]


def step(cfg: SimpleNamespace, models: tuple, precision: str, device: torch.device
         ) -> tuple[dict[str, float], Tensor]:
    """The losses of one image with 12 crops, and their gradient as one vector on the CPU."""
    student = models[0]
    student.zero_grad(set_to_none=True)
    with autocast(precision, device):
        losses = train.distill(cfg, *models, photos(1, device), [Grid(3, 4, list(range(12)))])
    sum(losses.values()).backward()
    gradient = torch.cat([weight.grad.double().flatten().cpu()
                          for weight in student.parameters() if weight.grad is not None])
    return {name: loss.item() for name, loss in losses.items()}, gradient


def check_losses(size: int) -> dict[str, str]:
    """Losses and gradients in every precision, beside those of the CPU in fp32.

    Raises AssertionError if fp32's are not the CPU's up to rounding.
    """
    cpu = torch.device("cpu")
    device = distributed.start().device
    cfg, _, models = build(f"--image_size {size}", "--image_size 128", cpu)
    expected, whole = step(cfg, models, "fp32", cpu)
    for model in models:
        model.to(device)
    found = {}
    for name, precision, tf32 in (("fp32", "fp32", False), ("tf32", "fp32", True),
                                  ("bf16", "bf16", False), ("fp16", "fp16", False)):
        with fp32_products(tf32):
            losses, gradient = step(cfg, models, precision, device)
        error = max(abs(losses[key] / expected[key] - 1) for key in expected)
        rotation = ((gradient - whole).norm() / whole.norm()).item()
        found[f"{name}: largest relative error of a loss, of the gradient"] = (
            f"{error:.0e}, {rotation:.0e}")
        limit = {"fp32": (1e-5, 1e-3), "tf32": (1e-3, 0.1)}.get(name, (0.1, 1.0))
        assert error < limit[0] and rotation < limit[1], (name, error, rotation)
    return found


def check_segmentation() -> dict[str, str]:
    """The share of pixels to which the fast form gives the class that one window at a time gives.

    Raises AssertionError if it is below 99.9 %.
    """
    device = distributed.start().device
    _, clip, _ = build("", "--image_size 128", device)
    protocol = eval_seg.Protocol().fit(clip)
    text = nn.functional.normalize(torch.randn(
        171, clip.visual.embed_dim, generator=torch.Generator().manual_seed(1)), dim=-1).to(device)
    classes = make_classes([f"class {number}" for number in range(len(text))])
    found = eval_seg.predict(protocol, clip, classes, text, photos(2, device))
    plain = [reference.predict(protocol, clip, classes, text, photo)
             for photo in photos(2, device)]
    share = torch.stack(found).eq(torch.stack(plain)).float().mean().item()
    assert share > 0.999, share
    return {"pixels of the same class": f"{100 * share:.3f} %"}


def check_memory() -> dict[str, str]:
    """Speed and memory of train.py's step by micro batch, up to what fits, at 560 and 1024 px.

    On a CPU two images, as an example.
    """
    found = {}
    for size in (560, 1024):
        images = 1
        while images <= (512 if torch.cuda.is_available() else 2):
            name = f"{size} px, micro batch {images}"
            words = small_or(f"--image_size {size} --repeats 1", SMALL)
            words += ["--micro_batch", str(images), "--parts", "train"]
            try:
                rows = {row.name: row for row in bench.main(words)["train"]}
            except SystemExit as error:
                if "memory" not in str(error):
                    raise
                found[name] = "out of memory"
                break
            found[name] = (f"{rows['images/s'].values['this code']:,.4g} images/s, "
                           f"{rows['peak memory with these, MB'].values['this code']:,.0f} MB")
            images *= 2
            torch.cuda.empty_cache()
    return found


# ------------------------------------------------------------------------------------ the checks

SMALL = f"{SMALL_MODELS} --repeats 1 --image_size 128 --precision fp32"     # fp16 takes CPUs long
NANO = "--model local-dir:toy/clip --repeats 1 "
TORCHRUN = "torch.distributed.run --standalone --nproc_per_node {n} "
SHORT = "--batch_size {batch} --num_workers 0 "
TOY = TORCHRUN + f"train.py @presets/toy.txt --steps 6 --log_every 3 {SHORT} --out {{out}}/"
DETECTOR = SHORT + "--steps 4 --cache none --out {out}/"


def checks() -> dict[str, Check]:
    """The checks by name, in the order in which they run."""
    found = {
        "suite": Check("pytest -q -p no:cacheprovider -n 8 -m 'not slow and not cpu'",
                       small="tests/util/test_order.py -n 0", limit=480),
        "losses 560": Check(function=partial(check_losses, 560)),
        "losses 1024": Check(function=partial(check_losses, 1024), limit=180),
        "segmentation": Check(function=check_segmentation),
        "memory": Check(function=check_memory, limit=240),
        "scenes": Check("toy.world --dev 0" + "".join(      # those that are there stay
            f" --{kind} {count * (not (ROOT / 'data/toy' / kind / 'instances.json').exists())}"
            for kind, count in {"train": 1024, "val": 200, "labelled": 512}.items())),
    }
    at_560 = "--repeats 5 --image_size 560"
    at_1024 = "--repeats 3 --image_size 1024 --micro_batch 2"
    for name, words in {
            "bench 560": f"--baseline {at_560} --parts train segment",
            "bench 1024": f"--baseline {at_1024} --parts train",
            "fp16": f"{at_560} --precision fp16 --parts train",
            "fp32": f"{at_560} --precision fp32 --parts train",
            "compile 560": f"{at_560} --compile --parts train",
            "compile 1024": f"{at_1024} --compile --parts train",
            "checkpointing": f"{at_1024} --checkpointing --parts train"}.items():
        found[name] = Check(bench=words, small=SMALL, limit=240 if "compile" in name else 120)
    found["input"] = Check(bench="--repeats 3 --parts input --baseline", small=SMALL)
    found["F-ViT and CAT-Seg"] = Check(bench="--repeats 5 --parts fvit catseg", small=(
        f"{NANO} --fvit_size 64 --catseg_size 64 --catseg_classes 3"))
    for way, options in {"": "", " bf16": "--precision bf16", " fp16": "--precision fp16",
                         " FSDP": "--fsdp", " compiled": "--compile",
                         " checkpointing": "--checkpointing"}.items():
        found[f"ranks{way}"] = Check(f"{TOY}ranks{way.strip()} {options}")
    if torch.cuda.device_count() > 1:
        found["one rank"] = Check(TOY.replace("{n}", "1").replace("{batch}", "8") + "one_rank")
    novel = "circle,square,triangle"
    found["F-ViT ranks"] = Check(
        f"{TORCHRUN} -m downstream.fvit.train @presets/toy_fvit_train.txt --novel {novel} "
        f"--backbone none --attention clip {DETECTOR}fvit")
    found["OV-DQUO ranks"] = Check(
        f"{TORCHRUN} -m downstream.ov_dquo.train @presets/toy_ov_dquo.txt --novel {novel} "
        f"--backbone none --attention clip {DETECTOR}ov_dquo")
    found["CAT-Seg ranks"] = Check(
        f"{TORCHRUN} -m downstream.catseg.train @presets/catseg_toy.txt --model local-dir:toy/clip "
        f"--pretrained own --attention catseg {SHORT} --steps 4 --out {{out}}/catseg")
    return found


if __name__ == "__main__":
    main()
