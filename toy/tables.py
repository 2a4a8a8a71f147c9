"""The toy world's tables, of docs/toy.md: each trains its rows with several seeds, and evaluates.

    python -m toy.world                 # the scenes, first
    python -m toy.tables table1         # Table 1: each row as its preset says, 12 runs
    python -m toy.tables table1 --search        # its LR and λ, judged on the dev scenes: 30 runs
    python -m toy.tables siglip         # the same for the nano SigLIP: 12 runs
    python -m toy.tables detection      # F-ViT over CLIP and DeCLIP: 6 runs of 3 minutes of a core
    python -m toy.tables ov_dquo        # OV-DQUO over both, with unknown objects, too: 12 runs
    python -m toy.tables catseg         # CAT-Seg over both, beside both alone: 6 runs

The last three need the nano DeCLIP of toy/demo.sh, and CAT-Seg labelled scenes (toy/catseg.sh draws
them). A training or evaluation that is in the folder of runs already is not repeated.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

import eval_region
import eval_seg
import train
from downstream.catseg import eval as catseg_eval
from downstream.catseg import train as catseg_train
from downstream.fvit import eval as fvit_eval
from downstream.fvit import train as fvit_train
from downstream.ov_dquo import eval as ov_dquo_eval
from downstream.ov_dquo import train as ov_dquo_train
from downstream.ov_dquo import unknown as ov_dquo_unknown
from tools.visualize import read_log
from toy.world import NAMES, SEEN, THINGS, UNSEEN
from util import distributed, settings
from util.results import read_results, write_result
from util.weights import read_record

OUT: str | None = None              # folder of the runs; None: what TABLES has for the table
SEEDS = (0, 1, 2)                   # of the trainings; in detection each has its own split
SCENES = "val"                      # val to report, dev to choose settings with
CKPT = "out/toy/declip/declip.safetensors"      # the nano DeCLIP under detectors and segmenters
SEARCH = False                      # of table1, siglip: try the grid below on the dev scenes
LRS = (3e-4, 1e-3, 3e-3)            # learning rates of the grid
LAMBDAS = (0.01, 0.03, 0.1)         # weights of the context loss, for rows that have one


def main(argv: list[str] | None = None) -> None:
    """Makes the runs that the command line (or `argv`) asks for, and prints their table."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="TABLE")
    with distributed.session(__file__):
        print(run(cfg))


class Table(NamedTuple):
    """What the runs of a table are, and where they go."""
    unit: str
    out: str                        # folder of the runs, if OUT names none
    folder: str                     # of a run, by its settings
    script: ModuleType              # that trains
    options: list[str]              # of every training; {ckpt}, {novel}: CKPT, what is NOVEL
    rows: dict[str, list[str]]      # more options of each row's trainings
    evaluate: Callable[[Path, str], dict[str, float]]   # folder of a run, SCENES -> figures
    alone: dict[str, list[str]] = {}    # rows without training: options of eval_seg.py
    row_before: str = ""            # whose run finds the unknown objects, {unknown}, of other rows


def run(cfg: SimpleNamespace) -> str:
    """The table that TABLE names; UserError if there is none, or for a setting that it lacks."""
    name = " ".join(cfg.TABLE)
    splits = range(len(NOVEL)) if name in ("detection", "ov_dquo") else cfg.SEEDS
    settings.check(cfg, TABLE=(name in TABLES, f"one of {', '.join(TABLES)}"),
                   SCENES=(cfg.SCENES in BENCHMARKS, "val or dev"),
                   SEEDS=({*cfg.SEEDS} <= {*splits}, "from 0 to 2, which have a split each"))
    mode = "--search" if cfg.SEARCH and name in READ_BY["SEARCH"].split() else name
    settings.refuse_unread(cfg, sys.modules[__name__], [mode], READ_BY)
    return (search if cfg.SEARCH else report)(cfg, TABLES[name])


