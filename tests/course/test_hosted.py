"""The set-up cell on stand-ins of Colab and Kaggle: what it fetches, installs, keeps and says, and that it does so once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import IPython
import pytest

from tpo_course import hosted, notebooks

GIT = """#!{python}
import os, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
if {broken} or "-b" in sys.argv:
    sys.exit(128)  # there is no such tag yet
os.makedirs(sys.argv[-1])
for name in ("tpo_lib", "notebooks", "data"):
    os.symlink(os.path.join({root!r}, name), os.path.join(sys.argv[-1], name))
"""
RUN = """
import json, os, sys, types
sys.path += {lent!r}
if {colab}:
    google, colab, drive = (types.ModuleType(name) for name in ("google", "google.colab", "google.colab.drive"))
    drive.mount = lambda place: (os.makedirs(place + "/MyDrive", exist_ok=True), print("mounted", place))
    google.colab, colab.drive = colab, drive
    sys.modules |= {{"google": google, "google.colab": colab, "google.colab.drive": drive}}
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for _ in range(2):
    result = shell.run_cell({cell!r})
    print("FAILED" if result.error_in_exec or result.error_before_exec else "PRESET " + shell.user_ns["PRESET"])
print(json.dumps({{name: os.environ.get(name) for name in ("TPO_CACHE", "TPO_PROGRESS")}}))
import tpo_course
print(tpo_course.__file__)
"""
TORCH = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
COLAB = "python3.13"  # newer than what the other tests run on


def _colabs_python() -> str:
    """The Python that is on Colab, from TPO_COLAB_PYTHON or the PATH; the test is skipped where there is none that starts."""
    if named := os.environ.get("TPO_COLAB_PYTHON"):
        return named
    if not (found := shutil.which(COLAB)):
        pytest.skip(f"there is no {COLAB} on the PATH: name one in TPO_COLAB_PYTHON")
    chosen = os.environ | {"PYENV_VERSION": COLAB.removeprefix("python")}  # for pyenv's shims; others ignore it
    ask = [found, "-c", "import sys; print(sys.executable)"]
    told = subprocess.run(ask, env=chosen, capture_output=True, text=True)
    if told.returncode:
        pytest.skip(f"{found} does not start: {told.stderr.strip()}")
    return told.stdout.strip()


def _lent(folder: Path) -> list[str]:
    """Folders with what a bare Python lacks: stand-ins of what the course needs, and IPython, which is pure Python."""
    for name in hosted.NEEDED:
        (folder / "lent" / name).mkdir(parents=True, exist_ok=True)
        (folder / "lent" / name / "__init__.py").write_text(TORCH if name == "torch" else "")
    return [str(folder / "lent"), str(Path(IPython.__file__).parents[1])]


def _session(
    folder: Path, *, colab: bool = True, drive: bool = False, broken: bool = False, python: str = sys.executable
):
    """Run the cell twice in one session; its output, the environment it leaves, and the calls of git."""
    home, log = folder / "home", folder / "git.log"
    (folder / "bin").mkdir(exist_ok=True)
    home.mkdir(exist_ok=True)
    (folder / "bin/git").write_text(GIT.format(python=python, log=str(log), broken=broken, root=str(notebooks.ROOT)))
    (folder / "bin/git").chmod(0o755)
    cell = notebooks.set_up(tier=True).replace('"/content"' if colab else '"/kaggle/working"', repr(str(home)))
    cell = cell.replace("KEEP_ON_DRIVE = False", f"KEEP_ON_DRIVE = {drive}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TPO_", "PYTHONPATH"))}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}  # of another version, into folders that are not its own
    environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "IPYTHONDIR": str(folder / "ipython")}
    code = RUN.format(colab=colab, cell=cell, lent=_lent(folder))
    told = subprocess.run([python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    return lines[:-2], json.loads(lines[-2]), log.read_text().splitlines(), lines[-1], home


@pytest.mark.parametrize("version", ["this Python", "Colab's"])
def test_colab_fetches_once_and_advises_once(tmp_path, version):
    python = sys.executable if version == "this Python" else _colabs_python()
    said, environment, calls, file, home = _session(tmp_path, python=python)
    assert [call.split()[0] for call in calls] == ["clone", "clone"]  # the tag, which is missing, and the newest
    assert f"v{notebooks.tpo_lib.__version__}" in calls[0]
    assert "-b" not in calls[1]
    assert file == str(home / "course/notebooks/tpo_course/__init__.py")
    assert [line for line in said if line.startswith("PRESET")] == ["PRESET pocket"] * 2
    assert sum("Save a copy in Drive" in line for line in said) == 1
    assert environment == {"TPO_CACHE": str(home / "kept"), "TPO_PROGRESS": None}
    said, _, calls, _, _ = _session(tmp_path, python=python)  # another chapter of the same session
    assert len(calls) == 2
    assert said == ["PRESET pocket"] * 2


def test_colab_keeps_on_drive_what_is_asked_to_be_kept(tmp_path):
    said, environment, _, _, home = _session(tmp_path, drive=True)
    kept = home / "drive/MyDrive/tpo_course"
    assert environment == {"TPO_CACHE": str(kept), "TPO_PROGRESS": str(kept / ".progress.json")}
    assert f"mounted {home}/drive" in said


def test_kaggle_and_its_missing_network(tmp_path):
    said, environment, _, _, home = _session(tmp_path, colab=False)
    assert any("Save Version" in line for line in said)
    assert environment["TPO_CACHE"] == str(home / "kept")


def test_without_a_network_the_cell_says_what_to_switch_on(tmp_path):
    home = tmp_path / "bin"
    home.mkdir()
    (home / "git").write_text("#!/bin/sh\nexit 128\n")
    (home / "git").chmod(0o755)
    cell = notebooks.set_up(tier=True).replace('"/kaggle/working"', repr(str(tmp_path)))
    code = f"from IPython.core.interactiveshell import InteractiveShell as S\nS.instance().run_cell({cell!r})"
    environment = os.environ | {"PATH": f"{home}:{os.environ['PATH']}", "IPYTHONDIR": str(tmp_path / "ipython")}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "No network? On Kaggle switch Internet on" in told.stdout


def test_what_is_there_is_not_installed_again(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    hosted.install(tmp_path)


@pytest.mark.parametrize(
    ("status", "after", "said"), [(0, "9", "torch was replaced"), (1, None, "is there a network?"), (0, None, "")]
)
def test_installing_leaves_torch_as_it_is(monkeypatch, tmp_path, status, after, said):
    calls, torch = [], ["2.11.0+cu128"]

    def run(command, **_):
        calls.append(command)
        torch[0] = after or torch[0]
        return subprocess.CompletedProcess(command, status, "", "ERROR: no route")

    monkeypatch.setattr(hosted, "NEEDED", ("torch", "no_such_package_of_ours"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(hosted.importlib.metadata, "version", lambda name: torch[0])
    if said:
        with pytest.raises(RuntimeError, match=said):
            hosted.install(tmp_path)
    else:
        hosted.install(tmp_path)
    assert calls[0][-4:] == ["-e", str(tmp_path), "-c", str(tmp_path / ".torch.txt")]
    assert (tmp_path / ".torch.txt").read_text() == "torch==2.11.0\n"
