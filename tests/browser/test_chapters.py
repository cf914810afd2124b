"""The widgets of the chapters as their own cells build them: derivations to step through, small sliders, cards, quizzes."""

from __future__ import annotations

import importlib
import math
import re

import pytest

from browser.chapters import cells, folded, imports
from browser.harness import PICTURES, at_once, open_notebook
from tpo_course.derivations import DERIVATIONS
from tpo_course.exercise import Exercise
from tpo_course.exercises import break_it

# Chapter 2 after those that use its names (world, dpo) for other things: its slider reads them whenever it moves.
CHAPTERS = (
    "01_preferences",
    "03_token_mdp",
    "04_tdpo",
    "05_tgdpo",
    "05b_tgdpo_practice",
    "02_dpo",
    "06_compare",
    "06b_real_model",
    "07_break_it",
)
WALKS = {  # by derivation: its chapter, what its cell needs after the imports, and the cell
    "preferences": ("01_preferences", ("world = TokenWorld(",), 'step_through(DERIVATIONS["preferences"]'),
    "token_mdp": ("03_token_mdp", ("tiny = TokenWorld(",), "step_through("),
    "tdpo": ("04_tdpo", ("derivation, holds = ",), "step_through("),
    "tgdpo": ("05_tgdpo", (), 'step_through(DERIVATIONS["tgdpo"]'),
    "one_form": ("05_tgdpo", (), 'step_through(DERIVATIONS["one_form"]'),
    "dpo": ("02_dpo", ("world = TokenWorld(",), "step_through("),
}
TREE = ".widget-output img"
RUNS = """
names = ["dpo", "tdpo2", "tgdpo", *check.CASES]
rows = lambda i: [{dial: (i + 1) * (k + 1) / 10 + j for j, dial in enumerate(check.DIALS)} for k in range(3)]
runs = {name: check.Run(name, None, None, rows(i)) for i, name in enumerate(names)}
"""  # instead of chapter 7's own, which take a minute: no curve is like another


@pytest.fixture(scope="module")
def course(browser, lab):
    """One notebook with cells of all chapters; `course(key)` is the output of a derivation's cell, of "tree", of "dials", or
    of a chapter's folded cells: "02_dpo 0" and so on."""
    sources, places = [], {}

    def add(*more: str, key: str) -> None:
        sources.extend(more)
        places[key] = len(sources) - 1

    for chapter in CHAPTERS:
        sources.append(imports(chapter))
        for number, source in enumerate(folded(chapter)):
            add(source, key=f"{chapter} {number}")
        for key, (of, needed, cell) in WALKS.items():
            if of == chapter:
                add(*cells(chapter, *needed, cell), key=key)
        if chapter == "02_dpo":
            add(*cells(chapter, "def drawn(", "beta_slider ="), key="tree")
    add(RUNS, *cells("07_break_it", "def turn(", "observe(turn"), key="dials")
    lab.write("course.ipynb", sources)
    page = open_notebook(browser, lab, "course.ipynb", height=1300)
    page.run_all()
    yield lambda key: page.output(places[key])
    page.close()


def number(page, name: str) -> float:
    """A value as the line below the sliders of step_through says it."""
    return float(re.search(rf"\b{name} = ([\d.]+)", page.text.split("World ")[1])[1])


@pytest.mark.parametrize("key", WALKS)
def test_step_through(course, tmp_path, key):
    page, steps = course(key), DERIVATIONS[key].steps
    page.wait_for_text(f"Step 1 of {len(steps)}: ")
    seconds = [page.key_latency("Next", "Enter", f"Step 2 of {len(steps)}: ", ".widget-output mjx-container")]
    page.click("Previous")
    page.wait_for_text(f"Step 1 of {len(steps)}: ")

    # The sliders; V and T to the smaller world, if there is one.
    place = round(10 * math.log10(number(page, "beta") / 0.05))
    said = f"beta = {0.05 * 10 ** ((place + 1) / 10):.3g}, "
    seconds.append(page.key_latency("beta", "ArrowRight", said))
    seconds.append(page.key_latency("alpha", "ArrowRight", f"alpha = {number(page, 'alpha') + 0.1:.3g}, "))
    for name in "VT":
        smaller = number(page, name) > 2
        size = int(number(page, name)) + (-1 if smaller else 1)
        seconds.append(page.key_latency(name, "ArrowLeft" if smaller else "ArrowRight", f" {name} = {size}, "))

    page.click("Another world")
    page.page.wait_for_timeout(100)
    page.idle()
    page.choose("Step", f"{len(steps)}. {steps[-1].title}")
    page.wait_for_text(f"Step {len(steps)} of {len(steps)}: ")
    page.idle()
    for _ in steps:
        assert page.text.count(": holds") == 1
        if page.control("Measure").is_enabled():
            break
        page.press("Previous", "Enter")
        page.idle()
    page.click("Measure")
    page.wait_for_match(r"World .*\n(.*\n)*?.*(\w = -?[\d.]+|differ by)")
    page.screenshot(tmp_path / f"{key}.png")
    page.assert_clean()
    at_once(f"step_through {key}", seconds)


