"""A training run in its folder: lock, log, guard, checkpoints, signals. It trains any model.

    with Run(cfg, ranks, dataset, "model.safetensors") as run:
        student = run.begin(model, optimizer, save=model.save)      # goes on where OUT says
        batches = training_batches(dataset, run)
        for step in run.steps():
            for batch in run.micro_batches(batches):
                with run.forward():
                    losses = student(batch.data)        # scalars by name
                    loss = sum(losses.values())
                run.backward(loss, losses, batch)
            run.end_step(lr)

The settings it reads: OUT, RESUME, EPOCHS, STEPS, BATCH_SIZE, MICRO_BATCH, PRECISION, SEED and the
machinery below; FSDP, if the model is divided over the ranks. Its files in OUT: the model,
`resume-STEP.pt` (with FSDP a folder, `resume-STEP.parts`), `log.jsonl`, `skipped.txt`,
`bad_steps.jsonl`.
"""

import fcntl
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from util import UserError, distributed, printable, settings
from util.distributed import Ranks
from util.files import atomic_write, find, is_half_written, is_number, is_text, wrong_field
from util.precision import autocast, check_precision, grad_scaler
from util.samples import Batch, TrainingData
from util.sharding import file_checksum, own_part, read_about, read_parts, write_parts
from util.towers import locate
from util.weights import read_record

# The machinery
NUM_WORKERS = 4                     # processes that decode images, for each GPU
READ_TIMEOUT = 60.0                 # seconds after which an image file counts as unreadable
TIMEOUT = 600.0                     # seconds after which a step that does not end ends the run
LOG_EVERY = 20                      # steps between lines of log.jsonl
SAVE_EVERY = 1000                   # steps between checkpoints; each epoch ends with one, too
KEEP = 2                            # checkpoints kept to resume from, should the last be damaged
MAX_BAD_FILES = 0.01                # share of files that may be unreadable before the run stops
MAX_BAD_STEPS = 20                  # steps in a row without a finite gradient before it stops

# Settings that may differ when a run is resumed: any other would make it another run.
MAY_CHANGE_ON_RESUME = (
    "OUT", "RESUME", "MICRO_BATCH", "STEPS", "NUM_WORKERS", "READ_TIMEOUT", "TIMEOUT", "LOG_EVERY",
    "SAVE_EVERY", "KEEP", "MAX_BAD_FILES", "MAX_BAD_STEPS")
# The least value of settings that trainings have.
MIN_OF_TRAINING = {
    "BATCH_SIZE": 1, "MICRO_BATCH": 1, "EPOCHS": 1, "ITERATIONS": 1, "STEPS": 1, "IMAGE_SIZE": 1,
    "LR": 0, "WARMUP": 0, "WEIGHT_DECAY": 0, "EPS": 0, "CLIP_NORM": 0, "NUM_WORKERS": 0,
    "READ_TIMEOUT": 0.001, "TIMEOUT": 1, "LOG_EVERY": 1, "SAVE_EVERY": 1, "KEEP": 1,
    "MAX_BAD_FILES": 0, "MAX_BAD_STEPS": 1}
# What a line of log.jsonl has besides the losses.
LOG_FIELDS = ("step", "epoch", "lr", "images_per_second", "memory_mb", "bad_steps", "bad_files")
SIGNALS = (signal.SIGTERM, signal.SIGINT)      # a scheduler's before it takes a machine; Ctrl-C


