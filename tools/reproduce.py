"""Fills the paper's tables: trains and evaluates what they list, and lays the figures beside them.

    python -m tools.reproduce --tables 1 5 6 --list     # what would run, what is there, what lacks
    python -m tools.reproduce --tables 1 5 6            # runs it; the same command goes on
    python -m tools.reproduce --world toy --tables 1    # the same in the toy world
    python -m tools.reproduce --render                  # its figures and tables into docs/*.md

The rows stand in docs/reproduce.json and toy/reproduce.json. What several rows need is made once;
every command has a folder below OUT, with what it printed in output.txt. An interrupted training
goes on where it was; a command that fails stops only those that need what it makes. The figures are
OUT/report.md and report.png, made anew after each command.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch

from downstream.catseg.data import find_evaluation, find_training
from downstream.detection import find_files
from tools import report
from tools.report import Figure, Found
from util import UserError, distributed, settings
from util.files import ROOT, atomic_write, find
from util.labels import MissingData
from util.results import as_written, read_results
from util.run import MAY_CHANGE_ON_RESUME, hold_folder, resume_files
from util.weights import read_record

WORLD = "docs"                      # docs: the paper's tables; toy: the toy world's; or a json
TABLES: tuple[str, ...] = ()        # numbers of the paper's tables, or names; or all
SEEDS: tuple[int, ...] = ()         # of tables with several; none: all that a table has
OUT: str | None = None              # folder of all runs; None: the world's, such as out/reproduce
GPUS: int | None = None             # processes of each command; None: one for each GPU
LIST = False                        # only say what would run
RENDER = False                      # only record whole rows' figures, and write the document

# The file that a script makes in its folder. Evaluations add to a json there.
PRODUCTS = {"train": "declip.safetensors", "downstream.fvit.train": "fvit.safetensors",
            "downstream.ov_dquo.train": "ov_dquo.safetensors",
            "downstream.catseg.train": "catseg.safetensors",
            "downstream.ov_dquo.unknown": "unknown.json"}
EVALUATIONS = dict.fromkeys(["eval_region", "eval_seg", "downstream.fvit.eval",
                             "downstream.ov_dquo.eval", "downstream.catseg.eval"])
# Settings that make no other run of a command.
FREE = {*MAY_CHANGE_ON_RESUME, "CACHE", "BENCHMARKS"} - {"STEPS"}
MADE_WITH = "^# (commit .*)$"       # how a line of versions() begins in an output.txt


def main(argv: list[str] | None = None) -> None:
    """Does what the command line (or `argv`) says; status 1 if a command failed or lacked data."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__):
        run(cfg)


def run(cfg: SimpleNamespace) -> None:
    """The tables of a world: listed, run, or rendered."""
    world = report.read_world(cfg.WORLD)
    check(cfg, world)
    plan = Plan(world, cfg)
    if cfg.RENDER:
        return render(cfg, plan)
    print(overview(plan))
    if cfg.LIST:
        return
    distributed.heed_signals()      # they end the present command: it saves, and we leave
    failed = carry_out(plan)
    print(f"\n{write_report(plan, failed)} has the figures as a page for an issue")
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} commands did not end well:", *(
            f"{folder}: {reason}" for folder, reason in failed.items())]))


def check(cfg: SimpleNamespace, world: SimpleNamespace) -> None:
    """Raises UserError on settings that don't fit the world, or have no effect."""
    settings.check_min(cfg, GPUS=0)
    there = " ".join(row.tables or table.tables for table in world.tables for row in table.rows)
    there = dict.fromkeys([*there.split(), "all"])
    seeds = sorted({seed for table in world.tables for seed in table.seeds})
    needs_none = cfg.LIST or cfg.RENDER
    settings.check(cfg, TABLES=({*cfg.TABLES} <= {*there} and (needs_none or cfg.TABLES),
                                f"some of {', '.join(there)}"),
                   SEEDS=({*cfg.SEEDS} <= {*seeds}, f"some of {', '.join(map(str, seeds))}"))
    only = cfg.RENDER and "is for runs, but --render takes all that there is"
    settings.refuse_unused(cfg, TABLES=only, SEEDS=only, LIST=only,
                           GPUS=only or cfg.LIST and "is for runs, but --list makes none")


