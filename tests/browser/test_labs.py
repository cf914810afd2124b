"""Training lab, microscope, explorer, before/after and run browser in a real JupyterLab, moved by mouse and keyboard."""

from __future__ import annotations

import json
import math
import re
from statistics import median

import pytest

from browser.harness import open_notebook
from tpo_lib import sweep

LATENCY = 0.5  # seconds from a key to the new text and pictures
STAGE = """
from dataclasses import replace
from tpo_lib import widgets
from tpo_lib.lab import Laboratory
from tpo_lib.stage import build_stage, pocket_stage_config
small = {"train_prompts": 24, "held_out_prompts": 6, "max_pairs": 128, "max_new_tokens": 16, "max_held_out_pairs": 8}
stage = build_stage(replace(pocket_stage_config(quick=True), min_gap=0.0, **small), cache_dir=None)
"""
TRAINING = """
class Breaking(Laboratory):
    def train(self, config, name=None, **hooks):
        if name == "fails":
            raise FloatingPointError("the loss is <nan> at update 3")
        return super().train(config, name, **hooks)

widgets.training_lab(Breaking(stage))
"""
RUNS = """
lab = Laboratory(stage)
for name, loss_type in (("plain", "dpo"), ("with KL", "tdpo2")):
    lab.train(lab.config(loss_type, beta=0.1, alpha=0.5, lr=1e-3, updates=2), name)
dpo, tdpo2 = (run.policy for run in lab.runs.values())
"""
MICROSCOPE = "widgets.token_microscope(stage, {'dpo': dpo, 'tdpo2': tdpo2, 'tgdpo': dpo}, guide=dpo)"
PICTURES = ".widget-image"
TOKENS = ".widget-html-content:has(span[title])"
DISABLED = "document.querySelectorAll('.jp-OutputArea-output .noUi-target[disabled]').length"  # sliders
# The contents of all elements that a selector finds: an image's address, the HTML of anything else.
CONTENT = "selector => [...document.querySelectorAll(selector)].map(e => e.src ?? e.innerHTML)"
WATCH = f"""([text, selector, before]) => {{
    const content = {CONTENT}, book = document.querySelector(".jp-Notebook"), start = performance.now();
    window.moved = null;
    const look = () => {{
        const done = book.textContent.includes(text) && content(selector).every((c, i) => c !== before[i]);
        if (done) window.moved = (performance.now() - start) / 1000; else setTimeout(look, 10);
    }};
    look();
}}"""


def content(page, selector: str) -> list[str]:
    return page.page.evaluate(CONTENT, selector)


def key_latency(page, name: str, key: str, text: str, selector: str) -> float:
    """Seconds from the start of pressing `key` until `text` stands there and all that `selector` finds is new."""
    page.control(name).focus()
    page.page.evaluate(WATCH, [text, selector, content(page, selector)])
    page.page.keyboard.press(key)
    seconds = page.page.wait_for_function("() => window.moved", timeout=30_000).json_value()
    page.idle()
    return seconds


def readout(page, name: str) -> str:
    """The value that stands beside a slider."""
    return page.page.locator(f'.widget-inline-hbox:has(> .widget-label:text-is("{name}")) .widget-readout').inner_text()


def fill(page, name: str, text: str, nth: int = 0) -> None:
    page.control(name, nth).fill(text)
    page.page.keyboard.press("Tab")


def press(page, name: str, key: str, nth: int) -> None:
    page.control(name, nth).focus()
    page.page.keyboard.press(key)


def execute(page, code: str) -> None:
    kernel = "jupyterapp.shell.currentWidget.context.sessionContext.session.kernel"
    page.page.evaluate(f"code => {kernel}.requestExecute({{code}}).done.then(() => null)", code)


def wait_for_pictures(page, before: list[str]) -> list[str]:
    """Until all pictures are others than `before`, and loaded."""
    fresh = f"before => ({CONTENT})('{PICTURES}').every((source, i) => source !== before[i])"
    page.page.wait_for_function(fresh, arg=before, timeout=30_000)
    shown = f"() => [...document.querySelectorAll('{PICTURES}')].every(e => e.complete && e.naturalWidth > 300)"
    page.page.wait_for_function(shown, timeout=30_000)
    return content(page, PICTURES)