def check_training(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting that is out of its range, of those that every training has."""
    settings.check_min(cfg, **{name: least for name, least in MIN_OF_TRAINING.items()
                               if hasattr(cfg, name)})
    check_precision(cfg.PRECISION)
    betas = getattr(cfg, "BETAS", (0, 0))
    settings.check(cfg, SEED=(0 <= cfg.SEED < 2**40, "from 0 to 2**40"),
                   BETAS=(len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
                          "two numbers from 0 to 1"))


class Run:
    """One training run: locked folder, exact resume, log, checkpoints, signals.

    cfg: the settings named above. model_name: file of the finished model in OUT. may_change:
    settings that may differ on resume besides MAY_CHANGE_ON_RESUME. total: the steps of the whole
    training, None for those of EPOCHS.
    Raises UserError if OUT is in use, holds a run that is not to be resumed, or one with other
    settings or images; and if ranks can't share a batch, or images don't fill one.
    """

    def __init__(self, cfg: SimpleNamespace, ranks: Ranks, images: TrainingData, model_name: str,
                 may_change: Sequence[str] = (), total: int | None = None):
        self.cfg, self.ranks, self.images = cfg, ranks, images
        self.micro_batch, self.accumulate = distributed.divide_batch(
            cfg.BATCH_SIZE, cfg.MICRO_BATCH, ranks.world_size)
        self.steps_per_epoch = len(images.paths) // cfg.BATCH_SIZE
        if not self.steps_per_epoch:
            count = len(images.paths)
            raise UserError(f"There are {count} images, fewer than BATCH_SIZE, {cfg.BATCH_SIZE}; "
                            f"add images, or set BATCH_SIZE to {count} or less.")
        self.total = total or cfg.EPOCHS * self.steps_per_epoch
        self.last = self.total if cfg.STEPS is None else min(cfg.STEPS, self.total)
        self.model_path = Path(cfg.OUT) / model_name
        # torchrun --max_restarts repeats the command after a crash.
        cfg.RESUME = cfg.RESUME or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.is_sharded = getattr(cfg, "FSDP", False)   # then all ranks save together
        self.fingerprint = images.fingerprint       # now: a save must not fail for want of it
        self.files = checksums(cfg, getattr(images, "sources", ())) if ranks.is_main else {}
        self.lock = hold_folder(cfg.OUT) if ranks.is_main else None
        self.resumed = find_resume(cfg, self.fingerprint, (*MAY_CHANGE_ON_RESUME, *may_change))
        self.has_begun = False
        if ranks.is_main:
            check_files(cfg.OUT, self.resumed, self.files)
            self.prepare_folder()

    def __enter__(self) -> "Run":
        self.handlers = {number: signal.getsignal(number) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.has_begun:
            self.watchdog.rest()
        if kind and issubclass(kind, Exception):
            self.save_what_is_there()
        if self.has_begun:
            self.progress.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()

    def prepare_folder(self) -> None:
        """Removes files that a killed run left half-written, and prints the settings."""
        own = rf"{re.escape(self.model_path.name)}|resume-\d{{8}}\.pt|log\.jsonl|bad_steps\.jsonl"
        for path in Path(self.cfg.OUT).glob("*.tmp"):
            if is_half_written(path, own) or re.fullmatch(r"resume-\d{8}\.tmp", path.name):
                remove(path)
        print(settings.show(self.cfg))
        count, size = len(self.images.paths), self.cfg.BATCH_SIZE
        print(f"{count:,} images: {self.steps_per_epoch:,} steps an epoch"
              + (f"; {count % size} of them, which fill no batch of {size}, are left out of each"
                 if count % size else ""))
        if self.cfg.RESUME:
            print(f"going on at step {self.resumed['step']}" if self.resumed else
                  f"{self.cfg.OUT} has no checkpoint, so the run begins")

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer,
              save: Callable[[Path, dict], None], trained: nn.Module | None = None) -> nn.Module:
        """Restores the state to resume from, if any, and starts the log and the guard -> the module
        that training calls, which averages gradients over the ranks.

        model: what is trained of it is what a checkpoint keeps. save: writes the model with the
        settings given to a path. trained: the part of the model that training calls, None for all.
        Raises UserError if the disk is too small, or if ranks found different checkpoints.
        """
        self.model, self.optimizer, self.save_model = model, optimizer, save
        self.scaler = grad_scaler(self.cfg.PRECISION, self.ranks.device)
        if self.ranks.is_main:
            check_disk(self.cfg, model, self.model_path)
        self.step = self.restore() if self.resumed else 0
        if self.resumed and (self.ranks.is_main or self.is_sharded):
            self.renew_model()
        if len(set(distributed.gather(self.step))) > 1:
            raise UserError(f"The processes found different checkpoints in {self.cfg.OUT}; put OUT "
                            "on a disk that all machines share.")
        bad_steps = self.resumed["bad_steps"] if self.resumed else 0
        self.log = Log(self.cfg, self.ranks, len(self.images.paths), self.step)
        self.guard = Guard(self.cfg, self.ranks, self.images.paths, bad_steps)
        # Of the present step: losses of each micro batch, its images, and files left out.
        self.losses: list[dict[str, Tensor]] = []
        self.indices: list[int] = []
        self.failures: list[tuple[str, str]] = []
        self.is_saved, self.has_begun = True, True
        self.is_stepping = False        # between the gradients of a step and its end
        self.is_due = False             # a checkpoint is to be written after the next good step
        # What a forward changes, such as norms' statistics, and how the last step left it.
        weights = dict(model.named_parameters())
        self.buffers = [value for name, value in model.state_dict().items() if name not in weights]
        self.kept = [buffer.clone() for buffer in self.buffers]
        self.watchdog = Watchdog(self)
        self.progress = tqdm(initial=self.step, total=self.last, desc="train", unit="step",
                             disable=not self.ranks.is_main)
        self.student = distributed.wrap(trained or model, self.ranks)
        return self.student

    def renew_model(self) -> None:
        """Writes the model, if a kill or a full disk has left that of another step, or none."""
        about = {"settings": {}}
        with suppress(UserError, FileNotFoundError):
            about = read_record(self.model_path)
        if about.get("settings", {}).get("step") != self.step:
            self.save_model(self.model_path, vars(self.cfg) | {"step": self.step})

    def restore(self) -> int:
        """Puts the resumed state back and returns its step.

        Raises UserError unless it has every trained weight, and moments of the optimiser's own
        names, shapes and types: PyTorch would take others, and compute beyond their ends.
        """
        state, own = self.resumed, get_optimizer_state_dict(self.model, self.optimizer)
        try:
            if self.is_sharded:     # this rank's parts, of a folder that any number of ranks wrote
                read_parts(resume_file(self.cfg.OUT, state["step"], True),
                           {"model": self.trained(), "moments": own["state"]})
                set_optimizer_state_dict(self.model, self.optimizer, own)
            else:
                own = self.optimizer.state_dict()
                if not is_like(state, self.trained(), own):
                    raise KeyError("model")
                self.model.load_state_dict(state["model"], strict=False)
                self.optimizer.load_state_dict(own | {"state": {
                    number: {name: value.contiguous() for name, value in moments.items()}
                    for number, moments in state["optimizer"]["state"].items()}})
        except (KeyError, ValueError):      # other names; other groups of the optimiser
            raise UserError(f"The checkpoint of step {state['step']} in {self.cfg.OUT} does not "
                            "have the weights that are trained; remove it to go on from the one "
                            "before, or begin in another OUT.") from None
        # On another GPU the run may compute in another precision, which scales by other rules.
        if state["scaler"].get("growth_interval") == self.scaler.get_growth_interval():
            self.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def trained(self) -> dict[str, Tensor]:
        """The weights that training changes and the statistics of norms, by name."""
        frozen = {name for name, parameter in self.model.named_parameters()
                  if not parameter.requires_grad}
        return {name: value for name, value in self.model.state_dict().items()
                if name not in frozen}

    # ------------------------------------------------------------------------------ the loop

    @property
    def epoch(self) -> int:
        """The epoch of the present step, from 0."""
        return self.step // self.steps_per_epoch

    def steps(self) -> Iterator[int]:
        """The steps of this run. It ends early after a signal, and leaves as `finish` says."""
        while self.step < self.last and not self.guard.stops:
            yield self.step
        self.finish()

    def micro_batches(self, batches: Iterator) -> Iterator:
        """The micro batches of a step."""
        for number in range(self.accumulate):
            self.is_last_batch = number == self.accumulate - 1
            yield next(batches)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within it, models compute in PRECISION."""
        with distributed.synchronized(self.student, self.is_last_batch), autocast(
                self.cfg.PRECISION, self.ranks.device):
            yield

    def backward(self, loss: Tensor, losses: dict[str, Tensor], batch: Batch) -> None:
        """Gradients of a micro batch; its losses, scalars by name, go to the log."""
        with distributed.synchronized(self.student, self.is_last_batch):
            self.scaler.scale(loss / self.accumulate).backward()
        self.losses.append({name: value.detach()
                            for name, value in ({"loss": loss} | losses).items()})
        self.indices += batch.indices
        self.failures += [failure for of_image in batch.skipped for failure in of_image]

    def end_step(self, lr: float, clip_norm: float | None = None) -> None:
        """The optimiser's step with learning rate `lr`, then log and checkpoint where it is time.

        A group of the optimiser with a `share` has that share of the rate. clip_norm: longer
        gradients are cut to it. A step whose gradient is not finite changes no weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        # All ranks are asked, without waiting; the scaler leaves a bad step out.
        is_bad = is_bad_step(self.optimizer, self.scaler, self.losses)
        self.guard.watch(self.step + 1, is_bad, self.indices)
        with self.watchdog.changing:
            self.is_stepping = True
            if clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_([weight for weight in self.model.parameters()
                                          if weight.requires_grad], clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.kept = [buffer.clone() for buffer in self.buffers]
            self.is_stepping = False
            self.watchdog.beat()
        self.log.add({name: sum(losses[name] for losses in self.losses) / len(self.losses)
                      for name in self.losses[0]}, self.failures)
        self.losses, self.indices, self.failures = [], [], []
        self.progress.update()
        self.guard.look()
        self.log_and_save(lr)

    def log_and_save(self, lr: float) -> None:
        """Writes a line of the log and a checkpoint, where it is time to."""
        is_last = self.step == self.last or self.guard.stops
        saves = (is_last or self.is_due or self.step % self.steps_per_epoch == 0
                 or self.step % self.cfg.SAVE_EVERY == 0)
        if saves:
            self.guard.look(last=True)
        if saves or self.step == 1 or self.step % self.cfg.LOG_EVERY == 0:
            epoch = (self.step - 1) // self.steps_per_epoch
            self.log.write(self.step, epoch, lr, self.guard.bad_steps)
        # At the end a single bad step may be due to its images; more are due to the weights.
        if saves and self.guard.in_a_row > (1 if is_last else 0):
            self.postpone(is_last)
        elif saves:
            self.is_due = False
            with self.watchdog.changing:
                self.is_saved = self.save() if self.ranks.is_main or self.is_sharded else True
            self.watchdog.beat()

    # -------------------------------------------------------------------------------- saving

    def postpone(self, is_last: bool) -> None:
        """Leaves the last good checkpoint as it is while steps are bad; UserError at the end."""
        found = f"the last {self.guard.in_a_row} steps had no finite gradient"
        if is_last:
            raise UserError(f"The run ends here, but {found}, so nothing was saved; "
                            f"{last_checkpoint(self.cfg.OUT)}; lower LR or look at the images in "
                            "bad_steps.jsonl.")
        if self.ranks.is_main and not self.is_due:
            tqdm.write(f"step {self.step} is not saved, since {found}; the next good one will be")
        self.is_due = True

    def save(self) -> bool:
        """Writes what going on needs (resume-STEP.pt) and the model, each whole or not at all.

        If the disk is full it says so and returns False; the files before stay.
        Raises UserError, and writes nothing, if the weights are not finite.
        """
        if not self.is_finite():
            raise UserError(f"The weights are not finite after step {self.step}, so they were not "
                            f"saved; {last_checkpoint(self.cfg.OUT)}; lower LR.")
        about = {"step": self.step, "settings": vars(self.cfg), "images": self.fingerprint,
                 "scaler": self.scaler.state_dict(), "bad_steps": self.guard.bad_steps,
                 "files": self.files}
        path = resume_file(self.cfg.OUT, self.step, self.is_sharded)
        try:
            if self.is_sharded:
                moments = get_optimizer_state_dict(self.model, self.optimizer)["state"]
                write_parts(path, {"model": self.trained(), "moments": moments}, about, self.ranks)
            else:
                state = about | {"model": self.trained(), "optimizer": self.optimizer.state_dict()}
                atomic_write(path, lambda file: torch.save(state, file))
            self.save_model(self.model_path, vars(self.cfg) | {"step": self.step})
        except OSError as error:
            if self.ranks.is_main:
                tqdm.write(f"the checkpoint of step {self.step} could not be written ({error}); "
                           "make room: the one before it is kept")
            return False
        for old in resume_files(self.cfg.OUT)[self.cfg.KEEP:] if self.ranks.is_main else ():
            remove(old)
        return True

    def is_finite(self) -> bool:
        """Whether all weights are; of divided ones each rank looks at its parts."""
        parts = [own_part(weight).isfinite().all() for weight in self.trained().values()]
        is_bad = (~torch.stack(parts).all()).float()
        return not (distributed.max_over_ranks(is_bad) if self.is_sharded else is_bad).item()

    def save_what_is_there(self) -> None:
        """After an error: saves the last step, if it is whole, good, and not yet saved.

        One process can't, of a model that is divided over many.
        """
        if self.is_sharded and self.ranks.world_size > 1:
            return
        if not (self.ranks.is_main and self.has_begun) or self.is_stepping or not self.step:
            return
        path = resume_file(self.cfg.OUT, self.step, self.is_sharded)
        if self.guard.is_bad_now() or path.exists():
            return
        self.model.eval()       # a forward that still runs changes no more buffers
        for buffer, kept in zip(self.buffers, self.kept):
            buffer.copy_(kept)
        if self.save():
            print(f"step {self.step} was saved; go on with --resume")

    def finish(self) -> None:
        """Waits for all ranks. After a signal, leaves with the exit status that is usual for it.

        Raises UserError if the last checkpoint could not be written.
        """
        self.progress.close()
        self.watchdog.beat()
        distributed.barrier()
        if self.guard.stops:
            if self.ranks.is_main:
                print(f"stopped by {signal.Signals(self.guard.signal).name} after step "
                      f"{self.step}, which is saved; go on with --resume")
            raise SystemExit(128 + self.guard.signal)       # 143: SIGTERM, 130: Ctrl-C
        if not self.is_saved:
            raise UserError(f"The last checkpoint could not be written to {self.cfg.OUT}; make "
                            "room, and repeat the end with --resume.")

    def say_end(self, command: str, needs: str | Path | None, tool: str) -> None:
        """Says which file the run made, and a command that works, if the file is put behind it.

        command: evaluates it, with the data `needs`. tool: shows it on an image, without them.
        """
        if not self.ranks.is_main:
            return
        what = "evaluate"
        if not (needs and find(needs).exists()):
            photo = self.images.paths[0]
            photo = shlex.quote(photo) if Path(photo).is_file() else "photo.jpg"
            what, command = "try", f'python -m {tool} {photo} --classes "cat, grass" --ckpt'
        print(f"{self.model_path} holds the model after {self.step} steps; {what} it with "
              f"{command} {shlex.quote(str(self.model_path))}")


# ----------------------------------------------------------------------------- signals, bad steps

def ignore_signals(_: int) -> None:
    """In a worker of a DataLoader: leaves SIGNALS to the trainer.

    They go to all processes of a group, but the trainer still needs images for its last steps. Only
    a SIGTERM that the trainer itself sends ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_trainer, args=(os.getppid(),), daemon=True).start()


