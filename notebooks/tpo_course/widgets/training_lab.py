"""Train on the pocket model from a notebook: a live curve, a Stop button, and every run as a point beside the others."""

from __future__ import annotations

import html
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w

from tpo_course.widgets import parts
from tpo_course.widgets.parts import bundle, button, image, interval, knob, look, movable, on, room, row, with_a_margin
from tpo_course.widgets.training_troubles import TROUBLES, WELL
from tpo_lib.files.store import read_json
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import plots

if TYPE_CHECKING:
    from tpo_lib.runs.lab import Laboratory
    from tpo_lib.runs.runs import Trained

SHOWN = 3  # samples of a run
KEPT = 4  # ended runs whose curves stand beside those of the run under way: the legend has room for five
LETTERS = 32  # of a run's name in that legend
NOTHING, BY_HAND = "nothing", "settings of your own"
SOUND = "Nothing in these settings goes wrong. Train it first, then with one of the troubles, and hold the two beside each other."


class TrainingLab:
    """A training laboratory with controls. In a cell: set the controls, `train_button.click()`, `wait()`.

    Args:
        lab: what to train; its runs, also those made in code, are listed.
        folder: where Export writes `training_lab.json`.
        stored: the file of a sweep (`tpo_lib.runs.sweep`) from the same start and reward: its runs stand faintly behind yours.

    Attributes:
        trouble: what goes wrong: sets all controls; `look` says what to look for.
        swapped, guide_trained_at: mistakes to make on purpose, as `Laboratory.train` takes them.
        objective, hyper ({name: control}), lr, updates, name: settings of the next run.
        train_button, stop_button, bar, status: training.
        curve, points, table, samples: what came of it (PNG images and HTML).
        chosen, new_name, rename_button, remove_button, export_button: the runs made so far.
    """

    def __init__(self, lab: Laboratory, *, folder: str | Path = ".", stored: str | Path | None = None) -> None:
        self.lab, self.folder = lab, Path(folder)
        self._stored = read_json(stored, "make it anew with `python -m tpo_lib sweep`")["runs"] if stored else []
        self._held = False  # several controls are being set at once
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._stage = ""  # what the run is at, in words
        self._build()
        self._settings_changed()
        self._runs_changed()

    # Layout.

    def _settings(self) -> list[w.Widget]:
        """The controls of the next run, what goes wrong above them."""
        wide = look("110px", "430px")
        self.trouble = w.Dropdown(options=[NOTHING, *TROUBLES, BY_HAND], description="goes wrong", **wide)
        trained_at = [("what it is read with", 0.0), *((f"{beta:g}", beta) for beta in (0.01, 0.1, 1.0, 10.0))]
        self.guide_trained_at = w.Dropdown(options=trained_at, description="guide trained at", **wide)
        self.objective = w.Dropdown(options=with_a_margin(), value="dpo", description="objective", **wide)
        self.hyper = {
            name: knob(OBJECTIVES[readers[0]].hyperparameters[name], name, steps=10, **wide)
            for name, readers in (movable() | {"guide_beta": ["tgdpo"]}).items()
        }
        wide["continuous_update"] = False
        rates = {"min": -5, "max": -2.5, "step": 0.1, "description": "learning rate", "readout_format": ".1e"}
        self.lr = w.FloatLogSlider(WELL["lr"], **rates, **wide)
        self.updates = w.IntSlider(WELL["updates"], min=2, max=60, description="updates", **wide)
        self.name = w.Text(placeholder="chosen for you", description="name", **wide)
        self.look = room(72)
        self.look.value = parts.page(SOUND)
        self.swapped = w.Checkbox(description="swap the labels of all pairs", indent=False)
        self._knobs = {"objective": self.objective, "lr": self.lr, "updates": self.updates, **self.hyper}
        self._knobs |= {"swapped": self.swapped, "guide_trained_at": self.guide_trained_at}
        on([self.trouble], self._begin_trouble)
        on(self._knobs.values(), self._settings_changed)
        on([self.objective], self._draw_points)
        right = [self.lr, self.updates, self.guide_trained_at, self.swapped, self.name]
        return [self.trouble, self.look, row(w.VBox([self.objective, *self.hyper.values()]), w.VBox(right))]

    def _build(self) -> None:
        settings, wide = self._settings(), look("110px", "430px")
        self.chosen = w.Dropdown(description="run", options=[], **wide)
        self.train_button = button("Train", self._train, icon="play", button_style="primary")
        self.stop_button = button("Stop", self._halt, icon="stop", disabled=True)
        self.bar = w.IntProgress(0, min=0, max=1, layout=w.Layout(width="260px"))
        self.status, self.samples, self.table = room(28), room(290), w.HTML()
        self.status.value = "Ready: set the controls and press Train."
        self.curve, self.points = image(912, 320), image(560, 336)
        self.new_name = w.Text(description="new name", **wide | {"continuous_update": False})
        self.rename_button, self.remove_button = button("Rename", self._rename), button("Remove", self._remove)
        self.export_button = button("Export all", self._export, icon="download")
        buttons = row(self.train_button, self.stop_button, self.bar)
        runs = row(self.chosen, self.remove_button, self.export_button), row(self.new_name, self.rename_button)
        # The table last: it grows with every run.
        pictures = parts.sideways(self.curve), parts.sideways(self.points), self.table
        self.box = w.VBox([*settings, buttons, self.status, *pictures, *runs, self.samples])
        on([self.chosen], self._show_samples)

    def _repr_mimebundle_(self, **_) -> dict:
        return bundle(self.box, "Run this cell to train runs of your own.", image=self.points.value)

    # Training.

    def wait(self) -> None:
        """Wait until the run has ended; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _begin_trouble(self) -> None:
        """Set the controls as what was chosen asks; "nothing" keeps the objective, so that it stands beside the trouble."""
        chosen = self.trouble.value
        words = TROUBLES[chosen].look if chosen in TROUBLES else SOUND if chosen == NOTHING else ""
        self.look.value = parts.page(words)
        self._held = True
        for name, value in self._asked().items():
            self._knobs[name].value = value
        self._held = False
        self._settings_changed()

    def _asked(self) -> dict:
        """{control: value} of what is chosen above the controls."""
        chosen = TROUBLES.get(self.trouble.value)
        return chosen.values if chosen else WELL if self.trouble.value == NOTHING else {}

    def _settings_changed(self) -> None:
        if self._held:
            return
        objective = OBJECTIVES[self.objective.value]
        for name, control in self.hyper.items():
            control.disabled = name not in objective.hyperparameters
        self.guide_trained_at.disabled = "guide_logps" not in objective.needs
        if any(self._knobs[name].value != value for name, value in self._asked().items()):
            self.trouble.value = BY_HAND

    def _train(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        name = self.name.value.strip()
        if not name and self.trouble.value in TROUBLES:
            name = self.lab.free_name(f"{self.objective.value} {self.trouble.value}")
        if name in self.lab.runs:
            self._say(f"There is a run {name!r} already: choose another name, or remove that one.")
            return
        self._error = None
        try:
            values = {name: control.value for name, control in self._knobs.items()}
            mistakes = {name: values.pop(name) for name in ("swapped", "guide_trained_at")}
            if self.guide_trained_at.disabled or not self.guide_trained_at.value:
                mistakes["guide_trained_at"] = None
            config = self.lab.config(values.pop("objective"), **values)
        except Exception as error:
            self._failed(error)
            return
        self._stop.clear()
        self.bar.value, self.bar.max = 0, config.max_steps
        self.train_button.disabled, self.stop_button.disabled = True, False
        self._thread = threading.Thread(target=self._work, args=(config, name, mistakes), daemon=True)
        self._thread.start()

    def _work(self, config, name: str, mistakes: dict) -> None:
        """In a thread of its own, so that the kernel stays free to hear the Stop button."""
        try:
            hooks = {"on_log": self._logged, "on_stage": self._next_stage}
            run = self.lab.train(config, name, **mistakes, **hooks)
            if not run.updates:
                self._say("Stopped before its own first update: nothing was kept.")
            else:
                made = next(key for key, value in self.lab.runs.items() if value is run)
                how = "stopped" if run.stopped else "finished"
                self._runs_changed(select=made)
                self._say(f"{made}: {how} after {run.updates} of {config.max_steps} updates.")
        except BaseException as error:  # shown here, raised again by wait()
            self._failed(error)
        finally:
            self.train_button.disabled, self.stop_button.disabled = False, True

    def _next_stage(self, words: str) -> None:
        self._stage = words[0].upper() + words[1:]
        self.stop_button.disabled = self._stop.is_set() or words.startswith("evaluating")  # which is short
        self._say(f"{self._stage} ...")

    def _logged(self, run: Trained) -> bool:
        self.bar.value = run.updates
        row = run.rows[-1]
        if not self._stop.is_set():
            floor = row.get("guidance/floor_share")
            self._say(
                f"{self._stage}, update {run.updates} of {run.config.max_steps}: loss {row['loss']:.3f} nats, "
                f"own margin {row['rewards/margins']:.3f} nats, own accuracy {row['rewards/accuracies']:.2f}"
                + ("" if floor is None else f", {floor:.0%} of the tokens on the floor")
            )
        self._draw_curves(run)
        return self._stop.is_set()

    def _halt(self) -> None:
        self._stop.set()
        self.stop_button.disabled = True
        self._say("Stopping after this update ...")

    def _failed(self, error: BaseException) -> None:
        self._error = error
        words = html.escape(f"The run failed: {type(error).__name__}: {error}")
        alert = 'role="alert" style="line-height:1.5;max-width:912px;color:#A00000"'
        self.status.value = f"<div {alert}><b>{words}</b></div>"

    def _draw_curves(self, now: Trained | None = None) -> None:
        """The last runs' curves, each in a shade of its objective, and those of the run under way."""
        shown = list(self.lab.runs.items())[-KEPT:]
        curves: dict[str, list[dict]] = {}
        for name, run in [*shown, *([("under way", now)] if now else [])]:
            objective = run.config.loss_type
            label = f"{objective} {name.removeprefix(objective).strip()[:LETTERS]}"
            while label in curves:
                label += "'"
            curves[label] = run.rows
        most = max([run.config.max_steps for _, run in shown] + [now.config.max_steps if now else 0])
        self.curve.value = parts.training(curves or {self.objective.value: []}, most or self.updates.value)

    def _say(self, words: str) -> None:
        self.status.value = html.escape(words)

    # The runs.

    def _runs_changed(self, select: str | None = None) -> None:
        names = list(self.lab.runs)
        self.chosen.options = names
        if select or names:
            self.chosen.value = select or names[-1]
        for needs_a_run in (self.rename_button, self.remove_button, self.export_button):
            needs_a_run.disabled = not names
        self.table.value = self._table()
        self._draw_curves()
        self._draw_points()
        self._show_samples()

    def _draw_points(self) -> None:
        behind = {"behind": self._stored, "coloured": self.objective.value}
        self.points.value = parts.png(plots.run_points(self.lab.points(), self.lab.start_point(), **behind))

    def _table(self) -> str:
        rows = [("start", "", "", self.lab.start_point())]
        for name, run in self.lab.runs.items():
            used = run.config.hyperparameters().items()
            words = [f"{key} {value if isinstance(value, str) else f'{value:.3g}'}" for key, value in used]
            words.insert(1, f"lr {run.config.lr:.1e}")
            floor = run.rows[-1].get("guidance/floor_share")
            words += [*run.mistakes, *([f"{floor:.0%} of the tokens on the floor"] if floor else [])]
            ended = f"{run.updates} updates" + (", stopped" if run.stopped else "")
            rows.append((name, ", ".join(words), ended, self.lab.points()[name][1]))
        points = [point for *_, point in rows]
        titles = {"reward": "reward (0 to 1)", "judge": "judge (0 to 1)", "kl": "KL(policy ‖ ref), nats"}
        titles = {metric: plots.label(metric, points, title) for metric, title in titles.items() if metric in points[0]}
        body = [
            [f"<b>{html.escape(name)}</b>", settings, ended, *(interval(point[metric]) for metric in titles)]
            for name, settings, ended, point in rows
        ]
        note = f"Means on the held-out prompts with 95% bootstrap intervals. Curves are of the last {KEPT} runs."
        if self._stored:
            note += (
                f" Faint: {len(self._stored)} stored runs on other pairs and prompts, the chosen objective's in colour."
            )
        return parts.table(["run", "settings", "length", *titles.values()], body, note)

    def _show_samples(self) -> None:
        run = self.lab.runs.get(self.chosen.value)
        if run is None:
            self.samples.value = "No run yet."
            return
        before, after = (map(vars, evaluation.samples[:SHOWN]) for evaluation in (self.lab.start, run.evaluation))
        self.samples.value = parts.samples(self.chosen.value, before, after)

    def _rename(self) -> None:
        old, new = self.chosen.value, self.new_name.value.strip()
        try:
            self.lab.rename(old, new)
        except ValueError as error:
            self._say(str(error))
            return
        self.new_name.value = ""
        self._runs_changed(select=new)
        self._say(f"{old} is now {new}.")

    def _remove(self) -> None:
        name = self.chosen.value
        self.lab.remove(name)
        self._runs_changed()
        self._say(f"{name} removed.")

    def _export(self) -> None:
        count = len(self.lab.runs)
        path = self.lab.save(self.folder / "training_lab.json")
        self._say(f"{count} run{'s' if count > 1 else ''} written to {path}.")


training_lab = TrainingLab  # as the chapters call it
