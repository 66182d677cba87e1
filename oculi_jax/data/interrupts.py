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
def until_asked(what: str, largest: Callable[[int], int] = int) -> Iterator[Callable[[], None]]:
    """Yields what a job calls after each chunk, and raises KeyboardInterrupt, or SystemExit for SIGTERM, if it was asked to end.

    A second Ctrl-C ends at once. Elsewhere than in the main thread signals are left as they are. `largest` makes of the number of
    the signal here, 0 for none, that of all hosts that end together.
    """
    asked: list[int] = []

    def check() -> None:
        if number := largest(asked[0] if asked else 0):
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield check
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        print(f"{what} ends after the chunk at hand; the same call does the rest.", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