def end_with_trainer(trainer: int) -> None:
    """Waits for a SIGTERM of the process `trainer`, and ends this one."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def is_bad_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                losses: list[dict[str, Tensor]]) -> Tensor:
    """Whether the gradients are not finite, a bool on their device.

    In fp16 a scaled gradient may overflow where the losses are finite; then the scaler lowers its
    scale, which is no fault of the step unless the scale is 1.
    """
    # Of weights that are divided a rank looks at its parts; Guard asks all ranks.
    gradients = [own_part(parameter.grad) for group in optimizer.param_groups
                 for parameter in group["params"] if parameter.grad is not None]
    is_finite = nn.utils.get_total_norm(gradients, math.inf).isfinite()
    scale = scaler.scale(torch.ones((), device=is_finite.device))
    values = torch.stack([loss for of_batch in losses for loss in of_batch.values()])
    overflows = (scale > 1) & values.isfinite().all()
    return ~is_finite & ~overflows


STOPPED = 1.0       # seconds between two looks after which the process has not run meanwhile


class Watchdog:
    """Ends a process whose step does not end, from a thread: the main one waits for something.

    A step of more than TIMEOUT seconds hangs; after a signal, GRACE seconds are enough to wait for
    an image or another rank. What is saved is the last whole step.
    """

    GRACE = 5.0

    def __init__(self, run: Run):
        self.run = run
        self.changing = threading.RLock()       # held while weights change or are written
        self.resting = threading.Event()
        self.last_beat, self.signalled = time.monotonic(), math.inf
        self.is_copied = None       # on a GPU: when the last step's weights are there
        threading.Thread(target=self.look, daemon=True).start()

    def beat(self) -> None:
        """Notes the end of a step."""
        self.last_beat = time.monotonic()
        if self.run.ranks.device.type == "cuda":
            self.is_copied = torch.cuda.current_stream().record_event()

    def rest(self) -> None:
        """Looks no more; waits for a save that has begun, with which the process ends."""
        with self.changing:
            self.resting.set()

    def look(self) -> None:
        """Looks a few times a second whether it is time to end the process."""
        # The main rank saves, so the others give it time: without them it ends with an error. A
        # model that is divided is saved by all together, after the step or not at all.
        alone = self.run.ranks.is_main and not self.run.is_sharded
        grace = self.GRACE if alone else 3 * self.GRACE
        last_look = time.monotonic()
        while not self.resting.wait(0.2):
            now, number = time.monotonic(), self.run.guard.signal
            if now - last_look > STOPPED:       # the process itself stood still (SIGSTOP)
                self.last_beat += now - last_look
            last_look = now
            self.signalled = min(self.signalled, now) if number else math.inf
            if now - self.signalled > grace:
                self.end(128 + number, f"stopped by {signal.Signals(number).name} while step "
                         f"{self.run.step + 1} waited for an image or another process; go on with "
                         "--resume")
            elif now - self.last_beat > self.run.cfg.TIMEOUT:
                self.end(1, f"step {self.run.step + 1} did not end within TIMEOUT, "
                         f"{self.run.cfg.TIMEOUT:g} s, so a process or a disk hangs; go on with "
                         "--resume, or raise TIMEOUT if steps take that long")

    def end(self, status: int, sentence: str) -> None:
        """Saves the last whole step and ends the process, unless a step has ended meanwhile."""
        beat = self.last_beat
        is_stable = self.changing.acquire(timeout=self.run.cfg.TIMEOUT)
        if self.resting.is_set() or self.last_beat != beat:
            if is_stable:
                self.changing.release()
            return
        if is_stable:
            with torch.cuda.stream(self.side_stream()):
                self.run.save_what_is_there()
        print(f"rank {self.run.ranks.rank}: {sentence}", file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        os._exit(status)

    def side_stream(self) -> torch.cuda.Stream | None:
        """A stream that waits for the last step's weights alone: the usual one may hang, too."""
        if not self.is_copied:
            return None
        stream = torch.cuda.Stream()
        stream.wait_event(self.is_copied)
        return stream


