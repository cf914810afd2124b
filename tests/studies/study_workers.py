"""What processes of a pool run in the tests: they import it by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tpo_lib.files import store
from tpo_lib.studies.execute import record_path


def made(spec: dict, folder: Path) -> Path:
    """A run that does as its spec says, and leaves a record."""
    path = record_path(spec, folder)
    tries = path.with_name("tries")
    store.write_file(tries, (tries.read_text() if tries.exists() else "") + "x")
    if len(tries.read_text()) <= spec.get("die", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if "wait" in spec:
        store.write_file(path.with_name("pid"), str(os.getpid()))
        time.sleep(spec["wait"])
    if "fail" in spec:
        raise ValueError(spec["fail"])
    store.write_json(path, {"spec": spec})
    return path
