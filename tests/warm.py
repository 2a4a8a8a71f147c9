"""Scripts in processes of their own that have imported everything before they start.

They have nothing to do with pytest's process, as if a shell had started them, but are forked by a
server, this file run as a script, that has imported torch and the scripts: that takes seconds. What
torchrun itself does is tested with torchrun.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Process:
    """A script's process, as subprocess.Popen has it; it prints into the file `printed`."""

    def __init__(self, command: Sequence[str], printed: Path,
                 variables: dict[str, str] | None = None):
        self.server, self.returncode = server(), None
        request = {"command": list(map(str, command)), "printed": str(printed),
                   "variables": variables or {}}
        self.pid = self.ask(request)
        atexit.register(self.kill)      # what a failed test left

    def ask(self, request: dict | int) -> int | None:
        """Asks the server to start a process -> its id, or how a process ended -> its status."""
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

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
def server() -> subprocess.Popen:
    """The process that forks the others; it ends with this one."""
    paths = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | paths)


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

def serve() -> list[str]:
    """Forks a process for each request, and tells how they ended -> in such a process, its command.
    """
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, dict):
            pid = os.fork()
            if not pid:
                return become(request)
            answer = pid
        else:
            collect(ended)
            answer = ended.get(request)
        print(json.dumps(answer), flush=True)
    os._exit(0)


def collect(ended: dict[int, int]) -> None:
    """Notes the exit status of each process that has ended, minus the signal that ended it."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        ended[pid] = os.waitstatus_to_exitcode(status)


def become(request: dict) -> list[str]:
    """In a new process: a session, files and variables of its own -> its command."""
    os.setsid()
    os.environ |= request["variables"]
    printed = os.open(request["printed"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(printed, stream)
    return request["command"]


if __name__ == "__main__":
    import runpy

    import conftest  # noqa: F401
    import torch._dynamo  # noqa: F401

    import downstream.fvit.train  # noqa: F401
    import eval_region  # noqa: F401
    import eval_seg  # noqa: F401
    import train  # noqa: F401

    sys.argv = serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
