"""The stored result of a study to look around in: nothing trains, every number comes from studies/results/NAME.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets as w
from matplotlib.figure import Figure

import tpo_lib
from tpo_course.widgets.parts import BEHIND, Lab, bundle, look, table
from tpo_course.widgets.parts import page as as_page
from tpo_lib.runs.plots import AXIS, FONT, curve, legend, panels, style_of
from tpo_lib.studies.words import heading

STUDIES = Path(tpo_lib.__file__).parents[1] / "studies"  # of the repository; a wheel has none
# Nats, about evenly spaced in their root.
BUDGETS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 23, 26, 30, 35, 40)
FIRST = 10  # the budget at the start
AT_FIRST = 7  # methods that are shown at the start
SIZE = (9.0, 5.3)  # inches, of the room for the picture
NOTE = """Means over seeds. One that is not there, since it ends below the budget, counts with its end. Intervals are Student's,
over the seeds alone; those of studies/results/{name}.md cover seeds and prompts, and its p values the number of comparisons.
<b>*</b> the interval excludes 0."""
TUNED = """One seed, validation prompts: neighbours differ by chance too, and the best of many is a little lucky. What is reported
was measured anew, on test prompts and with other seeds."""


class StudyBrowser(Lab):
    """Browse a study: every method's score at a budget of KL beside another's, and the settings that were tried.

    Args:
        name: of the study, one of those in `folder` that have a result.
        folder: with NAME.toml and results/NAME.json; None is `studies` of the repository.
        offered: the methods to choose from, by their labels; None are all. The first of those in the study's frontier picture
            are shown at the start, at most AT_FIRST.

    Attributes:
        controls: {name: control}: show, score, reference, budget; and of every method, by its label, whether it is shown.
        rows: {method: its figures at the budget}: "mean", "low", "high", "there" (seeds that come to it) and "difference", a row
            of `tables.paired`, None of the reference itself.
        figure: the matplotlib Figure; picture: the HTML widget that shows it.
        text: the HTML widget that says the numbers; alt: the picture in words.

    Raises:
        FileNotFoundError: the study or its result is not there; the message says how to make it.
        ValueError: the study has no method of that label.
    """

    def __init__(
        self, name: str = "frontier", folder: str | Path | None = None, *, offered: Sequence[str] | None = None
    ) -> None:
        # Here and in the methods below: studies bring what trains and evaluates, which other widgets need not.
        from tpo_lib.studies import page, study
        from tpo_lib.studies.spec import Study

        folder = Path(folder or STUDIES)
        self.result, self.plan = study.read(folder, name), Study.read(folder / f"{name}.toml")
        self.runs = page.methods(self.result)
        if unknown := [label for label in offered or () if label not in self.runs]:
            raise ValueError(f"offered: study {name!r} has no method {unknown[0]!r}; it has {', '.join(self.runs)}")
        self.runs = {label: self.runs[label] for label in offered or self.runs}
        self._drawn = None  # which methods and score the figure shows
        self._far = max(point["kl"] for runs in self.result["runs"].values() for run in runs for point in run["points"])
        shown = list(page.frontiers(self.plan, self.result, self.runs)["frontier"])[:AT_FIRST]
        names, half = list(self.runs), -(-len(self.runs) // 2)
        # Not one list: JupyterLab takes the keys that would select several of it.
        longest = max(len(style_of(name).label) for name in names)
        layout = {"indent": False, "layout": w.Layout(width=f"{max(210, 44 + 7 * longest)}px")}
        boxes = {name: w.Checkbox(name in shown, description=style_of(name).label, **layout) for name in names}
        columns = (("show", "score", "reference", "budget"), names[:half], names[half:])
        super().__init__(self._made() | boxes, columns, Figure(SIZE), 260)
        self.text.layout.max_width = "912px"
        self.box.children = (w.HTML(f"<b>{self.plan.title}</b>: {self.plan.question}"), *self.box.children)

    def choose(self, *methods: str) -> None:
        """Show these methods, by their labels, and no others."""
        self._set({name: name in methods for name in self.runs})
        self._draw()

    def _made(self) -> dict[str, w.Widget]:
        """The controls beside the methods'."""
        from tpo_lib.studies import figures

        names = [(style_of(name).label, name) for name in self.runs]
        against = self.result["best"].get("dpo", next(iter(self.runs)))
        tuned = dict.fromkeys(name for name, *_ in self.result["grid"])
        views = [("scores against KL", ""), *((f"settings tried for {style_of(name).label}", name) for name in tuned)]
        scores = [(heading(score), score) for score in figures.present(self.runs, figures.SCORES)]
        budgets = [(f"{nats:g} nats", nats) for nats in BUDGETS if nats <= max(self._far, BUDGETS[0])]
        begin = min((nats for _, nats in budgets), key=lambda nats: abs(nats - FIRST))
        wide = look("110px", "400px")
        return {
            "show": w.Dropdown(options=views, description="show", **wide),
            "score": w.Dropdown(options=scores, description="score", **wide),
            "reference": w.Dropdown(options=names, value=against, description="compared with", **wide),
            "budget": w.SelectionSlider(options=budgets, value=begin, description="budget of KL", **wide),
        }

    def _follow(self, moved: w.Widget) -> None:
        """What the view does not use is closed."""
        for control in self.controls.values():
            control.disabled = bool(self.controls["show"].value) and control is not self.controls["show"]

    def _draw(self) -> None:
        view, methods = self.controls["show"].value, [name for name in self.runs if self.controls[name].value]
        if view:
            self._settings(view)
        elif methods:
            self._scores(methods, *(self.controls[name].value for name in ("score", "reference", "budget")))
        else:
            self.alt, self._png, self.picture.value = "No method is chosen.", b"", ""
            self.text.value = "No method is chosen: tick one or several."

    def _scores(self, methods: Sequence[str], score: str, reference: str, level: float) -> None:
        if self._drawn != (methods, score):
            self._paint(methods, score)
        self._line.set_xdata([level, level])
        self._mark.set(x=level, text=f"{level:g} nats")
        self.rows = self._compared(methods, score, reference, level)
        words, seeds = heading(score), len(self.runs[methods[0]])
        said = ", ".join(f"{style_of(name).label} {row['mean']:.3f}" for name, row in self.rows.items())
        alt = (
            f"{words.capitalize()} against {AXIS['kl']}, on a root scale, every seed thin, the mean of {seeds} thick. "
        )
        text = f"<b>{words} within {level:g} nats</b>, {seeds} seeds"
        self._show(f"{alt}Within {level:g} nats: {said}.", as_page(f"{text}{self._table(words, reference)}"))

    def _paint(self, methods: Sequence[str], score: str) -> None:
        """A new figure with the line of the budget, its places settled once: they stay while the line moves."""
        from tpo_lib.studies import figures

        runs = {name: self.runs[name] for name in methods}
        self.figure = figures.frontier(runs, [score], self.result.get("best_of_n", ()), seeds=True)
        ax = self.figure.axes[0]
        ax.set_xlim(right=max(ax.get_xlim()[1], 1.03 * self.controls["budget"].options[-1][1]))
        self._line = ax.axvline(1, color="black", linewidth=1.2, linestyle="--", zorder=1)
        where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom", "bbox": BEHIND}
        self._mark = ax.text(1, 1.01, " ", fontsize=FONT - 1, **where)
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine(None)  # looking for places again would take half of the time of a move
        self._drawn = methods, score

    def _compared(self, methods: Sequence[str], score: str, reference: str, level: float) -> dict[str, dict]:
        from tpo_lib.studies import endpoints, tables

        values = {name: endpoints.table(self.runs[name], "budget", score, level) for name in (*methods, reference)}
        pairs = [(name, reference) for name in methods if name != reference]
        differences = {row["a"]: row for row in tables.paired(values, pairs, seed=0)}
        there = {
            name: sum(endpoints.at_level(run, score, level) is not None for run in self.runs[name]) for name in methods
        }
        return {
            name: tables.summary(values[name], seed=0) | {"there": there[name], "difference": differences.get(name)}
            for name in methods
        }

    def _table(self, words: str, reference: str) -> str:
        from tpo_lib.studies import page

        lines = []
        for name, row in self.rows.items():
            there = f"{row['there']} of {len(self.runs[name])}"
            setting = page.setting_words(self.result["chosen"][name][1])
            cells = (style_of(name).label, page.cell(row, words), there, _signed(row["difference"]))
            lines.append([*(f'<span style="white-space:nowrap">{cell}</span>' for cell in cells), setting])
        heads = ["", f"{words} [95%]", "seeds there", f"minus {style_of(reference).label} [95%]", "setting"]
        return table(heads, lines, NOTE.format(name=self.plan.name))

    def _settings(self, name: str) -> None:
        from tpo_lib.studies import page

        keys = next(list(method.grid) for method in self.plan.methods if method.name == name)
        tried = [(setting, area) for method, setting, area in self.result["grid"] if method == name]
        reported = [setting for method, setting in self.result["chosen"].values() if method == name]
        self.figure, self._drawn = grid_figure(name, tried, keys, reported), None
        values = sorted({setting[keys[0]] for setting, _ in tried})
        lines: dict[str, dict] = {}
        for setting, area in tried:
            lines.setdefault(line_of(name, setting, keys), {})[setting[keys[0]]] = area
        cells = [
            [style_of(line).label, *(f"{areas[x]:.3f}" if x in areas else "-" for x in values)]
            for line, areas in lines.items()
        ]
        best, most = max(tried, key=lambda each: each[1])
        said = f"Area under the frontier of {len(tried)} settings of {style_of(name).label} on validation prompts: most at "
        said += f"{page.setting_words(best)}, {most:.3f}."
        self._show(said, as_page(said + table(["", *(f"{keys[0]} {value:g}" for value in values)], cells, TUNED)))