class Guard:
    """What ranks must agree on at every step: was its gradient finite, did a signal come?

    The answer about a step is read after the next one was sent to the device, so that the device
    never waits for it.
    """

    def __init__(self, cfg: SimpleNamespace, ranks: Ranks, paths: Sequence[str],
                 bad_steps: int = 0):
        self.cfg, self.ranks, self.paths = cfg, ranks, paths
        self.signal, self.stops = 0, False      # the signal that came; whether all ranks know it
        self.bad_steps, self.in_a_row = bad_steps, 0
        self.pending: list[tuple[int, Callable[[], list], list[int]]] = []
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, _: object) -> None:
        """Remembers a signal. A second Ctrl-C ends the process; launchers may repeat SIGTERM."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch(self, step: int, is_bad: Tensor, indices: list[int]) -> None:
        """Asks all ranks about a step; `indices` are those of its images on this rank."""
        # DDP averages gradients, so they are finite on all ranks or on none; a signal may have come
        # to one rank only.
        came = torch.full((), float(self.signal), device=self.ranks.device)
        flags = distributed.max_over_ranks(torch.stack([is_bad.float(), came]))
        self.pending.append((step, distributed.fetch(flags), indices))

    def is_bad_now(self) -> bool:
        """Whether the last steps had no finite gradient, those included that were not read yet."""
        return self.in_a_row > 0 or any(read()[0] for _, read, _ in self.pending)

    def look(self, last: bool = False) -> None:
        """Reads the answers except the newest (`last`: all); UserError after too many bad steps."""
        while len(self.pending) > (0 if last else 1):
            step, read, indices = self.pending.pop(0)
            is_bad, number = read()
            self.stops, self.signal = self.stops or number > 0, self.signal or int(number)
            self.in_a_row = self.in_a_row + 1 if is_bad else 0
            if is_bad:
                self.bad_steps += 1
                self.list_bad_step(step, indices)
            if self.in_a_row >= self.cfg.MAX_BAD_STEPS:
                raise UserError(
                    f"The gradient was not finite in {self.in_a_row} steps in a row, up to step "
                    f"{step}; lower LR or look at the images in bad_steps.jsonl; "
                    f"{last_checkpoint(self.cfg.OUT)}.")

    def list_bad_step(self, step: int, indices: list[int]) -> None:
        """Adds a step and its images on all ranks to bad_steps.jsonl."""
        # Names are looked up here only: for shards each takes a read.
        files = distributed.gather([self.paths[index] for index in indices])
        files = [file for share in files for file in share]
        if self.ranks.is_main:
            append(Path(self.cfg.OUT) / "bad_steps.jsonl",
                   json.dumps({"step": step, "files": files}) + "\n")
            tqdm.write(f"step {step} was left out, its gradient is not finite; its images are in "
                       "bad_steps.jsonl")


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
        # A file that was listed before a resume may be readable now: it is counted anew.
        self.listed = {line.split("\t")[0] for line in read_lines(self.skipped_path)}
        self.failures: set[str] = set()
        if ranks.is_main:
            for path in (self.path, self.path.with_name("bad_steps.jsonl")):
                if path.exists():
                    cut_lines(path, first_step)

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
            append(self.path, json.dumps(line) + "\n")
            tqdm.write("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else
                                 f"{name} {value}" for name, value in line.items()))
        self.sums, self.steps, self.since = {}, 0, time.perf_counter()

    def write_failures(self) -> None:
        """Adds files that no rank could read before to skipped.txt, each once.

        Raises UserError if the share of unreadable files is above MAX_BAD_FILES.
        """
        found = {escaped(path): escaped(reason)
                 for share in distributed.gather(self.new_failures)
                 for path, reason in share.items()}
        self.failures.update(found)
        self.new_failures = {}
        new = {path: reason for path, reason in sorted(found.items()) if path not in self.listed}
        self.listed.update(new)
        if new and self.ranks.is_main:
            append(self.skipped_path, "".join(f"{path}\t{reason}\n"
                                              for path, reason in new.items()))
        if len(self.failures) > self.cfg.MAX_BAD_FILES * self.images:
            raise UserError(
                f"{len(self.failures)} of {self.images} images or their labels can't be used, more "
                f"than MAX_BAD_FILES, {self.cfg.MAX_BAD_FILES:.2%}; they are listed with the "
                f"reasons in {self.skipped_path}, so check whether these are the data that you "
                "meant.")


def append(path: Path, text: str) -> None:
    """Appends whole lines to a file; a full disk is reported, and the run goes on without them."""
    try:
        with open(path, "a", errors="surrogateescape") as file:
            file.write(text)
    except OSError as error:
        tqdm.write(f"{path} could not be written ({error}); the run goes on, make room")


def read_lines(path: Path) -> list[str]:
    """The whole lines of a file, none if there is no such file."""
    if not path.exists():
        return []
    text = path.read_text(errors="surrogateescape")
    return [line for line in text.split("\n")[:-1] if line]


def cut_lines(path: Path, last: int) -> None:
    """Removes lines of json about later steps than the `last` one, since those will be repeated.

    Lines that a kill or a full disk left unreadable go, too.
    """
    def step_of(line: str) -> float:
        try:
            return float(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            return math.inf

    text = "".join(f"{line}\n" for line in read_lines(path) if step_of(line) <= last)
    atomic_write(path, lambda file: Path(file).write_text(text))


def escaped(text: str) -> str:
    """A file's name or a reason on one line, without control characters."""
    # Bytes that are no text stay, so that the name still finds its file.
    return "".join(letter if "\ud800" <= letter <= "\udfff" else printable(letter)
                   for letter in text.replace("\n", "\\n"))


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
    paths = (path for path in Path(out).glob("resume-*") if path.suffix in (".pt", ".parts"))
    return sorted(paths, reverse=True)