# Which tables read a setting; others are read by all, and by --search.
READ_BY = {"SEARCH": "--search table1 siglip", "CKPT": "detection ov_dquo catseg",
           "LRS": "--search", "LAMBDAS": "--search",
           **dict.fromkeys(("SEEDS", "SCENES"), "table1 siglip detection ov_dquo catseg")}


def report(cfg: SimpleNamespace, table: Table) -> str:
    """Every row with every seed -> the table of its figures."""
    found = {row: [alone(cfg, table, options)] for row, options in table.alone.items()}
    for row, seed in tqdm([*product(table.rows, cfg.SEEDS)], desc="runs", unit="run"):
        found.setdefault(row, []).append(figures(cfg, table, row, seed))
    return layout(f"{cfg.SCENES} scenes, {table.unit}", found)


def layout(corner: str, found: dict[str, list[dict[str, float | None]]]) -> str:
    """The figures of each row's runs -> their means and, of several, standard deviations."""
    width, columns = max(map(len, [corner, *found])) + 3, [*next(iter(found.values()))[0]]
    lines = [f"{corner:{width}}" + "".join(f"{column:>14}" for column in columns)]
    for row, runs in found.items():
        line = f"{row:{width}}"
        for column in columns:
            values = [run[column] for run in runs]
            known = None not in values
            deviation = f" ± {stdev(values):3.1f}" if known and len(values) > 1 else ""
            line += f"{mean(values):8.1f}{deviation:6}" if known else " " * 14
        lines.append(line)
    return "\n".join(lines)


def search(cfg: SimpleNamespace, table: Table) -> str:
    """Every LR and λ of the grid for every row of Table 1, with one seed on the dev scenes -> a
    table, the best of each row marked."""
    cfg, found = SimpleNamespace(**vars(cfg) | {"SCENES": "dev"}), {}
    for row, lr, weight in tqdm([*product(table.rows, cfg.LRS, cfg.LAMBDAS)], desc="search"):
        has_context = row != "self-distillation"
        weighed = ["--lambda", str(weight)] if has_context else []
        run = figures(cfg, table, row, 0, ["--lr", str(lr), *weighed])
        shown = f"{weight:g}" if has_context else "-"
        found[f"{row:34}{lr:>8g}{shown:>8}"] = [run | {"mean": mean(run.values())}]
    first, *lines = layout(f"{'dev scenes, %':34}{'LR':>8}{'λ':>8}", found).splitlines()
    means = {name: runs[0]["mean"] for name, runs in found.items()}
    best = [max((name for name in means if name[:34] == f"{row:34}"), key=means.get)
            for row in table.rows]
    return "\n".join([first, *(line + ("  best" if name in best else "")
                               for name, line in zip(found, lines))])


# ---------------------------------------------------------------------------------------- the runs

def figures(cfg: SimpleNamespace, table: Table, row: str, seed: int, more: Sequence[str] = ()
            ) -> dict[str, float]:
    """Trains and evaluates a run, but for what its folder has -> its figures.

    more: options beside those of the row.
    """
    words = {"ckpt": cfg.CKPT, "novel": ", ".join(NOVEL[seed % len(NOVEL)]),
             "unknown": Path(cfg.OUT or table.out) / f"unknown-{seed}.json"}
    options = [option.format(**words) for option in [*table.options, *table.rows[row], *more]]
    options += ["--seed", str(seed)]
    chosen = settings.parse(options, table.script)
    name = table.folder.format(arm=row.split()[-1].lower(), **vars(chosen))
    folder = Path(cfg.OUT or table.out) / name
    trained, results = folder / "trained", folder / "figures.json"
    with printing_into(folder):
        if "{unknown}" in table.rows[row] and not words["unknown"].exists():
            find_unknown(table, words["unknown"], seed)
        if not trained.exists():
            table.script.main([*options, "--out", str(folder), "--resume"])
            trained.touch()
        if not (results.exists() and read_results(results, scenes=cfg.SCENES)):
            run = SimpleNamespace(**vars(cfg) | {"OUT": str(folder)})
            write_result(run, "figures", {"scenes": cfg.SCENES},
                         {"figures": table.evaluate(folder, cfg.SCENES)})
    return read_results(results, scenes=cfg.SCENES)[-1]["figures"]