def tops(page) -> list[float]:
    """Where buttons and pictures stand, pixels below the first of them (the notebook may scroll)."""
    places = page.page.locator(f".jp-OutputArea-output :is({PICTURES}, button)")
    found = [places.nth(i).bounding_box()["y"] for i in range(places.count())]
    return [y - found[0] for y in found]


def test_training_lab(notebook, lab, tmp_path):
    page = notebook("training_lab.ipynb", [STAGE, TRAINING], height=1700)
    page.run_all()
    assert "Ready: set the controls and press Train." in page.text
    assert "No run yet." in page.text
    pictures, places = wait_for_pictures(page, ["", ""]), tops(page)

    # The settings, alpha only where the objective has one.
    page.press("alpha", "ArrowRight")
    assert readout(page, "alpha") == "0.50"
    page.choose("objective", "TDPO2")
    page.idle()
    for name, key, value in (
        ("alpha", "ArrowRight", "0.60"),
        ("beta", "ArrowRight", "0.13"),
        ("learning rate", "ArrowRight", "4.0e-4"),
        ("updates", "Home", "2"),
    ):
        page.press(name, key)
        assert readout(page, name) == value
    fill(page, "name", "mine")
    page.click("Train")
    page.wait_for_text("mine: finished after 2 of 2 updates.", 240)
    assert "beta 0.126, lr 4.0e-04, alpha 0.6" in page.text
    assert "mine (0." in page.text
    pictures = wait_for_pictures(page, pictures)
    assert tops(page)[: len(places) - 3] == places[:-3]  # only what is below the table of runs has moved
    page.click("Train")
    page.wait_for_text("There is a run 'mine' already")

    # What goes wrong in the thread stands on the page.
    fill(page, "name", "fails")
    page.click("Train")
    page.wait_for_text("The run failed: FloatingPointError: the loss is <nan> at update 3")
    assert page.page.get_by_role("alert").count() == 1
    assert page.control("Train").is_enabled()
    assert page.control("Stop").is_disabled()

    # A long run leaves the kernel free: it hears other controls, and Stop.
    page.press("updates", "End")
    assert readout(page, "updates") == "60"
    fill(page, "name", "long")
    page.press("Train", "Enter")
    page.wait_for_text("Training long, update 2 of 60: loss", 120)
    assert page.control("Train").is_disabled()
    page.idle(10)
    assert page.page.evaluate(DISABLED) == 0
    page.choose("objective", "DPO")
    page.page.wait_for_function(f"{DISABLED} === 1", timeout=10_000)  # the kernel has answered: DPO has no alpha
    assert "of 60: loss" in page.text, "the run had ended before the kernel answered"
    page.screenshot(tmp_path / "during.png")
    page.press("Stop", "Space")
    page.wait_for_text("Stopping after this update", 10)
    page.wait_for_text("long: stopped after", 120)
    assert 2 <= int(re.search(r"long: stopped after (\d+) of 60", page.text)[1]) < 60
    assert re.search(r"\d+ updates, stopped", page.text)
    pictures = wait_for_pictures(page, pictures)

    # The runs.
    assert "long (0." in page.text
    page.choose("run", "mine")
    page.wait_for_text("mine (0.")
    assert "long (0." not in page.text
    fill(page, "new name", "long")
    page.click("Rename")
    page.wait_for_text("cannot rename 'mine' to 'long'")
    fill(page, "new name", "first")
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
    """One notebook with the three widgets that read a stage's pairs and runs."""
    cells = [STAGE + RUNS, MICROSCOPE, "widgets.preference_explorer(stage)", "widgets.before_after(lab)"]
    lab.write("reading.ipynb", cells)
    page = open_notebook(browser, lab, "reading.ipynb", height=2400)
    page.run_all()
    yield page
    page.close()


