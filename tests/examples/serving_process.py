"""An example program that serves, as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PATIENCE = 120  # seconds, on a busy machine


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
            env=environment, cwd=EXAMPLES.parent,
        )  # fmt: skip
        self._known = threading.Event()
        self.url = ""
        self._pattern = re.compile(listens)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
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

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """For its end: the exit code."""
        code = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def kill(self) -> None:
        """Ends it if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def running(*command: str, listens: str) -> Iterator[Process]:
    """The program while it runs."""
    process = Process(*command, listens=listens)
    try:
        yield process
    finally:
        process.kill()
