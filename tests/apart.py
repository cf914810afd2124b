"""Tests in processes of their own: one that may be killed, forked where all is imported; two that train together."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "tpo_lib.runs.run"])


def apart(function: Callable, *arguments) -> tuple[int, str]:
    """(exit status, stderr) of a function of a test file; the status is negative where a signal ended it."""
    with tempfile.TemporaryDirectory() as folder:
        child = SERVER.Process(target=_tell, args=(Path(folder) / "stderr", function, arguments))
        child.start()
        child.join()
        return child.exitcode, (Path(folder) / "stderr").read_text()


def _tell(path: Path, function: Callable, arguments: tuple) -> None:
    import torch

    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    function(*arguments)


def two_processes(code: str, folder: Path) -> tuple[str, str]:
    """(stdout, stderr) of a program that two processes run together, as data-parallel training does; it finds `tiny`."""
    if "TPO_DISTRIBUTED" not in os.environ:
        pytest.skip("set TPO_DISTRIBUTED=1: starts two processes")
    (folder / "child.py").write_text(textwrap.dedent(code))
    paths = os.pathsep.join(filter(None, sys.path))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(folder / "child.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr
