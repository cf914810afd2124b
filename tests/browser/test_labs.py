"""Training lab, microscope, explorer and before/after in a real JupyterLab, moved by mouse and keyboard."""

from __future__ import annotations

import json
import re

import pytest

from browser.chapters import cells
from browser.harness import PICTURES, at_once, open_notebook

STAGE = """
from dataclasses import replace
from tpo_course import widgets
from tpo_lib.runs.lab import Laboratory
from tpo_lib.runs.stage import build_stage, pocket_stage_config
small = {"train_prompts": 24, "held_out_prompts": 6, "max_pairs": 128, "max_new_tokens": 16, "max_held_out_pairs": 8}
stage = build_stage(replace(pocket_stage_config(quick=True), min_gap=0.0, **small), cache_dir=None)
PRESET = "pocket"
"""
BREAKING = """
whole, folder = Laboratory.train, "."

def breaking(self, config, name=None, **hooks):
    if name == "fails":
        raise FloatingPointError("the loss is <nan> at update 3")
    return whole(self, config, name, **hooks)

Laboratory.train = breaking
"""
RUNS = """
lab = Laboratory(stage)
for name, loss_type in (("plain", "dpo"), ("with KL", "tdpo2")):
    lab.train(lab.config(loss_type, beta=0.1, alpha=0.5, lr=1e-3, updates=2), name)
dpo, tdpo2 = (run.policy for run in lab.runs.values())
"""
MICROSCOPE = "widgets.token_microscope(stage, {'dpo': dpo, 'tdpo2': tdpo2, 'tgdpo': dpo}, guide=dpo)"
# What the cells of chapters 1, 5 and 6 find there, and took minutes to make.
NAMES = """
everything = stage
runs, guide_model = {"dpo": {8: dpo}, "tgdpo α=0.5": {8: tdpo2}}, dpo
config = lab.config("dpo", beta=0.1, alpha=0.5, lr=1e-3, updates=2)
"""
TOKENS = ".widget-html-content:has(span[title])"
DISABLED = "document.querySelectorAll('.jp-OutputArea-output .noUi-target[disabled]').length"  # sliders


def execute(page, code: str) -> None:
    kernel = "jupyterapp.shell.currentWidget.context.sessionContext.session.kernel"
    page.page.evaluate(f"code => {kernel}.requestExecute({{code}}).done.then(() => null)", code)


def tops(page) -> list[float]:
    """Where buttons and pictures stand, pixels below the first of them (the notebook may scroll)."""
    places = page.locator(f".jp-OutputArea-output :is({PICTURES}, button)")
    found = [places.nth(i).bounding_box()["y"] for i in range(places.count())]
    return [y - found[0] for y in found]


def test_training_lab(notebook, lab, tmp_path):
    chapter = cells("06_compare", "widgets.training_lab(")
    page = notebook("training_lab.ipynb", [STAGE + BREAKING, *chapter], height=1700)
    page.run_all()
    assert "Ready: set the controls and press Train." in page.text
    assert "No run yet." in page.text
    pictures, places = page.wait_for_pictures(["", ""]), tops(page)

    # The settings, alpha only where the objective has one.
    page.press("alpha", "ArrowRight")
    assert page.readout("alpha") == "0.50"
    page.choose("goes wrong", "labels swapped")
    page.wait_for_text("Look at the curves: they are as good as a sound run's")
    assert page.readout("updates") == "16"
    page.press("updates", "Home")
    page.fill("name", "swapped")
    page.click("Train")
    page.wait_for_text("swapped: finished after 2 of 2 updates.", 240)
    assert "beta 0.1, lr 3.2e-04, labels swapped" in page.text
    assert "Look at the curves" not in page.text  # a setting was changed by hand
    page.idle()
    page.screenshot(tmp_path / "swapped.png")
    page.click("Remove")
    page.wait_for_text("swapped removed.")
    page.choose("goes wrong", "nothing")
    page.wait_for_text("Nothing in these settings goes wrong.")
    pictures = page.content(PICTURES)
    page.choose("objective", "TDPO2")
    page.idle()
    for name, key, value in (
        ("alpha", "ArrowRight", "0.60"),
        ("beta", "ArrowRight", "0.13"),
        ("learning rate", "ArrowRight", "4.0e-4"),
        ("updates", "Home", "2"),
    ):
        page.press(name, key)
        assert page.readout(name) == value
    page.fill("name", "mine")
    page.click("Train")
    page.wait_for_text("mine: finished after 2 of 2 updates.", 240)
    assert "beta 0.126, lr 4.0e-04, alpha 0.6" in page.text
    assert "mine (0." in page.text
    pictures = page.wait_for_pictures(pictures)
    assert tops(page)[: len(places) - 3] == places[:-3]  # only what is below the table of runs has moved
    page.click("Train")
    page.wait_for_text("There is a run 'mine' already")

    # What goes wrong in the thread stands on the page.
    page.fill("name", "fails")
    page.click("Train")
    page.wait_for_text("The run failed: FloatingPointError: the loss is <nan> at update 3")
    assert page.page.get_by_role("alert").count() == 1
    assert page.control("Train").is_enabled()
    assert page.control("Stop").is_disabled()

    # A long run leaves the kernel free: it hears other controls, and Stop.
    page.press("updates", "End")
    assert page.readout("updates") == "60"
    page.fill("name", "long")
    page.press("Train", "Enter")
    page.wait_for_text("Training long, update 2 of 60: loss", 120)
    assert page.control("Train").is_disabled()
    page.idle(10)
    assert page.page.evaluate(DISABLED) == 2  # TDPO2 has neither gamma nor a guide
    page.choose("objective", "DPO")
    page.page.wait_for_function(f"{DISABLED} === 3", timeout=10_000)  # the kernel has answered: DPO has no alpha either
    assert "of 60: loss" in page.text, "the run had ended before the kernel answered"
    page.screenshot(tmp_path / "during.png")
    page.press("Stop", "Space")
    page.wait_for_text("Stopping after this update", 10)
    page.wait_for_text("long: stopped after", 120)
    assert 2 <= int(re.search(r"long: stopped after (\d+) of 60", page.text)[1]) < 60
    assert re.search(r"\d+ updates, stopped", page.text)
    pictures = page.wait_for_pictures(pictures)

    # The runs.
    assert "long (0." in page.text
    page.choose("run", "mine")
    page.wait_for_text("mine (0.")
    assert "long (0." not in page.text
    page.fill("new name", "long")
    page.click("Rename")
    page.wait_for_text("cannot rename 'mine' to 'long'")
    page.fill("new name", "first")
    page.click("Rename")
    page.wait_for_text("mine is now first.")
    assert "first (0." in page.text
    page.click("Export all")
    page.wait_for_text("2 runs written to training_lab.json.")
    saved = json.loads((lab.root / "training_lab.json").read_text())["runs"]
    assert [(name, run["stopped"]) for name, run in saved.items()] == [("first", False), ("long", True)]
    page.screenshot(tmp_path / "training_lab.png")
    for name in ("first", "long"):
        page.click("Remove")
        page.wait_for_text(f"{name} removed.")
    page.wait_for_text("No run yet.")
    assert page.control("Remove").is_disabled()
    page.assert_clean()


