"""Progress of long work: the one running line of a terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

TERMINAL_SECONDS, PIPE_SECONDS = 0.2, 60.0  # between two states of the running line


class Progress:
    """Lines for a person: finished ones stay; the running one is replaced on a terminal, rarely printed to a pipe."""

    def __init__(self, quiet: bool, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.quiet, self.terminal = quiet, self.stream.isatty()
        self.shown, self.width = time.monotonic(), 0

    def due(self) -> bool:
        """Whether it is time for a new running line."""
        every = TERMINAL_SECONDS if self.terminal else PIPE_SECONDS
        return not self.quiet and time.monotonic() - self.shown >= every

    def show(self, text: str) -> None:
        """Show or replace the running line."""
        self.shown = time.monotonic()
        if self.terminal:
            print(f"\r{text:<{self.width}}", end="", file=self.stream, flush=True)
            self.width = len(text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self.quiet:
            start = "\r" if self.terminal else ""
            print(f"{start}{text:<{self.width}}", file=self.stream, flush=True)
        self.width = 0

    def clear(self) -> None:
        """Remove the running line."""
        if self.terminal:
            print(f"\r{'':<{self.width}}\r", end="", file=self.stream, flush=True)
        self.width = 0


def duration(seconds: float) -> str:
    """As 1:02:03, 2:03 or 3 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
