"""The loss lab: one preference pair under your hand, and what every objective makes of it.

The widget sets sliders and draws; every number comes from `tpo_course.coefficients`, which runs the objectives of
`tpo_lib.losses` on a small TokenStats and differentiates them by autograd.
"""

from collections.abc import Mapping
from html import escape

import ipywidgets as w
import torch

from tpo_course.coefficients import least_kl
from tpo_course.widgets import loss_columns
from tpo_course.widgets.loss_picture import CHOSEN, LIMIT, REF_LOGP, State, canvas, out_of_reach, paint, signed, state
from tpo_course.widgets.parts import LAB_DPI, Lab, button, knob, look, movable, row, with_a_margin
from tpo_lib.losses import F_FLOOR, OBJECTIVES, floor_share
from tpo_lib.runs.plots import style_of

PAIR = ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl")
SITUATIONS = {  # what the four sliders of PAIR are set to, nats
    "start: policy = reference": (0.0, 0.0, 0.0, 0.0),
    "half-way through training": (4.0, -6.0, 2.0, 3.0),
    "both log-ratios go down": (-5.0, -16.0, 5.0, 11.0),
    "learned: a wide margin": (15.0, -30.0, 9.0, 18.0),
    "wrong way round": (-8.0, 8.0, 4.0, 4.0),
}
BY_HAND = "set by hand"
ONE, ALL = "one objective", "all, side by side"


class LossLab(Lab):
    """One preference pair, sliders for how far the policy has moved on it, and what one objective, or all, make of that.

    Of one it shows the loss at the pair's margin, what the margin is made of, the coefficient on every token's log pi and KL
    (TDPO2's stop-gradient included) and TGDPO's weights f with their floor; of all, side by side, loss, weight of the gradient
    and coefficients in a table. The log-ratios and KLs are spread evenly over the tokens. A log-ratio and a SeqKL bound each
    other (`coefficients.least_kl`): what no policy can have is hatched on a map, and said.

    Attributes:
        controls: {name: control}: show, objective, the objectives' hyperparameters, guide, situation, and those of PAIR.
        pin_button, unpin_button: keep the present state beside what comes, in grey and as differences in words.
        states: {objective: State} of what is shown; pinned: the same of what was pinned, or {}.
        result, terms: the PairCoefficients and the `margin_terms` of the objective that is chosen.
        figure: the matplotlib Figure, redrawn in place; picture: the HTML widget that shows it.
        text: the HTML widget that says all numbers; alt: the same as plain text.

    Example:
        >>> lab = loss_lab()
        >>> lab.controls["objective"].value = "tdpo2"
        >>> lab.controls["rejected_kl"].value = 3.0
        >>> round(lab.result.margin.item(), 4)  # beta 0.1, alpha 0.5, DPO's part 0: -0.1 * 0.5 * 3
        -0.15
    """

    def __init__(self) -> None:
        controls, pair = _controls(), ("situation", *PAIR)
        self.pinned: dict[str, State] = {}
        self._canvases = {ONE: canvas(), ALL: loss_columns.canvas()}
        columns = ([name for name in controls if name not in pair], pair)
        super().__init__(controls, columns, self._canvases[ONE], text=210)
        self.pin_button, self.unpin_button = (
            button("Pin this state", self._pin),
            button("Unpin", self._unpin, disabled=True),
        )
        sliders, *shown = self.box.children
        self.box.children = (sliders, row(self.pin_button, self.unpin_button), *shown)

    def _repr_mimebundle_(self, **_) -> dict:
        shown = super()._repr_mimebundle_()
        if self.controls["show"].value == ALL:
            shown["text/html"] = self.text.value
        return shown

    def _pin(self) -> None:
        self.pinned, self.unpin_button.disabled = (
            {name: self.states.get(name) or self._state(name) for name in _names()},
            False,
        )
        self._draw()

    def _unpin(self) -> None:
        self.pinned, self.unpin_button.disabled = {}, True
        self._draw()

    def _state(self, objective: str) -> State:
        return state(objective, {name: control.value for name, control in self.controls.items()})

    def _follow(self, moved: w.Widget) -> None:
        if moved is self.controls["situation"] and moved.value != BY_HAND:
            self._set(dict(zip(PAIR, SITUATIONS[moved.value], strict=True)))
        elif any(moved is self.controls[name] for name in PAIR):
            self._set({"situation": BY_HAND})

    def _arrange(self, show: str) -> None:
        """Turn to the picture of one objective, or of all, which answers in a tenth of a second and moves with the hand."""
        if self.figure is not self._canvases[show]:
            self.figure = self._canvases[show]
            self.picture.layout.min_height = f"{round(self.figure.get_figheight() * LAB_DPI) + 8}px"
            for control in self.controls.values():
                if isinstance(control, w.FloatSlider | w.FloatLogSlider):
                    control.continuous_update = show == ALL

    def _draw(self) -> None:
        chosen, every = self.controls["objective"].value, self.controls["show"].value == ALL
        self._arrange(self.controls["show"].value)
        self.states = {name: self._state(name) for name in (_names() if every else [chosen])}
        now = self.states[chosen]
        self.result, self.terms = now.found, now.terms
        read = set().union(*(_read(name) for name in self.states)) - ({"objective"} if every else set())
        for name, control in self.controls.items():
            control.disabled = name not in read
        if every:
            reach, picture = _reach(now.value, kl=True), loss_columns.paint(self.figure, self.states, self.pinned)
            alt = f"{loss_columns.words(self.states, self.pinned)} {reach}"
            self._show(alt, loss_columns.page(self.states, self.pinned, reach), picture)
            return
        pinned = self.pinned.get(chosen)
        paint(self.figure.axes, now, pinned)
        lines = _sentences(now, read)
        lines += [_since(now, pinned)] if pinned else []
        self._show(" ".join(lines), "<br>".join(map(escape, lines)))


