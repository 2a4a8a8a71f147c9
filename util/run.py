"""A training run in its folder: lock, log, guard, checkpoints, signals. It trains any model.

    with Run(cfg, ranks, dataset, steps_per_epoch, "model.safetensors") as run:
        run.begin(model, optimizer, scaler, save=lambda path, settings: model.save(path, settings))
        for step in range(run.step, run.last):
            for batch in micro_batches:
                ...                                             # losses and backward
                run.record(losses, indices, skipped)
            run.check_gradient()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if run.end_step(lr=lr):
                break
        run.finish()

The settings it reads: OUT, RESUME, EPOCHS, STEPS, BATCH_SIZE, LOG_EVERY, SAVE_EVERY, KEEP,
MAX_BAD_FILES, MAX_BAD_STEPS. Its files in OUT: the model, `resume-STEP.pt`, `log.jsonl`,
`skipped.txt`, `bad_steps.jsonl`.
"""

import fcntl
import json
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from util import UserError, distributed, settings
from util.distributed import Ranks
from util.files import atomic_write

# Settings that may differ when a run is resumed: any other would make it another run.
HARMLESS = ("OUT", "RESUME", "MICRO_BATCH", "NUM_WORKERS", "LOG_EVERY", "SAVE_EVERY", "STEPS",
            "KEEP", "MAX_BAD_FILES", "MAX_BAD_STEPS")
# What a line of log.jsonl has besides the losses.
LOG_FIELDS = ("step", "epoch", "lr", "images_per_second", "memory_mb", "bad_steps", "bad_files")
SIGNALS = (signal.SIGTERM, signal.SIGINT)      # a scheduler's before it takes a machine; Ctrl-C


class Images(Protocol):
    """What a run must know of its data."""
    paths: Sequence[str]        # the image files
    fingerprint: str            # the same for the same images in the same order


