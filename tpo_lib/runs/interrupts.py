"""SIGTERM, as Slurm and Colab send it before they take the machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """SIGTERM asked the process to end."""


@contextmanager
def on_sigterm(handler: Callable) -> Iterator[None]:
    """Let `handler` take SIGTERM; not outside the main thread, where Python allows none, nor where it is ignored."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_terminated(number, frame) -> None:
    """A handler that ends what runs as an error would: locks are let go of, unfinished files removed."""
    raise Terminated
