"""Interactive pieces of the course: thin ipywidgets over tpo_lib, with no mathematics of their own."""

from tpo_course.widgets.before_after import before_after
from tpo_course.widgets.frontier_lab import frontier_lab
from tpo_course.widgets.loss_lab import loss_lab
from tpo_course.widgets.memory_lab import memory_lab
from tpo_course.widgets.microscope import token_microscope
from tpo_course.widgets.parts import Shown as shown
from tpo_course.widgets.preference_explorer import preference_explorer
from tpo_course.widgets.run_browser import run_browser
from tpo_course.widgets.split_lab import split_lab
from tpo_course.widgets.step_through import step_through
from tpo_course.widgets.study_browser import study_browser, study_shelf
from tpo_course.widgets.training_lab import training_lab
from tpo_course.widgets.two_models import two_models

__all__ = [
    "before_after",
    "frontier_lab",
    "loss_lab",
    "memory_lab",
    "preference_explorer",
    "run_browser",
    "shown",
    "split_lab",
    "step_through",
    "study_browser",
    "study_shelf",
    "token_microscope",
    "training_lab",
    "two_models",
]
