"""Every exercise of the course: its solution passes, its stub is not attempted, its wrong answers are named."""

from __future__ import annotations

import ast
import functools
import html
import importlib
import importlib.util
import json
import pkgutil
import re

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from IPython.core.inputtransformer2 import TransformerManager

from tpo_course import cards, exercises, notebooks
from tpo_course.exercise import SOLUTIONS, Exercise, solution_source
from tpo_course.quiz import Quiz
from tpo_lib import TrainConfig, fit
from tpo_lib.losses import OBJECTIVES

NOTEBOOKS = SOLUTIONS.parent
MODULES = {
    info.name: importlib.import_module(f"tpo_course.exercises.{info.name}")
    for info in pkgutil.iter_modules(exercises.__path__)
}
TASKS = [
    pytest.param(module, task, id=task.key) for module in MODULES.values() for task in module.chapter.tasks.values()
]
EXERCISES = [each for each in TASKS if each.values[1].kind == "function"]
OTHERS = [each for each in TASKS if each.values[1].kind != "function"]


def _notebook(module) -> list[dict]:
    (path,) = NOTEBOOKS.glob(f"*_{module.chapter.file.stem}.ipynb")
    return json.loads(path.read_text())["cells"]


def _solution(exercise: Exercise):
    spec = importlib.util.spec_from_file_location(exercise.chapter, SOLUTIONS / f"{exercise.chapter}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, exercise.name)


def test_there_are_exercises_for_every_module():
    for name, module in MODULES.items():
        assert len(module.chapter.tasks) >= 2, name
        assert sum(isinstance(value, Quiz) for value in vars(module).values()) == 1, name


@pytest.mark.parametrize("name", MODULES)
def test_words_and_functions_have_the_same_names(name):
    """Hints, messages and questions are compared when the module is imported."""
    chapter = MODULES[name].chapter
    assert list(chapter.words) == [*chapter.tasks, "quiz"]
    assert all(getattr(MODULES[name], key) is task for key, task in chapter.tasks.items())


@pytest.mark.parametrize("name", MODULES)
def test_words_are_rendered(name):
    """No Markdown is left over in what a learner reads, and no HTML tag is left open."""
    shown = [*MODULES[name].chapter.tasks.values(), MODULES[name].quiz]
    pages = [page for v in shown for page in (v._repr_html_(), *(m.message for m in getattr(v, "mistakes", ())))]
    for page in (re.sub("(?s)<pre>.*?</pre>", "", page) for page in pages):
        assert not re.search(r"`|^#|- \[[ x]\]|\*\*\w|\w\*\*$", page, re.MULTILINE), page
        for tag in ("code", "i", "b", "sub", "sup", "p", "details"):
            assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>"), f"<{tag}> in {page}"


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_the_solution_passes(module, exercise):
    assert getattr(module, exercise.name) is exercise
    assert exercise(_solution(exercise)).status == "correct"


OPERATIONS = ast.Call | ast.BinOp | ast.UnaryOp | ast.Compare | ast.Subscript


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_no_hint_is_the_answer(module, exercise):
    """Code in a hint is a name or a call: no expression of three operations, and none of two that the solution holds."""
    solution = re.sub(r"\s", "", solution_source(SOLUTIONS / f"{exercise.chapter}.py", exercise.name))
    for hint in exercise.hints:
        for span in re.findall(r"<code>(.*?)</code>", hint):
            code = html.unescape(span)
            try:
                count = sum(isinstance(node, OPERATIONS) for node in ast.walk(ast.parse(code)))
            except SyntaxError:  # a piece such as ".detach()"
                count = code.count("(")
            most = 1 if re.sub(r"\s", "", code) in solution else 2
            assert count <= most, f"{exercise.key}: {code}"


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_every_mistake_gets_its_own_message(module, exercise):
    assert len({mistake.message for mistake in exercise.mistakes}) == len(exercise.mistakes) >= 4
    for mistake in exercise.mistakes:
        for way in mistake.ways:
            verdict = exercise.judge(way)
            assert (verdict.status, verdict.message, verdict.mistakes) == ("wrong", mistake.message, (mistake.name,))


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_the_notebook_shows_card_stub_and_check(module, exercise):
    """The cell tagged `exercise:NAME` holds the stub; a card and a call of the checker stand around it."""
    cells, _ = _cells(module, exercise)
    stubs = [c for c in cells if f"exercise:{exercise.name}" in c["metadata"].get("tags", [])]
    assert len(stubs) == 1, f"{module.__name__}: one cell of its notebook must carry the tag exercise:{exercise.name}"
    namespace: dict = {}
    exec(TransformerManager().transform_cell("".join(stubs[0]["source"])), namespace)
    assert exercise(namespace[exercise.name]).status == "not attempted"


@pytest.mark.parametrize(("module", "exercise"), EXERCISES)
def test_only_its_checker_calls_an_answer(module, exercise):
    """So that Run All survives an answer that is missing, or half done."""
    cells, _ = _cells(module, exercise)
    others = ("".join(c["source"]) for c in cells if f"exercise:{exercise.name}" not in c["metadata"].get("tags", []))
    assert [source for source in others if re.search(rf"(?<![\w.]){exercise.name}\(", source)] == []


@pytest.mark.parametrize(
    "chapter", ["01_preferences", "02_dpo", "03_token_mdp", "04_tdpo", "05_tgdpo", "05b_tgdpo_practice"]
)
def test_every_section_has_something_to_do(chapter):
    """A task, a widget, an equation to break, a prediction, or a question in words."""
    cells = json.loads((NOTEBOOKS / f"{chapter}.ipynb").read_text())["cells"]
    _, *sections = re.split(r"^## ", "\n".join("".join(cell["source"]) for cell in cells), flags=re.MULTILINE)
    asks = re.compile(r"\bcheck\.\w|\bwidgets\.\w|\.ask\(|\*Predict|\?")
    idle = [section.splitlines()[0] for section in sections if not asks.search(section)]
    assert idle in (["Recap"], [])
    assert len(sections) > 5


@pytest.mark.parametrize(("module", "task"), OTHERS)
def test_the_notebook_shows_the_other_kinds(module, task):
    _, code = _cells(module, task)
    if task.kind == "predict":
        asked, told = (
            next(i for i, s in enumerate(code) if f"check.{task.name}{what}(" in s) for what in ("", ".reveal")
        )
        assert asked < told


def _cells(module, task) -> tuple[list[dict], list[str]]:
    """The cells of the task's notebook, and the sources of those with code, among them its card and a call of its checker."""
    cells = _notebook(module)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    card = any(source.strip() == f"check.{task.name}" for source in code)
    assert card, "no card"
    assert any(f"check.{task.name}(" in source for source in code), "no call of the checker"
    return cells, code


@pytest.mark.parametrize(("module", "task"), OTHERS)
def test_the_other_kinds_accept_what_is_right_and_name_what_is_wrong(module, task):
    assert task.judge().status == "not attempted"
    if task.kind == "open_ended":
        assert len(task.rubric) >= 2
        assert task.judge("text", points=[points for points, _ in task.rubric]).status == "assessed"
        return
    right, wrong = ANSWERS[task.kind](task)
    assert task.judge(right).status == "correct"
    assert len(wrong) >= 2
    for name, answer in wrong.items():
        verdict = task.judge(answer)
        assert (verdict.status, name in verdict.mistakes, len(cards.plain(verdict.message)) > 20) == (
            "wrong",
            True,
            True,
        ), name


def _of_choices(task) -> tuple:
    return sorted(task.right), {c.name: [c.name] for c in task.choices if c.name not in task.right}


def _of_order(task) -> tuple:
    right, wrong = [c.name for c in task.choices], {}
    for name, ((first, then), _) in task.early.items():  # exchange the two
        other = {first: then, then: first}
        wrong[name] = [other.get(step, step) for step in right]
    return right, wrong


def _of_blanks(task) -> tuple:
    wrong = {
        name: [piece or want for piece, want in zip(pieces, task.right, strict=True)]
        for name, (pieces, _) in task.wrong.items()
    }
    return list(task.right), wrong


def _of_breaks(task) -> tuple:
    found = task.residuals()
    assert found.pop("") < 1e-9
    assert all(value < 1e-9 or value > 1e-3 for value in found.values()), found
    standing = [name for name, value in found.items() if value < 1e-9]
    assert 0 < len(standing) < len(found)  # something to predict
    return standing, {name: sorted({*standing} ^ {name}) for name in found}


def _of_predictions(task) -> tuple:
    if isinstance(task.truth, str):
        return task.truth, {c.name: c.name for c in task.choices if c.name != task.truth}
    return task.truth, {name: value for name, (value, _) in task.wrong.items()}


ANSWERS = {
    "choose": _of_choices,
    "name_the_bug": _of_choices,
    "order": _of_order,
    "complete": _of_blanks,
    "break_it": _of_breaks,
    "predict": _of_predictions,
}


@pytest.mark.parametrize("name", MODULES)
def test_every_chapter_asks_for_more_than_functions(name):
    kinds = [task.kind for task in MODULES[name].chapter.tasks.values()]
    structured = sum(kind in ("choose", "order", "complete", "break_it") for kind in kinds)
    assert structured >= 2
    assert "open_ended" in kinds
    assert "predict" in kinds or name == "your_own_data"


@pytest.mark.parametrize("name", MODULES)
def test_the_notebook_ends_with_its_quiz(name):
    module = MODULES[name]
    quiz = next(key for key, value in vars(module).items() if isinstance(value, Quiz))
    assert any("".join(cell["source"]).strip() == f"check.{quiz}" for cell in _notebook(module))


LOSSES = [each for each in EXERCISES if each.values[1].name.removesuffix("_loss") in OBJECTIVES]


@pytest.mark.parametrize(("module", "exercise"), LOSSES)
def test_a_learners_loss_is_what_trains_once_it_is_right(module, exercise, capsys):
    name, solution, calls = exercise.name.removesuffix("_loss"), _solution(exercise), []
    assert exercise.trains(lambda **given: None, name) is None
    assert f"not attempted: tpo_lib.losses.{name} trains instead" in capsys.readouterr().out

    @functools.wraps(solution)  # takes what the exercise gives, and not all hyperparameters
    def mine(**given):
        calls.append(given)
        return solution(**given)

    loss = exercise.trains(mine, name)
    assert "the loss that trains is yours" in capsys.readouterr().out
    guided = {"guide_beta": 0.1} if name == "tgdpo" else {}
    config = TrainConfig(loss_type=name, batch_size=4, max_steps=2, lr=1e-2, warmup_steps=0, device="cpu", **guided)
    guide = tiny.llama(seed=1) if guided else None
    calls.clear()
    ours, yours = (
        fit(config, tiny.llama(), tiny.llama(), tiny.pairs(8), guide=guide, loss=one, progress=False).policy
        for one in (None, loss)
    )
    assert len(calls) >= 2  # updates
    for a, b in zip(ours.parameters(), yours.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_chapters_train_every_loss_that_is_written_in_them():
    for module, exercise in (each.values for each in LOSSES):
        code = ["".join(cell["source"]) for cell in _notebook(module) if cell["cell_type"] == "code"]
        (taken,) = [source for source in code if f"check.{exercise.name}.trains({exercise.name}" in source]
        assert any("fit(" in source for source in code[code.index(taken) :])


def test_a_cell_goes_on_with_the_learners_answer_once_it_is_right(capsys):
    exercise = MODULES["preferences"].chapter.tasks["preference_nll"]
    mine = _solution(exercise)
    for answer, said in ((..., "not attempted"), (lambda reward_w, reward_l: reward_w.mean(), "wrong")):
        assert exercise.used(answer) is exercise.right
        told = f"preference_nll is {said}: the course's own is used. Solve it and run this cell again\n"
        assert capsys.readouterr().out == told
    assert exercise.used(mine) is mine
    assert capsys.readouterr().out == "preference_nll is correct: yours is used\n"


@pytest.mark.parametrize("path", notebooks.course(), ids=lambda path: path.stem)
def test_no_chapter_needs_the_right_answer_in_plain_sight(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not re.search(r"\bcheck\w*\.\w+\.right\b", "".join(cell["source"])), (
            f"{cell['id']}: take `.used(answer)`"
        )


def _spent(rewards, mask, gamma):
    return (rewards * mask).cumsum(1)


def _plain_total(rewards, mask, gamma):
    return (rewards * mask).sum(1, keepdim=True).expand_as(rewards)


def _after_it(rewards, mask, gamma):
    total, columns = torch.zeros_like(rewards[:, 0]), []
    for column in (rewards * mask).unbind(1)[::-1]:
        columns.append(total)
        total = column + gamma * total
    return torch.stack(columns[::-1], 1) * mask


def _rolled(rewards, values, mask, gamma):
    return torch.where(mask, rewards + gamma * torch.roll(values, 1, dims=1) - values, 0.0)


def _guided(weigh):
    def loss(chosen, rejected, beta, alpha, guide_beta):
        sides = []
        for side, sign in ((chosen, 1), (rejected, -1)):
            hat = (guide_beta * (side.guide_logps - side.ref_logps)).detach()
            sides.append(weigh(side, sign * alpha * hat, beta))
        return -F.logsigmoid(sides[0] - sides[1])

    return loss


REAL = [  # (task, what somebody wrote, what it is called)
    ("token_mdp.return_to_go", _spent, "past"),
    ("token_mdp.return_to_go", _plain_total, "whole_return"),
    ("token_mdp.return_to_go", _after_it, "without_own_reward"),
    ("token_mdp.advantages", _rolled, "rolled_backwards"),
    ("token_mdp.advantages", lambda rewards, values, mask, gamma: (rewards - values) * mask, "no_next_value"),
    ("token_mdp.soft_backup", lambda p, q, b: b * ((p + q) / b).logsumexp(-1), "reference_tempered"),
    ("token_mdp.soft_backup", lambda p, q, b: (p + q).logsumexp(-1), "beta_outside"),
    ("preferences.win_probability", lambda w, r: torch.softmax(w - r, dim=0), "softmax_over_batch"),
    ("preferences.win_probability", lambda w, r: torch.softmax(torch.stack([w, r]), dim=1)[0], "softmax_over_batch"),
    ("preferences.preference_nll", lambda w, r: -(w - r).sigmoid().clamp_min(1e-9).log().mean(), "small_constant"),
    ("preferences.preference_nll", lambda w, r: -(w - r).sigmoid().clamp(min=1e-6).log().mean(), "small_constant"),
    (
        "tgdpo_practice.tgdpo_loss",
        _guided(lambda s, x, b: b * ((1 + x).clamp(min=0.01) * s.logps).sum(-1)),
        "no_reference",
    ),
    (
        "tgdpo_practice.tgdpo_loss",
        _guided(lambda s, x, b: b * (x.exp() * (s.logps - s.ref_logps)).sum(-1)),
        "exponential",
    ),
    (
        "tgdpo_practice.tgdpo_loss",
        _guided(lambda s, x, b: b * (1 + x.sum(-1)).clamp(min=0.01) * (s.logps - s.ref_logps).sum(-1)),
        "r_hat_summed",
    ),
    ("tgdpo.largest_alpha", lambda r, m: 0.99 / (r * m).abs().max(), "times_mask"),
    ("preferences.preferred_pairs", lambda s, g: _pairs(s.logit(), g), "gaps_in_logits"),
    ("preferences.preferred_pairs", lambda s, g: _pairs((100 * s).round() / 100, g), "rounded"),
    ("preferences.preferred_pairs", lambda s, g: _pairs((1000 * s).round() / 1000, g), "rounded"),
    ("preferences.preferred_pairs", lambda s, g: _pairs(s.double().round(decimals=4), g), "rounded"),
]


def _gap(scores):
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def _pairs(scores, min_gap):
    gap = _gap(scores)
    return (gap > 0) & (gap >= min_gap)


@pytest.mark.parametrize(("key", "answer", "name"), REAL)
def test_what_people_write_is_called_by_its_name(key, answer, name):
    module, _, task = key.partition(".")
    assert MODULES[module].chapter.tasks[task].judge(answer).mistakes == (name,)


def test_what_was_accepted_wrongly_is_refused():
    pairs, slope = (MODULES["preferences"].chapter.tasks[name] for name in ("preferred_pairs", "nll_gradient"))
    assert "True and False" in pairs.judge(lambda s, g: _pairs(s, g).float()).message

    def by_machine(weights, differences):
        weights = weights.clone().requires_grad_()
        F.softplus(-(differences @ weights)).mean().backward()
        return weights.grad

    assert slope.judge(by_machine).mistakes == ("by_autograd",)


def test_no_rounding_of_scores_is_judged_correct_and_no_right_answer_is_refused():
    pairs = MODULES["preferences"].chapter.tasks["preferred_pairs"]
    for size in (10**digits for digits in range(1, 7)):
        for to in (torch.round, torch.floor, torch.ceil):
            assert pairs.judge(lambda s, g, n=size, to=to: _pairs(to(n * s) / n, g)).status == "wrong", (size, to)
        late = lambda s, g, n=size: _pairs(s, 0.0) & ((n * _gap(s)).round() / n >= g)  # noqa: E731 - min_gap's side alone
        assert size > 10**5 or pairs.judge(late).status == "wrong", size
    by_name = {
        "float32": lambda s, g: _pairs(s.float(), g),
        "float64": lambda s, g: _pairs(s.double(), g),
        "moved over": lambda s, g: (s[:, :, None] > s[:, None, :]) & (s[:, :, None] >= s[:, None, :] + g),
        "near min_gap": lambda s, g: _pairs(s, 0.0) & (_gap(s) >= g - 1e-6),
        "near each other": lambda s, g: _pairs(s, g) & ~torch.isclose(s[:, :, None], s[:, None, :]),
    }
    for name, answer in by_name.items():
        assert pairs.judge(answer).status == "correct", name


def test_bounds_on_the_edge_and_losses_that_do_not_matter_are_told_apart():
    decision = MODULES["your_own_data"].chapter.tasks["decision"]

    def rule(take, worse, below):
        return lambda low, high, matters: torch.where(
            take(low, matters), 1, torch.where(worse(high, matters), -1, torch.where(below(high, matters), 2, 0))
        )

    edge = rule(torch.gt, lambda high, m: high < -m, torch.lt)
    assert decision.judge(edge).mistakes == ("strict",)
    assert decision.judge(rule(torch.ge, lambda high, m: high < 0, torch.lt)).mistakes == ("any_loss",)
    assert decision.judge(rule(torch.ge, lambda high, m: high <= -m, torch.lt)).status == "correct"


def test_a_softmax_in_tiles_never_makes_a_whole_row():
    tiled = MODULES["scale"].chapter.tasks["tiled_logsumexp"]
    for whole in (
        lambda states, weight, columns: (states @ weight.T).logsumexp(-1),
        lambda states, weight, columns: F.linear(states, weight).logsumexp(-1),
        lambda states, weight, columns: torch.stack([(weight @ one).logsumexp(-1) for one in states]),
    ):
        assert tiled.judge(whole).mistakes == ("all_at_once",)

    def running(states, weight, columns):
        peak, total = torch.full((len(states),), -torch.inf, dtype=states.dtype), 0.0
        for tile in weight.split(columns):
            z = F.linear(states, tile)
            new = torch.maximum(peak, z.amax(-1))
            peak, total = new, total * (peak - new).exp() + (z - new[:, None]).exp().sum(-1)
        return peak + total.log()

    assert tiled.judge(running).status == "correct"


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, np.array])
def test_a_list_of_numbers_may_be_a_tensor_and_its_entries_are_counted(form):
    batches, right = MODULES["scale"].chapter.tasks["token_batches"], _solution(MODULES["scale"].token_batches)
    assert batches.judge(lambda lengths, max_tokens: form(right(lengths, max_tokens))).status == "correct"
    last = batches.judge(lambda lengths, max_tokens: form([*right(lengths, max_tokens)[:-1], 7]))
    assert "got 7 (entry 6 of 7)" in last.message


def _checks_padding(same):
    def answer(loss_of, logits, ref_logits, labels):
        new, other = torch.randn(2, len(logits), 2, logits.shape[-1], dtype=logits.dtype)
        wider = (torch.cat(each, dim=1) for each in ((logits, new), (ref_logits, other)))
        return same(loss_of(logits, ref_logits, labels), loss_of(*wider, F.pad(labels, (0, 2), value=-100)))

    return answer


def test_an_invariant_holds_for_every_pair_and_both_ways():
    task = MODULES["break_it"].padding_invariant
    assert task.judge(_checks_padding(lambda a, b: (a - b).abs().max() < 1e-4)).status == "correct"
    assert task.judge(_checks_padding(lambda a, b: torch.isclose(a, b)[0])).mistakes == ("any_pair",)
    assert task.judge(_checks_padding(lambda a, b: torch.isclose(a.sum(), b.sum()))).mistakes == ("mean_compared",)
    for one_way in (lambda a, b: (a - b).max() < 1e-4, lambda a, b: (b - a).max() < 1e-4):
        assert task.judge(_checks_padding(one_way)).status == "wrong"
    assert "True or False is asked for" in task.judge(_checks_padding(torch.isclose)).message


def test_what_is_too_small_is_not_always_a_mean():
    task, right = MODULES["break_it"].name_the_bug, _solution(MODULES["break_it"].name_the_bug)

    def answer(loss, chosen, rejected, beta):
        found = right(loss, chosen, rejected, beta)
        small = loss(chosen, rejected).item() > 0.69 and abs(chosen.logps.grad).max() < beta / 2 - 1e-6
        return 1 if small and found == 8 else found

    def with_gradient(loss, chosen, rejected, beta):
        loss(chosen, rejected).sum().backward()
        return answer(loss, chosen, rejected, beta)

    assert task.judge(with_gradient).mistakes == ("small_is_a_mean",)


def test_of_five_faults_the_first_that_is_left_is_named():
    def loss(logits, ref_logits, labels, beta):
        mask, ids = labels[:, 1:] != -100, labels[:, 1:].clamp_min(0)[..., None]
        scored = (z[:, :-1].softmax(-1).log().gather(-1, ids)[..., 0] for z in (logits, ref_logits))
        policy, ref = scored
        chosen, rejected = (torch.where(mask, policy - ref, 0.0).sum(-1) / mask.sum(-1)).chunk(2)
        return -F.logsigmoid(beta * (chosen - rejected))

    assert MODULES["break_it"].repaired_loss.judge(loss).mistakes == ("mean_and_more",)


def test_a_wrong_value_is_not_told_the_right_one():
    task = MODULES["break_it"].padding_report
    assert repr(task.judge(12)) == "wrong: It is not 12."
    assert "is a str; a single number is asked for" in task.judge("2").message


@pytest.mark.parametrize("name", MODULES)
def test_no_letter_of_a_quiz_is_always_right(name):
    quiz = next(value for value in vars(MODULES[name]).values() if isinstance(value, Quiz))
    places = [[option.right for option in question.options].index(True) for question in quiz.questions]
    assert len(set(places)) > 1, name


def _read(kl, reward, at, roots=np.sqrt, order=None, **beyond):
    order = kl.argsort() if order is None else order
    return np.interp(roots(at), roots(kl[order].numpy()), reward[order].numpy(), **beyond)


def test_a_run_is_read_in_the_order_of_its_kl_and_no_further_than_it_went():
    task, beyond = MODULES["compare"].chapter.tasks["reward_at_kl"], {"left": np.nan, "right": np.nan}
    assert task.judge(lambda kl, reward, at: _read(kl, reward, at, **beyond)).status == "correct"
    for answer, name in (
        (lambda kl, reward, at: _read(kl.sort().values, reward.sort().values, at, **beyond), "sorted_apart"),
        (lambda kl, reward, at: _read(kl.sort().values, reward, at, **beyond), "kl_sorted_alone"),
        (lambda kl, reward, at: _read(kl, reward, at), "held"),
        (lambda kl, reward, at: _read(kl, reward, at) if at <= kl.max() else np.nan, "one_end"),
        (lambda kl, reward, at: _read(kl, reward, at) if kl.min() < at < kl.max() else np.nan, "ends_left_out"),
        (lambda kl, reward, at: _read(kl, reward, at**2, **beyond), "root_on_one_side"),
        (lambda kl, reward, at: _read(kl, reward, at, roots=np.float64, **beyond), "straight_in_nats"),
    ):
        assert task.judge(answer).mistakes == (name,)


def test_an_interval_that_ends_at_zero_contains_it():
    task = MODULES["real_model"].chapter.tasks["carries_over"]

    def product(side):
        return task.judge(lambda small, large: side(small) * side(large))

    assert product(lambda x: torch.where(x[:, 0] * x[:, 1] > 0, x[:, 0].sign(), 0.0)).status == "correct"
    assert product(lambda x: (x[:, 0] > 0).int() - (x[:, 1] < 0).int()).status == "correct"
    assert product(lambda x: (x[:, 0] >= 0).int() - (x[:, 1] <= 0).int()).mistakes == ("bound_of_zero",)
    assert product(lambda x: x.sign().mean(-1)).mistakes == ("bound_of_zero",)
