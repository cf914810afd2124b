"""Interactive pieces of the course: thin ipywidgets over tpo_lib, with no mathematics of their own."""

from tpo_lib.widgets.before_after import BeforeAfter, before_after
from tpo_lib.widgets.loss_lab import LossLab, loss_lab
from tpo_lib.widgets.memory_lab import MemoryLab, memory_lab
from tpo_lib.widgets.microscope import TokenMicroscope, token_microscope
from tpo_lib.widgets.preference_explorer import PreferenceExplorer, preference_explorer
from tpo_lib.widgets.run_browser import RunBrowser, run_browser
from tpo_lib.widgets.step_through import StepThrough, step_through
from tpo_lib.widgets.training_lab import TrainingLab, training_lab

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
