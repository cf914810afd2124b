"""Answers made in a thread of their own, so that a slider stays free to move: of several requests the last one counts."""

import threading
from collections.abc import Callable


class Latest:
    """One thread for the newest request; an answer that comes too late is thrown away.

    Args:
        work: (request, stale) -> answer, in the thread. It may ask `stale()` whether somebody asked anew meanwhile, and stop
            by whatever exception: what a stale request raises is dropped like what it returns.
        done: gets the answer, in the thread, holding `lock`.
        failed: gets the exception of a request that nobody replaced, in the thread, holding `lock`.

    Attributes:
        lock: whoever draws holds it, so that no two draw at once and nothing stale is drawn over something newer.

    Example:
        >>> answers = []
        >>> latest = Latest(lambda request, stale: request + 1, answers.append, print)
        >>> latest.ask(1)
        >>> latest.wait()
        >>> answers
        [2]
    """

    def __init__(self, work: Callable, done: Callable, failed: Callable) -> None:
        self.lock = threading.RLock()
        self._work, self._done, self._failed = work, done, failed
        self._number, self._request, self._waiting = 0, None, False
        self._thread: threading.Thread | None = None

    def ask(self, request) -> None:
        """Begin with this one; what came before is stale from now on."""
        with self.lock:
            self._number += 1
            self._request, self._waiting = request, True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def drop(self) -> None:
        """Make every request so far stale."""
        with self.lock:
            self._number += 1
            self._request, self._waiting = None, False

    def wait(self) -> None:
        """Until nothing is being worked on."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self.lock:
                if not self._waiting:
                    self._thread = None
                    return
                number, request, self._waiting = self._number, self._request, False

            def stale(number: int = number) -> bool:
                return number != self._number

            then, answer = self._done, None
            try:
                answer = self._work(request, stale)
            except Exception as error:  # told by `failed`, unless nobody waits for it
                then, answer = self._failed, error
            with self.lock:
                if not stale():
                    then(answer)
