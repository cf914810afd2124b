"""The loss lab: every control changes the numbers it should, and the picture and the text show those of the library."""

from __future__ import annotations

import base64
import io
import math
import re
import time

import matplotlib.image
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text

from tpo_course.coefficients import coefficients, least_kl, loss_at, spread
from tpo_course.widgets import loss_lab as exported
from tpo_course.widgets.loss_lab import ALL, BY_HAND, ONE, PAIR, SITUATIONS, loss_lab
from tpo_course.widgets.loss_picture import CHOSEN, GUIDE_BETA, REF_LOGP, REJECTED, out_of_reach
from tpo_course.widgets.parts import knob
from tpo_lib.losses import F_FLOOR, OBJECTIVES, Hyperparameter
from tpo_lib.runs.plots import style_of

LABS = [name for name in OBJECTIVES if name != "sft"]
START, HALF_WAY = next(iter(SITUATIONS)), "half-way through training"


@pytest.fixture(scope="module")
def shared():
    return loss_lab()


@pytest.fixture
def lab(shared):
    """One lab for all tests, its controls back at the start; drawn by the first `put`."""
    shared.unpin_button.click()
    shared.controls["show"].value = ONE
    start = {"objective": "dpo", "beta": 0.1, "alpha": 0.5, "shaping": "linear", "guide": 1.0, "gamma": 0.5}
    shared._set({**start, **dict.fromkeys(PAIR, 0.0), "situation": START})
    return shared


def put(lab, **values) -> None:
    """Set controls and draw once: all but the last without drawing, the last as a hand would."""
    *before, last = values
    lab._set({name: values[name] for name in before})
    if lab.controls[last].value == values[last]:
        lab._draw()
    lab.controls[last].value = values[last]


def text(lab) -> str:
    return re.sub(r"<[^>]*>", " ", lab.text.value)


def results(lab) -> str:
    """The text without its first line, which repeats the controls."""
    return lab.text.value.partition("<br>")[2]


def panels(lab):
    return lab.figure.axes  # loss, terms of the margin, reach, coefficients, weights


def heights(container) -> list[float]:
    return [bar.get_height() for bar in container]


def bars(ax, label: str) -> list[float]:
    (found,) = [container for container in ax.containers if container.get_label() == label]
    return heights(found)


def line(ax, label: str):
    (found,) = [each for each in ax.get_lines() if each.get_label() == label]
    return found


def test_it_is_exported_and_starts_at_the_reference(lab):
    assert exported is loss_lab
    lab._draw()
    assert lab.result.output.loss.item() == pytest.approx(math.log(2))
    assert "loss 0.6931 nats" in text(lab)
    assert "Margin +0.000" in text(lab)


@pytest.mark.parametrize("objective", LABS)
def test_what_is_drawn_is_what_the_library_computes(lab, objective):
    put(lab, objective=objective, beta=0.3, guide=2.0, situation=HALF_WAY)

    values = SITUATIONS[HALF_WAY]
    chosen = spread(
        values[0],
        values[2],
        2.0 * torch.tensor(list(CHOSEN.values())).double(),
        guide_beta=GUIDE_BETA,
        ref_logp=REF_LOGP,
    )
    rejected = spread(
        values[1],
        values[3],
        2.0 * torch.tensor(list(REJECTED.values())).double(),
        guide_beta=GUIDE_BETA,
        ref_logp=REF_LOGP,
    )
    given = {"beta": lab.controls["beta"].value, "alpha": 0.5, "gamma": 0.5, "shaping": "linear", "floor": F_FLOOR}
    given["guide_beta"] = GUIDE_BETA
    hyper = {name: given[name] for name in OBJECTIVES[objective].hyperparameters}
    expected = coefficients(objective, chosen, rejected, **hyper)

    loss, terms, _, tokens, weights = panels(lab)
    margin, value = expected.margin.item(), expected.output.loss.item()
    assert line(loss, "this pair").get_xydata().tolist() == [[pytest.approx(margin), pytest.approx(value)]]
    curve = line(loss, "loss").get_xydata()
    assert curve[:, 1] == pytest.approx(loss_at(objective, torch.tensor(curve[:, 0]), **hyper)[0].numpy())
    (x0, y0), (x1, y1) = line(loss, "slope").get_xydata()
    assert (y1 - y0) / (x1 - x0) == pytest.approx(loss_at(objective, expected.margin, **hyper)[1].item())

    widths = [bar.get_width() for container in terms.containers for bar in container]
    assert sum(widths[:4]) == pytest.approx(widths[4]) == pytest.approx(margin)
    both = torch.cat([expected.chosen.logps[0], expected.rejected.logps[0]]).tolist()
    assert bars(tokens, "on log π") == pytest.approx(both)
    reads_kl = "kl" in OBJECTIVES[objective].needs
    if reads_kl:
        kl = torch.cat([expected.chosen.kl[0], expected.rejected.kl[0]]).tolist()
        assert bars(tokens, "on KL") == pytest.approx(kl)
    assert len(tokens.containers) == 1 + reads_kl
    assert [label.get_text() for label in tokens.get_xticklabels()] == [*CHOSEN, *REJECTED]
    if objective == "tgdpo":
        f = torch.cat([expected.chosen.weights[0], expected.rejected.weights[0]]).tolist()
        assert bars(weights, "f") == pytest.approx(f)
    else:
        assert not weights.containers
        assert "no token weights" in weights.get_title(loc="left")
    said = text(lab)
    assert f"Margin {margin:+.3f} nats, loss {value:.4g} nats" in said
    assert f"chosen {both[0]:+.3g} on every token" in said or objective == "tgdpo"