@pytest.fixture(scope="module")
def reading(browser, lab):
    """One notebook with the widgets that read a stage's pairs and runs: in cell 1 the microscope with three objectives, in
    cells 2, 3 and 4 those of chapters 1, 6 and 5."""
    explorer, compared = cells("01_preferences", "preference_explorer("), cells("06_compare", "before_after(")
    microscope = cells("05b_tgdpo_practice", "token_microscope(")
    lab.write("reading.ipynb", [STAGE + RUNS + NAMES, MICROSCOPE, *explorer, *compared, *microscope])
    page = open_notebook(browser, lab, "reading.ipynb", height=2400)
    page.run_all()
    yield page
    page.close()


def test_microscope(reading, tmp_path):
    page = reading.output(1)
    assert "chosen token 0, " in page.text
    assert "<|endoftext|>" not in page.text.split("prompt")[1].split("\n")[0]
    for label in ("true credit", "DPO", "TDPO2", "TGDPO"):
        heads = page.locator(f'{TOKENS} span:text-is("{label}"), {TOKENS} small:text-is("{label}")')
        assert heads.count() == 2  # of the chosen and the rejected response
        box, around = heads.first.bounding_box(), page.locator(TOKENS).bounding_box()
        assert box["x"] >= around["x"], f"the label {label} is cut off"

    def frames() -> int:
        return page.locator(f"{TOKENS} span[style*=outline]").count()

    assert frames() == 4
    colours = set(page.content(TOKENS))
    for quantity, words in (
        ("KL", "KL(π_ref ‖ π_θ)"),
        ("weight f", "TGDPO's weight"),
        ("KL coefficient", "d loss / d KL"),
        ("coefficient", "d loss / d log"),
    ):
        page.choose("colour by", quantity)
        page.wait_for_text(words)
        assert ("this objective has none" in page.text) == (quantity not in ("KL", "coefficient"))
        colours |= set(page.content(TOKENS))
    assert len(colours) == 5

    before = page.text
    margins = re.findall(r"margin (\S+), loss", before)
    page.press("alpha", "ArrowRight", 5)  # a KL after two updates is small
    page.wait_for_text("beta = 0.1, alpha = 1;")
    moved = [a != b for a, b in zip(margins, re.findall(r"margin (\S+), loss", page.text), strict=True)]
    assert moved == [False, True, True]  # DPO has no alpha
    page.press("token", "ArrowRight", 2)
    page.wait_for_text("chosen token 2, ")
    assert frames() == 4
    page.press("token", "End")
    page.wait_for_text("rejected token ")
    page.choose("colour by", "coefficient")

    def depth() -> float:
        """Pixels from the first control to the one below the tokens."""
        return page.control("token").bounding_box()["y"] - page.control("colour by").bounding_box()["y"]

    place = depth()
    prompt = page.text.split("prompt")[1]
    tokens = page.content(TOKENS)
    page.press("pair", "ArrowRight")
    page.wait_for_pictures(tokens, TOKENS)
    assert page.text.split("prompt")[1] != prompt
    page.idle()
    assert depth() == place  # what is below the tokens stays where it is
    page.screenshot(tmp_path / "microscope.png")
    page.assert_clean()


