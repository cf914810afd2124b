"""Checkpoints of the builders' plain loops: weights, optimizers and JSON values."""

from __future__ import annotations

from pathlib import Path

import torch

from tpo_lib.files import store


def save_progress(
    folder: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], *, step: int, **extra
) -> None:
    """Write the checkpoint of `step` below `folder`; the last two are kept."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step, **extra}
    store.write_atomically(store.step_folder(folder, step), lambda target: store.save_state(target / "state", state))
    store.keep_last(folder, 2)


def load_progress(folder: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict:
    """Continue from the newest sound checkpoint below `folder`; returns its state, {} where there is none."""
    found = store.newest(folder)
    store.set_aside(folder, found)
    if found is None:
        return {}
    state = store.load_state(found / "state")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state
