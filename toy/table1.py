"""Table 1 in the toy world: what self-distillation does alone, with a VFM, decoupled, and beyond.

    python -m toy.world                 # the scenes, first
    python -m toy.table1 --search       # LR and λ of each row, judged on the dev scenes: 30 runs
    python -m toy.table1                # each row as its preset says, with three seeds: 12 runs

A row's settings are judged by the mean of its five figures. The report has two more, mIoU in
windows and with PAMR, and the seconds of a training. A run that is in OUT already is not repeated.
"""

import contextlib
import json
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from types import SimpleNamespace

from tqdm import tqdm

import eval_region
import eval_seg
import train
from util import UserError, settings

OUT = "out/table1"                  # folder of the runs, one below it for each
SEARCH = False                      # try the grid below on the dev scenes; else presets, on val
LRS = (3e-4, 1e-3, 3e-3)            # learning rates of the grid
LAMBDAS = (0.01, 0.03, 0.1)         # weights of the context loss, for rows that have one
SEEDS = (0, 1, 2)                   # of the order of images and their grids, for reported runs


def main(argv: list[str] | None = None) -> None:
    """Makes the runs that the command line (or `argv`) asks for, and prints their table."""
    cfg = settings.parse(argv, sys.modules[__name__])
    try:
        print(search(cfg) if cfg.SEARCH else report(cfg))
    except UserError as error:
        raise SystemExit(f"table1.py: {error}") from None


ROWS = {"self-distillation": ["@presets/toy_self.txt"],
        "self + VFM": ["@presets/toy_undecoupled.txt"],
        "self + VFM + decoupled (DeCLIP)": [],
        "self + VFM, values of 3 blocks": ["@presets/best.txt"]}
FIGURES = ("box thing", "box stuff", "mask thing", "mask stuff", "mIoU")
# Of the report only: options of eval_seg.py beside those of the preset.
MORE_FIGURES = {"windows": ["--window", "96", "--stride", "32"], "PAMR": ["--pamr", "10"]}


def search(cfg: SimpleNamespace) -> str:
    """Every LR and λ of the grid for every row, on the dev scenes -> a table, the best of each row
    marked."""
    runs = [(name, lr, weight) for name in ROWS for lr, weight in product(cfg.LRS, cfg.LAMBDAS)
            if name != "self-distillation" or weight == cfg.LAMBDAS[0]]
    judged = {}
    for name, lr, weight in tqdm(runs, desc="search", unit="run"):
        options = ["--lr", str(lr),
                   *(["--lambda", str(weight)] if name != "self-distillation" else [])]
        judged[name, lr, weight] = figures(cfg, name, options, 0, "dev")
    lines = [f"{'dev scenes, %':34}{'LR':>8}{'λ':>6}"
             + "".join(f"{figure:>12}" for figure in FIGURES) + f"{'mean':>8}"]
    for (name, lr, weight), found in judged.items():
        best = max(mean(other.values()) for (arm, *_), other in judged.items() if arm == name)
        shown = "-" if name == "self-distillation" else f"{weight:g}"
        lines.append(f"{name:34}{lr:>8g}{shown:>6}"
                     + "".join(f"{found[figure]:12.1f}" for figure in FIGURES)
                     + f"{mean(found.values()):8.1f}"
                     + ("  best" if mean(found.values()) == best else ""))
    return "\n".join(lines)


def report(cfg: SimpleNamespace) -> str:
    """Each row with the settings of its preset and every seed, on the val scenes -> mean and
    standard deviation."""
    found = {name: [] for name in ROWS}
    for name, seed in tqdm(list(product(ROWS, cfg.SEEDS)), desc="report", unit="run"):
        found[name].append(figures(cfg, name, [], seed, "val"))
    columns = (*FIGURES, *MORE_FIGURES, "seconds")
    lines = [f"{'val scenes, %':34}" + "".join(f"{column:>14}" for column in columns)]
    for name, runs in found.items():
        values = [[run[column] for run in runs] for column in columns]
        spread = [stdev(each) if len(each) > 1 else 0 for each in values]
        lines.append(f"{name:34}" + "".join(f"{mean(each):8.1f} ± {wide:3.1f}"
                                            for each, wide in zip(values, spread)))
    return "\n".join(lines)


def figures(cfg: SimpleNamespace, name: str, options: list[str], seed: int,
            scenes: str) -> dict[str, float]:
    """Trains and evaluates one run, unless OUT has it -> what `evaluate` found; on the val scenes
    also the seconds of its training."""
    run = ["@presets/toy.txt", *ROWS[name], *options, "--seed", str(seed)]
    chosen = settings.parse(run, train)
    folder = Path(cfg.OUT) / (f"{chosen.CONTEXT}-lambda-{chosen.LAMBDA:g}-lr-{chosen.LR:g}"
                              f"-seed-{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{scenes}.json"
    with (open(folder / "output.txt", "a") as output, contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(output)):
        if not (folder / "seconds").exists():
            start = perf_counter()
            train.main([*run, "--out", str(folder), "--resume"])
            (folder / "seconds").write_text(str(perf_counter() - start))
        if not result.exists():
            result.write_text(json.dumps(evaluate(folder / "declip.safetensors", scenes)))
    found = json.loads(result.read_text())
    seconds = {"seconds": float((folder / "seconds").read_text())}
    return found | (seconds if scenes == "val" else {})


def evaluate(checkpoint: Path, scenes: str) -> dict[str, float]:
    """A checkpoint's FIGURES in per cent, on the dev scenes, or with MORE_FIGURES on val."""
    of_model, root = ["--ckpt", str(checkpoint)], f"data/toy/{scenes}"
    places = ["--annotations", f"{root}/panoptic.json", "--pngs", f"{root}/panoptic",
              "--images", f"{root}/images"]
    regions = eval_region.main(["@presets/toy_region.txt", *of_model, *places])["128"]["mAcc"]
    benchmark = "toy_dev" if scenes == "dev" else "toy"
    found = {figure: regions[figure]["top1"] for figure in FIGURES[:-1]}
    for figure, options in ({"mIoU": []} | (MORE_FIGURES if scenes == "val" else {})).items():
        pixels = eval_seg.main(["@presets/toy_seg.txt", *of_model, *options,
                                "--benchmarks", benchmark])
        found[figure] = pixels[benchmark]["mIoU"]
    return found


if __name__ == "__main__":
    main()