# ------------------------------------------------------------------------------------- the plan

@dataclass
class Job:
    """A command and its folder. Rows with the same one share it."""
    script: str                         # a module
    words: list[str]                    # of its command line, but for --out and --benchmarks
    cfg: SimpleNamespace                # what they say
    folder: Path
    needs: list["Job"]                  # what it reads the products of
    typed: str                          # the command with names for those products
    benchmarks: list[str] = field(default_factory=list)     # of an evaluation that has several

    @property
    def product(self) -> Path:
        return self.folder / PRODUCTS[self.script]

    @property
    def is_training(self) -> bool:
        return hasattr(self.cfg, "RESUME")

    def chain(self) -> list["Job"]:
        """What it needs, in order, and itself."""
        return [*(job for need in self.needs for job in need.chain()), self]

    def results(self, benchmark: str | None = None) -> list[dict]:
        """What an evaluation has found so far of the present weights, the newest last."""
        if not all(need.product.exists() for need in self.needs):
            return []
        made = max((need.product.stat().st_mtime for need in self.needs), default=0.0)
        found = []
        for path in sorted(self.folder.glob("*.json")):
            with suppress(UserError):       # one that holds none was put aside
                found += read_results(path) if path.stat().st_mtime >= made else []
        return [result for result in found
                if result["of"].get("checksum") == found[-1]["of"].get("checksum")
                and benchmark in (None, result["of"].get("benchmark"))]

    def steps(self) -> tuple[int, int | None]:
        """The step that a training has reached and its last one, None as long as it is unknown."""
        step = max([int(path.stem[7:]) for path in resume_files(self.folder)], default=0)
        with suppress(UserError):
            step = read_record(self.product).get("settings", {}).get("step", step)
        total = getattr(self.cfg, "ITERATIONS", None)
        for in_epoch in self.printed(r"images: ([\d,]+) steps an epoch") if total is None else ():
            total = self.cfg.EPOCHS * int(in_epoch.replace(",", ""))
        return step, total and min(total, self.cfg.STEPS or total)

    def printed(self, pattern: str) -> list[str]:
        """What its last command printed that fits a pattern, at most one text."""
        output = self.folder / "output.txt"
        text = output.read_text(errors="replace") if output.exists() else ""
        return re.findall(pattern, text, re.MULTILINE)[-1:]

    def state(self) -> str:
        """done, none, or how far a training was when it was interrupted."""
        step, total = self.steps() if self.is_training else (0, 0)
        is_done = (self.product.exists() and step == total if self.script in PRODUCTS
                   else all(map(self.results, self.benchmarks or [None])))
        begun = f"at step {step:,}" + (f" of {total:,}" if total else "")
        return "done" if is_done else begun if step else "none"

    def is_done(self) -> bool:
        return self.state() == "done"

    def left(self) -> tuple[list[str], list[str]]:
        """Of an evaluation's benchmarks those to run, and of all data what is missing, a sentence
        each."""
        if self.benchmarks:
            lacks = {name: lack_of(find_evaluation, name, self.cfg.DATA)
                     for name in self.benchmarks if not self.results(name)}
            return ([name for name, lack in lacks.items() if not lack],
                    [*filter(None, lacks.values())])
        made = [str(need.product) for need in self.needs]
        files = [path for name in ("CKPT", "BACKBONE", "PRETRAINED", "UNKNOWN")
                 if (path := getattr(self.cfg, name, None)) and path not in made
                 and Path(path).suffix in (".pt", ".safetensors", ".json")]
        lacks = [f"There is no {path}" for path in [*data_of(self), *files]
                 if not find(path).exists()]
        if self.script == "downstream.catseg.train":
            lacks.append(lack_of(find_training, self.cfg.IMAGES, self.cfg.DATA))
        return [], [*filter(None, lacks)]