def test_microscope(reading, tmp_path):
    page = reading
    assert "chosen token 0, " in page.text
    assert "<|endoftext|>" not in page.text.split("prompt")[1].split("\n")[0]
    for label in ("true credit", "DPO", "TDPO2", "TGDPO"):
        heads = page.page.locator(f'{TOKENS} span:text-is("{label}"), {TOKENS} small:text-is("{label}")')
        assert heads.count() == 2  # of the chosen and the rejected response
        box, around = heads.first.bounding_box(), page.page.locator(TOKENS).bounding_box()
        assert box["x"] >= around["x"], f"the label {label} is cut off"

    def frames() -> int:
        return page.page.locator(f"{TOKENS} span[style*=outline]").count()

    assert frames() == 4
    colours = set(content(page, TOKENS))
    for quantity, words in (
        ("KL", "KL(π_ref ‖ π_θ)"),
        ("weight f", "TGDPO's weight"),
        ("KL coefficient", "d loss / d KL"),
        ("coefficient", "d loss / d log"),
    ):
        page.choose("colour by", quantity)
        page.wait_for_text(words)
        assert ("this objective has none" in page.text) == (quantity not in ("KL", "coefficient"))
        colours |= set(content(page, TOKENS))
    assert len(colours) == 5

    before = page.text
    margins = re.findall(r"margin (\S+), loss", before)
    page.press("alpha", "ArrowRight")
    page.wait_for_text("beta = 0.1, alpha = 0.6;")
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
    page.press("pair", "ArrowRight")
    page.page.wait_for_function(
        f"before => ({CONTENT})('{TOKENS}')[0] !== before", arg=content(page, TOKENS)[0], timeout=30_000
    )
    assert page.text.split("prompt")[1] != prompt
    page.idle()
    assert depth() == place  # what is below the tokens stays where it is
    page.screenshot(tmp_path / "microscope.png")
    page.assert_clean()


def test_microscope_answers_at_once(reading):
    reading.choose("colour by", "coefficient")
    reading.press("beta", "Home")
    reading.wait_for_text("beta = 0.01, alpha")
    reading.idle()
    moves = [f"beta = {0.01 * 10 ** (step / 10):.3g}, alpha" for step in range(1, 8)]
    seconds = [key_latency(reading, "beta", "ArrowRight", said, TOKENS) for said in moves]
    print(f"microscope, beta: median {median(seconds):.3f} s of {[round(s, 3) for s in seconds]}")
    reading.assert_clean()
    assert median(seconds) <= LATENCY, seconds


def test_explorer(reading, tmp_path):
    page = reading
    page.wait_for_text("of 128 pairs")
    picture = content(page, PICTURES)
    page.press("smallest gap", "ArrowRight", 2)
    page.wait_for_text("differ by at least 0.30;")
    page.idle()
    picture = wait_for_pictures(page, picture)
    gap = float(re.search(r"Pair 0 of 0 to \d+: gap ([\d.]+)", page.text)[1])
    assert gap >= 0.3
    press(page, "pair", "ArrowRight", 1)
    page.wait_for_text("Pair 1 of 0 to ")
    fill(page, "search", "no such <word>")
    page.wait_for_text("0 of 128 pairs")
    assert "No pair is left" in page.text
    fill(page, "search", "")
    page.wait_for_text("Pair 0 of 0 to ")
    fill(page, "search", "the")
    page.wait_for_text("with 'the' in them")
    page.idle()
    assert "the" in page.page.locator(".widget-html-content:has-text('Pair 0 of')").inner_text().lower()
    fill(page, "search", "")

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
    assert page.control("Train on both sides of the gap").is_enabled()
    page.screenshot(tmp_path / "explorer.png")
    page.assert_clean()


def test_before_after(reading, tmp_path):
    page = reading

    def sampled(then) -> str:
        before = page.text
        then()
        page.idle()
        page.page.wait_for_timeout(200)
        assert page.text != before
        return page.text

    page.wait_for_text("Seed 0: 4 samples of at most 16 tokens each.")
    assert "start: mean reward 0." in page.text
    assert "with KL: mean reward 0." in page.text
    page.choose("left", "plain")
    sampled(lambda: page.click("Sample"))
    page.wait_for_text("plain: mean reward 0.")
    page.choose("right", "plain")
    sampled(lambda: page.press("Sample", "Enter"))
    shown = page.page.locator("div[style*='flex:1'], div[style*='flex: 1']")
    columns = shown.all_inner_texts()
    assert len(columns) == 2
    assert columns[0] == columns[1]  # the same policy, the same random numbers
    page.press("seed", "ArrowRight", 3)
    page.idle()  # ipywidgets holds values back while the kernel is busy, but no clicks
    sampled(lambda: page.click("Sample"))
    page.wait_for_text("Seed 3: ")
    assert shown.all_inner_texts()[0] != columns[0]
    fill(page, "prompt", "I left after")
    sampled(lambda: page.click("Sample"))
    assert page.page.locator("b:text-is('I left after')").count() == 8
    page.screenshot(tmp_path / "before_after.png")
    fill(page, "prompt", " ")
    page.click("Sample")
    page.wait_for_text("The prompt is empty")
    fill(page, "prompt", "I left after")
    execute(page, "lab.rename('plain', 'renamed')")
    page.click("Reread runs")
    page.wait_for_text("start: mean reward 0.")  # plain is gone
    page.choose("left", "renamed")
    page.click("Sample")
    page.wait_for_text("renamed: mean reward 0.")
    page.assert_clean()


