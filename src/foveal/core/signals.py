"""Ending long work where it may end: the first Ctrl-C (or SIGTERM) asks, the second one ends the
process as if nobody had listened."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, instead of what the signal does else."""
    stop = threading.Event()

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signum, previous[signum])

    previous = {int(s): signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