class Run:
    """One training run: locked folder, exact resume, log, checkpoints, signals.

    cfg: the settings named above. model_name: file of the finished model in OUT. harmless: settings
    that may differ on resume besides HARMLESS.
    Raises UserError if OUT is in use, holds a run that is not to be resumed, or one with other
    settings or images.
    """

    def __init__(self, cfg: SimpleNamespace, ranks: Ranks, images: Images, steps_per_epoch: int,
                 model_name: str, harmless: Sequence[str] = ()):
        self.cfg, self.ranks, self.images = cfg, ranks, images
        self.steps_per_epoch = steps_per_epoch
        self.total = cfg.EPOCHS * steps_per_epoch
        self.last = self.total if cfg.STEPS is None else min(cfg.STEPS, self.total)
        self.model_path = Path(cfg.OUT) / model_name
        # torchrun --max_restarts repeats the command after a crash.
        cfg.RESUME = cfg.RESUME or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.lock = hold_folder(cfg.OUT) if ranks.is_main else None
        self.resumed = find_resume(cfg, images, (*HARMLESS, *harmless))
        if ranks.is_main:
            self.prepare_folder()

    def __enter__(self) -> "Run":
        self.handlers = {number: signal.getsignal(number) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()

    def prepare_folder(self) -> None:
        """Removes files that a killed run left half-written, and prints the settings."""
        for half in Path(self.cfg.OUT).glob("*.tmp"):
            half.unlink()
        print(settings.show(self.cfg))
        if self.cfg.RESUME:
            print(f"going on at step {self.resumed['step']}" if self.resumed else
                  f"{self.cfg.OUT} has no checkpoint, so the run begins")

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer,
              scaler: torch.amp.GradScaler, save: Callable[[Path, dict], None]) -> None:
        """Restores the state to resume from, if any, and starts the log and the guard.

        model: what is trained of it is what a checkpoint keeps. save: writes the model with the
        settings given to a path.
        Raises UserError if the disk is too small, or if ranks found different checkpoints.
        """
        self.model, self.optimizer, self.scaler, self.save_model = model, optimizer, scaler, save
        if self.ranks.is_main:
            check_disk(self.cfg, model, self.model_path)
        self.step = self.restore() if self.resumed else 0
        if not distributed.all_equal(self.step, self.ranks.device):
            raise UserError(f"The processes found different checkpoints in {self.cfg.OUT}; put OUT "
                            "on a disk that all machines share.")
        bad_steps = self.resumed["bad_steps"] if self.resumed else 0
        self.log = Log(self.cfg, self.ranks, len(self.images.paths), self.step)
        self.guard = Guard(self.cfg, self.ranks, bad_steps)
        # Of the present step: losses of each micro batch, its images, and files left out.
        self.losses: list[dict[str, Tensor]] = []
        self.files: list[str] = []
        self.failures: list[tuple[str, str]] = []
        self.is_saved = True
        self.progress = tqdm(initial=self.step, total=self.last, desc="train", unit="step",
                             disable=not self.ranks.is_main)

    def restore(self) -> int:
        """Puts the resumed state back and returns its step."""
        state = self.resumed
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        # On another GPU the run may compute in another precision, which scales by other rules.
        if state["scaler"].get("growth_interval") == self.scaler.get_growth_interval():
            self.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def record(self, losses: dict[str, Tensor], indices: Sequence[int],
               skipped: Sequence[list[tuple[str, str]]]) -> None:
        """Takes a micro batch: its losses, scalars by name, and for each image its index and the
        files that could not be read in its place, with the reasons."""
        self.losses.append({name: loss.detach() for name, loss in losses.items()})
        self.files += [self.images.paths[index] for index in indices]
        self.failures += [failure for of_image in skipped for failure in of_image]

    def check_gradient(self) -> None:
        """Asks all ranks whether the gradients of this step are finite, without waiting.

        A step whose gradient is not finite changes no weights: the scaler leaves it out.
        """
        self.guard.watch(self.step + 1, self.optimizer, self.files)

    def end_step(self, lr: float) -> bool:
        """Logs and saves where it is time to -> whether to stop, because a signal came."""
        self.step += 1
        self.log.add({name: sum(losses[name] for losses in self.losses) / len(self.losses)
                      for name in self.losses[0]}, self.failures)
        self.losses, self.files, self.failures = [], [], []
        self.progress.update()
        self.guard.look()
        saves = (self.step % self.steps_per_epoch == 0 or self.step == self.last
                 or self.step % self.cfg.SAVE_EVERY == 0 or self.guard.stops)
        if saves:
            self.guard.look(last=True)
        if saves or self.step == 1 or self.step % self.cfg.LOG_EVERY == 0:
            epoch = (self.step - 1) // self.steps_per_epoch
            self.log.write(self.step, epoch, lr, self.guard.bad_steps)
        if saves and self.ranks.is_main:
            self.is_saved = self.save()
        return self.guard.stops

    def save(self) -> bool:
        """Writes what going on needs (resume-STEP.pt) and the model, each whole or not at all.

        If the disk is full it says so and returns False; the files before stay.
        """
        trained = {name: parameter.detach() for name, parameter in self.model.named_parameters()
                   if parameter.requires_grad}
        state = {"step": self.step, "settings": vars(self.cfg), "images": self.images.fingerprint,
                 "model": trained, "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict(), "bad_steps": self.guard.bad_steps}
        path = Path(self.cfg.OUT) / f"resume-{self.step:08}.pt"
        try:
            atomic_write(path, lambda file: torch.save(state, file))
            self.save_model(self.model_path, vars(self.cfg) | {"step": self.step})
        except OSError as error:
            tqdm.write(f"the checkpoint of step {self.step} could not be written ({error}); make "
                       "room: the one before it is kept")
            return False
        for old in resume_files(self.cfg.OUT)[self.cfg.KEEP:]:
            old.unlink(missing_ok=True)
        return True

    def finish(self) -> None:
        """Waits for all ranks. After a signal, leaves with the exit status that is usual for it.

        Raises UserError if the last checkpoint could not be written.
        """
        self.progress.close()
        distributed.barrier()
        if self.guard.stops:
            raise SystemExit(self.guard.leave(self.step))
        if not self.is_saved:
            raise UserError(f"The last checkpoint could not be written to {self.cfg.OUT}; make "
                            "room, and repeat the end with --resume.")


# ----------------------------------------------------------------------------- signals, bad steps

def ignore_signals(_: int) -> None:
    """In a worker of a DataLoader: leaves SIGNALS to the trainer.

    They go to all processes of a group, but the trainer still needs images for its last steps.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ends the worker in 30 s if the trainer does not.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class Guard:
    """What ranks must agree on at every step: was its gradient finite, did a signal come?

    The answer about a step is read after the next one was sent to the device, so that the device
    never waits for it.
    """

    def __init__(self, cfg: SimpleNamespace, ranks: Ranks, bad_steps: int = 0):
        self.cfg, self.ranks = cfg, ranks
        self.signal, self.stops = 0, False      # the signal that came; whether all ranks know it
        self.bad_steps, self.in_a_row = bad_steps, 0
        self.pending: list[tuple[int, Callable[[], list], list[str]]] = []
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, _: object) -> None:
        """Remembers a signal. A second Ctrl-C ends the process; launchers may repeat SIGTERM."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch(self, step: int, optimizer: torch.optim.Optimizer, files: list[str]) -> None:
        """Asks all ranks about a step whose gradients are computed; `files`: its images here."""
        gradients = [parameter.grad for group in optimizer.param_groups
                     for parameter in group["params"] if parameter.grad is not None]
        is_bad = ~nn.utils.get_total_norm(gradients, math.inf).isfinite()
        # DDP averages gradients, so they are finite on all ranks or on none; a signal may have come
        # to one rank only.
        came = torch.full((), float(self.signal), device=self.ranks.device)
        flags = distributed.max_over_ranks(torch.stack([is_bad.float(), came]))
        self.pending.append((step, distributed.fetch(flags), files))

    def look(self, last: bool = False) -> None:
        """Reads the answers except the newest (`last`: all); UserError after too many bad steps."""
        while len(self.pending) > (0 if last else 1):
            step, read, files = self.pending.pop(0)
            is_bad, number = read()
            self.stops, self.signal = self.stops or number > 0, self.signal or int(number)
            self.in_a_row = self.in_a_row + 1 if is_bad else 0
            if is_bad:
                self.bad_steps += 1
                self.list_bad_step(step, files)
            if self.in_a_row >= self.cfg.MAX_BAD_STEPS:
                raise UserError(
                    f"The gradient was not finite in {self.in_a_row} steps in a row, up to step "
                    f"{step}; lower LR or look at the images in bad_steps.jsonl; {self.cfg.OUT} "
                    "keeps the last good checkpoint.")

    def list_bad_step(self, step: int, files: list[str]) -> None:
        """Adds a step and its images on all ranks to bad_steps.jsonl."""
        files = [file for share in distributed.gather(files) for file in share]
        if self.ranks.is_main:
            with open(Path(self.cfg.OUT) / "bad_steps.jsonl", "a") as out:
                out.write(json.dumps({"step": step, "files": files}) + "\n")
            tqdm.write(f"step {step} was left out, its gradient is not finite; its images are in "
                       "bad_steps.jsonl")

    def leave(self, step: int) -> int:
        """Says which signal stopped the run -> its exit status (143: SIGTERM, 130: Ctrl-C)."""
        if self.ranks.is_main:
            print(f"stopped by {signal.Signals(self.signal).name} after step {step}, which is "
                  "saved; go on with --resume")
        return 128 + self.signal


# ------------------------------------------------------------------------------------------ log

class Log:
    """Means over some steps and all ranks, a line of json each; no step waits for the device."""

    def __init__(self, cfg: SimpleNamespace, ranks: Ranks, images: int, first_step: int):
        self.cfg, self.ranks, self.images = cfg, ranks, images
        self.sums: dict[str, Tensor] = {}
        self.steps, self.since = 0, time.perf_counter()
        self.path = Path(cfg.OUT) / "log.jsonl"
        self.skipped_path = Path(cfg.OUT) / "skipped.txt"
        self.new_failures: dict[str, str] = {}
        is_listed = first_step and self.skipped_path.exists()
        listed = self.skipped_path.read_text().splitlines() if is_listed else []
        self.failures = {line.split("\t")[0] for line in listed}
        if ranks.is_main:
            self.cut(first_step)

    def cut(self, step: int) -> None:
        """Removes lines after the checkpoint that a run goes on from: those steps are repeated."""
        is_there = step and self.path.exists()
        lines = self.path.read_text().splitlines(keepends=True) if is_there else []
        whole = [line for line in lines if line.endswith("\n")]     # a kill may leave half a line
        kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
        atomic_write(self.path, lambda file: Path(file).write_text(kept))

    def add(self, losses: dict[str, Tensor], failures: list[tuple[str, str]]) -> None:
        """Takes the losses of a step, scalars by name, and the files that could not be read."""
        is_finite = torch.stack(list(losses.values())).isfinite().all()
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.where(is_finite, 0)
        self.sums["steps"] = self.sums.get("steps", 0) + is_finite.float()
        self.steps += 1
        self.new_failures.update(failures)

    def write(self, step: int, epoch: int, lr: float, bad_steps: int) -> None:
        """Writes a line on the steps since the last one; UserError on too many unreadable files."""
        sums = distributed.sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        *losses, steps = sums
        means = {name: loss / steps if steps else None for name, loss in zip(self.sums, losses)}
        self.write_failures()
        seconds = time.perf_counter() - self.since
        line = {"step": step, "epoch": epoch, **means, "lr": lr,
                "images_per_second": round(self.steps * self.cfg.BATCH_SIZE / seconds, 2),
                "memory_mb": peak_memory(self.ranks.device), "bad_steps": bad_steps,
                "bad_files": len(self.failures)}
        if self.ranks.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else
                                 f"{name} {value}" for name, value in line.items()))
        self.sums, self.steps, self.since = {}, 0, time.perf_counter()

    def write_failures(self) -> None:
        """Adds files that no rank could read before to skipped.txt, each once.

        Raises UserError if the share of unreadable files is above MAX_BAD_FILES.
        """
        found = {path: reason for share in distributed.gather(self.new_failures)
                 for path, reason in share.items()}
        new = {path: reason for path, reason in found.items() if path not in self.failures}
        self.failures.update(new)
        self.new_failures = {}
        if new and self.ranks.is_main:
            with open(self.skipped_path, "a") as file:
                file.writelines(f"{path}\t{reason}\n" for path, reason in sorted(new.items()))
        if len(self.failures) > self.cfg.MAX_BAD_FILES * self.images:
            raise UserError(
                f"{len(self.failures)} of {self.images} image files can't be read, more than "
                f"MAX_BAD_FILES, {self.cfg.MAX_BAD_FILES:.2%}; they are listed in "
                f"{self.skipped_path}, so check whether these are the data that you meant.")


