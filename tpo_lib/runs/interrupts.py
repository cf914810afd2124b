"""SIGTERM, as Slurm and Colab send it before they take the machine away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """SIGTERM asked the process to end."""


@contextmanager
def _handled(number: int, handler: Callable, replaces: Callable[[object], bool]) -> Iterator[None]:
    """Let `handler` take a signal whose handler it may replace; not outside the main thread, where Python allows none."""
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or not replaces(before):
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def on_sigterm(handler: Callable):
    """Let `handler` take SIGTERM within this block, where it is not ignored."""
    return _handled(signal.SIGTERM, handler, lambda before: before not in (None, signal.SIG_IGN))


def raise_terminated(number, frame) -> None:
    """A handler that ends what runs as an error would: locks are let go of, unfinished files removed."""
    raise Terminated


def leave_at_once():
    """Let Ctrl-C end the process with one line while modules are imported and nothing has been done yet."""

    def leave(number, frame) -> None:  # an exception would surface in the midst of torch's import, as anything
        os.write(2, b"interrupted before anything was done\n")
        os._exit(130)

    # where somebody has decided otherwise (nohup, say), that stays
    return _handled(signal.SIGINT, leave, lambda before: before is signal.default_int_handler)