def grid_figure(
    name: str, tried: Sequence[tuple[Mapping, float]], keys: Sequence[str], chosen: Sequence[Mapping] = ()
) -> Figure:
    """The area of every setting of a method's grid against the first of `keys`, a line for each value of the others.

    Args:
        tried: (setting, area on validation prompts).
        chosen: settings that get a ring.
    """
    fig, (ax,) = panels(1, width=6.5, height=4.4)
    lines: dict[str, list] = {}
    for setting, area in tried:
        lines.setdefault(line_of(name, setting, keys), []).append((setting[keys[0]], area))
        if setting in chosen:
            ring = {"markersize": 15, "markeredgewidth": 1.8, "markerfacecolor": "none", "color": "black"}
            ax.plot(setting[keys[0]], area, "o", **ring)
    for line, points in lines.items():
        curve(ax, *zip(*sorted(points), strict=True), style_of(line, lines))
    values = sorted({setting[keys[0]] for setting, _ in tried})
    if values[0] > 0:
        ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
    ax.set_xlabel(f"{keys[0]}{' (log scale)' * (values[0] > 0)}; ringed: reported")
    ax.set_ylabel("area on validation prompts")
    legend(fig, lines)
    return fig


def line_of(name: str, setting: Mapping, keys: Sequence[str]) -> str:
    """The label of the line that a setting lies on in `grid_figure`."""
    return " ".join([name, *(f"{key} {setting[key]:g}" for key in keys[1:])])


