"""step_through in a real JupyterLab: what the reader presses, and what then stands on the screen."""

from __future__ import annotations

import re

import pytest

from browser.harness import at_once

WORLD = "World 0: V = 3, T = 3, 2 prompts"


@pytest.fixture
def page(shelf):
    return shelf.output(4)


def verdict(page) -> str:
    return re.search(r"Step \d+ of 12: .*", page.text)[0]


def test_step_through(page, tmp_path):
    page.wait_for_text("Step 1 of 12: residual")
    assert "1. The objective, by response and by token." in page.text
    assert WORLD in page.text
    page.page.wait_for_selector(".widget-output mjx-container")
    first = page.page.locator(".widget-output mjx-container").inner_html()
    framed = page.page.locator(".widget-output mjx-menclose")
    assert framed.count() == 1
    assert framed.evaluate("e => getComputedStyle(e).color") == "rgb(213, 94, 0)"

    # Next, by mouse and by keyboard.
    page.click("Next")
    page.wait_for_text("2. Complete the KL.")
    page.wait_for_text("Step 2 of 12: residual")
    page.page.wait_for_function(
        "first => { const e = document.querySelector('.widget-output mjx-container'); return e && e.innerHTML !== first; }",
        arg=first,
    )
    page.press("Next", "Enter")
    page.wait_for_text("3. The optimum's value.")
    page.press("Previous", "Space")
    page.wait_for_text("Step 2 of 12: residual")

    # A slider, by keyboard: the printed value, and the residual that belongs to it.
    page.choose("Step", "5. Reward from policy")
    page.wait_for_text("Step 5 of 12: residual")
    assert "beta = 0.5," in page.text
    lines = {verdict(page)}
    for presses in range(1, 9):
        page.press("beta", "ArrowRight")
        page.wait_for_text(f"beta = {0.05 * 10 ** (1 + presses / 10):.3g},")
        lines.add(verdict(page))
    assert len(lines) > 1, "the rounding error of eight other betas cannot be the same"
    assert all(line.endswith(": holds") for line in lines)
    page.press("V", "ArrowRight")
    page.wait_for_text("World 0: V = 4, T = 3")

    page.choose("Step", "7. The loss")
    page.wait_for_text("tpo_lib/losses.py:")

    # Another world, and the numbers of a step.
    page.click("Another world")
    page.wait_for_text("World 1: V = 4, T = 3")
    page.choose("Step", "11. Beta at the optimum: larger stays closer")
    page.wait_for_text("Step 11 of 12: residual")
    page.click("Measure")
    page.wait_for_text("KL(pi*||pi_ref) at beta=0.1 = ")

    # The table below needs no kernel.
    page.page.get_by_text("All 12 steps with their residuals").click()
    page.page.wait_for_function("() => document.querySelectorAll('details mjx-container').length >= 12")
    assert page.page.locator("details tbody tr").count() == 12
    page.idle()
    page.screenshot(tmp_path / "step_through.png")
    page.assert_clean()


def test_a_key_is_answered_at_once(page):
    page.choose("Step", page.control("Step").locator("option").first.inner_text())
    page.wait_for_text("Step 1 of 12: ")
    page.idle()
    seconds = [page.key_latency("Next", "Enter", f"Step {number} of 12: ") for number in range(2, 9)]
    page.assert_clean()
    at_once("step_through, Next", seconds)


def test_the_harness_sees_an_error_in_a_callback(shelf):
    shelf.output(5).click("Break")
    shelf.page.wait_for_function("() => window.kernelErrors.length > 0")
    with pytest.raises(AssertionError, match="kernel: ZeroDivisionError"):
        shelf.assert_clean()
    shelf.page.evaluate("() => { window.kernelErrors = []; }")
