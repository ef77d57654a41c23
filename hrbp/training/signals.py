"""SIGINT and SIGTERM during a training: recorded, and handled after the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def noted(note: Callable[[int], None]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM to `note` within the context; a second signal acts at once. Main thread only."""
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