def resume_file(out: str | Path, step: int, is_sharded: bool = False) -> Path:
    """Where the checkpoint of a step is; a folder if it is in parts."""
    return Path(out) / f"resume-{step:08}{'.parts' if is_sharded else '.pt'}"


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = path.iterdir() if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files)


def last_checkpoint(out: str | Path) -> str:
    """What a sentence about a failed run says of its checkpoints."""
    paths = resume_files(out)
    if not paths:
        return f"{out} has no checkpoint yet"
    return f"{out} keeps the checkpoint of step {int(paths[0].stem.split('-')[1])}"


def check_disk(cfg: SimpleNamespace, model: nn.Module, model_path: Path) -> None:
    """Raises UserError if the disk is too small for the checkpoints of this run together."""
    everything = sum(4 * parameter.numel() for parameter in model.parameters())
    trained = sum(4 * parameter.numel() for parameter in model.parameters()
                  if parameter.requires_grad)
    # A checkpoint has weights and two moments; while the newest is written there is one more than
    # KEEP, and the model is there twice.
    needed = 2 * everything + (cfg.KEEP + 1) * 3 * trained
    present = sum(map(bytes_of, (*resume_files(cfg.OUT), model_path)))
    free = shutil.disk_usage(cfg.OUT).free
    if free + present < needed:
        raise UserError(f"{Path(cfg.OUT).absolute()} has {free / 1e9:.1f} GB free, but the run's "
                        f"checkpoints take {needed / 1e9:.1f} GB; make room, set OUT to another "
                        "disk, or lower KEEP.")


