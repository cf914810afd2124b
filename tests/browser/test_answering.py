"""Tasks of every kind in a real JupyterLab: answered by mouse and keyboard, judged, and written down."""

from __future__ import annotations

import json

WRITTEN = """
from tpo_course.exercises import tgdpo_practice as later

def r_hat(guide_logps, ref_logps, guide_beta):
    ...

def tgdpo_loss(chosen, rejected, beta, alpha, guide_beta):
    return r_hat(chosen.guide_logps, chosen.ref_logps, guide_beta) * beta

later.tgdpo_loss(tgdpo_loss)
"""
RAISES = """
def gibbs(ref_logps, reward, beta):
    scores = ref_logps + reward / beta
    return scores.softmax("vocabulary")

check.gibbs(gibbs)
"""
CELLS = [
    "from tpo_course.exercises import dpo as check",
    "check.beta_at_the_end",
    "check.dpo_in_steps",
    "check.z_notices",
    "check.line_of_dpo",
    "check.first_loss",
    "check.both_fall",
    RAISES,
    WRITTEN,
    "check.first_loss.reveal(0.693)",
    "from tpo_course.derivations.breaks import Holds\nHolds('dpo', check._world(), beta=0.5).ask('z_cancels')",
]


def test_every_kind_is_answered_and_written_down(notebook, lab, tmp_path):
    page = notebook("answering.ipynb", CELLS, height=1400)
    page.run_all()
    for cell in range(1, 7):
        output = page.output(cell)
        output.wait_for_text("What.")
        assert "VBox" not in output.text
    choice = page.output(1)
    choice.click("a")
    choice.click("Write it down")
    choice.wait_for_text("You say It grows")
    assert "makes leaving" not in choice.text  # nothing is given away before the cell has run
    order = page.output(2)
    order.locator("input").first.fill("abc")
    order.click("Check")
    order.wait_for_text("Use every letter once")
    broken = page.output(3)
    broken.locator("input").first.fill("d")
    broken.click("Check")
    broken.wait_for_text("residual")
    broken.wait_for_text("wrong")
    bug = page.output(4)
    bug.click("b")
    bug.click("Check")
    bug.wait_for_text("correct")
    text = page.output(6)
    text.locator("textarea").first.fill("The loss sees the difference alone.")
    text.click("Write it down")
    text.wait_for_text("1 point: the loss sees the difference alone")
    text.click("Give points")
    text.wait_for_text("0 of 4 points")
    page.output(7).wait_for_text('in line 3 (gibbs): return scores.softmax("vocabulary")')
    page.output(8).wait_for_text("It calls r_hat, which is still to be written")
    page.output(9).wait_for_text("Nothing was predicted")
    assert page.output(2).formulas > 3
    page.screenshot(tmp_path / "answering.png")
    for cell, name in enumerate(("predict", "order", "break"), 1):
        page.output(cell).screenshot(tmp_path / f"{name}.png")
    page.assert_clean()
    done = json.loads((lab.root / ".progress.json").read_text())["tasks"]
    assert {key.partition(".")[2]: task["status"] for key, task in done.items()} == {
        "gibbs": "wrong",
        "beta_at_the_end": "predicted",
        "z_notices": "wrong",
        "line_of_dpo": "correct",
        "both_fall": "assessed",
    }
