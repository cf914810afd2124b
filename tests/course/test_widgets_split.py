"""The split lab: slack and loss are the derivation's, and every control changes them."""

from __future__ import annotations

import pytest

from tpo_course.derivations.tgdpo import random_potential, slack_and_loss
from tpo_course.widgets import split_lab
from tpo_course.world import TokenWorld


@pytest.fixture(scope="module")
def lab():
    return split_lab(TokenWorld(4, 3, seed=0, num_prompts=2))


def test_it_starts_at_the_reward_as_it_is_and_ends_at_nothing_lost(lab):
    assert (lab.slack, lab.loss) == pytest.approx((0.878, 0.729), abs=5e-4)
    before = lab.picture.value
    lab.controls["size"].value = 1.0
    assert (lab.slack, lab.loss) == pytest.approx((0, 0), abs=1e-11)
    assert "slack 0.000, lost by the relaxation 0.000" in lab.alt
    assert lab.alt in lab.text.value
    assert lab.picture.value != before


def test_potential_and_beta_count(lab):
    lab.controls["size"].value = 1.0
    lab.controls["potential"].value = "random 2"
    lab.controls["beta"].value = 0.5
    assert (lab.slack, lab.loss) == pytest.approx(slack_and_loss(lab.world, 0.5, random_potential(lab.world, 2)))
    assert min(lab.slack, lab.loss) > 0.1


def test_the_curves_pass_through_the_markers(lab):
    lab.controls["size"].value = 0.5
    lines = lab.figure.axes[0].get_lines()
    for curve, marker in zip(lines[0:4:2], lines[1:4:2], strict=True):
        x, y = marker.get_data()
        at = abs(curve.get_xdata() - x).argmin()
        assert curve.get_ydata()[at] == pytest.approx(y)
