"""The record of what a learner did: its form, and where it is kept."""

from __future__ import annotations

import json

import pytest

from tpo_course import progress


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("TPO_PROGRESS", raising=False)
    progress.forget()
    yield
    progress.forget()


def test_outside_a_notebook_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    progress.record("a.b", kind="function", status="wrong", mistakes=("swapped",))
    assert progress.file() is None
    assert list(tmp_path.iterdir()) == []
    assert progress.tasks()["a.b"]["mistakes"] == ["swapped"]


def test_in_a_notebook_it_lies_beside_it(monkeypatch, tmp_path):
    class Shell:
        kernel = object()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("IPython.get_ipython", Shell)
    progress.record("a.b", kind="function", status="wrong")
    assert progress.file() == tmp_path / ".progress.json"
    assert progress.read(tmp_path / ".progress.json")["a.b"]["status"] == "wrong"
    monkeypatch.setenv("TPO_PROGRESS", "off")
    assert progress.file() is None


def test_form_of_the_file(monkeypatch, tmp_path):
    path = tmp_path / "kept.json"
    monkeypatch.setenv("TPO_PROGRESS", str(path))
    progress.record("a.b", kind="choose", status="wrong", mistakes=("x", "x", "y"), answer="c")
    progress.record("a.b", kind="choose", status="correct", mistakes=("x",), answer="a")
    progress.record("a.b", kind="choose", status="wrong", mistakes=("z",), answer="c")
    content = json.loads(path.read_text())
    assert list(content) == ["version", "tasks"]
    task = content["tasks"]["a.b"]
    assert task.pop("first") <= task.pop("last")
    assert task == {
        "kind": "choose",
        "status": "correct",  # once solved it stays solved
        "tries": 3,
        "mistakes": ["x", "y", "z"],
        "answer": "c",
        "points": None,
        "of": None,
    }


def test_two_notebooks_and_two_sessions_add_up(monkeypatch, tmp_path):
    path = tmp_path / "kept.json"
    monkeypatch.setenv("TPO_PROGRESS", str(path))
    progress.record("a.b", kind="function", status="wrong")
    progress.forget()  # another kernel knows nothing of it
    progress.record("c.d", kind="function", status="correct")
    progress.record("a.b", kind="function", status="wrong")
    assert {key: task["tries"] for key, task in progress.read(path).items()} == {"a.b": 2, "c.d": 1}
    progress.forget(path)
    assert not path.exists()
    assert progress.read(path) == {} == progress.tasks()


def test_the_truth_seen_later_is_no_second_try():
    progress.record("a.b", kind="predict", status="predicted", answer="+")
    progress.record("a.b", kind="predict", status="wrong", answer="+", mistakes=("minus",), again=False)
    task = progress.tasks()["a.b"]
    assert (task["tries"], task["status"], task["mistakes"]) == (1, "wrong", ["minus"])


@pytest.mark.parametrize("content", ["", "[]", '{"tasks": {}}', '{"version": 2, "tasks": {}}'])
def test_a_file_that_is_not_ours_is_named_and_left_alone(monkeypatch, tmp_path, capsys, content):
    path = tmp_path / "kept.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"kept.json is .* move"):
        progress.read(path)
    monkeypatch.setenv("TPO_PROGRESS", str(path))
    progress.record("a.b", kind="function", status="wrong")  # the learner's work goes on
    assert "kept.json is" in capsys.readouterr().out
    assert path.read_text() == content


def test_unknown_kind_and_status_are_refused():
    with pytest.raises(ValueError, match="kind 'poem'"):
        progress.record("a.b", kind="poem", status="wrong")
    with pytest.raises(ValueError, match="status 'not attempted'"):
        progress.record("a.b", kind="function", status="not attempted")
