"""Chapter 0 on a machine with a GPU, by the stand-in of one (tests/stand_in.py): `fit` moves models there, the cells do not."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import stand_in
import torch
from IPython.core.interactiveshell import InteractiveShell
from test_device import on_the_device

from tpo_lib import models

FIRST = Path(__file__).parents[2] / "notebooks/00_start_here.ipynb"


def cells_there(path: Path) -> None:
    stand_in.watched = lambda on=True: nullcontext()  # what a cell loads by itself may compute on the CPU
    chosen = models.choose_device
    here = [module for module in sys.modules.values() if getattr(module, "choose_device", None) is chosen]
    for module in here:
        module.choose_device = lambda name=None: torch.device(stand_in.DEVICE) if name is None else chosen(name)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": stand_in.DEVICE, "TPO_PROGRESS": "off"}
    os.chdir(path.parent)
    shell, devices = InteractiveShell.instance(), []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            shell.run_cell("".join(cell["source"]).replace("%matplotlib inline", "")).raise_error()
            devices += [shell.user_ns["policy"].device.type] if "policy" in shell.user_ns else []
    assert (devices[0], devices[-1]) == (stand_in.DEVICE, "cpu")  # trained there, and taken back


def test_the_first_chapter_runs_there():
    on_the_device(cells_there, FIRST)
