"""The study browser in a real JupyterLab, moved by keyboard: text and picture follow every control."""

from __future__ import annotations

from toy_study import write

from browser.chapters import cells, imports
from browser.harness import at_once

PICTURE = ".widget-html-content img"
METHODS = ".widget-checkbox input"  # in the order of the result


def test_study_browser(notebook, tmp_path):
    place = write(tmp_path / "studies")
    shown = notebook("study.ipynb", ["from tpo_course import widgets", f"widgets.study_browser('toy', {str(place)!r})"])
    shown.run_all()
    page = shown.output(1)
    page.wait_for_text("reward within 10 nats")
    assert "Which is higher?" in page.text
    assert page.readout("budget of KL") == "10 nats"
    before = page.wait_for_pictures([""], PICTURE)
    seconds = [
        page.key_latency("budget of KL", "ArrowRight", f"reward within {nats} nats", PICTURE)
        for nats in (12, 14, 17, 20)
    ]
    page.choose("score", "judge")
    page.wait_for_text("judge within 20 nats")
    page.idle()
    page.choose("compared with", "SimPO")
    page.wait_for_text("minus SimPO")
    page.idle()
    for place, words in ((1, "alpha 0.1 beta 0.1 lr 0.0003"), (3, "minus SimPO")):  # show TDPO2 at .1, hide SimPO
        before = page.text
        page.locator(METHODS).nth(place).focus()
        page.page.keyboard.press("Space")
        page.wait_for_change(before)
        page.wait_for_text(words)
        page.idle()
    assert "\nbeta 2" not in page.text  # SimPO's setting
    before = page.content(PICTURE)
    page.choose("show", "settings tried for DPO")
    page.wait_for_text("most at beta 0.1 lr 0.0003, 0.780")
    page.wait_for_pictures(before, PICTURE)
    page.idle()
    assert page.locator(".noUi-target[disabled]").count() == 1
    page.screenshot(tmp_path / "settings.png")
    page.choose("show", "scores against KL")
    page.wait_for_text("judge within 20 nats")
    page.idle()
    assert page.locator(PICTURE).get_attribute("alt").startswith("Judge against ")
    page.screenshot(tmp_path / "scores.png")
    page.assert_clean()
    at_once("study browser", seconds)


def test_the_shelf_of_chapter_6_opens_another_study(notebook, tmp_path):
    page = notebook("shelf_06.ipynb", [imports("06_compare"), *cells("06_compare", "widgets.study_shelf(")])
    page.run_all()
    page.wait_for_text("reward within 10 nats")
    page.choose("study", "Guides")
    page.wait_for_text("Is it the guidance, or only the changed scale?")
    page.wait_for_text("TGDPO poor guide")
    page.idle()
    page.screenshot(tmp_path / "guides.png")
    page.choose("study", "Data")
    page.wait_for_text("a fifth of the labels swapped")
    page.idle()
    page.screenshot(tmp_path / "data.png")
    page.assert_clean()