def data_of(job: Job) -> list[str | Path]:
    """Files and folders that a command reads, but for label images."""
    cfg = job.cfg
    if job.script == "train":
        return [] if {*cfg.IMAGES} & {*"{*?[:"} else [cfg.IMAGES]       # shards
    if job.script == "eval_region":
        return [cfg.ANNOTATIONS, cfg.PNGS, cfg.IMAGES]
    if not re.search(r"(fvit|ov_dquo)\.(train|eval)", job.script):
        return []
    _, path, images = find_files(cfg.DATASET or job.needs[-1].cfg.DATASET,
                                 "train" if job.is_training else "val", cfg.DATA)
    return [cfg.ANNOTATIONS or path, cfg.IMAGES or images]


@cache
def lack_of(find_set: Callable, name: str, data: str) -> str:
    """Where the files of a set should be; "" if they are there."""
    try:
        find_set(name, data)
    except MissingData as error:
        return str(error).split(", or ")[0].split("; ")[0]
    return ""


class Plan:
    """The commands of the rows that are asked for, each after those that it needs."""

    def __init__(self, world: SimpleNamespace, cfg: SimpleNamespace):
        self.world, self.cfg, self.out = world, cfg, Path(cfg.OUT or world.out)
        self.gpus = torch.cuda.device_count() if cfg.GPUS is None else cfg.GPUS
        self.jobs: dict[Path, Job] = {}
        # Of each row: its table, its number, and its evaluations by name for each seed
        self.rows: list[tuple[SimpleNamespace, int, list[dict[str, Job]]]] = []
        wants_all = not cfg.TABLES or "all" in cfg.TABLES
        for table in world.tables:
            seeds = [seed for seed in table.seeds
                     if not cfg.SEEDS or seed in cfg.SEEDS or len(table.seeds) == 1]
            for number, row in enumerate(table.rows):
                numbers = {*(row.tables or table.tables).split()}
                if seeds and (wants_all or numbers & {*cfg.TABLES}):
                    self.rows.append((table, number, [self.evaluations(table, row, seed)
                                                      for seed in seeds]))

    @cached_property
    def all_rows(self) -> list[tuple[SimpleNamespace, int, list[dict[str, Job]]]]:
        """Those that are not asked for, too."""
        return Plan(self.world, SimpleNamespace(**vars(self.cfg) | {"TABLES": ()})).rows

    def evaluations(self, table: SimpleNamespace, row: SimpleNamespace, seed: int
                    ) -> dict[str, Job]:
        """Adds the training of a row and its evaluations -> the latter, by name."""
        values = {"SEED": str(seed)} | ({"NOVEL": table.splits[seed]} if table.splits else {})
        model, found = None, {}
        if row.model or row.train is not None:
            command = self.world.models.get(row.model) or f"{table.train} {row.train}"
            model = self.add(command, values)
        for name, command in (row.commands or table.evaluate).items():
            wanted = [column.benchmark for place, column in enumerate(table.columns)
                      if column.of == name
                      and report.has_figure(self.world.against, row.paper, place)]
            if not wanted:
                continue
            job = self.add(f"{command} {row.evaluate.get(name, '')}", values, model)
            job.benchmarks = [*dict.fromkeys([*job.benchmarks, *filter(None, wanted)])]
            found[name] = job
        return found

    def add(self, command: str, values: dict[str, str], model: Job | None = None) -> Job:
        """The job of a command, the same for equal options. model: what an evaluation is of."""
        (first, *words), needs = shlex.split(command), []
        script = first.removesuffix(".py")

        def filled(word: str) -> str:
            name = word[1:-1] if re.fullmatch(r"\{\w+\}", word) else ""
            if name in self.world.models:
                needs.append(self.add(self.world.models[name], values))
                return str(needs[-1].product)
            if name and name not in values:
                raise UserError(f"{command!r} has {word}, which is no model or value of the "
                                "world's json; correct it there.")
            return values.get(name, word)

        typed = [values.get(word[1:-1], report.plain(word)) for word in words]
        words = [filled(word) for word in words]
        if script not in (*PRODUCTS, *EVALUATIONS):
            raise UserError(f"{command!r} is no command of {', '.join([*PRODUCTS, *EVALUATIONS])}; "
                            "correct it in the world's json.")
        if model:
            needs.append(model)
            words += ["--ckpt", str(model.product)]
        cfg = settings.parse(words, importlib.import_module(script))
        folder = self.out / name_of(script, cfg, self.out)
        return self.jobs.setdefault(folder, Job(script, words, cfg, folder, needs,
                                                shlex.join([first, *typed])))


