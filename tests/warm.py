"""Scripts in processes of their own that have imported everything before they start.

They have nothing to do with what a test has done in pytest's process, but are forked by a server,
which that process forks before its first test: a process that imports torch takes seconds.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TextIO

from PIL import Image

FORK = multiprocessing.get_context("fork")


class Process:
    """A script's process, as subprocess.Popen has it; it prints into the file `printed`."""

    def __init__(self, command: Sequence[str], printed: Path,
                 variables: dict[str, str] | None = None):
        self.returncode = None
        request = {"command": list(map(str, command)), "printed": str(printed),
                   "variables": variables or {}}
        self.pid = self.ask(request)
        atexit.register(self.kill)      # what a failed test left

    def ask(self, request: dict | int) -> int | None:
        """Asks the server to start a process -> its id, or how a process ended -> its status."""
        requests, answers = server()
        print(json.dumps(request), file=requests, flush=True)
        return json.loads(answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.ask(self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("warm", timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


@cache
def server() -> tuple[TextIO, TextIO]:
    """Forks the process that forks the others -> its requests and answers; it ends with this one.

    conftest.py calls it when nothing has been computed yet, in as few threads as possible.
    """
    (requests, to_server), (answers, to_us) = os.pipe(), os.pipe()
    if not os.fork():
        os.close(to_server)
        os.setsid()
        Image.init()
        serve(open(requests), open(to_us, "w"))
    os.close(requests)
    os.close(to_us)
    return open(to_server, "w"), open(answers)


def start_ranks(command: Sequence[str], printed: Path, count: int = 2) -> list[Process]:
    """Starts `tests/<script>` in `count` processes that meet as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Process(command, printed, meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)]


def ranks(*command: str, count: int = 2, timeout: float = 200) -> subprocess.CompletedProcess:
    """Runs `tests/<script>` in `count` processes that meet as torchrun's do, to their end."""
    with tempfile.NamedTemporaryFile(prefix="ranks-", delete=False) as file:
        printed = Path(file.name)
    processes = start_ranks(command, printed, count)
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):
            time.sleep(1)       # like torchrun: when one fails, the others are ended
            break
        time.sleep(0.02)
    failed = next((process.returncode for process in processes if process.returncode), 0)
    for process in processes:
        process.kill()
    status = failed or next(filter(None, [process.wait() for process in processes]), 0)
    text = printed.read_text()
    printed.unlink()
    return subprocess.CompletedProcess(command, status, text, "")


# ---------------------------------------------------------------------------------- the server

def serve(requests: TextIO, answers: TextIO) -> None:
    """Forks a process for each request, and tells how they ended."""
    started = {}
    for line in requests:
        request = json.loads(line)
        if isinstance(request, dict):
            process = FORK.Process(target=become, kwargs=request)
            process.start()
            started[process.pid] = process
            answer = process.pid
        else:
            answer = started[request].exitcode
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


def become(command: list[str], printed: str, variables: dict[str, str]) -> None:
    """In a new process: a session, files and variables of its own, and the command.

    As multiprocessing ends it, what was imported is not taken apart, which takes a second.
    """
    os.setsid()
    os.chdir(Path(__file__).parent.parent)
    os.environ |= variables
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