def find_unknown(table: Table, path: Path, seed: int) -> None:
    """Writes what the detector of `row_before` takes for objects that no label names."""
    folder = path.parent / table.folder.format(arm=table.row_before.lower(), SEED=seed)
    ov_dquo_unknown.main(["@presets/toy_unknown.txt", "--out", str(path),
                          "--ckpt", str(folder / "ov_dquo.safetensors")])


@contextlib.contextmanager
def printing_into(folder: Path) -> Iterator[None]:
    """Within it, what is printed goes into a file of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "output.txt", "a") as output, contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(output)):
        yield


def alone(cfg: SimpleNamespace, table: Table, options: list[str]) -> dict[str, float]:
    """The figures of a CLIP with nothing trained upon it; they are always made anew."""
    folder = Path(cfg.OUT or table.out)
    options = [option.format(ckpt=cfg.CKPT) for option in options]
    with printing_into(folder):
        return mean_iou(segment([*options, "--out", str(folder)], cfg.SCENES)["IoU"])


# ------------------------------------------------------------------------------------- the tables

BENCHMARKS = {"val": "toy", "dev": "toy/dev.json"}


def of_declip(folder: Path, scenes: str, clip: str = "local-dir:toy/clip"
              ) -> dict[str, float | None]:
    """Table 1: how right regions are named by box and by mask, and mIoU; on the val scenes also
    mIoU in windows and with PAMR, and the seconds of the training's steps."""
    model, root = ["--ckpt", f"{folder}/declip.safetensors", "--model", clip], f"data/toy/{scenes}"
    regions = eval_region.main([
        "@presets/toy_region.txt", *model, "--annotations", f"{root}/panoptic.json",
        "--pngs", f"{root}/panoptic", "--images", f"{root}/images"])["128"]["mAcc"]
    found = {figure: regions[figure]["top1"]
             for figure in ("box thing", "box stuff", "mask thing", "mask stuff")}
    found["mIoU"] = segment(model, scenes)["mIoU"]
    if scenes == "val":
        found["windows"] = segment([*model, "--window", "96", "--stride", "32"], scenes)["mIoU"]
        found["PAMR"] = segment([*model, "--pamr", "10"], scenes)["mIoU"]
        found["seconds"] = training_seconds(folder)
    return found


def training_seconds(folder: Path) -> float | None:
    """The seconds of a run's steps by its log, in however many parts it was made; None, a blank in
    the table, if the log lacks the end."""
    run = read_record(folder / "declip.safetensors")["settings"]
    lines = read_log(folder / "log.jsonl")
    steps = [0, *(line["step"] for line in lines)]
    seconds = sum((last - first) * run["BATCH_SIZE"] / line["images_per_second"]
                  for (first, last), line in zip(pairwise(steps), lines))
    return seconds if steps[-1] == run["step"] else None


def segment(options: list[str], scenes: str) -> dict:
    """What eval_seg.py finds."""
    name = BENCHMARKS[scenes]
    return eval_seg.main(["@presets/toy_seg.txt", "--benchmarks", name, *options])[name]


# What a detector does not see, by its seed: things in their order, fixed before any training.
NOVEL = (THINGS[0:3], THINGS[3:6], THINGS[6:9])


def of_detector(folder: Path, scenes: str) -> dict[str, float]:
    """AP50 of novel, base and all things."""
    return groups(fvit_eval.main([
        "@presets/toy_fvit_eval.txt", "--dataset", f"data/toy/{scenes}/instances.json",
        "--images", f"data/toy/{scenes}/images", "--ckpt", f"{folder}/fvit.safetensors"]))


def of_ov_dquo(folder: Path, scenes: str) -> dict[str, float]:
    """The same of OV-DQUO."""
    return groups(ov_dquo_eval.main([
        "@presets/toy_ov_dquo_eval.txt", "--dataset", f"data/toy/{scenes}/instances.json",
        "--images", f"data/toy/{scenes}/images", "--ckpt", f"{folder}/ov_dquo.safetensors"]))