@pytest.mark.parametrize("objective", LABS)
def test_an_objective_is_drawn_in_its_colour_with_its_name(lab, objective):
    put(lab, objective=objective)
    style = style_of(objective)
    loss, terms, _, tokens, _ = panels(lab)
    point = line(loss, "this pair")
    assert (point.get_color(), point.get_marker()) == (style.colour, style.marker)
    assert to_hex(tokens.containers[0][0].get_facecolor()) == style.colour.lower()
    assert to_hex(terms.containers[0][0].get_facecolor()) == style.colour.lower()
    assert loss.get_title().startswith(style.label)
    assert text(lab).strip().startswith(style.label)


def test_the_stop_gradient_is_shown_for_tdpo2_and_for_tdpo2_alone(lab):
    for objective in LABS:
        lab._set({"situation": START})
        put(lab, objective=objective, situation=HALF_WAY)
        _, terms, _, tokens, _ = panels(lab)
        crosses = [each for each in tokens.get_lines() if "stop-gradient" in str(each.get_label())]
        noted = [note for note in terms.texts if note.get_text().endswith(" (held)")]
        assert len(crosses) == len(noted) == (objective == "tdpo2")
        assert ("The stop-gradient holds the chosen KL" in text(lab)) == (objective == "tdpo2")
    put(lab, objective="tdpo2")  # the sliders stay
    (cross,) = [each for each in panels(lab)[3].get_lines() if "stop-gradient" in str(each.get_label())]
    assert cross.get_xydata()[:, 1].tolist() == [0.0] * len(CHOSEN)
    assert "chosen +0.100 in the margin, coefficient 0, no gradient" in text(lab)  # 0.1 * 0.5 * 2
    assert bars(panels(lab)[3], "on KL")[: len(CHOSEN)] == [0.0] * len(CHOSEN)
    put(lab, objective="tdpo1")
    assert "chosen +0.200 in the margin, coefficient -" in text(lab)


def test_the_floor_counts_the_tokens_that_sit_on_it(lab):
    put(lab, objective="tgdpo", guide=1.0)
    assert "0 of 12 tokens (0%) on the floor 0.01" in text(lab)
    put(lab, guide=4.0)  # 1 - 0.5 * 4 * 0.8 and 1 - 0.5 * 4 * 0.9 and 1 - 0.5 * 4 * 0.5 lie at or below 0
    assert "3 of 12 tokens (25%) on the floor 0.01" in text(lab)
    weights = panels(lab)[4]
    marks = line(weights, "on the floor").get_xydata()
    low = [patch for patch in weights.containers[0] if patch.get_height() <= F_FLOOR]
    assert marks[:, 0].tolist() == pytest.approx([bar.get_x() + bar.get_width() / 2 for bar in low])
    assert "3 of 12" in weights.get_title(loc="left")
    put(lab, shaping="exp")  # never on the floor by itself
    assert "0 of 12 tokens" in text(lab)
    assert len(line(panels(lab)[4], "on the floor").get_xdata()) == 0


@pytest.fixture(scope="module")
def half_way(shared) -> dict[str, tuple[str, bytes]]:
    """{objective: (results as text, picture)} half-way."""
    found = {}
    for objective in LABS:
        shared._set({"situation": START, "beta": 0.1, "alpha": 0.5, "shaping": "linear", "guide": 1.0, "gamma": 0.5})
        put(shared, objective=objective, situation=HALF_WAY)
        found[objective] = results(shared), shared._png
    return found


