"""The memory lab of chapter 8 in a real JupyterLab: every control moves, and table and picture follow."""

from __future__ import annotations

import pytest

from browser.harness import at_once

PICTURE = ".widget-html-content img"


@pytest.fixture
def page(shelf):
    return shelf.output(3)


def test_memory_lab(page, tmp_path):
    page.wait_for_text("Llama-3.2-1B, V = 128,256, T = 512, B = 16, 60% of the positions scored; TDPO2, ")
    for action, said in (
        (lambda: page.press("length T (tokens)", "ArrowRight"), "T = 1024, B = 16"),
        (lambda: page.press("pairs B", "ArrowLeft"), "T = 1024, B = 8"),
        (lambda: page.press("share of response", "ArrowRight"), "70% of the positions"),
        (lambda: page.choose("model", "GPT-2 small"), "GPT-2 small, V = 50,257"),
        (lambda: page.choose("objective", "DPO"), "; DPO, "),
        (lambda: page.choose("optimizer", "RMSprop"), "RMSprop, without caches"),
        (lambda: page.choose("caches", "yes"), "RMSprop, with caches"),
    ):
        before = page.content(PICTURE)
        action()
        page.wait_for_text(said)
        page.wait_for_pictures(before, PICTURE)
        page.idle()
    page.screenshot(tmp_path / "memory.png")
    page.assert_clean()


def test_memory_lab_answers_at_once(page):
    page.press("length T (tokens)", "Home")
    page.wait_for_text("T = 32, ")
    page.idle()
    seconds = [page.key_latency("length T (tokens)", "ArrowRight", f"T = {2**n}, ", PICTURE) for n in range(6, 12)]
    page.assert_clean()
    at_once("memory lab, T", seconds)
