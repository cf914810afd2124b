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


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process with one line while modules are imported and nothing has been done yet.

    An exception would surface in the midst of torch's import, as whatever that makes of it.
    """

    def leave(number, frame) -> None:
        os.write(2, b"interrupted before anything was done\n")
        os._exit(130)

    # else somebody has decided otherwise: nohup, say
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
