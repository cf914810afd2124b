"""benchmarks/: contestants agree, times and goals are read right, a killed run keeps what it had."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import contestants, goals, loops, measure, pocket, report, run, sections
from benchmarks.cases import Shape, build, make_batch

TINY = Shape(vocab=97, pairs=2, length=16, layers=1, width=16)


@pytest.mark.parametrize("name", contestants.CONTESTANTS)
def test_contestants_agree(name):
    entries = contestants.available(name)
    found = measure.check_agreement(entries, build(TINY, guide=name == "tgdpo"))
    assert found.keys() == entries.keys() - {"textbook"}
    assert all(0 <= value <= 1e-5 for differences in found.values() for value in differences.values())


@pytest.mark.parametrize(("scale", "what"), [(1.001, "loss"), (None, "gradient")])
def test_a_contestant_that_computes_something_else_is_refused(scale, what):
    entries = contestants.available("dpo")

    def wrong(case):
        loss = entries["fused"](case)
        return scale * loss if scale else loss.detach() + 1.001 * (loss - loss.detach())  # the value is right

    with pytest.raises(measure.Disagreement, match=f"wrong differs from textbook in its {what}"):
        measure.check_agreement({"textbook": entries["textbook"], "wrong": wrong}, build(TINY))


def test_who_disagrees_or_breaks_is_written_down_where_that_is_asked_for():
    entries = contestants.available("dpo")

    def breaks(case):
        raise RuntimeError("no kernel for this card")

    of = {"textbook": entries["textbook"], "breaks": breaks, "wrong": lambda case: 2 * entries["fused"](case)}
    found = measure.check_agreement(of | {"fused": entries["fused"]}, build(TINY), catch=Exception)
    assert found["breaks"] == {"refused": "RuntimeError: no kernel for this card"}
    assert found["wrong"]["loss"] == pytest.approx(1.0)
    assert "Disagreement: wrong differs from textbook in its loss by 1.0e+00" in found["wrong"]["refused"]
    assert "refused" not in found["fused"]


def test_the_batch_is_as_ragged_as_stated():
    batch = make_batch(Shape(vocab=50257))
    response, padding = (batch.labels >= 0).float().mean(), 1 - batch.attention_mask.float().mean()
    assert response.item() == pytest.approx(0.60, abs=0.005)
    assert padding.item() == pytest.approx(0.36, abs=0.005)
    assert make_batch(Shape(vocab=97, ragged=False)).attention_mask.all()


def test_the_rounds_rotate():
    calls = []
    times = measure.interleave({name: partial(calls.append, name) for name in "abc"}, 3)
    assert "".join(calls) == "abcbcacab"
    assert all(len(values) == 3 for clocks in times.values() for values in clocks.values())


def test_ratios_are_taken_within_a_round():
    times = {"a": {"cpu_s": [1.0, 10.0, 3.0]}, "b": {"cpu_s": [2.0, 40.0, 4.0]}}
    assert measure.ratio(times, "a", "b")["median"] == 0.5  # of 0.5, 0.25, 0.75; the medians would give 0.75


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_peak_memory_sees_the_full_logits():
    shape = replace(TINY, vocab=16384, pairs=4, length=64)
    peak = {label: measure._peak_here(shape, "tdpo2", label, 1) for label in ("textbook", "fused", "bodies")}
    one = 8 * 64 * 16384 * 4 / 2**20  # MiB of one (N, T, V) tensor
    assert peak["textbook"] > 4 * one
    assert peak["bodies"] < one


def test_far_apart_logits():
    found = sections.finite(sections.Plan())["finite"]
    assert not found["textbook"]
    assert all(found[label] for label in contestants.OURS)


def _timed(**seconds) -> dict:
    return {label: {"cpu_s": [value] * 3, "wall_s": [value] * 3} for label, value in seconds.items()}


def test_goals():
    step = {"times": _timed(textbook=10.0, trl=16.0, fused=4.0), "memory_mib": {"textbook": 1000.0, "fused": 130.0}}
    rows = {row["text"]: row for row in goals.evaluate({"tdpo2-50257": step})}
    time, memory, trl = [row for row in rows.values() if row["number"] == 1][:3]
    assert (time["measured"], time["holds"]) == (0.4, True)
    assert (memory["measured"], memory["holds"]) == (0.13, False)
    assert (trl["measured"], trl["holds"]) == (0.25, False)
    assert all(row["holds"] is None for row in rows.values() if row["number"] > 1)
    assert "8% over" in report.goals_table(list(rows.values()))


@pytest.fixture
def small(monkeypatch):
    """Three sections of tiny shapes; the last one fails."""

    def fail():
        raise measure.Disagreement("on purpose")

    def every(plan):
        shape = partial(sections.step, "tdpo2", TINY, replace(plan, memory=False))
        return {"tdpo2-97": shape, "finite": partial(sections.finite, plan), "tdpo1-97": fail}

    monkeypatch.setattr(sections, "every", every)


def test_a_run_that_fails_keeps_what_it_had(small, tmp_path):
    with pytest.raises(measure.Disagreement):
        run.run(tmp_path, repetitions=2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["sections"]) == ["tdpo2-97", "finite"]
    text = (tmp_path / "README.md").read_text()
    assert "## TDPO2, V = 97" in text
    assert results["about"]["versions"]["torch"] in text
    assert text == report.readme(results)  # from results.json alone


def test_a_readme_of_the_users_is_not_replaced(small, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README\.md is not of these benchmarks"):
        run.run(tmp_path, repetitions=2)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_repeats_one_section(small, tmp_path):
    run.run(tmp_path, only=["tdpo2"], repetitions=2)
    before = json.loads((tmp_path / "results.json").read_text())
    run.run(tmp_path, only=["finite"])
    after = json.loads((tmp_path / "results.json").read_text())
    assert after["sections"]["tdpo2-97"] == before["sections"]["tdpo2-97"]
    assert "finite" in after["sections"]


def test_chosen_contestants_are_printed_not_written(small, tmp_path, capsys):
    run.run(tmp_path, only=["tdpo2"], labels=["fused"], repetitions=1)
    assert "**ours**" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_unknown_section_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no section is called nonsense; there are tdpo2-50257"):
        run.run(tmp_path, only=["nonsense"])


def test_the_command_line_names_the_sections(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "nonsense"])
    assert "ValueError: no section is called nonsense" in capsys.readouterr().err


def test_scaling_figure():
    times = _timed(textbook=8.0, fused=2.0, b=0.125, u=0.25)
    memory = {"textbook": 900.0, "fused": 200.0, "bodies": 100.0}
    points = [{"value": value, "times": times, "memory_mib": memory, "response_positions": 9} for value in (8, 16)]
    figure = report.scaling_figure([{"kind": "scaling", "axis": "pairs", "objective": "tdpo2", "points": points}])
    above, below = figure.axes
    assert {tuple(line.get_ydata()) for line in above.lines} == {(8.0, 8.0), (2.0, 2.0), (1.5, 1.5)}  # 4b + 4u
    assert {tuple(line.get_ydata()) for line in below.lines} == {(900.0, 900.0), (200.0, 200.0), (100.0, 100.0)}
    assert all("s" in ax.get_ylabel() or "MiB" in ax.get_ylabel() for ax in figure.axes)


def test_whole_runs_end_at_the_same_weights(small_stage):
    found = pocket.whole_runs(1, small_stage, objectives=("tdpo2",), updates=2, batch_size=4)
    assert 0 < found["gaps"]["tdpo2"] <= pocket.TOLERANCE
    assert list(found["times"]) == ["tdpo2/textbook", "tdpo2/default"]


TINY_LOOP = loops.Loop("tiny", together=True, pairs=12, updates=2)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


def test_whole_loops_make_the_same_updates(threads):
    found = loops.whole_loops(TINY_LOOP, 2, threads=threads, run=loops._here)
    ran = [label for label in loops.LOOPS if not label.startswith("dpo/trl") or not contestants.MISSING["trl"]]
    assert list(found["times"]) == ran
    assert found["gaps"].keys() == set(ran)
    assert all(len(values) == 2 for clocks in found["times"].values() for values in clocks.values())
    results = {"about": run.about(), "goals": goals.evaluate({}), "sections": {}}
    results["sections"]["loop-tiny"] = found | {"load": [0, 0], "commit": "none"}
    page = report.readme(json.loads(json.dumps(results)))
    assert "## Whole training loops, tiny" in page
    assert "| TDPO2 | **`fit`**, reference cached |" in page


def test_a_loop_runs_in_a_process_of_its_own(threads):
    found = loops.alone(TINY_LOOP, "tdpo2/fit", threads)
    assert found["losses"] == loops._here(TINY_LOOP, "tdpo2/fit", threads)["losses"]
    assert found["wall_s"] > 0


def test_loops_learn_the_same_and_who_does_not_is_refused(threads):
    fast = replace(TINY_LOOP, updates=1, pairs=6)
    assert loops.LOOPS["dpo/fit"](fast, clock=loops.Clock()) == pytest.approx([0.6931472], abs=1e-6)
    calls = []

    def other(loop, label, threads):
        calls.append(label)
        return {"losses": [0.5 if label == "dpo/fit" else 0.6]}

    with pytest.raises(
        measure.Disagreement, match=r"dpo/fit: its losses \[0\.5\] are not those of the first loop, \[0\.6\]"
    ):
        loops.whole_loops(TINY_LOOP, 9, threads=1, run=other)
    assert len(calls) == len(set(calls))  # one round


@pytest.mark.parametrize("together", [True, False])
def test_pairs_of_a_loop_are_as_stated(together):
    loop = loops.Loop(pairs=12, updates=40, together=together)
    pairs = loops.make_pairs(loop, 49152)
    lengths = torch.tensor([len(pair.chosen_ids) for pair in pairs])
    assert (lengths == 48).float().mean().item() == pytest.approx(0.8, abs=0.06)
    assert {len(pair.prompt_ids) for pair in pairs} == set(range(2, 9))
    updates = loops.windows(loop, pairs)
    assert [len(window) for window in updates] == [12] * 40
    for window in updates:
        assert len({tuple(pair.prompt_ids) for pair in window}) == (2 if together else 12)
        sides = {tuple(ids) for pair in window for ids in (pair.chosen_ids, pair.rejected_ids)}
        assert len(sides) == (8 if together else 24)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_memory_of_a_loop_is_what_lies_above_the_state(threads):
    clock, model = loops.Clock(), torch.nn.Linear(1, 1)
    clock.start(model)
    torch.ones(64 << 18).sum()  # 64 MiB
    clock.stop()
    assert clock.found["memory_mib"] == pytest.approx(64, abs=8)
    large = torch.nn.Linear(2048, 2048)  # 16 MiB, of which 48 are subtracted: gradients and two moments
    clock.start(large)
    torch.ones(64 << 18).sum()
    clock.stop()
    assert clock.found["memory_mib"] == pytest.approx(16, abs=8)


def test_goals_of_loops():
    times = {f"tdpo2/{name}": {"wall_s": [value] * 2} for name, value in (("authors", 1.0), ("fit", 0.4))}
    times["tdpo2/fit-cached"] = times["tdpo2/fit"]
    section = {"times": times, "memory_mib": {"tdpo2/fit": 60.0, "tdpo2/authors": 100.0}}
    rows = [row for row in goals.evaluate({"loop-smollm2-135m-imdb-prompts": section}) if row["measured"] is not None]
    assert [(row["number"], row["measured"], row["holds"]) for row in rows] == [
        (7, 0.4, True), (7, 0.4, True), (7, 0.6, False), (8, 0.4, True),
    ]  # fmt: skip
