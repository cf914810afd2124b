"""Tests in processes of their own: one that may be killed, forked where all is imported; two that train together."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "tpo_lib.runs.run"])
# what `accelerate launch` says of configs/accelerate/fsdp2.yaml; tests/test_processes.py launches that file too
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


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


def together(function: Callable, *arguments, sharded: bool = False) -> list[tuple[int, str, str]]:
    """[(exit status, stdout, stderr)] of function(rank, *arguments) in two processes, as `accelerate launch` starts them."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), function, arguments, sharded)
        children = [SERVER.Process(target=_join, args=(rank, *arguments)) for rank in range(2)]
        for child in children:
            child.start()
        wait([child.sentinel for child in children], timeout=240)
        for child in children:
            child.join(240 if all(other.exitcode in (None, 0) for other in children) else 20)
            if child.is_alive():  # it waits for the other one
                child.kill()
                child.join()
        return [
            (child.exitcode, *((Path(folder) / f"{name}{rank}").read_text() for name in ("stdout", "stderr")))
            for rank, child in enumerate(children)
        ]


def _join(rank: int, folder: Path, function: Callable, arguments: tuple, sharded: bool) -> None:
    import torch
    import torch.distributed as dist

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if sharded:
        os.environ |= FSDP2
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
