"""The run browser of chapter 0 on the runs of data/runs.json, in a real JupyterLab: every run is reached and shown."""

from __future__ import annotations

import json

from browser.chapters import cells
from browser.harness import PICTURES, at_once
from tpo_course.widgets.parts import interval
from tpo_lib.runs.plots import style_of
from tpo_lib.runs.sweep import RUNS


def facts(run: dict) -> str:
    """How the line of numbers begins."""
    alpha = f", alpha {run['alpha']:g}" if run["alpha"] else ""
    reward = f"reward {interval(run['metrics']['reward'])} from"
    return f"{style_of(run['objective']).label}, beta {run['beta']:g}{alpha}: {reward}"


def walk(runs: list[dict]) -> list[tuple[str, str, dict]]:
    """(control, key, run then shown) from the smallest beta and alpha: up all alphas, then up all betas."""
    betas, alphas = (sorted({run[name] for run in runs}) for name in ("beta", "alpha"))
    at = {(run["beta"], run["alpha"]): run for run in runs}
    moves = [("alpha", "ArrowRight", at[betas[0], alpha]) for alpha in alphas[1:]]
    return moves + [("beta", "ArrowRight", at[beta, alphas[-1]]) for beta in betas[1:]]


def test_run_browser(notebook, tmp_path):
    runs = json.loads(RUNS.read_text(encoding="utf-8"))["runs"]
    chapter = cells("00_start_here", "widgets.run_browser()")
    shown = notebook("runs.ipynb", ["from tpo_course import widgets", *chapter], height=1700)
    shown.run_all()
    page = shown.output(1)
    pictures = page.wait_for_pictures(["", ""])
    places = [page.locator(PICTURES).nth(i).bounding_box() for i in range(2)]
    seconds = []
    for objective in dict.fromkeys(run["objective"] for run in runs):
        mine = [run for run in runs if run["objective"] == objective]
        if not page.text.startswith(f"objective\n{style_of(objective).label}\n"):
            page.choose("objective", style_of(objective).label)
            page.wait_for_text(f"{style_of(objective).label}, beta ")
            pictures = page.wait_for_pictures(pictures)
            page.idle()
        alphas = {run["alpha"] for run in mine}
        closed = page.locator(".noUi-target[disabled]").count()
        assert closed == (len(alphas) == 1), f"{objective}: alpha is disabled: {closed}"
        page.press("beta", "Home")
        if len(alphas) > 1:
            page.idle()
            page.press("alpha", "Home")
        first = min(mine, key=lambda run: (run["beta"], run["alpha"]))
        page.wait_for_text(facts(first))
        page.idle()
        for name, key, run in walk(mine):
            seconds.append(page.key_latency(name, key, facts(run), PICTURES))
            said = " ".join(page.text.split())
            for sample in run["samples"][:3]:
                assert " ".join(sample["text"].split()) in said, f"{facts(run)}: its samples are not shown"
        pictures = page.content(PICTURES)
        page.screenshot(tmp_path / f"{objective}.png")
    assert [page.locator(PICTURES).nth(i).bounding_box() for i in range(2)] == places
    page.assert_clean()
    at_once("run browser", seconds)