def find_resume(cfg: SimpleNamespace, fingerprint: str, may_change: Sequence[str]) -> dict | None:
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
    changed = next((name for name in now if name not in may_change and now[name] != then.get(name)),
                   None)
    if changed:
        raise UserError(f"The run in {cfg.OUT} was begun with {changed} {then.get(changed)}, but "
                        f"now it is {now[changed]}; resume with the old value, or set OUT to "
                        "another folder.")
    if state["images"] != fingerprint:
        raise UserError(f"The run in {cfg.OUT} was begun with {state['images']} (number, checksum "
                        f"of names), but now there are {fingerprint}; resume with the same images, "
                        "or set OUT to another folder.")
    return state


def checksums(cfg: SimpleNamespace, sources: Sequence[str | Path]) -> dict[str, str]:
    """CRC-32 of the files that settings name: weights, a model's folder, jsons; and of `sources`,
    those of the data. Shards and folders of images are known by their fingerprint."""
    found = {"data": [Path(source) for source in sources]}
    for name, value in vars(cfg).items():
        if isinstance(value, str) and value.startswith("local-dir:"):
            found[name] = sorted(Path(locate(value).removeprefix("local-dir:")).glob("*.*"))
        elif isinstance(value, str) and Path(value).suffix in OF_FILES:
            found[name] = [find(value)]
    of_name = {name: [file_checksum(path) for path in paths
                      if path.suffix in OF_FILES and path.is_file()]
               for name, paths in found.items()}
    return {name: " ".join(sums) for name, sums in of_name.items() if sums}