def peak_memory(device: torch.device) -> int:
    """The most memory used so far in MB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


# ---------------------------------------------------------------------------------- checkpoints

def hold_folder(out: str) -> IO:
    """Makes OUT and locks it as long as the returned file is open and this process lives.

    Raises UserError if another process writes there, such as one that a scheduler has not ended.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    lock = open(Path(out) / ".lock", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another process is training into {out}; wait for its end or stop it, or "
                        "set OUT to another folder.") from None
    return lock


def resume_files(out: str | Path) -> list[Path]:
    """The checkpoints in OUT to go on from, the newest first."""
    return sorted(Path(out).glob("resume-*.pt"), reverse=True)


def check_disk(cfg: SimpleNamespace, model: nn.Module, model_path: Path) -> None:
    """Raises UserError if the disk is too small for the checkpoints of this run together."""
    everything = sum(4 * parameter.numel() for parameter in model.parameters())
    trained = sum(4 * parameter.numel() for parameter in model.parameters()
                  if parameter.requires_grad)
    # A checkpoint has weights and two moments; while the newest is written there is one more than
    # KEEP, and the model is there twice.
    needed = 2 * everything + (cfg.KEEP + 1) * 3 * trained
    present = sum(file.stat().st_size for file in (*resume_files(cfg.OUT), model_path)
                  if file.exists())
    free = shutil.disk_usage(cfg.OUT).free
    if free + present < needed:
        raise UserError(f"{Path(cfg.OUT).absolute()} has {free / 1e9:.1f} GB free, but the run's "
                        f"checkpoints take {needed / 1e9:.1f} GB; make room, set OUT to another "
                        "disk, or lower KEEP.")


