"""CAT-Seg in the toy world: classes that it never saw, over plain CLIP and over DeCLIP.

    toy/catseg.sh                       # one seed, command by command
    python -m toy.catseg                # the table of docs/toy.md: three seeds of both

It learns from the labels of twelve classes; the pixels of six others are void. All eighteen are
evaluated together, so an unseen class must hold its own against those that were trained. What is in
OUT already is not repeated.
"""

import contextlib
import json
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

from tqdm import tqdm

import eval_seg
from downstream.catseg import eval as catseg_eval
from downstream.catseg import train
from downstream.catseg.data import SEEN, UNSEEN
from toy.world import NAMES
from util import UserError, settings

OUT = "out/toy/catseg"              # folder of the runs, one below it for each
DECLIP = "out/toy/declip/declip.safetensors"    # the nano DeCLIP, which toy/demo.sh trains
SCENES = "val"                      # val to report, dev to choose settings with
SEEDS = (0, 1, 2)                   # of first weights, order and augmentation


def main(argv: list[str] | None = None) -> None:
    """Makes the runs that the command line (or `argv`) asks for, and prints their table."""
    cfg = settings.parse(argv, sys.modules[__name__])
    try:
        print(report(cfg))
    except UserError as error:
        raise SystemExit(f"catseg.py: {error}") from None


ROWS = {"CLIP alone": None, "DeCLIP alone": None,
        "CAT-Seg over CLIP": "clip", "CAT-Seg over DeCLIP": "declip"}
FIGURES = {"unseen": UNSEEN, "seen": SEEN, "all": [*range(len(NAMES))]}


def report(cfg: SimpleNamespace) -> str:
    """mIoU of the unseen, the seen and all classes for every row -> mean and standard deviation."""
    if cfg.SCENES not in ("val", "dev"):
        raise UserError(f"SCENES is {cfg.SCENES!r}; it must be val or dev.")
    benchmark = "toy" if cfg.SCENES == "val" else "toy_dev"
    found = {"CLIP alone": [alone(cfg, benchmark, ["--attention", "clip"])],
             "DeCLIP alone": [alone(cfg, benchmark, ["--ckpt", cfg.DECLIP])]}
    trained = [(name, arm) for name, arm in ROWS.items() if arm]
    for (name, arm), seed in tqdm([*product(trained, cfg.SEEDS)], desc="runs", unit="run"):
        found.setdefault(name, []).append(figures(cfg, arm, seed, benchmark))
    lines = [f"{cfg.SCENES + ' scenes, mIoU in %':24}" + "".join(f"{name:>14}" for name in FIGURES)]
    for name, runs in found.items():
        columns = [[run[figure] for run in runs] for figure in FIGURES]
        spread = [f" ± {stdev(each):3.1f}" if len(each) > 1 else 6 * " " for each in columns]
        lines.append(f"{name:24}" + "".join(f"{mean(each):8.1f}{wide}"
                                            for each, wide in zip(columns, spread)))
    return "\n".join(lines)


def alone(cfg: SimpleNamespace, benchmark: str, options: list[str]) -> dict[str, float]:
    """The figures of a CLIP without a segmenter, by eval_seg.py."""
    with into(Path(cfg.OUT)):
        result = eval_seg.main(["@presets/toy_seg.txt", "--benchmarks", benchmark, *options,
                                "--out", cfg.OUT])
    return means(result[benchmark]["IoU"])


def figures(cfg: SimpleNamespace, arm: str, seed: int, benchmark: str) -> dict[str, float]:
    """Trains and evaluates one run, unless OUT has it -> its figures."""
    folder = Path(cfg.OUT) / f"{arm}-{seed}"
    with into(folder):      # a run that is complete ends at once
        train.main(["@presets/catseg_toy.txt", *options_of(cfg, arm), "--seed", str(seed),
                    "--out", str(folder), "--resume"])
        result = folder / "catseg.json"
        found = json.loads(result.read_text())["benchmarks"] if result.exists() else {}
        if benchmark not in found:
            found = catseg_eval.main(["@presets/catseg_toy_eval.txt", "--benchmarks", benchmark,
                                      "--ckpt", str(folder / "catseg.safetensors")])
    return means(found[benchmark]["IoU"])


def options_of(cfg: SimpleNamespace, arm: str) -> list[str]:
    """What is under CAT-Seg: plain CLIP with CAT-Seg's own attention, or the nano DeCLIP."""
    if arm == "clip":
        return ["--model", "local-dir:toy/clip", "--pretrained", "own", "--attention", "catseg"]
    return ["--ckpt", cfg.DECLIP]


def means(iou: dict[str, float | None]) -> dict[str, float]:
    """IoU of each class -> the means of FIGURES, over classes that occur."""
    return {figure: mean(iou[NAMES[number]] for number in numbers
                         if iou[NAMES[number]] is not None)
            for figure, numbers in FIGURES.items()}


@contextlib.contextmanager
def into(folder: Path):
    """Within it, what is printed goes into a file of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "output.txt", "a") as output, contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(output)):
        yield


if __name__ == "__main__":
    main()