def test_microscope_answers_at_once(reading):
    page = reading.output(1)
    page.choose("colour by", "coefficient")
    page.press("beta", "Home")
    page.wait_for_text("beta = 0.01, alpha")
    page.idle()
    moves = [f"beta = {0.01 * 10 ** (step / 10):.3g}, alpha" for step in range(1, 8)]
    seconds = [page.key_latency("beta", "ArrowRight", said, TOKENS) for said in moves]
    page.assert_clean()
    at_once("microscope, beta", seconds)


def test_microscope_of_chapter_5(reading, tmp_path):
    page = reading.output(4)
    page.wait_for_text("beta = 0.1, alpha = 2;")
    assert "TGDPO's weight" in page.text
    tokens = page.content(TOKENS)
    seconds = [page.key_latency("alpha", "ArrowLeft", "beta = 0.1, alpha = 1.9;", TOKENS)]
    page.choose("colour by", "coefficient")
    page.wait_for_text("d loss / d log")
    assert page.content(TOKENS) != tokens
    page.press("token", "ArrowRight")
    page.wait_for_text("chosen token 1, ")
    page.idle()
    page.screenshot(tmp_path / "microscope_5.png")
    page.assert_clean()
    at_once("microscope of chapter 5b, alpha", seconds)


def test_explorer(reading, tmp_path):
    page = reading.output(2)
    page.wait_for_text("of 128 pairs")
    picture = page.content(PICTURES)
    moves = [f"differ by at least {gap};" for gap in ("0.25", "0.30")]
    seconds = [page.key_latency("smallest gap", "ArrowRight", said, PICTURES) for said in moves]
    assert page.content(PICTURES) != picture
    gap = float(re.search(r"Pair 0 of 0 to \d+: gap ([\d.]+)", page.text)[1])
    assert gap >= 0.3
    seconds.append(page.key_latency("pair", "ArrowRight", "Pair 1 of 0 to "))
    page.fill("search", "no such <word>")
    page.wait_for_text("0 of 128 pairs")
    assert "No pair is left" in page.text
    page.fill("search", "")
    page.wait_for_text("Pair 0 of 0 to ")
    page.fill("search", "the")
    page.wait_for_text("with 'the' in them")
    page.idle()
    assert "the" in page.locator(".widget-html-content:has-text('Pair 0 of')").inner_text().lower()
    page.fill("search", "")

    page.press("smallest gap", "End")
    page.wait_for_text("differ by at least 0.90")
    page.click("Train on both sides of the gap")
    page.wait_for_text("are needed on either side")
    page.press("smallest gap", "Home")
    page.press("smallest gap", "ArrowRight", 4)
    page.wait_for_text("differ by at least 0.20")
    page.click("Train on both sides of the gap")
    page.wait_for_text("pairs below the gap", 120)
    page.wait_for_text("trained on gaps", 240)
    assert re.search(r"below 0\.20\s+(\d+)\s+.*at or above 0\.20\s+\1\s", page.text, re.DOTALL)
    page.idle()  # the button comes back after the table
    assert page.control("Train on both sides of the gap").is_enabled()
    page.screenshot(tmp_path / "explorer.png")
    page.assert_clean()
    at_once("explorer", seconds)


def test_before_after(reading, tmp_path):
    page = reading.output(3)

    def sampled(then) -> str:
        before = page.text
        then()
        return page.wait_for_change(before)

    page.wait_for_text("Seed 0: 4 samples of at most 16 tokens each.")
    assert "start: mean reward 0." in page.text
    assert "with KL: mean reward 0." in page.text
    page.choose("left", "plain")
    sampled(lambda: page.click("Sample"))
    page.wait_for_text("plain: mean reward 0.")
    page.choose("right", "plain")
    sampled(lambda: page.press("Sample", "Enter"))
    shown = page.locator("div[style*='flex:1'], div[style*='flex: 1']")
    columns = shown.all_inner_texts()
    assert len(columns) == 2
    assert columns[0] == columns[1]  # the same policy, the same random numbers
    page.press("seed", "ArrowRight", 3)
    sampled(lambda: page.click("Sample"))
    page.wait_for_text("Seed 3: ")
    assert shown.all_inner_texts()[0] != columns[0]
    page.fill("prompt", "I left after")
    sampled(lambda: page.click("Sample"))
    assert page.locator("b:text-is('I left after')").count() == 8
    page.screenshot(tmp_path / "before_after.png")
    page.fill("prompt", " ")
    page.click("Sample")
    page.wait_for_text("The prompt is empty")
    page.fill("prompt", "I left after")
    execute(page, "lab.rename('plain', 'renamed')")
    page.click("Reread runs")
    page.wait_for_text("start: mean reward 0.")  # plain is gone
    page.choose("left", "renamed")
    page.click("Sample")
    page.wait_for_text("renamed: mean reward 0.")
    page.assert_clean()
