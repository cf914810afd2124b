"""The frontier lab of chapters 2 and 4 in a real JupyterLab."""

from __future__ import annotations

import pytest

from browser.chapters import cells, imports
from browser.harness import at_once
from tpo_course.frontier import Setting, needed
from tpo_course.frontier_grid import grid
from tpo_course.widgets.frontier_controls import CHOICES, settings

PICTURES = "svg[role=img]"  # front, tree and credit; the last two are drawn anew only when the run is trained

OVERLAPS = """scope => {
  const tree = document.querySelector(`${scope} svg[aria-label^="Token tree"]`);
  const boxes = (what) => [...tree.querySelectorAll(what)].map(e => [e.getBoundingClientRect(), e.textContent]);
  const numbers = boxes('text').filter(([, said]) => /^[<(]?[-+]?[.\\d]/.test(said)), nodes = boxes('circle, rect');
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top + 3 < b.bottom - 1 && b.top + 1 < a.bottom - 3;
  return [numbers.length, numbers.filter(([n]) => nodes.some(([d]) => meet(n, d))).map(([, said]) => said)];
}"""
HEIGHTS = "cells => cells.map(cell => Math.round(cell.getBoundingClientRect().height))"


def test_a_pinned_state_stands_beside_the_next_and_collides_with_nothing(notebook, tmp_path):
    chapter = [imports("02_dpo"), *cells("02_dpo", "widgets.frontier_lab(")]
    page = notebook("frontier_lab.ipynb", chapter, height=1500)
    page.run_all()
    assert "β = 0.5" in page.text
    page.click("Pin")
    page.press("β", "ArrowLeft", 3)
    page.wait_for_text("what is added to the pinned one")
    page.wait_for_text("β = 0.2,")
    page.idle()
    page.screenshot(tmp_path / "pinned.png")
    count, colliding = page.page.evaluate(OVERLAPS, page.scope)
    assert count > 20
    assert not colliding
    heights = page.locator("table:has(th:text-is('optimum')) td").evaluate_all(HEIGHTS)
    assert heights
    assert max(heights) < 30, "a cell of the table wraps"
    page.page.set_viewport_size({"width": 390, "height": 1500})
    page.idle()
    page.screenshot(tmp_path / "narrow.png")
    page.page.set_viewport_size({"width": 1100, "height": 1500})
    page.choose("preset", "too few pairs")
    page.wait_for_text("0.007", 120)  # the loss
    page.click("Unpin")
    page.idle()
    assert "pinned" not in page.text
    page.assert_clean()


@pytest.mark.parametrize(
    ("chapter", "objectives"),
    [
        ("02_dpo", ["dpo"]),
        ("04_tdpo", ["dpo", "tdpo1", "tdpo2"]),
        ("05_tgdpo", ["dpo", "tdpo1", "tdpo2", "tgdpo"]),
    ],
)
def test_frontier_lab_trains_and_draws_at_once(notebook, chapter, objectives):
    """From a key to the pictures of what was trained: with 5% of the labels swapped no state is stored."""
    page = notebook(f"live_{chapter}.ipynb", [imports(chapter), *cells(chapter, "widgets.frontier_lab(")], height=1500)
    page.run_all()
    states = [Setting(beta=beta, noise=0.05) for beta in CHOICES["beta"][:8]]
    assert not any(needed(name, state) in grid() for name in objectives for state in states)
    page.press("labels swapped", "ArrowRight")
    page.wait_for_text(settings(Setting(noise=0.05), objectives))
    page.key_latency("β", "Home", settings(states[0], objectives), PICTURES)
    said = [settings(state, objectives) for state in states[1:]]
    seconds = [page.key_latency("β", "ArrowRight", each, PICTURES) for each in said]
    assert "training" not in page.text
    page.assert_clean()
    at_once(f"frontier lab of {chapter}, β", seconds)