@pytest.mark.parametrize(
    ("objective", "control", "value"),
    [
        *((name, "beta", 1.0) for name in LABS),
        *((name, "chosen_logratio", 5.0) for name in LABS),
        *((name, "rejected_logratio", -5.0) for name in LABS),
        ("tdpo2", "alpha", 1.5),
        ("tgdpo", "alpha", 1.5),
        ("tdpo1", "chosen_kl", 4.0),
        ("tdpo2", "chosen_kl", 4.0),
        ("tdpo2", "rejected_kl", 4.0),
        ("tgdpo", "guide", 2.0),
        ("tgdpo", "shaping", "exp"),
        ("simpo", "gamma", 1.0),
    ],
)
def test_a_control_that_is_read_changes_text_and_picture(lab, half_way, objective, control, value):
    said, shown = half_way[objective]
    lab._set({"objective": objective, **dict(zip(PAIR, SITUATIONS[HALF_WAY], strict=True))})
    put(lab, **{control: value})
    assert not lab.controls[control].disabled
    assert results(lab) != said
    assert lab._png != shown


def test_a_control_that_is_not_read_is_greyed_out_and_changes_nothing(lab):
    unread = {
        "dpo": {"alpha", "shaping", "guide", "gamma", "chosen_kl", "rejected_kl"},
        "tdpo1": {"alpha", "shaping", "guide", "gamma"},
        "tdpo2": {"shaping", "guide", "gamma"},
        "tgdpo": {"gamma", "chosen_kl", "rejected_kl"},
        "simpo": {"alpha", "shaping", "guide", "chosen_kl", "rejected_kl"},
    }
    for objective, names in unread.items():
        put(lab, objective=objective)
        assert {name for name, control in lab.controls.items() if control.disabled} == names
    put(lab, objective="dpo", situation=HALF_WAY)
    before = lab.result.output.loss.item()
    put(lab, alpha=2.0, chosen_kl=30.0, guide=4.0)
    assert lab.result.output.loss.item() == before


def test_a_hyperparameter_gets_the_control_that_its_record_asks_for():
    scale = knob(Hyperparameter(2.0, "s", "scale", above=0), "s", steps=20)
    assert (scale.value, scale.min, scale.max, scale.step) == (2.0, -2.0, pytest.approx(math.log10(20)), 0.05)
    must = knob(Hyperparameter(None, "m", "to be given", above=0), "m", steps=10)
    assert (must.value, must.min, must.max, must.step) == (0.1, -2.0, 1.0, 0.1)
    weight = knob(Hyperparameter(0.5, "α", "weight", least=0), "α", steps=10)
    assert (weight.value, weight.min, weight.max, weight.step) == (0.5, 0.0, 2.0, 0.1)
    word = knob(Hyperparameter("exp", "f", "form", choices=("linear", "exp")), "f", steps=20)
    assert (word.value, word.options) == ("exp", ("linear", "exp"))


def test_a_situation_sets_the_four_sliders_with_one_drawing(lab, monkeypatch):
    drawn = []
    draw = type(lab)._draw
    monkeypatch.setattr(type(lab), "_draw", lambda self: (drawn.append(1), draw(self)))
    put(lab, situation="both log-ratios go down")
    assert [lab.controls[name].value for name in PAIR] == list(SITUATIONS["both log-ratios go down"])
    assert len(drawn) == 1
    assert lab.result.output.chosen_reward.item() < 0  # both rewards fell, yet the loss is below its start
    assert lab.result.output.rejected_reward.item() < 0
    assert lab.result.output.loss.item() < math.log(2)
    put(lab, chosen_logratio=-6.0)
    assert lab.controls["situation"].value == BY_HAND
    assert len(drawn) == 2
    put(lab, beta=0.2)
    assert lab.controls["situation"].value == BY_HAND


def test_every_situation_fits_its_sliders(lab):
    for values in SITUATIONS.values():
        for name, value in zip(PAIR, values, strict=True):
            slider = lab.controls[name]
            assert slider.min <= value <= slider.max
            assert (value - slider.min) % slider.step == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("objective", LABS)
def test_extremes_of_every_slider_are_drawn(lab, objective):
    # At beta = 10 the second margin is so wide that the coefficients underflow to 0.
    for beta, logratio in ((0.01, -40.0), (10.0, -40.0), (10.0, 40.0)):
        move = {"chosen_logratio": logratio, "rejected_logratio": -logratio, "chosen_kl": 40.0, "guide": 0.0}
        put(lab, objective=objective, **move, beta=beta)
        assert math.isfinite(lab.result.output.loss.item())
        assert "nan" not in text(lab)
        (x, y), (low, high) = line(panels(lab)[0], "this pair").get_xydata()[0], panels(lab)[0].get_xlim()
        assert low < x < high
        assert y <= panels(lab)[0].get_ylim()[1]
        assert panels(lab)[3].get_ylim()[0] < 0 < panels(lab)[3].get_ylim()[1]
    assert lab.result.chosen.logps.any() == (objective in ("simpo", "ipo"))