def _names() -> list[str]:
    return [name for _, name in with_a_margin()]


def _read(objective: str) -> set[str]:
    """The controls that an objective reads."""
    entry = OBJECTIVES[objective]
    read = {"show", "objective", "situation", *PAIR[:2], *entry.hyperparameters}
    read |= {*PAIR[2:]} if "kl" in entry.needs else set()
    return read | ({"guide"} if "guide_logps" in entry.needs else set())


def _controls() -> dict[str, w.Widget]:
    wide = look("150px", "395px")
    objectives = with_a_margin()

    def slider(description: str, low: float, high: float, step: float, value: float = 0.0) -> w.FloatSlider:
        more = {"readout_format": ".1f", "continuous_update": False}
        return w.FloatSlider(value=value, min=low, max=high, step=step, description=description, **more, **wide)

    def hyperparameter(name: str, readers: list[str]) -> w.Widget:
        record = OBJECTIVES[readers[0]].hyperparameters[name]
        whose = "" if len(readers) == len(objectives) else f" ({', '.join(style_of(n).label for n in readers)})"
        format = {} if record.choices else {"readout_format": ".3f" if record.above == 0 else ".2f"}
        return knob(record, record.symbol + whose, steps=20, **format, **wide)

    return {
        "show": w.Dropdown(options=[ONE, ALL], description="show", **wide),
        "objective": w.Dropdown(options=objectives, value="dpo", description="objective", **wide),
        **{name: hyperparameter(name, readers) for name, readers in movable().items()},
        "guide": slider("guide's largest r̂ (nats)", 0.0, 4.0, 0.1, value=1.0),
        "situation": w.Dropdown(options=[*SITUATIONS, BY_HAND], description="situation", **wide),
        "chosen_logratio": slider("log-ratio chosen (nats)", -LIMIT, LIMIT, 0.5),
        "rejected_logratio": slider("log-ratio rejected", -LIMIT, LIMIT, 0.5),
        "chosen_kl": slider("SeqKL chosen (nats)", 0.0, LIMIT, 0.5),
        "rejected_kl": slider("SeqKL rejected", 0.0, LIMIT, 0.5),
    }


