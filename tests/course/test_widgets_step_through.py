"""step_through says what the derivation says, checks it in the world its sliders describe, and never breaks an equation."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import ipywidgets
import pytest
import torch
from IPython.display import Markdown

from tpo_course import widgets
from tpo_course.derivations import DERIVATIONS, Derivation, Step
from tpo_course.widgets.step_through import code_location, static_table, typeset
from tpo_course.world import TokenWorld

module = importlib.import_module("tpo_course.widgets.step_through")  # the package's attribute is the function
STEPS = {f"{name}.{step.key}": step for name, derivation in DERIVATIONS.items() for step in derivation.steps}
FRAME = r"\,{\color{#D55E00}{\boxed{%s}}}\,"


@pytest.fixture
def walk():
    return widgets.step_through(DERIVATIONS["dpo"])


def derivation_of(*steps: Step) -> Derivation:
    return dataclasses.replace(DERIVATIONS["dpo"], steps=steps)


def balanced(latex: str) -> bool:
    depth = 0
    for character in re.sub(r"\\[{}]", "", latex):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0 and latex.count(r"\left") == latex.count(r"\right")


def inside_a_script(before: str) -> bool:
    """Whether LaTeX that follows `before` is inside the braces of a sub- or superscript."""
    open_braces = []
    for place, character in enumerate(before):
        if character == "{":
            open_braces.append(before[:place].rstrip().endswith(("^", "_")))
        elif character == "}":
            open_braces.pop()
    return any(open_braces)


# The equation.


@pytest.mark.parametrize("name", STEPS)
def test_the_changed_term_can_be_framed(name):
    latex, changed = STEPS[name].latex, STEPS[name].changed
    assert changed in latex
    assert balanced(changed)
    assert "&" not in changed
    assert module.NEXT_CLAIM not in changed
    for start in (m.start() for m in re.finditer(re.escape(changed), latex)):
        before, after = latex[:start], latex[start + len(changed) :]
        assert not after[:1].isalpha() or not changed[-1].isalpha(), "it would end inside a command"
        assert not after.lstrip().startswith(("^", "_", "'")), "its script would be left outside the frame"
        assert not before.rstrip().endswith(("\\", "^", "_")), "a script or command would lose its argument"
        assert not inside_a_script(before), "a frame there is taller than the line: change the whole term"


@pytest.mark.parametrize("name", STEPS)
def test_typesetting_adds_a_frame_and_nothing_else(name):
    step = STEPS[name]
    shown = typeset(step)
    assert shown.count(r"\boxed") == step.latex.count(step.changed)
    assert shown.count("#D55E00") == shown.count(r"\boxed")
    bare = shown.removeprefix(r"\begin{gathered} ").removesuffix(r" \end{gathered}")
    rows = bare.split(r", \\[6pt] ")
    assert all(balanced(row) for row in rows)
    assert module.NEXT_CLAIM.join(rows).replace(FRAME % step.changed, step.changed) == step.latex
    assert (r"\begin{gathered}" in shown) == (r"\end{gathered}" in shown) == (len(rows) > 1)


def test_nothing_changed_nothing_framed():
    step = dataclasses.replace(STEPS["dpo.loss"], changed="")
    assert typeset(step) == step.latex


def test_the_equation_is_an_output_that_every_frontend_typesets(walk):
    walk.jump.value = 5
    (output,) = walk.equation.outputs
    assert output["output_type"] == "display_data"
    assert output["data"]["text/latex"] == f"$$\n{walk.latex}\n$$"
    assert FRAME % DERIVATIONS["dpo"].steps[5].changed in walk.latex


# Walking.


@pytest.mark.parametrize("name", DERIVATIONS)
def test_next_walks_through_all_steps_and_every_one_holds(name):
    derivation = DERIVATIONS[name]
    walk = widgets.step_through(derivation)
    entered = []
    for number, step in enumerate(derivation.steps, 1):
        assert walk.step is step
        assert walk.jump.value == number - 1
        kind = "residual" if step.relation == "=" else "violation"
        residual = step.residual(walk.world, beta=0.5, alpha=0.5)
        how = ", by definition" if step.by_definition else ""
        assert walk.verdict.value == (
            f"<b>Step {number} of {len(derivation.steps)}: {kind} {residual:.1e}: holds{how}</b>"
        )
        assert walk.latex == typeset(step)
        assert module._text(f"{number}. {step.title}.") in walk.words.value
        assert module._text(step.words) in walk.words.value
        facts = walk.facts.value
        assert f"<b>New assumption:</b> {module._text(step.assumption) or 'none'}" in facts
        assert all(f"({n}) {module._text(text)}" in facts for n, text in entered)
        assert facts.count("(") >= len(entered)
        assert f"<b>Source:</b> {step.source}" in facts
        assert (code_location(step.implements) if step.implements else "no function of its own") in facts
        entered += [(number, step.assumption)] if step.assumption else []
        assert walk.previous_button.disabled == (number == 1)
        assert walk.next_button.disabled == (number == len(derivation.steps))
        walk.next_button.click()
    walk.previous_button.click()
    assert walk.jump.value == len(derivation.steps) - 2


@pytest.mark.parametrize("name", sorted({step.implements for step in STEPS.values() if step.implements}))
def test_code_location_leads_to_the_definition(name):
    path, _, line = code_location(name).rpartition(":")
    text = (Path(__file__).parents[2] / path).read_text().splitlines()[int(line) - 1]
    assert re.match(rf"\s*(def |class )?{name.rpartition('.')[2]}\b", text), text


# The world and the knobs.


def test_sliders_change_world_and_numbers(walk):
    walk.jump.value = 6
    walk.v.value, walk.t.value, walk.beta.value, walk.alpha.value = 4, 2, 0.1, 1.5
    assert (walk.world.vocab_size, walk.world.horizon) == (4, 2)
    assert "World 0: V = 4, T = 2, 2 prompts, 8 states, " in walk.world_text.value
    assert "beta = 0.1, alpha = 1.5, guide_beta = 1, margin = 0.5" in walk.world_text.value
    residual = walk.step.residual(walk.world, beta=0.1, alpha=1.5)
    assert f"Step 7 of 12: residual {residual:.1e}: holds" in walk.verdict.value


@pytest.mark.parametrize("knob", ["beta", "alpha", "guide_beta", "margin"])
def test_every_hyperparameter_reaches_the_step(knob):
    def sides(world, hyper):
        return torch.tensor([getattr(hyper, knob)]), torch.zeros(1)

    echo = dataclasses.replace(STEPS["dpo.loss"], sides=sides)
    walk = widgets.step_through(derivation_of(echo), **{knob: 0.25})
    assert "Step 1 of 1: residual 2.5e-01: does NOT hold" in walk.verdict.value
    if knob in ("beta", "alpha"):
        getattr(walk, knob).value = 1.25
        assert "residual 1.2e+00: does NOT hold" in walk.verdict.value


def test_beta_and_alpha_follow_the_drag_where_a_residual_comes_at_once(monkeypatch):
    clock = [0.0]

    def taking(seconds):
        def sides(world, hyper):
            clock[0] += seconds
            return torch.zeros(1), torch.zeros(1)

        return dataclasses.replace(STEPS["dpo.loss"], sides=sides)

    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    walk = widgets.step_through(derivation_of(taking(0.001), taking(0.09), taking(0.14)))
    for index, live in enumerate((True, True, False)):
        walk.jump.value = index
        for slider in (walk.beta, walk.alpha):
            slider.value = slider.value / 2 + 0.1 * index
            assert (walk.beta.continuous_update, walk.alpha.continuous_update) == (live, live), index
    walk.jump.value = 0
    assert walk.beta.continuous_update
    assert not walk.v.continuous_update
    assert not walk.t.continuous_update


def test_another_world_is_the_next_seed(walk):
    before = walk.world
    walk.another.click()
    assert "World 1: V = 3" in walk.world_text.value
    assert torch.equal(walk.world.reward, TokenWorld(3, 3, seed=1, num_prompts=2).reward)
    assert not torch.equal(walk.world.reward, before.reward)


def test_sliders_keep_the_other_settings_of_a_given_world():
    world = TokenWorld(6, 1, seed=7, eos=False, num_prompts=1, temperature=0.5, reward_scale=2.0)
    walk = widgets.step_through(DERIVATIONS["dpo"], world, beta=7.0, alpha=3.0)
    assert torch.equal(walk.world.reward, world.reward)
    assert torch.equal(walk.world.ref_logps, world.ref_logps)
    assert (walk.v.value, walk.t.value, walk.beta.value, walk.alpha.value) == (6, 1, pytest.approx(7.0), 3.0)
    walk.v.value = 2
    assert "World 7: V = 2, T = 1, 1 prompt, " in walk.world_text.value
    assert not walk.world.eos
    assert walk.world.reward_scale == 2.0


def test_a_step_that_does_not_hold_says_so():
    good, equal = STEPS["dpo.loss"], torch.zeros(2)
    bad = dataclasses.replace(good, sides=lambda w, h: (equal, equal + 1e-6))
    bound = dataclasses.replace(good, sides=lambda w, h: (equal - 1, equal), relation="<=")
    lost = dataclasses.replace(good, sides=lambda w, h: (equal / 0, equal / 0))
    walk = widgets.step_through(derivation_of(bad, bound, lost))
    said = []
    for index in range(3):
        walk.jump.value = index
        said.append(walk.verdict.value)
    assert "Step 1 of 3: residual 1.0e-06: does NOT hold" in said[0]
    assert "Step 2 of 3: violation 0.0e+00: holds" in said[1]
    assert "Step 3 of 3: residual nan: does NOT hold" in said[2]


def test_a_world_too_large_is_refused_in_words_and_can_be_left():
    walk = widgets.step_through(DERIVATIONS["dpo"], TokenWorld(5, 4, seed=0, num_prompts=100))
    assert "Step 1 of 12: not run: 11,594,000 pairs of up to 4 tokens do not fit" in walk.verdict.value
    assert "V = 5, T = 4 is too large" in walk.world_text.value
    assert walk.measure_button.disabled
    walk.jump.value = 11
    assert walk.measure_button.disabled
    walk.t.value = 2
    assert "holds" in walk.verdict.value
    assert not walk.measure_button.disabled


def test_discount_is_said_where_it_matters():
    walk = widgets.step_through(DERIVATIONS["token_mdp"], TokenWorld(3, 2, seed=0, gamma=0.9))
    assert "residual" in walk.verdict.value
    assert "gamma = 0.9" in walk.world_text.value
    walk.jump.value = 11
    assert "not run: it holds at gamma = 1, this world has gamma = 0.9" in walk.verdict.value
    assert walk.measure_button.disabled


def test_errors_of_a_step_are_not_swallowed():
    def sides(world, hyper):
        if world.seed == 1:
            raise ValueError("a defect")
        return torch.zeros(1), torch.zeros(1)

    walk = widgets.step_through(derivation_of(dataclasses.replace(STEPS["dpo.loss"], sides=sides)))
    walk.seed = 1
    with pytest.raises(ValueError, match="a defect"):
        walk.v.value = 4


def test_measuring(walk):
    assert walk.measure_button.disabled
    assert walk.measured.value == "This step has no further numbers."
    walk.jump.value = 10
    assert not walk.measure_button.disabled
    assert walk.measured.value == ""
    walk.measure_button.click()
    for name, value in walk.step.measure(walk.world).items():
        assert f"{module._text(name)} = {value:.4g}" in walk.measured.value
    walk.beta.value = 1.0
    assert walk.measured.value == "", "numbers of another beta may not stay"
    walk.jump.value = 5
    walk.measure_button.click()
    assert ">symbolically (sympy), the two sides differ by 0<" in walk.measured.value


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"alpha": -1.0}])
def test_wrong_hyperparameters(wrong):
    with pytest.raises(ValueError, match="must be above 0"):
        widgets.step_through(DERIVATIONS["dpo"], **wrong)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="derivation is 'dpo': pass a Derivation"):
        widgets.step_through("dpo")
    with pytest.raises(TypeError, match="guide"):
        widgets.step_through(DERIVATIONS["dpo"], guide=1.0)


# What is displayed.


def test_it_displays_controls_and_table_as_two_outputs(walk, monkeypatch):
    shown = []
    monkeypatch.setattr(module, "display", shown.append)
    walk._ipython_display_()
    box, table = shown
    assert isinstance(box, ipywidgets.VBox)
    assert isinstance(table, Markdown)
    assert table.data == walk.table
    assert len(repr(box)) <= 110, "a longer text is cut off where there is no kernel"


def test_every_control_is_described_and_a_new_world_waits_for_the_release(walk):
    def inside(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from inside(child)

    controls = [
        part for part in inside(walk.box) if hasattr(part, "disabled") and not isinstance(part, ipywidgets.HTML)
    ]
    named = (walk.previous_button, walk.next_button, walk.jump, walk.v, walk.t, walk.beta, walk.alpha)
    assert set(controls) == {*named, walk.another, walk.measure_button}
    assert all(control.description for control in controls)
    waits = {control for control in controls if not getattr(control, "continuous_update", True)}
    assert waits - {walk.beta, walk.alpha} == {walk.v, walk.t}
    assert any("Keyboard" in part.value for part in inside(walk.box) if isinstance(part, ipywidgets.HTML))


@pytest.mark.parametrize("name", DERIVATIONS)
def test_static_table(name):
    derivation = DERIVATIONS[name]
    walk = widgets.step_through(derivation)
    count = len(derivation.steps)
    assert walk.table.startswith(
        f"<details>\n<summary>All {count} steps with their residuals (works without a kernel)</summary>\n\nWorld 0: V = 3"
    )
    assert walk.table.endswith("\n\n</details>\n")
    rows = [line for line in walk.table.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == count
    for number, (step, row) in enumerate(zip(derivation.steps, rows, strict=True), 1):
        assert len(re.findall(r"(?<!\\)\|", row)) == 4, "a bare | would end the cell"
        residual = step.residual(walk.world)
        kind = "residual" if step.relation == "=" else "violation"
        how = ", by definition" if step.by_definition else ""
        assert row.startswith(f"| {number} | {kind} {residual:.1e}: holds{how} | **{module._escape(step.title)}**<br>$")
        formulas = re.findall(r"\$\\displaystyle ([^$]*)\$", row)
        assert row.count("$") == 2 * len(formulas) == 2 * len(step.latex.split(module.NEXT_CLAIM))
        assert all(balanced(formula) and "<" not in formula for formula in formulas)
        for text in (step.words, step.source, step.assumption):
            assert module._escape(text) in row
        assert not step.implements or code_location(step.implements) in row
    assert len(walk.table) < 15_000


def test_the_table_keeps_the_world_it_was_made_in(walk):
    before = walk.table
    walk.another.click()
    assert walk.table == before
    assert "does NOT hold" in static_table(walk.derivation, ["residual 1.0e+00: does NOT hold"] * 12, "")
