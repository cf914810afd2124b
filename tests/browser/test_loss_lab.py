"""The loss labs of chapters 4 and 5 in a real JupyterLab: every control moves, and text and picture follow."""

from __future__ import annotations

import re

from browser.harness import at_once

PICTURE = ".widget-html-content img"
LABELS = ["DPO", "TDPO1", "TDPO2", "TGDPO", "SimPO", "IPO"]
# log 2; log(1 + e^.5), SimPO at a target margin of .5; (1 / (2 * .1))^2
AT_THE_START = ["0.6931"] * 4 + ["0.9741", "25"]


def move(page, action, said: str) -> None:
    """Do something: the text says `said` afterwards, and the picture is another one."""
    before = page.content(PICTURE)
    action()
    page.wait_for_text(said)
    page.wait_for_pictures(before, PICTURE)
    page.idle()


def test_loss_lab(shelf, tmp_path):
    page = shelf.output(1)
    page.wait_for_text("TDPO1, β = 0.1.")
    assert "SeqKL 6.0 (chosen), 10.0 (rejected) nats." in page.text
    place = page.locator(PICTURE).bounding_box()

    # Every objective; a control that it does not read cannot be moved.
    for label, settings, closed in (
        ("DPO", "β = 0.1.", 6),
        ("TDPO2", "β = 0.1, α = 0.5.", 3),
        ("SimPO", "β = 0.1, γₘ = 0.5.", 5),
        ("TGDPO", "β = 0.1, α = 0.5, f = linear.", 3),
    ):
        move(page, lambda label=label: page.choose("objective", label), f"{label}, {settings}")
        found = page.locator(".noUi-target[disabled], select[disabled]").count()
        assert found == closed, f"{label}: {found} controls are disabled"

    # All sliders. On TGDPO now.
    for name, key, said in (
        ("β", "ArrowRight", "TGDPO, β = 0.112, α = 0.5"),
        ("α (TDPO2, TGDPO)", "ArrowRight", "α = 0.55, f"),
        ("guide's largest r̂ (nats)", "ArrowRight", "largest r̂ 1.1 nats."),
        ("log-ratio chosen (nats)", "ArrowRight", "Log-ratio +0.5 (chosen), +0.0 (rejected)"),
        ("log-ratio rejected", "ArrowLeft", "Log-ratio +0.5 (chosen), -0.5 (rejected)"),
    ):
        move(page, lambda name=name, key=key: page.press(name, key), said)
    move(page, lambda: page.choose("f (TGDPO)", "exp"), "f = exp.")
    move(page, lambda: page.choose("situation", "both log-ratios go down"), "Log-ratio -5.0 (chosen), -16.0 (rejected)")
    move(page, lambda: page.choose("objective", "TDPO2"), "SeqKL 5.0 (chosen), 11.0 (rejected) nats.")
    assert "The stop-gradient holds the chosen KL" in page.text
    move(page, lambda: page.press("SeqKL chosen (nats)", "ArrowRight"), "SeqKL 5.5 (chosen), 11.0 (rejected)")
    assert "set by hand" in page.text
    margin = re.search(r"Margin (\S+) nats", page.text)[1]
    move(page, lambda: page.press("SeqKL rejected", "ArrowRight"), "SeqKL 5.5 (chosen), 11.5 (rejected)")
    assert re.search(r"Margin (\S+) nats", page.text)[1] != margin
    page.screenshot(tmp_path / "tdpo2.png")
    move(page, lambda: page.choose("objective", "SimPO"), "SimPO, β")
    move(page, lambda: page.press("γₘ (SimPO)", "ArrowRight"), "γₘ = 0.55.")
    assert page.locator(PICTURE).bounding_box() == place, (
        "it moved, or JupyterLab scrolled: does the cell fit into the window?"
    )
    page.screenshot(tmp_path / "simpo.png")
    page.assert_clean()


def losses(table) -> list[str]:
    """The first line of every cell in the row of the losses."""
    cells = table.locator("tr", has_text="loss, nats").locator("td").all_inner_texts()
    return [cell.split("\n")[0].strip() for cell in cells]


def test_all_objectives_and_the_pinned_state(notebook, tmp_path):
    """On a page of its own, where the loss labs of the others stay as they were left; on a phone too."""
    whole = notebook("all.ipynb", ["from tpo_course import widgets", "widgets.loss_lab()"], height=1500)
    whole.run_all()
    page = whole.output(1)
    move(page, lambda: page.choose("show", "all, side by side"), "One β for all")
    table = page.locator(".widget-html-content table")
    assert re.findall(r"[A-Z]\w*PO\d?", table.locator("tr").first.inner_text()) == LABELS
    assert page.locator(".noUi-target[disabled], select[disabled]").count() == 1  # which objective is shown
    assert page.control("Unpin").is_disabled()
    before = page.locator(PICTURE).bounding_box()

    # The start: every margin of a sum is 0, and the pin stands in the table when the pair has moved.
    assert losses(table) == AT_THE_START
    assert "was" not in table.inner_text()
    page.click("Pin this state")
    page.wait_for_text("was 0.693")
    pinned = losses(table)
    move(page, lambda: page.choose("situation", "learned: a wide margin"), "was 0.693, -0.")
    now = losses(table)
    assert all(a != b for a, b in zip(now, pinned, strict=True))
    move(page, lambda: page.press("β", "ArrowRight"), "β 0.112")
    assert page.locator(PICTURE).bounding_box() == before
    page.screenshot(tmp_path / "pinned.png")
    whole.page.set_viewport_size({"width": 390, "height": 1500})
    whole.idle()
    page.screenshot(tmp_path / "pinned_390.png")
    for shown in (".widget-html-content", ".widget-readout", "select", "button"):
        boxes = [each.bounding_box() for each in page.locator(shown).all()]
        assert boxes
        assert all(box["x"] + box["width"] <= 390 for box in boxes), f"{shown} is cut off on a phone"
    assert page.locator(PICTURE).bounding_box()["width"] >= 600, "too small to be read: it is to move sideways instead"
    assert min(each.bounding_box()["width"] for each in page.locator(".noUi-base").all()) >= 100, "no thumb can move it"
    whole.page.set_viewport_size({"width": 1100, "height": 1500})
    page.click("Unpin")
    whole.idle()
    assert "was" not in table.inner_text()
    assert page.control("Unpin").is_disabled()
    whole.assert_clean()


def test_loss_lab_of_chapter_5(shelf, tmp_path):
    page = shelf.output(2)
    page.wait_for_text("TGDPO, β = 0.1, α = 0.5, f = linear.")
    on_floor = re.compile(r"(\d+) of 12 tokens \(\d+%\) on the floor 0.01")
    before = on_floor.search(page.text)
    move(page, lambda: page.press("guide's largest r̂ (nats)", "End"), "largest r̂ 4.0 nats.")
    assert int(on_floor.search(page.text)[1]) > int(before[1])
    page.screenshot(tmp_path / "tgdpo.png")
    page.assert_clean()


def test_loss_lab_answers_at_once(shelf):
    page = shelf.output(2)
    page.choose("objective", "TGDPO")
    page.press("β", "Home")
    page.wait_for_text("β = 0.01, ")
    page.idle()
    moves = [f"β = {10 ** (-2 + step / 20):.3g}, " for step in range(1, 8)]
    seconds = [page.key_latency("β", "ArrowRight", said, PICTURE) for said in moves]
    page.assert_clean()
    at_once("loss lab, β", seconds)
