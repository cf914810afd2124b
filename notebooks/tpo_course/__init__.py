"""The course's own machinery, beside its chapters: the token world, derivations, exercises and widgets.

It imports `tpo_lib`; nothing in `tpo_lib` imports it.
"""

import sys
from pathlib import Path

ROOMS = {"tpo_lib": "tpo_lib", "tpo_course": "notebooks/tpo_course"}  # package -> its folder in the repository


def source_path(module: str) -> str:
    """Where an imported module's file lies in the repository, wherever it is installed.

    >>> source_path("tpo_course")
    'notebooks/tpo_course/__init__.py'
    """
    package = module.partition(".")[0]
    folder = Path(sys.modules[package].__file__).parent
    return f"{ROOMS[package]}/{Path(sys.modules[module].__file__).relative_to(folder).as_posix()}"