def find_resume(cfg: SimpleNamespace, images: Images, harmless: Sequence[str]) -> dict | None:
    """The state to go on from; None for a new run.

    Raises UserError if OUT holds a run that is not to be resumed, or one with other settings or
    images.
    """
    paths = resume_files(cfg.OUT)
    if not paths:
        return None
    if not cfg.RESUME:
        raise UserError(f"{cfg.OUT} already holds a run; go on with it by --resume, or set OUT to "
                        "another folder.")
    state = next(filter(None, map(read_state, paths)), None)
    if state is None:
        raise UserError(f"All checkpoints in {cfg.OUT} are damaged; remove them, or begin anew in "
                        "another OUT.")
    now, then = vars(cfg), state["settings"]
    changed = next((name for name in now if name not in harmless and now[name] != then.get(name)),
                   None)
    if changed:
        raise UserError(f"The run in {cfg.OUT} was begun with {changed} {then.get(changed)}, but "
                        f"now it is {now[changed]}; resume with the old value, or set OUT to "
                        "another folder.")
    if state["images"] != images.fingerprint:
        raise UserError(f"The run in {cfg.OUT} was begun with {state['images']} (number, checksum "
                        f"of names), but {cfg.IMAGES} has {images.fingerprint}; resume with the "
                        "same images, or set OUT to another folder.")
    return state


def read_state(path: Path) -> dict | None:
    """A checkpoint; None if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:       # damaged files raise anything
        print(f"{path} is damaged, so the one before it is taken")
        return None