def test_the_picture_is_an_image_with_the_numbers_as_its_alternative_text(lab):
    put(lab, objective="tdpo2", situation=HALF_WAY)
    tag = r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)" style="max-width:100%;min-width:620px">'
    source, alt = re.search(tag, lab.picture.value).groups()
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(source)))
    assert pixels.shape[:2] == (604, 789)
    assert pixels[..., :3].min() < 0.1
    assert alt == lab.alt
    assert "Margin +0.950 nats" in alt
    assert lab.picture.layout.min_height == "613px"
    bundle = lab._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == lab.box.model_id
    assert base64.b64decode(bundle["image/png"]) == base64.b64decode(source)


def test_controls_have_descriptions_and_follow_the_hand_where_the_answer_is_quick(lab):
    for show in (ONE, ALL):
        lab.controls["show"].value = show
        for control in lab.controls.values():
            assert control.description
            if hasattr(control, "continuous_update"):
                assert control.continuous_update is (show == ALL)


# What can be reached.


def test_every_situation_can_be_reached(lab):
    for values in SITUATIONS.values():
        assert not out_of_reach(dict(zip(PAIR, values, strict=True)), kl=True)


@pytest.mark.parametrize(
    ("objective", "sliders", "said"),
    [
        ("tdpo2", (4.0, -6.0, 0.0, 3.0), "SeqKL 0.0 (chosen): at log-ratio +4.0 it is at least 0.09 nats"),
        ("tdpo2", (4.0, 20.0, 2.0, 9.0), "log-ratio +20.0 (rejected): at 18 nats every token has probability 1"),
        ("dpo", (18.0, 0.0, 40.0, 0.0), "log-ratio +18.0 (chosen): at 18 nats"),
        ("dpo", (4.0, -6.0, 0.0, 0.0), None),  # reads no KL: whatever it is
        ("tdpo2", (0.0, 0.0, 0.0, 0.0), None),
    ],
)
def test_what_no_policy_can_have_is_said_and_crossed_out(lab, objective, sliders, said):
    put(lab, objective=objective, **dict(zip(PAIR, sliders, strict=True)))
    crosses = [each for each in panels(lab)[2].get_lines() if each.get_marker() == "x"]
    if said is None:
        least = (least_kl(x, 6, ref_logp=REF_LOGP).item() for x in sliders[:2])
        assert "need a SeqKL of {:.2f} (chosen) and {:.2f} (rejected) nats".format(*least) in lab.alt
        assert not crosses
    else:
        assert f"Out of reach (✕): {said}" in text(lab)
        side = "(rejected)" in said
        assert [each.get_xydata()[0, 0] for each in crosses] == [sliders[side]]


def test_the_map_hatches_what_the_bound_forbids(lab):
    lab._draw()
    (shade,) = panels(lab)[2].collections
    (path,) = shade.get_paths()
    for x, y in ((-20, 0.2), (4, 0.02), (15, 3.0), (19, 20), (35, 1)):
        assert path.contains_point((x, y)), (x, y)
    for x, y in ((-20, 3.0), (4, 0.5), (15, 6.0), (17.5, 39.0), (0, 0.5)):
        assert not path.contains_point((x, y)), (x, y)


# All objectives side by side.


