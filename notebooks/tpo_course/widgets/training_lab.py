"""Train on the pocket model from a notebook: a live curve, a Stop button, and every run as a point beside the others."""

from __future__ import annotations

import html
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w

from tpo_course.widgets import parts
from tpo_course.widgets.parts import bundle, button, image, interval, knob, look, movable, on, room, row, with_a_margin
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import plots

if TYPE_CHECKING:
    from tpo_lib.runs.lab import Laboratory
    from tpo_lib.runs.runs import Trained

SHOWN = 3  # samples of a run


class TrainingLab:
    """A training laboratory with controls. In a cell: set the controls, `train_button.click()`, `wait()`.

    Args:
        lab: what to train; its runs, also those made in code, are listed.
        folder: where Export writes `training_lab.json`.

    Attributes:
        objective, hyper ({name: control}), lr, updates, name: settings of the next run.
        train_button, stop_button, bar, status: training.
        curve, points, table, samples: what came of it (PNG images and HTML).
        chosen, new_name, rename_button, remove_button, export_button: the runs made so far.
    """

    def __init__(self, lab: Laboratory, *, folder: str | Path = ".") -> None:
        self.lab, self.folder = lab, Path(folder)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._stage = ""  # what the run is at, in words
        self._build()
        self._settings_changed()
        self._draw_curve([], self.objective.value, self.updates.value)
        self._runs_changed()

    # Layout.

    def _build(self) -> None:
        wide = look("110px", "430px")
        self.objective = w.Dropdown(options=with_a_margin(), value="dpo", description="objective", **wide)
        self.chosen = w.Dropdown(description="run", options=[], **wide)
        self.hyper = {
            name: knob(OBJECTIVES[readers[0]].hyperparameters[name], name, steps=10, **wide)
            for name, readers in movable().items()
        }
        wide["continuous_update"] = False
        rates = {"min": -5, "max": -2.5, "step": 0.1, "description": "learning rate", "readout_format": ".1e"}
        self.lr = w.FloatLogSlider(10**-3.5, **rates, **wide)
        self.updates = w.IntSlider(10, min=2, max=60, description="updates", **wide)
        self.name = w.Text(placeholder="chosen for you", description="name", **wide)
        self.train_button = button("Train", self._train, icon="play", button_style="primary")
        self.stop_button = button("Stop", self._halt, icon="stop", disabled=True)
        self.bar = w.IntProgress(0, min=0, max=1, layout=w.Layout(width="260px"))
        self.status, self.samples, self.table = room(28), room(290), w.HTML()
        self.status.value = "Ready: set the controls and press Train."
        self.curve, self.points = image(912, 320), image(560, 336)
        self.new_name = w.Text(description="new name", **wide)
        self.rename_button, self.remove_button = button("Rename", self._rename), button("Remove", self._remove)
        self.export_button = button("Export all", self._export, icon="download")
        settings = row(w.VBox([self.objective, *self.hyper.values()]), w.VBox([self.lr, self.updates, self.name]))
        buttons = w.HBox([self.train_button, self.stop_button, self.bar])
        runs = (
            w.HBox([self.chosen, self.remove_button, self.export_button]),
            w.HBox([self.new_name, self.rename_button]),
        )
        pictures = self.curve, self.points, self.table  # the table last: it grows with every run
        self.box = w.VBox([settings, buttons, self.status, *pictures, *runs, self.samples])
        on([self.objective], self._settings_changed)
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

    def _settings_changed(self) -> None:
        for name, control in self.hyper.items():
            control.disabled = name not in OBJECTIVES[self.objective.value].hyperparameters

    def _train(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        name = self.name.value.strip() or None
        if name in self.lab.runs:
            self._say(f"There is a run {name!r} already: choose another name, or remove that one.")
            return
        self._error = None
        try:
            knobs = {"lr": self.lr, "updates": self.updates, **self.hyper}
            values = {name: control.value for name, control in knobs.items()}
            config = self.lab.config(self.objective.value, **values)
        except Exception as error:
            self._failed(error)
            return
        self._stop.clear()
        self.bar.value, self.bar.max = 0, config.max_steps
        self.train_button.disabled, self.stop_button.disabled = True, False
        self._draw_curve([], config.loss_type, config.max_steps)
        self._thread = threading.Thread(target=self._work, args=(config, name), daemon=True)
        self._thread.start()

    def _work(self, config, name: str | None) -> None:
        """In a thread of its own, so that the kernel stays free to hear the Stop button."""
        try:
            run = self.lab.train(config, name, on_log=self._logged, on_stage=self._next_stage)
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
            self._say(
                f"{self._stage}, update {run.updates} of {run.config.max_steps}: loss {row['loss']:.3f} nats, "
                f"own margin {row['rewards/margins']:.3f} nats, own accuracy {row['rewards/accuracies']:.2f}"
            )
        self._draw_curve(run.rows, run.config.loss_type, run.config.max_steps)
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

    def _draw_curve(self, rows: list[dict], objective: str, updates: int) -> None:
        self.curve.value = parts.training({objective: rows}, updates)

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
        self.points.value = parts.png(plots.run_points(self.lab.points(), self.lab.start_point()))
        self._show_samples()

    def _table(self) -> str:
        rows = [("start", "", "", self.lab.start_point())]
        for name, run in self.lab.runs.items():
            used = run.config.hyperparameters().items()
            words = [f"{key} {value if isinstance(value, str) else f'{value:.3g}'}" for key, value in used]
            words.insert(1, f"lr {run.config.lr:.1e}")
            ended = f"{run.updates} updates" + (", stopped" if run.stopped else "")
            rows.append((name, ", ".join(words), ended, self.lab.points()[name][1]))
        points = [point for *_, point in rows]
        titles = {"reward": "reward (0 to 1)", "judge": "judge (0 to 1)", "kl": "KL(policy ‖ ref), nats"}
        titles = {metric: plots.label(metric, points, title) for metric, title in titles.items() if metric in points[0]}
        body = [
            [f"<b>{html.escape(name)}</b>", settings, ended, *(interval(point[metric]) for metric in titles)]
            for name, settings, ended, point in rows
        ]
        note = "Means on the held-out prompts with 95% bootstrap intervals."
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