def test_tree_of_chapter_2(course, tmp_path):
    page = course("tree")
    page.wait_for_text("beta = 0.50: KL(optimum ‖ reference) = ")
    seconds, distances = [], []
    for step in range(1, 6):
        said = f"beta = {0.5 * 10 ** (step / 10):.2f}: KL(optimum ‖ reference) = "
        seconds.append(page.key_latency("beta", "ArrowRight", said, TREE))
        distances.append(float(page.text.split(said)[1].split()[0]))
    assert distances == sorted(set(distances), reverse=True)  # a larger beta stays closer
    assert page.locator(TREE).count() == 1
    page.screenshot(tmp_path / "tree.png")
    page.assert_clean()
    at_once("tree of chapter 2", seconds)


def test_dials_of_chapter_7(course, tmp_path):
    page, dials = course("dials"), list(break_it.DIALS)

    def said(case: str, dial: str) -> str:
        run = 4 + break_it.CASES.index(case)
        first, last = (run * update / 10 + dials.index(dial) for update in (1, 3))
        return f"run {case}, {dial}, first and last: {first:.4f}, {last:.4f}"

    def choose_next(name: str, text: str) -> float:
        """By keyboard. Space opens the list: on a closed one JupyterLab takes the arrow keys for itself."""
        for key in ("Space", "ArrowDown"):
            page.press(name, key)
            page.idle()
        seconds = page.latency(lambda: page.page.keyboard.press("Enter"), text, PICTURES)
        page.idle()
        return seconds

    page.wait_for_text(said("A", "loss"))
    seconds = [choose_next("run", said(case, "loss")) for case in break_it.CASES[1:4]]
    seconds += [choose_next("dial", said("D", dial)) for dial in dials[1:]]
    pictures = page.content(PICTURES)
    page.choose("run", "G")
    page.wait_for_text(said("G", dials[-1]))
    page.wait_for_pictures(pictures)
    page.screenshot(tmp_path / "dials.png")
    page.assert_clean()
    at_once("dials of chapter 7", seconds)


@pytest.mark.parametrize("chapter", sorted(CHAPTERS))
def test_cards_and_quiz_unfold(course, tmp_path, chapter):
    sources = folded(chapter)
    check = importlib.import_module(f"tpo_course.exercises.{chapter.partition('_')[2]}")
    assert sources[-1] == "check.quiz"
    for place, source in enumerate(sources):
        page = course(f"{chapter} {place}")
        closed = page.locator("details:not([open]) > summary:visible")
        first = page.text
        closed.first.click()
        assert len(page.text) > len(first), f"{source}: nothing unfolds"
        while closed.count():
            before = page.text
            closed.first.focus()
            page.page.keyboard.press("Enter")
            assert len(page.text) > len(before), f"{source}: nothing unfolds below {before[-80:]!r}"
        if source == "check.quiz":
            options = [option for question in check.quiz.questions for option in question.options]
            assert page.text.count("Right.") >= len(check.quiz.questions)
            assert page.locator("details[open]").count() == len(options)
        else:
            exercise = getattr(check, source.removeprefix("check."))
            assert (
                page.locator("details[open]").count() == exercise._repr_html_().count("<details") > len(exercise.hints)
            )
            if isinstance(exercise, Exercise):
                assert exercise.name in page.locator("pre").last.inner_text()
    page.screenshot(tmp_path / "quiz.png")
    page.assert_clean()