def made_up_runs() -> dict:
    """A sweep's file over the whole grid, with figures that follow a formula."""

    def metric(mean: float, half: float) -> dict:
        return {"mean": mean, "low": mean - half, "high": mean + half, "n": 128}

    def metrics(kl: float) -> dict:
        means = {"reward": 0.5 + 0.04 * kl, "judge": 0.5 + 0.03 * kl, "kl": kl, "entropy": 3.4 - 0.1 * kl}
        return {k: metric(v, 0.03) for k, v in {**means, "seqkl_chosen": 1.1 * kl, "seqkl_rejected": 1.4 * kl}.items()}

    def samples(words: str) -> list[dict]:
        long = "and then went on for an hour until everyone had left, which nobody seemed to mind very much"
        return [{"prompt": f"the film {i} was", "text": f"{words} {long}", "reward": 0.4 + 0.1 * i} for i in range(6)]

    def run(number: int, objective: str, beta: float, alpha: float) -> dict:
        training = [
            {
                "step": step,
                "loss": 0.69 - 0.001 * step * (number + 1),
                "rewards/margins": 0.1 * step * beta + 0.02 * math.sin(step),
                "rewards/accuracies": 0.5 + 0.02 * step,
            }
            for step in range(1, 21)
        ]
        kl = 2 / beta**0.4 / (1 + alpha) + 0.02 * number
        found = {"objective": objective, "beta": beta, "alpha": alpha, "training": training}
        return {**found, "metrics": metrics(kl), "samples": samples(f"made-up {number}")}

    runs = [run(number, *settings) for number, settings in enumerate(sweep.grid())]
    return {"start": {"metrics": metrics(0.0), "samples": samples("start")}, "runs": runs}


def facts(run: dict) -> str:
    alpha = f", alpha {run['alpha']:g}" if run["alpha"] else ""
    return f"{run['objective'].upper()}, beta {run['beta']:g}{alpha}: reward {run['metrics']['reward']['mean']:.2f} ["


def test_run_browser(notebook, lab, tmp_path):
    made = made_up_runs()
    (lab.root / "made_up.json").write_text(json.dumps(made))
    page = notebook("runs.ipynb", ["from tpo_lib import widgets", "widgets.run_browser('made_up.json')"], height=1700)
    page.run_all()
    by_settings = {(run["objective"], run["beta"], run["alpha"]): run for run in made["runs"]}
    betas, alphas = ([s[i] for s in by_settings if s[0] == "tdpo2"] for i in (1, 2))
    betas, alphas = sorted(set(betas)), sorted(set(alphas))
    dpo = by_settings["dpo", sorted({s[1] for s in by_settings if s[0] == "dpo"})[1], 0.0]
    page.wait_for_text(facts(dpo))
    pictures = wait_for_pictures(page, ["", ""])
    page.screenshot(tmp_path / "dpo.png")
    page.choose("objective", "TDPO2")
    page.wait_for_text("TDPO2, beta ")
    wait_for_pictures(page, pictures)
    places = [page.page.locator(PICTURES).nth(i).bounding_box() for i in range(2)]
    page.press("beta", "Home")
    page.press("alpha", "Home")
    page.wait_for_text(facts(by_settings["tdpo2", betas[0], alphas[0]]))
    page.idle()

    seconds = []
    for name, key, values in (("alpha", "ArrowRight", alphas[1:]), ("beta", "ArrowRight", betas[1:])):
        for value in values:
            settings = ("tdpo2", betas[0], value) if name == "alpha" else ("tdpo2", value, alphas[-1])
            seconds.append(key_latency(page, name, key, facts(by_settings[settings]), PICTURES))
            assert f"made-up {made['runs'].index(by_settings[settings])} " in page.text
    print(f"run browser: median {median(seconds):.3f} s of {[round(s, 3) for s in seconds]}")
    assert [page.page.locator(PICTURES).nth(i).bounding_box() for i in range(2)] == places
    page.screenshot(tmp_path / "tdpo2.png")
    page.assert_clean()
    assert median(seconds) <= LATENCY, seconds
