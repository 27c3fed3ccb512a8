"""An example program that serves, as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PATIENCE = 300  # seconds, on a busy machine


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


class Process:
    """A program, and where it listens.

    Attributes:
        url: Of its root.
        output: What it has printed.
    """

    def __init__(self, *command: str, listens: str) -> None:
        self.output: list[str] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment, cwd=EXAMPLES.parent, start_new_session=True,
        )  # fmt: skip
        self._known = threading.Event()
        self.url = ""
        self._pattern = re.compile(listens)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_it_listens(self) -> None:
        """Until it has printed where."""
        self._known.wait(PATIENCE)
        assert self.url, "".join(self.output)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line)
            if not self.url and (found := self._pattern.search(line)):
                self.url = found[1]
                self._known.set()
        self._known.set()

    def wait_until_healthy(self) -> None:
        """Until `/health` is a 200."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=PATIENCE).status_code == 200:
                    return
            time.sleep(0.2)
        raise AssertionError("".join(self.output))

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """For its end: the exit code."""
        code = self._process.wait(PATIENCE)
        self._reader.join(5)  # what it started may still hold the pipe
        return code

    def kill(self) -> None:
        """Ends it, and what it has started, if they have not ended."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def running(*command: str, listens: str) -> Iterator[Process]:
    """The program while it runs."""
    process = Process(*command, listens=listens)
    try:
        process.wait_until_it_listens()
        yield process
    finally:
        process.kill()