constants = cache(settings.constants)


def name_of(script: str, cfg: SimpleNamespace, out: Path) -> str:
    """The folder of a command: equal for equal options, wherever OUT is, and readable."""
    own = {name: value for name, value in vars(cfg).items() if name not in FREE}
    text = json.dumps([script, own]).replace(f"{json.dumps(str(out))[:-1]}/", '"')
    defaults = constants(importlib.import_module(script))
    changed = [f"{name.lower()}-{value}" for name, value in own.items()
               if value != defaults[name].default and "/" not in str(value)]
    readable = "-".join([script.removeprefix("downstream."), *changed])
    return f"{re.sub(r'[^a-zA-Z0-9_]+', '-', readable)[:48]}-{zlib.crc32(text.encode()):08x}"


# --------------------------------------------------------------------------------- what is left

def overview(plan: Plan) -> str:
    """What there is and what would run, in its order; time, disk; and what is missing."""
    lines, lacking, efforts = [], {}, []
    place = {folder: number for number, folder in enumerate(plan.jobs, 1)}
    states = {folder: job.state() for folder, job in plan.jobs.items()}
    left = {folder: job for folder, job in plan.jobs.items() if states[folder] != "done"}
    for folder, job in plan.jobs.items():
        hours, disk = effort_of(plan.world, job) if folder in left else (0, 0)
        efforts.append((hours, disk))
        about = f"about {shown(hours)}, {disk:g} GB" if hours else ""
        after = " ".join(str(place[need.folder]) for need in job.needs)
        lines.append(f"{place[folder]:4}  {states[folder]:24}{about:24}{job.typed}"
                     + (f"  (after {after})" if after else ""))
        for sentence in job.left()[1] if folder in left else ():
            of_source = lacking.setdefault(source(plan.world, sentence), ({}, {}))
            of_source[0][sentence] = of_source[1][str(place[folder])] = True
    hours, disk = map(sum, zip(*efforts, (0, 0)))
    lines += ["", f"{len(left)} of {len(plan.jobs)} commands are left. Their trainings take about "
              f"{shown(hours)} and {disk:.2g} GB in {plan.out}; evaluations, minutes each, are not "
              f"counted. {plan.world.effort}"]
    lines += [f"\n{'. '.join(sentences)}.\n    for: {' '.join(numbers)}\n    get: {how}"
              for how, (sentences, numbers) in lacking.items()]
    weights = sorted({weight for job in left.values() for weight in downloads(job)})
    if weights:
        lines.append("\nopen_clip and timm download at the first use, unless they are in their "
                     f"cache (with HF_HUB_OFFLINE=1 they must be): {', '.join(weights)}")
    return "\n".join(lines)


def shown(hours: float) -> str:
    """A time, roughly."""
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.3g} h"


