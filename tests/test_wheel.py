"""The wheel, installed beside this environment's dependencies, works from an empty folder: nothing of the checkout is near."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"tpo_lib": "tpo_lib", "notebooks/tpo_course": "tpo_course", "notebooks/solutions": "tpo_course/solutions"}
ROOMS |= {"data": "tpo_data"}  # folder of the repository -> its place in the wheel

USED = """
import importlib.metadata, pathlib
from dataclasses import replace

import tpo_lib
from tpo_course import widgets
from tpo_course.exercises import dpo as check
from tpo_data import pocket
from tpo_lib.files.load import POCKET
from tpo_lib import losses
from tpo_lib.runs import compare, presets, sweep

here = pathlib.Path(tpo_lib.__file__).parent.parent
assert here == pathlib.Path(pocket.__file__).parent.parent == POCKET.parent.parent, here
assert importlib.metadata.version("tpo-lib") == tpo_lib.__version__
assert "notebooks" not in str(here)

config = presets.comparison(quick=True)
small = {"train_prompts": 12, "held_out_prompts": 4, "max_pairs": 32, "max_held_out_pairs": 4}
small |= {"max_new_tokens": 8, "min_gap": 0.0}
summary = compare.run(
    replace(config, stage=replace(config.stage, **small), objectives=config.objectives[:1]), pathlib.Path("runs/quick")
)
assert pathlib.Path("runs/quick/report.html").stat().st_size > 10_000
assert widgets.run_browser() and sweep.RUNS.is_file()
card = check.dpo_loss
assert "def dpo_loss" in card._repr_html_() and card(card.right).status == "correct"
print("all of it works")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in (
        "tpo_lib",
        "notebooks",
        "data",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):  # a build writes beside them
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "made", "."]
    subprocess.run(build, cwd=folder, check=True)
    (path,) = (folder / "made").glob("*.whl")
    return path


def test_every_file_of_the_packages_is_in_it(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in ROOMS.items():
        there = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        missing = [f"{place}/{name}" for name in map(Path.as_posix, there) if f"{place}/{name}" not in inside]
        assert not [name for name in missing if "__pycache__" not in name]


def test_it_works_from_an_empty_folder(wheel, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # a path file inside a path file is not followed, so the dependencies come and the editable tpo_lib does not
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run([python, *arguments], cwd=empty, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "all of it works" in run("-c", USED)
    assert "FAIL" not in run("-m", "tpo_lib", "derive", "preferences")
