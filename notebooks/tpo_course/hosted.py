"""What the set-up cell does on Colab and Kaggle, once a session: install, choose where samples are kept, and advise.

It runs before anything is installed, so it imports the standard library alone. Elsewhere it is not called.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

NEEDED = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "scipy",
    "sympy",
    "ipywidgets",
    "jinja2",
    "yaml",
    "safetensors",
)
COLAB = (
    "What you write is lost with this runtime: File, Save a copy in Drive. Tick KEEP_ON_DRIVE, and sampled texts and your record "
    "of answers stay there for the next chapter."
)
KAGGLE = (
    "What you write is kept with Save Version; what lies in /kaggle/working comes along. A machine has a network only while "
    "Internet is on in the notebook's settings."
)


def prepare(home: str, *, keep_on_drive: bool = False) -> None:
    """Install what is missing, choose the cache, and print one line of advice; the second time in a session it is silent.

    Args:
        home: "/content" on Colab, "/kaggle/working" on Kaggle; the course lies in `home`/course.
        keep_on_drive: on Colab, mount the learner's Drive and keep cache and progress there.

    Raises:
        RuntimeError: the installation failed, or replaced torch; says what to do.
    """
    course, colab = Path(home) / "course", "google.colab" in sys.modules
    install(course)
    kept = Path(home) / "kept"
    if keep_on_drive and colab:
        from google.colab import drive

        drive.mount(f"{home}/drive")  # asks the learner, and does nothing where it is mounted
        kept = Path(home) / "drive/MyDrive/tpo_course"
        kept.mkdir(parents=True, exist_ok=True)
        os.environ["TPO_PROGRESS"] = str(kept / ".progress.json")
    os.environ["TPO_CACHE"] = str(kept)
    first = kept / ".told"
    if not first.exists():
        kept.mkdir(parents=True, exist_ok=True)
        first.touch()
        print(COLAB if colab else KAGGLE)


def install(course: Path) -> None:
    """Install the course's requirements, unless all are there; torch stays as the machine has it.

    Raises:
        RuntimeError: see `prepare`.
    """
    if not (missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]):
        return
    torch = importlib.metadata.version("torch") if "torch" not in missing else None
    pinned = course / ".torch.txt"
    pinned.write_text(f"torch=={torch.partition('+')[0]}\n" if torch else "", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "-q", "-e", str(course), "-c", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(
            f"{', '.join(missing)} could not be installed ({said[-1] if said else 'pip said nothing'}): is there a network? "
            "On Kaggle switch Internet on in the notebook's settings"
        )
    if torch and importlib.metadata.version("torch") != torch:
        raise RuntimeError("the machine's torch was replaced: restart the runtime and run this cell again")