def effort_of(world: SimpleNamespace, job: Job) -> tuple[float, float]:
    """Hours that a training still takes, and gigabytes; none of other commands."""
    for cost in world.costs:
        if cost.script == job.script and cost.where in job.typed:
            step, total = job.steps()
            images = (job.cfg.ITERATIONS * job.cfg.BATCH_SIZE if hasattr(job.cfg, "ITERATIONS")
                      else job.cfg.EPOCHS * cost.images)
            return (1 - step / total if total else 1) * images / cost.rate / 3600, cost.gb
    return 0, 0


def source(world: SimpleNamespace, sentence: str) -> str:
    """How to get what a sentence misses."""
    return next((how for part, how in world.get.items() if part in sentence),
                "docs/data.md says where it comes from")


def downloads(job: Job) -> list[str]:
    """Weights that a command takes from a hub."""
    cfg, found = job.cfg, []
    tag, model = getattr(cfg, "PRETRAINED", None), getattr(cfg, "MODEL", None) or "EVA02-B-16"
    if tag and not job.needs and not model.startswith("local-dir:") and not Path(tag).suffix:
        found.append(f"{model} {tag}")
    if getattr(cfg, "LAMBDA", 0) and cfg.VFM_PRETRAINED and "local-dir:" not in cfg.VFM_MODEL:
        found.append(cfg.VFM_MODEL)
    return found


# ---------------------------------------------------------------------------------- running it

def carry_out(plan: Plan) -> dict[Path, str]:
    """Runs what is left, in order -> why some did not end well, by their folders."""
    failed: dict[Path, str] = {}
    for number, job in enumerate(plan.jobs.values(), 1):
        wait_for_others(job)
        if job.is_done():
            continue
        benchmarks, lacking = job.left()
        before = [f"needs {need.folder}" for need in job.needs if need.folder in failed]
        missing = [f"{lack}; get it: {source(plan.world, lack)}" for lack in lacking]
        for reason in (before + missing)[:1]:
            failed[job.folder] = reason
        if before or missing and not benchmarks:
            continue
        command, since = command_of(job, plan.gpus, benchmarks), time.monotonic()
        line = shlex.join(["python", *command[1:]])
        print(f"\n{number} of {len(plan.jobs)}: {line}", flush=True)
        status, last = execute(command, job.folder)
        print(f"status {status} after {(time.monotonic() - since) / 60:.1f} min", flush=True)
        if status:
            failed[job.folder] = f"status {status}, {last}"
        write_report(plan, failed)
    return failed


def wait_for_others(job: Job) -> None:
    """Until no other process trains in a job's folder: of two commands that share trainings, each
    goes on with what the other made."""
    waits = False
    while job.is_training and job.folder.exists():
        with suppress(UserError):
            hold_folder(job.folder).close()
            return
        if not waits:
            print(f"waiting for another process that trains into {job.folder}", flush=True)
        waits = True
        time.sleep(2)


def command_of(job: Job, gpus: int, benchmarks: Sequence[str] = ()) -> list[str]:
    """The command line of a job, by torchrun on several GPUs."""
    is_file = job.script in PRODUCTS and not job.is_training
    words = [*job.words, "--out", str(job.product if is_file else job.folder)]
    words += ["--benchmarks", *benchmarks] if benchmarks else []
    if job.is_training:     # whose batch is divided among the processes
        words.append("--resume")
        gpus = next(count for count in range(max(gpus, 1), 0, -1)
                    if job.cfg.BATCH_SIZE % count == 0)
    launcher = (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
                if gpus > 1 else [])
    return [sys.executable, *launcher, "-m", job.script, *words]


