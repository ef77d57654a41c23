"""How SIGINT and SIGTERM end a training: they are noted, and acted upon after the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def noted(note: Callable[[int], None]) -> Iterator[None]:
    """While it lasts, SIGINT and SIGTERM are told to `note`; a second one acts at once. In the main thread alone."""
    before: dict[int, Any] = {}

    def handle(number: int, _: FrameType | None) -> None:
        note(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