OF_FILES = (".safetensors", ".pt", ".pth", ".bin", ".json", ".txt", ".gz")


def check_files(out: str, resumed: dict | None, files: dict[str, str]) -> None:
    """Raises UserError if a run that is resumed was begun with other files of the same names."""
    if resumed and "files" not in resumed:
        print("the checkpoint is of before files had checksums, so take care that weights and "
              "annotations are those that the run was begun with")
    for name, checksum in (resumed or {}).get("files", {}).items():
        if files.get(name, checksum) != checksum:
            raise UserError(f"The run in {out} was begun with other content of the file that "
                            f"{name.upper()} names; put that back, or set OUT to another folder.")


def read_state(path: Path) -> dict | None:
    """A checkpoint, without the tensors of one in parts; None if it is damaged."""
    try:
        if path.is_dir():
            state, needed = read_about(path), STATE.keys() - {"files", "model", "optimizer"}
        else:       # torch.load does not look at the checksums that the file, a zip archive, has
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
            needed = STATE.keys() - {"files"}
        if not wrong_field(state, STATE, needed) and path.stem == f"resume-{state['step']:08}":
            return state
    except Exception:       # damaged files raise anything
        pass
    print(f"{path} is damaged, so the one before it is taken")
    return None


SCALER = {"scale": partial(is_number, least=1e-30, most=1e38), "growth_factor": is_number,
          "backoff_factor": is_number, "growth_interval": partial(is_number, least=1, most=2**31),
          "_growth_tracker": partial(is_number, least=0, most=2**31 - 1)}