def execute(command: list[str], folder: Path) -> tuple[int, str]:
    """Runs a command, whose output goes to output.txt -> its status, and what it said at the end.

    If we are interrupted, it is told to end, which saves a training, and waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    with open(folder / "output.txt", "a") as output:
        print(f"$ {shlex.join(command)}\n# {versions()}", file=output, flush=True)
        start = output.tell()
        # In a session of its own, so that Ctrl-C reaches it by us alone
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True,
                                   env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            print(f"interrupted; {folder} has what was saved, and the same command goes on")
            raise
    text = (folder / "output.txt").read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in re.split("[\r\n]+", text) if re.search("[a-z]", line)]
    sentences = [line for line in lines if re.match(r"\w+\.py: ", line)]        # before torchrun's
    return status, (sentences or lines or ["no output"])[-1]


# -------------------------------------------------------------------------------- what was found

def figures_of(table: SimpleNamespace, evaluations: list[dict[str, Job]]) -> list[Figure | None]:
    """A row's figures, a column each; None unless every seed has it."""
    found: list[Figure | None] = []
    for column in table.columns:
        # What does not depend on the seed is there once.
        jobs = {of[column.of].folder: of[column.of] for of in evaluations if column.of in of}
        values = [value_of(column, job) for job in jobs.values()]
        found.append(None if not values or None in values else
                     (mean(values), stdev(values) if len(values) > 1 else None))
    others = [figure for figure, column in zip(found, table.columns) if column.of]
    if None not in others:
        found = [figure if column.of else (mean(value for value, _ in others), None)
                 for figure, column in zip(found, table.columns)]
    return found


def value_of(column: SimpleNamespace, job: Job) -> float | None:
    """A column's figure of one evaluation; None if it is not there."""
    results = job.results(column.benchmark)
    value = results[-1] if results else None
    with as_written(job.folder):
        for step in column.path if results else ():
            if isinstance(step, list):
                parts = [value[name] for name in step if value[name] is not None]
                value = mean(parts) if parts else None
            else:
                value = value[step]
    return value


def write_report(plan: Plan, failed: dict[Path, str]) -> Path:
    """Writes what was found by now, of tables that were not asked for too -> the report's path."""
    found, ran, asked = [], {}, {(table.id, number) for table, number, _ in plan.rows}
    for table, number, evaluations in plan.all_rows:
        figures = figures_of(table, evaluations)
        if not any(figures) and (table.id, number) not in asked:
            continue
        jobs = [[job for last in of.values() for job in last.chain()] for of in evaluations]
        commands = [f"`{job.typed}`" + (f" ({job.steps()[0]:,} steps)" if job.is_training else "")
                    for job in jobs[0]]
        found.append(Found(table, table.rows[number], figures, [*dict.fromkeys(commands)]))
        ran |= {job.folder: job for job in sum(jobs, [])}
    made = dict.fromkeys(line for job in ran.values() for line in job.printed(MADE_WITH))
    report.write(plan.world, plan.out, found, [*made],
                 [f"{folder}: {reason}" for folder, reason in failed.items()])
    return plan.out / "report.md"


def versions() -> str:
    """What a command of now is made with, a line."""
    count = torch.cuda.device_count()
    return "; ".join([f"commit {commit()}", time.strftime("%Y-%m-%d"),
                      f"{count} x {torch.cuda.get_device_name()}" if count else "a CPU",
                      *(f"{name} {metadata.version(name)}"
                        for name in ("torch", "open_clip_torch", "timm"))])


def commit() -> str:
    """The version of this code."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                                       text=True, stderr=subprocess.DEVNULL).strip()
    return "unknown"


def render(cfg: SimpleNamespace, plan: Plan) -> None:
    """Records the figures of whole rows, and writes the document's tables."""
    path = report.world_path(cfg.WORLD)
    report.record(path, {(table.id, number): figures_of(table, evaluations)
                         for table, number, evaluations in plan.rows})
    world = report.read_world(cfg.WORLD)
    doc = find(world.doc)
    text = report.fill(doc.read_text(encoding="utf-8"), world)
    atomic_write(doc, lambda file: Path(file).write_text(text, encoding="utf-8"))
    print(f"the tables of {doc} are those of {path}")


if __name__ == "__main__":
    main()