def groups(figures: dict) -> dict[str, float]:
    """AP50 of each group of classes, and of all."""
    boxes = figures["boxes"]
    return {name: group["AP50"] for name, group in boxes["groups"].items()} | {"all": boxes["AP50"]}


def of_segmenter(folder: Path, scenes: str) -> dict[str, float]:
    """mIoU of unseen, seen and all classes."""
    name = BENCHMARKS[scenes]
    found = catseg_eval.main(["@presets/catseg_toy_eval.txt", "--benchmarks", name,
                              "--ckpt", f"{folder}/catseg.safetensors"])
    return mean_iou(found[name]["IoU"])


def mean_iou(iou: dict[str, float | None]) -> dict[str, float]:
    """IoU of each class -> the means of unseen, seen and all classes, over those that occur."""
    groups = {"unseen": UNSEEN, "seen": SEEN, "all": range(len(NAMES))}
    return {group: mean(iou[NAMES[number]] for number in numbers
                        if iou[NAMES[number]] is not None)
            for group, numbers in groups.items()}


TABLES = {
    "table1": Table(
        "%", "out/table1", "{CONTEXT}-lambda-{LAMBDA:g}-lr-{LR:g}-seed-{SEED}", train,
        ["@presets/toy.txt"], {"self-distillation": ["@presets/toy_self.txt"],
                               "self + VFM": ["@presets/toy_undecoupled.txt"],
                               "self + VFM + decoupled (DeCLIP)": [],
                               "self + VFM, values of 3 blocks": ["@presets/best.txt"]}, of_declip),
    "siglip": Table(
        "%", "out/table1_siglip", "{CONTEXT}-lambda-{LAMBDA:g}-lr-{LR:g}-seed-{SEED}", train,
        ["@presets/toy.txt", "--model", "local-dir:toy/siglip"],
        {"self-distillation": ["@presets/toy_self.txt"],
         "self + VFM": ["@presets/toy_undecoupled.txt"],
         "self + VFM + decoupled (DeCLIP)": [],
         "self + VFM, V alone": ["@presets/toy_undecoupled.txt", "--context", "maskclip"]},
        partial(of_declip, clip="local-dir:toy/siglip")),
    "detection": Table(
        "AP50 in %", "out/toy/detection", "{arm}-{SEED}", fvit_train,
        ["@presets/toy_fvit_train.txt", "--novel", "{novel}"],
        {"CLIP": ["--backbone", "none", "--attention", "clip"],
         "DeCLIP": ["--backbone", "{ckpt}"]}, of_detector),
    "ov_dquo": Table(
        "AP50 in %", "out/toy/ov_dquo", "{arm}-{SEED}", ov_dquo_train,
        ["@presets/toy_ov_dquo.txt", "--novel", "{novel}"],
        {"DeCLIP": ["--backbone", "{ckpt}"],
         "CLIP": ["--backbone", "none", "--attention", "clip"],
         "DeCLIP+unknown": ["--backbone", "{ckpt}", "--unknown", "{unknown}"],
         "CLIP+unknown": ["--backbone", "none", "--attention", "clip", "--unknown", "{unknown}"]},
        of_ov_dquo, row_before="DeCLIP"),
    "catseg": Table(
        "mIoU in %", "out/toy/catseg", "{arm}-{SEED}", catseg_train, ["@presets/catseg_toy.txt"],
        {"CAT-Seg over CLIP": ["--model", "local-dir:toy/clip", "--pretrained", "own",
                               "--attention", "catseg"],
         "CAT-Seg over DeCLIP": ["--ckpt", "{ckpt}"]}, of_segmenter,
        alone={"CLIP alone": ["--attention", "clip"], "DeCLIP alone": ["--ckpt", "{ckpt}"]}),
}

if __name__ == "__main__":
    main()