# The fields of a checkpoint; those of before had no checksums of files.
STATE = {"step": lambda value: type(value) is int and 0 <= value < 2**53,
         "bad_steps": lambda value: type(value) is int and value >= 0,
         "settings": lambda value: isinstance(value, dict), "images": is_text,
         "files": lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
         "scaler": lambda value: value == {} or not wrong_field(value, SCALER, SCALER),
         "model": lambda value: isinstance(value, dict), "optimizer": lambda value: isinstance(
             value, dict) and isinstance(value.get("param_groups"), list)}


def is_like(state: dict, weights: dict[str, Tensor], own: dict) -> bool:
    """Whether a checkpoint has tensors of these weights' names, shapes and types, and moments as an
    optimizer's `own` state has them, if perhaps not of all weights."""
    def layout(tensors: dict[str, Tensor]) -> dict:
        return {name: (value.shape, value.dtype, value.layout, value.is_meta)
                for name, value in tensors.items()}
    try:
        groups = [[dict(group)["params"] for group in of_one["param_groups"]]
                  for of_one in (state["optimizer"], own)]
        return (layout(state["model"]) == layout(weights) and groups[0] == groups[1]
                and all(layout(moments) == layout(own["state"][number])
                        for number, moments in state["optimizer"]["state"].items()))
    except Exception:       # what is no such state raises anything
        return False
