"""Interactive pieces of the course: thin ipywidgets over tpo_lib, with no mathematics of their own."""

from tpo_course.widgets.before_after import BeforeAfter, before_after
from tpo_course.widgets.loss_lab import LossLab, loss_lab
from tpo_course.widgets.memory_lab import MemoryLab, memory_lab
from tpo_course.widgets.microscope import TokenMicroscope, token_microscope
from tpo_course.widgets.preference_explorer import PreferenceExplorer, preference_explorer
from tpo_course.widgets.run_browser import RunBrowser, run_browser
from tpo_course.widgets.step_through import StepThrough, step_through
from tpo_course.widgets.training_lab import TrainingLab, training_lab

__all__ = [
    "BeforeAfter",
    "LossLab",
    "MemoryLab",
    "PreferenceExplorer",
    "RunBrowser",
    "StepThrough",
    "TokenMicroscope",
    "TrainingLab",
    "before_after",
    "loss_lab",
    "memory_lab",
    "preference_explorer",
    "run_browser",
    "step_through",
    "token_microscope",
    "training_lab",
]