def columns(lab) -> dict[str, list[str]]:
    """{objective's label: its cells as text, from the loss on}."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", lab.text.value)]
    plain = [[re.sub(r"<[^>]*>", " ", cell).split() for cell in row] for row in rows]
    return {cells[0][0]: [" ".join(cell) for cell in cells[1:]] for cells in list(zip(*plain, strict=True))[1:]}


def test_all_objectives_stand_side_by_side_on_the_same_pair(lab):
    put(lab, objective="dpo", guide=2.0, situation=HALF_WAY)
    lab.controls["show"].value = ALL
    table = columns(lab)
    assert list(table) == [style_of(name).label for name in LABS]
    assert lab.controls["objective"].disabled
    assert not any(lab.controls[name].disabled for name in ("guide", "gamma", "alpha", *PAIR))
    for name in LABS:
        each, cells = lab.states[name], table[style_of(name).label]
        assert cells[:3] == [f"{each.loss:.4g}", f"{each.margin:.4g}", f"{each.slope:.4g}"]
        tokens = [*cells[4:10], *cells[11:]]
        expected = [*each.found.chosen.logps[0].tolist(), *each.found.rejected.logps[0].tolist()]
        assert [float(cell.split()[0]) for cell in tokens] == pytest.approx(expected, abs=6e-5)
        assert f"{style_of(name).label} loss {each.loss:.4g}, margin {each.margin:+.3f}" in lab.alt
    assert table["TDPO2"][4].endswith("KL held")
    assert table["TDPO1"][4].endswith(f"KL {lab.states['tdpo1'].found.chosen.kl[0, 0]:+.4f}")
    assert table["TGDPO"][4].endswith("f 1.80")  # 1 + 0.5 * 2 * 0.8
    lab.controls["objective"].disabled = False
    for name in LABS:  # one at a time says the same
        put(lab, show=ONE, objective=name)
        assert lab.result.output.loss.item() == pytest.approx(float(table[style_of(name).label][0]), rel=1e-3)


def test_the_colours_of_coefficients_are_centred_on_0_and_those_of_f_on_1(lab):
    put(lab, guide=4.0, situation=HALF_WAY)
    lab.controls["show"].value = ALL
    spans = re.findall(r"border-bottom:2px (solid|dashed)[^>]*>(f )?([+-]?[\d.]+)", lab.text.value)
    assert len(spans) == 12 * (len(LABS) + 1)
    for line, f, number in spans:
        assert (line == "solid") == (float(number) >= (1 if f else 0)), (line, f, number)


@pytest.mark.parametrize("show", [ONE, ALL])
def test_what_was_pinned_stays_beside_the_new_state(lab, show):
    put(lab, objective="tdpo2", situation=HALF_WAY)
    lab.controls["show"].value = show
    plain, before = lab._png, lab.states["tdpo2"]
    lab.pin_button.click()
    assert lab._png != plain
    put(lab, beta=0.2)
    change = f"{lab.states['tdpo2'].loss - before.loss:+.3f}"
    assert abs(float(change)) > 0.01
    if show == ONE:
        assert f"Since the pinned state (beta +0.1 → +0.2): loss {change}, margin" in lab.alt
        put(lab, objective="tgdpo")  # each objective beside itself
        assert "Since the pinned state (beta +0.1 → +0.2): loss" in lab.alt
        assert line(panels(lab)[3], "pinned").get_ydata()[0] == lab.pinned["tgdpo"].found.chosen.logps[0, 0].item()
    else:
        assert f"TDPO2 loss {lab.states['tdpo2'].loss:.4g} ({change} since the pinned state)" in lab.alt
        assert f"was {before.found.chosen.logps[0, 0]:+.4f}" in columns(lab)["TDPO2"][4]
    lab.unpin_button.click()
    assert "pinned" not in lab.alt
    assert "was" not in text(lab).split()


def test_without_a_kernel_all_objectives_are_a_table(lab):
    assert "text/html" not in lab._repr_mimebundle_()
    lab.controls["show"].value = ALL
    assert "<table" in lab._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize("objective", LABS)
def test_no_text_of_the_picture_overlaps_or_leaves_it(lab, objective):
    put(lab, objective=objective, situation="both log-ratios go down", guide=4.0)
    lab.pin_button.click()
    lab.figure.draw_without_rendering()
    shown = [t for t in lab.figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert min(t.get_fontsize() for t in shown) >= 10
    boxes = [(t.get_text(), t.get_window_extent()) for ax in panels(lab) for t in _texts(ax)]
    for i, (name, box) in enumerate(boxes):
        assert box.x0 >= 0, name
        assert box.x1 <= lab.figure.bbox.x1 + 1, name
        assert box.y0 >= 0, name
        assert box.y1 <= lab.figure.bbox.y1 + 1, name
        for other, another in boxes[:i]:
            assert not box.overlaps(another), (name, other)


def _texts(ax) -> list[Text]:
    found = [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
    for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        low, high = sorted(limits)
        found += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    found += ax.get_legend().get_texts() if ax.get_legend() else []
    return [t for t in found if t.get_text().strip()]


@pytest.mark.parametrize(("show", "limit"), [(ONE, 0.2), (ALL, 0.1)])  # the second moves with the hand
def test_a_move_redraws_in_time(lab, show, limit):
    put(lab, objective="tdpo2", situation=HALF_WAY)
    lab.controls["show"].value = show
    taken = []
    for value in (3.0, 4.0, 5.0, 6.0, 7.0):
        start = time.process_time()  # of this process alone: a busy machine does not count
        put(lab, chosen_kl=value)
        taken.append(time.process_time() - start)
    assert min(taken) <= limit
