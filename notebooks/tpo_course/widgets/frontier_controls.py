"""The controls of the frontier lab, and a setting in words. 0 stands for Setting's None, which no slider takes."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import ipywidgets as w

from tpo_course.frontier import FIELDS, NAMES, READS, Setting
from tpo_course.frontier_presets import PRESETS
from tpo_course.widgets.parts import look
from tpo_lib.runs.plots import style_of

# What the sliders can be set to; what is given beside them gets a place.
CHOICES = {
    "beta": [0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0],
    "alpha": [0.0, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0],
    "guide_beta": [0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0],
    "guide_updates": [5, 20, 80, 200, 0],
    "pairs": [10, 30, 100, 300, 1000, 3000, 10_000, 0],
    "noise": [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0],
}
WORDS = {
    "beta": "β",
    "alpha": "α",
    "guide_beta": "guide: its β",
    "guide_updates": "guide: updates",
    "pairs": "pairs",
    "noise": "labels swapped",
}
NONE = {"guide_beta": "no guide", "guide_updates": "to the end", "pairs": "all, exactly"}
R_HAT = [("the guide's β (right)", False), ("this run's β", True)]
TRUTHS = [("A*, at this β", "A*"), ("R, the token's reward", "R")]


def controls(objectives: Sequence[str], prompts: int, start: Setting) -> dict[str, w.Widget]:
    """A control for every field of `start`, and for what is shown.

    Returns:
        {name: control}: the fields, "show", "prompt", "truth" and "preset".
    """
    wide = look("118px", "300px")
    made: dict[str, w.Widget] = {}
    for name in CHOICES:
        value = getattr(start, name) or 0
        made[name] = w.SelectionSlider(options=_options(name, value), value=value, description=WORDS[name], **wide)
    presets = [("what goes wrong?", "")]
    presets += [(name, name) for name, preset in PRESETS.items() if preset.show in objectives]
    shown = [(style_of(name).label, name) for name in objectives]
    which = [(f"x{x}", x) for x in range(prompts)]
    return made | {
        "run_beta": w.Dropdown(options=R_HAT, value=start.run_beta, description="r̂ is read with", **wide),
        "preset": w.Dropdown(options=presets, description="preset", **wide),
        "show": w.Dropdown(options=shown, value=objectives[-1], description="tree and credit of", **wide),
        "prompt": w.Dropdown(options=which, description="prompt", **wide),
        "truth": w.Dropdown(options=TRUTHS, description="true credit", **wide),
    }


def unread(objectives: Sequence[str]) -> set[str]:
    """The fields of Setting that none of these objectives reads: their controls would move nothing.

    Example:
        >>> sorted(unread(["dpo", "tdpo2"]))
        ['guide_beta', 'guide_updates', 'run_beta']
    """
    axes = {axis for name in objectives for axis in READS[name]}
    idle = {field for axis in FIELDS.keys() - axes for field in FIELDS[axis]}
    return idle | {"run_beta"} if "guide" not in axes else idle


def _options(name: str, given: float) -> list[tuple[str, float]]:
    """(words, value) of a slider, the given value among them."""
    values = CHOICES[name]
    if given not in values:
        values = sorted({*values, given} - {0}) if values[-1] == 0 else sorted({*values, given})
        values += [0] * (CHOICES[name][-1] == 0)
    words = "{:.0%}" if name == "noise" else "{:g}"
    return [(NONE[name] if name in NONE and not value else words.format(value), value) for value in values]


def read(made: Mapping[str, w.Widget]) -> Setting:
    """What the controls say."""
    values = {part.name: made[part.name].value for part in fields(Setting)}
    return Setting(**values | {name: values[name] or None for name in NONE})


def settings(setting: Setting, objectives: Sequence[str] = NAMES) -> str:
    """A setting in words, without what none of these objectives reads.

    Example:
        >>> settings(Setting(pairs=30, noise=0.1))
        'β = 0.5, α = 0.5, guide of β 1 trained to the end, 30 pairs, 10% of the labels swapped'
        >>> settings(Setting(), ["dpo"])
        'β = 0.5, all pairs, exactly'
    """
    idle, guide = unread(objectives), "no guide"
    if setting.guide_beta is not None:
        long = "trained to the end" if setting.guide_updates is None else f"trained for {setting.guide_updates} updates"
        guide = f"guide of β {setting.guide_beta:g} {long}" + (", r̂ with this run's β" if setting.run_beta else "")
    said = (
        [f"β = {setting.beta:g}"]
        + [f"α = {setting.alpha:g}"] * ("alpha" not in idle)
        + [guide] * ("guide_beta" not in idle)
    )
    said += ["all pairs, exactly" if setting.pairs is None else f"{setting.pairs:,} pairs"]
    return ", ".join(said + [f"{setting.noise:.0%} of the labels swapped"] * bool(setting.noise))
