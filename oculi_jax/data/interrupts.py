"""Ctrl-C and SIGTERM, which end a job after the chunk at hand."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def until_asked(what: str) -> Iterator[Callable[[], None]]:
    """Yields what a job calls after each chunk, and raises KeyboardInterrupt, or SystemExit for SIGTERM, if it was asked to end.

    A second Ctrl-C ends at once. Elsewhere than in the main thread signals are left as they are.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        print(f"{what} ends after the chunk at hand; the same call does the rest.", file=sys.stderr)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
