"""Open-vocabulary detection in the toy world: F-ViT over plain CLIP and over DeCLIP.

    toy/detection.sh                    # one split as a tutorial, with this table at its end
    python -m toy.detection             # three splits, a seed each: 6 runs

A detector is trained on the boxes of seven of the ten things, and finds all ten. A run takes about
three minutes of a core; one that is in OUT already is not repeated.
"""

import contextlib
import json
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

from tqdm import tqdm

from downstream.fvit import eval as evaluation
from downstream.fvit import train
from toy.world import THINGS
from util import UserError, settings

OUT = "out/toy/detection"           # folder of the runs, one below it for each
CKPT = "out/toy/declip/declip.safetensors"      # the nano DeCLIP, which `make demo` trains
SEEDS = (0, 1, 2)                   # of the training; each has its own split of the things
DATASET = "toy"                     # scenes to report; toy_dev: those to choose settings with


def main(argv: list[str] | None = None) -> None:
    """Makes the runs that the command line (or `argv`) asks for, and prints their table."""
    cfg = settings.parse(argv, sys.modules[__name__])
    try:
        print(report(cfg))
    except UserError as error:
        raise SystemExit(f"detection.py: {error}") from None


# Fixed before anything was trained: things in their order.
NOVEL = (THINGS[0:3], THINGS[3:6], THINGS[6:9])
FIGURES = ("novel", "base", "all")


def backbones(cfg: SimpleNamespace) -> dict[str, list[str]]:
    """A row's name -> the options of its backbone."""
    return {"CLIP": ["--backbone", "none", "--attention", "clip"],
            "DeCLIP": ["--backbone", cfg.CKPT]}


def report(cfg: SimpleNamespace) -> str:
    """AP50 of both backbones with every seed -> mean and standard deviation."""
    wrong = next((seed for seed in cfg.SEEDS if not 0 <= seed < len(NOVEL)), None)
    if wrong is not None:
        raise UserError(f"SEEDS has {wrong}; there are splits for 0 to {len(NOVEL) - 1}.")
    runs = list(product(backbones(cfg), cfg.SEEDS))
    found = {name: [] for name in backbones(cfg)}
    for name, seed in tqdm(runs, desc="runs", unit="run"):
        found[name].append(figures(cfg, name, seed))
    lines = [f"{'AP50, %':10}" + "".join(f"{figure:>14}" for figure in FIGURES)]
    for name, rows in found.items():
        columns = [[row[figure] for row in rows] for figure in FIGURES]
        spread = [f" ± {stdev(each):3.1f}" if len(each) > 1 else "" for each in columns]
        lines.append(f"{name:10}" + "".join(f"{mean(each):8.1f}{wide:6}"
                                            for each, wide in zip(columns, spread)))
    return "\n".join(lines)


def figures(cfg: SimpleNamespace, name: str, seed: int) -> dict[str, float]:
    """Trains and evaluates one run, unless OUT has it -> AP50 of novel, base and all classes."""
    folder = Path(cfg.OUT) / f"{name.lower()}-{seed}"
    result = folder / f"{cfg.DATASET}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "output.txt", "a") as output, contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(output)):
        if not (folder / "trained").exists() and not result.exists():
            train.main(["@presets/toy_fvit_train.txt", *backbones(cfg)[name], "--seed", str(seed),
                        "--novel", ", ".join(NOVEL[seed]), "--out", str(folder), "--resume"])
            (folder / "trained").touch()
        if not result.exists():
            evaluation.main(["--ckpt", str(folder / "fvit.safetensors"), "--dataset",
                             cfg.DATASET])
    boxes = json.loads(result.read_text())["boxes"]
    groups = {group: each["AP50"] for group, each in boxes["groups"].items()}
    return groups | {"all": boxes["AP50"]}


if __name__ == "__main__":
    main()
