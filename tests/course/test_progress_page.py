"""The page of a learner's progress: what is done, what is left, readable by eye, by ear and without a kernel."""

from __future__ import annotations

import html.parser
import json

import pytest

from tpo_course import progress as records
from tpo_course.exercises import preferences
from tpo_course.progress_page import main, progress

TASKS = preferences.chapter.tasks


@pytest.fixture
def record(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    monkeypatch.setenv("TPO_PROGRESS", str(path))
    records.forget()
    preferences.win_probability(TASKS["win_probability"].mistakes[0].ways[0])
    preferences.win_probability(preferences.win_probability.right)
    preferences.preference_nll(TASKS["preference_nll"].mistakes[0].ways[0])
    yield path
    records.forget()


def test_what_is_done_and_what_is_left(record):
    page = progress()
    (chapter,) = [c for c in page.chapters if c.name == "01_preferences"]
    assert [task.name for task in chapter.done] == ["win_probability"]
    assert len(chapter.left) == len(TASKS) - 1
    left = sum(task.minutes for task in TASKS.values()) - TASKS["win_probability"].minutes
    assert f"01_preferences: 1 of {len(TASKS)} done, {left} minutes left" in repr(page)
    shown = page._repr_html_()
    assert "<td>✓ done</td><td>2</td><td>gap reversed</td>" in shown
    assert shown.count("✗ not yet") == 1
    assert [c.name for c in page.chapters] == sorted(c.name for c in page.chapters)


class _Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_says_what_its_signs_mean(record, tmp_path, capsys):
    main(["--record", str(record), "--output", str(tmp_path / "page.html")])
    assert "1 of " in capsys.readouterr().out
    text, tags = (tmp_path / "page.html").read_text(), _Tags()
    tags.feed(text)
    assert tags.open == []
    assert ("html", {"lang": "en"}) in tags.seen
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in tags.seen if tag == "th")
    assert all(attributes.get("aria-label") for tag, attributes in tags.seen if tag == "progress")
    tables = sum(tag == "table" for tag, _ in tags.seen)
    assert tables == sum(tag == "caption" for tag, _ in tags.seen) > 5
    assert "http" not in text


@pytest.mark.parametrize(("content", "said"), [(None, "is not there"), ("[]", "is no record of progress")])
def test_what_cannot_be_read_is_named(tmp_path, capsys, content, said):
    path = tmp_path / "record.json"
    if content:
        path.write_text(content)
    with pytest.raises(SystemExit):
        main(["--record", str(path), "--output", str(tmp_path / "p.html")])
    assert said in capsys.readouterr().err


def test_a_record_of_a_later_course_is_read_as_far_as_it_is_known(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"version": 1, "tasks": {"preferences.gone": {"status": "correct"}}}))
    assert not any(chapter.done for chapter in progress(path).chapters)