def _signed(row: Mapping | None) -> str:
    """A difference with its interval, in bold with a star where that excludes 0."""
    if row is None:
        return "-"
    said = f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    return f"<b>{said} *</b>" if row["low"] > 0 or row["high"] < 0 else said


class StudyShelf:
    """Several studies, one at a time.

    Args:
        studies: {name: the methods offered, None all}, as `StudyBrowser` takes them; the first is open.
        folder: as for `StudyBrowser`.

    Attributes:
        which: the control that chooses. browser: the StudyBrowser that is open; those opened before stay as they were left.

    Raises:
        FileNotFoundError, ValueError: as `StudyBrowser`, once that study is opened.
    """

    def __init__(self, studies: Mapping[str, Sequence[str] | None], folder: str | Path | None = None) -> None:
        from tpo_lib.studies.spec import Study

        self._studies, self._folder, self._opened = dict(studies), Path(folder or STUDIES), {}
        titles = [(Study.read(self._folder / f"{name}.toml").title, name) for name in studies]
        self.which = w.Dropdown(options=titles, description="study", **look("110px", "400px"))
        self.box = w.VBox()
        self.which.observe(lambda _: self._open(), "value")
        self._open()

    def _open(self) -> None:
        name = self.which.value
        if name not in self._opened:
            self._opened[name] = StudyBrowser(name, self._folder, offered=self._studies[name])
        self.browser = self._opened[name]
        self.box.children = (self.which, self.browser.box)

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, self.browser.alt, image=self.browser._png)


study_browser, study_shelf = StudyBrowser, StudyShelf  # as the chapters call them
