"""A terminal for tests: a pseudo-terminal of any width for one process, and the screen that its output makes."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from types import TracebackType

_SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b[=>78]")
_HALF_SEQUENCE = re.compile(r"\x1b(\[[0-9;?]*|[()])?$")


class Screen:
    """What a terminal of ``columns`` columns shows, scrolled-off lines included; it knows the sequences that rich sends."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._cells: list[list[str]] = [[]]
        self._row = self._column = 0

    @property
    def lines(self) -> list[str]:
        """The lines, without blanks at their ends."""
        lines = ["".join(row).rstrip() for row in self._cells]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def feed(self, text: str) -> None:
        """Write text to the screen."""
        at = 0
        while at < len(text):
            if found := _SEQUENCE.match(text, at):
                self._control(found[1] or "", found[2] or "")
                at = found.end()
            else:
                self._write(text[at])
                at += 1

    def _write(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._move_down()
        elif character == "\b":
            self._column = max(0, self._column - 1)
        elif character.isprintable():
            if self._column >= self.columns:  # wraps only once there is more to write, as terminals do
                self._column = 0
                self._move_down()
            row = self._cells[self._row]
            row.extend(" " * (self._column + 1 - len(row)))
            row[self._column] = character
            self._column += 1

    def _move_down(self) -> None:
        self._row += 1
        if self._row == len(self._cells):
            self._cells.append([])

    def _control(self, arguments: str, command: str) -> None:
        n = int(arguments) if arguments.isdecimal() else 0
        if command == "A":
            self._row = max(0, self._row - max(1, n))
        elif command == "B":
            self._row = min(len(self._cells) - 1, self._row + max(1, n))
        elif command == "G":
            self._column = max(0, n - 1)
        elif command == "K":
            row = self._cells[self._row]
            self._cells[self._row] = [] if n == 2 else row[: self._column]
        elif command == "J":
            del self._cells[self._row + 1 :]
            self._cells[self._row] = self._cells[self._row][: self._column]


class Terminal:
    """A Python script in a pseudo-terminal, whose width can be changed; a context manager that ends the process."""

    def __init__(self, code: str, columns: int = 80, env: Mapping[str, str] | None = None) -> None:
        self._master, slave = pty.openpty()
        self._slave = slave
        self._decoder, self._received = codecs.getincrementaldecoder("utf-8")(), ""
        self.resize(columns)
        given = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**given, "TERM": "xterm-256color", **(env or {})},
            preexec_fn=_take_terminal,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def resize(self, columns: int, rows: int = 50) -> None:
        """Give the terminal another width, and an empty screen."""
        self.screen = Screen(columns)
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """Type text; ``\\x03`` is Ctrl-C."""
        os.write(self._master, text.encode())

    def read_all(self, seconds: float = 60.0) -> str:
        """Read until the process has ended, which must succeed; return the text without control sequences."""
        deadline, found = time.monotonic() + seconds, b""
        while True:
            has_ended = self.process.poll() is not None
            if select.select([self._master], [], [], 0.1)[0]:
                found += os.read(self._master, 1 << 16)
            elif has_ended:
                break
            assert time.monotonic() < deadline, found
        assert self.process.returncode == 0, found
        return _SEQUENCE.sub("", found.decode())

    def read_until(self, condition: Callable[[Screen], object], seconds: float = 60.0) -> Screen:
        """Feed the screen until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition(self.screen):
            assert time.monotonic() < deadline, "\n".join(self.screen.lines)
            if select.select([self._master], [], [], 0.1)[0]:
                self._received += self._decoder.decode(os.read(self._master, 1 << 16))
                half = _HALF_SEQUENCE.search(self._received)
                whole = self._received[: half.start()] if half else self._received
                self.screen.feed(whole)
                self._received = self._received[len(whole) :]
        return self.screen


def _take_terminal() -> None:
    """Make the terminal the process's own, so that Ctrl-C reaches it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
