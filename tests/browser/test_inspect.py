"""The page of `inspect` in a real browser: it opens at once, asks for nothing, sorts, filters and says its numbers."""

from __future__ import annotations

import random
import time

import pytest

from browser.harness import ACTION_SECONDS
from tpo_lib.tools.inspect import QUANTITIES, page
from tpo_lib.tools.tokenwise import SIDES

PAIRS = 2000
NUMBERS = {"low": 0.4, "high": 0.6, "n": 9}
PLAIN = ("logratio", "kl", "logp", "weight", "slope")


@pytest.fixture(scope="module")
def found() -> dict:
    """What `run` finds, without a model: 2,000 pairs of up to 40 tokens a response."""
    draw, pairs = random.Random(0), []
    for row in range(PAIRS):
        pair = {"row": row, "prompt": f"prompt {row} <b>bold</b>", "margin": draw.gauss(1, 2), "loss": draw.random()}
        for side in SIDES:
            pieces = [f" word{i}" for i in range(draw.randint(2, 40))]
            pair[side] = {"reward": draw.gauss(0, 1), "pieces": pieces}
            pair[side] |= {name: [round(draw.gauss(0, 1), 5) for _ in pieces] for name in PLAIN}
            pair[f"seqkl_{side}"] = draw.random()
        pair["length"] = sum(len(pair[side]["pieces"]) for side in SIDES)
        pairs.append(pair)
    pairs[7]["chosen"]["pieces"][:2] = ["</script><script>document.title = 'changed'</script>", "\u202e\x07"]
    found = {
        "title": "<i>title</i>",
        "words": ["2,000 pairs"],
        "notes": [],
        "models": [],
        "settings": {"objective": "dpo"},
    }
    return found | {"summary": {"accuracy": {"mean": 0.5} | NUMBERS}, "pairs": pairs}


@pytest.fixture
def opened(browser, found, tmp_path):
    """A function that opens the page; what it asked for and complained of is in `asked` and `errors`."""
    path, pages = tmp_path / "page.html", []
    path.write_text(page(found), encoding="utf-8")

    def show(width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(context.new_page())
        shown = pages[-1]
        shown.set_default_timeout(ACTION_SECONDS * 1000)
        shown.asked, shown.errors = [], []
        shown.on("request", lambda request: shown.asked.append(request.url))
        shown.on("console", lambda message: shown.errors.append(message.text))
        shown.on("pageerror", lambda error: shown.errors.append(str(error)))
        began = time.monotonic()
        shown.goto(path.as_uri())
        shown.locator("article").nth(24).wait_for()
        shown.seconds = time.monotonic() - began
        return shown

    yield show
    for shown in pages:
        assert shown.asked == [path.as_uri()]
        assert shown.errors == []
        assert shown.title() == "<i>title</i>"
        shown.context.close()


def rows(shown) -> list[int]:
    return [
        int(name.removeprefix("pair-")) for name in shown.eval_on_selector_all("article", "all => all.map(a => a.id)")
    ]


def test_two_thousand_pairs_open_at_once_and_are_sorted_filtered_and_turned(opened, found):
    for _ in range(10):  # a busy machine delays some openings, a slow page all of them
        shown = opened()
        print(f"2,000 pairs: {shown.seconds:.2f} s")
        if shown.seconds < 2:
            break
    assert shown.seconds < 2
    pairs = {pair["row"]: pair for pair in found["pairs"]}
    for words, key in (
        ("margin, lowest first", lambda p: p["margin"]),
        ("margin, highest first", lambda p: -p["margin"]),
        ("loss, highest first", lambda p: -p["loss"]),
        ("longest first", lambda p: -p["length"]),
        ("KL, largest first", lambda p: -p["seqkl_chosen"] - p["seqkl_rejected"]),
        ("row of the table", lambda p: p["row"]),
    ):
        shown.get_by_label("Sort by").select_option(label=words)
        expected = sorted(pairs, key=lambda row: (key(pairs[row]), row))
        assert rows(shown) == expected[:25], words
    shown.get_by_role("button", name="Next").click()
    assert rows(shown) == list(range(25, 50))
    assert shown.get_by_role("status").inner_text() == "pairs 26 to 50 of 2000, row of the table"
    shown.get_by_label("wrong pairs only").check()
    wrong = [row for row in pairs if pairs[row]["margin"] < 0]
    assert rows(shown) == wrong[:25]
    assert f"pairs 1 to 25 of {len(wrong)} (of 2000)" in shown.get_by_role("status").inner_text()
    best = max(pairs, key=lambda row: pairs[row]["margin"])
    shown.get_by_role("button", name=f"pair {best} ·").click()  # it is not wrong: the filter opens
    assert best in rows(shown)
    assert shown.evaluate("document.activeElement.id") == f"pair-{best}"


def test_every_number_is_there_by_mouse_and_by_keyboard(opened, found):
    shown = opened()
    shown.get_by_label("Sort by").select_option(label="row of the table")
    pair, tip = found["pairs"][0], shown.get_by_role("tooltip")
    line = shown.locator("#pair-0 .tokens").first
    for name in PLAIN:
        shown.get_by_label(QUANTITIES[name].label, exact=True).check()
        value = pair["chosen"][name][0]
        line.locator(".t").first.focus()
        said = tip.inner_text().splitlines()
        assert said[0] == "token 0: “␣word0”"
        shown_value = float(said[1].removeprefix(QUANTITIES[name].label).split()[0].replace("−", "-"))
        assert shown_value == value
        up = QUANTITIES[name].sign * (value - QUANTITIES[name].centre) > 0
        assert line.locator(".t").first.get_attribute("class") == ("t up" if up else "t down")
    shown.keyboard.press("ArrowRight")
    assert "token 1:" in tip.inner_text()
    assert shown.evaluate("document.activeElement.matches(':focus-visible')")
    shown.keyboard.press("End")
    assert f"token {len(pair['chosen']['pieces']) - 1}:" in tip.inner_text()
    shown.keyboard.press("Escape")
    assert tip.count() == 0  # hidden
    shown.keyboard.press("Tab")  # a response is one stop
    assert (
        shown.evaluate("document.activeElement.parentElement.getAttribute('aria-label')")
        == "tokens of rejected, pair 0"
    )
    line.locator(".t").first.hover()
    assert "token 0:" in tip.inner_text()


def test_text_is_text_on_a_phone_in_the_dark(opened):
    shown = opened(width=390, scheme="dark")
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    shown.get_by_label("Sort by").select_option(label="row of the table")
    first = shown.locator("#pair-7 .t")
    assert first.nth(0).inner_text() == "</script><script>document.title = 'changed'</script>"
    assert first.nth(1).inner_text() == "⟨U+202E⟩⟨U+0007⟩"
    assert shown.locator("#pair-7 .text").inner_text() == "prompt 7 <b>bold</b>"
    assert shown.locator("script").count() == 2