def _sentences(now: State, read: set[str]) -> list[str]:
    """Everything the picture shows, as lines of text."""
    value, found, label, records = now.value, now.found, now.label, OBJECTIVES[now.objective].hyperparameters
    said = {n: v if isinstance(v, str) else f"{v:.3g}" for n, v in now.hyper.items() if n in value}
    settings = ", ".join(f"{records[n].symbol} = {v}" for n, v in said.items())
    state = f"Log-ratio {value['chosen_logratio']:+.1f} (chosen), {value['rejected_logratio']:+.1f} (rejected) nats"
    if "chosen_kl" in read:
        state += f"; SeqKL {value['chosen_kl']:.1f} (chosen), {value['rejected_kl']:.1f} (rejected) nats"
    if "guide" in read:
        state += f"; largest r̂ {value['guide']:.1f} nats"
    lines = [
        f"{label}, {settings}. {state}.",
        f"Margin {signed(now.margin, 3)} nats, loss {now.loss:.4g} nats, slope of the loss {now.slope:.3g}.",
        _reach(value, kl="chosen_kl" in read),
        f"Coefficients on log π: chosen {_range(found.chosen.logps)}, rejected {_range(found.rejected.logps)}. "
        "Training raises what has a negative one.",
        _kl_sentence(now),
    ]
    if found.chosen.weights is None:
        return [*lines, f"Weights f: {label} has none; all tokens of a response share one coefficient."]
    f_w, f_l = found.chosen.weights, found.rejected.weights  # (1, T) each
    low, count = (n.item() for n in floor_share(found.output, torch.ones_like(torch.cat([f_w, f_l]), dtype=torch.bool)))
    share = f"{low} of {count} tokens ({low / count:.0%}) on the floor {F_FLOOR}"
    return [*lines, f"Weights f: chosen {_range(f_w, '')}, rejected {_range(f_l, '')}; {share}."]


def _kl_sentence(now: State) -> str:
    if now.found.chosen.kl is None:
        return f"KL: {now.label} reads none."
    parts = []
    for side, tokens in (("chosen", now.found.chosen), ("rejected", now.found.rejected)):
        pull = f"coefficient {_range(tokens.kl)}" if tokens.kl.any() else "coefficient 0, no gradient"
        parts.append(f"{side} {signed(now.terms[f'{side} kl'], 3)} in the margin, {pull}")
    held = " The stop-gradient holds the chosen KL: it counts, but nothing pushes it." if now.held else ""
    return f"KL: {'; '.join(parts)}.{held}"


def _reach(value: Mapping, *, kl: bool) -> str:
    """Whether a policy can have these log-ratios, and with `kl` these KLs."""
    wrong = out_of_reach(value, kl=kl)
    if wrong:
        return f"Out of reach (✕): {'; '.join(wrong.values())}."
    least = (
        least_kl(value[f"{side}_logratio"], len(CHOSEN), ref_logp=REF_LOGP).item() for side in ("chosen", "rejected")
    )
    return "Within reach: these log-ratios need a SeqKL of {:.2f} (chosen) and {:.2f} (rejected) nats or more.".format(
        *least
    )


def _since(now: State, pinned: State) -> str:
    """How the present state differs from the pinned one."""
    moved = [
        f"{name} {before:+.3g} → {after:+.3g}" if not isinstance(after, str) else f"{name} {before} → {after}"
        for name, after in now.value.items()
        if (before := pinned.value[name]) != after and name in _read(now.objective) - {"show", "objective", "situation"}
    ]
    said = f"Since the pinned state ({', '.join(moved) or 'nothing has moved'})"
    numbers = (("loss", "loss"), ("margin", "margin"), ("slope", "slope"))
    changes = (f"{word} {signed(getattr(now, name) - getattr(pinned, name), 3)}" for word, name in numbers)
    return f"{said}: {', '.join(changes)}."


def _range(values: torch.Tensor, sign: str = "+") -> str:
    low, high = (f"{end.item() + 0.0:{sign}.3g}" for end in (values.min(), values.max()))  # + 0.0: no "-0"
    return f"{low} on every token" if low == high else f"{low} to {high}"


loss_lab = LossLab  # as the chapters call it
