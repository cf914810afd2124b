"""The site in a real browser, from a folder: formulas drawn, labs with Python's numbers, nothing fetched, no barrier."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from html import unescape

import pytest
import torch

from browser.harness import START_SECONDS
from tpo_course import frontier_grid
from tpo_course.coefficients import coefficients, loss_at, margin_terms, spread
from tpo_course.frontier import Setting, needed
from tpo_course.frontier_presets import PRESETS
from tpo_course.site.living import LABS, pair, runs
from tpo_course.site.source import pages
from tpo_course.widgets.loss_lab import _reach, loss_lab
from tpo_course.widgets.parts import interval
from tpo_lib.losses import F_FLOOR, OBJECTIVES
from tpo_lib.runs.plots import style_of

KINDS = ("notebooks/00_start_here.html", "notebooks/notation.html", "docs/results.html", *(lab.target for lab in LABS))
GUIDE_BETA = 0.1
KEPT = json.loads(frontier_grid.GRID.read_text(encoding="utf-8"))
known_pair = cache(pair)  # making the widget once is enough


@pytest.fixture(scope="module")
def show(browser, site):
    """show(target, **how) -> a page of the site; whatever leaves the machine is stopped and fails the test."""
    asked, opened = [], []

    def refuse(route):
        asked.append(route.request.url)
        route.abort()

    def open_page(target: str, width: int = 1440, **how):
        context = browser.new_context(viewport={"width": width, "height": 900}, **how)
        context.route(re.compile(r"^(?!file:|data:)"), refuse)
        page = context.new_page()
        page.on("pageerror", lambda error: asked.append(f"{target}: {error}"))
        page.set_default_timeout(1000 * START_SECONDS)
        page.goto((site.out / target).as_uri())
        opened.append(context)
        return page

    yield open_page
    for context in opened:
        context.close()
    assert asked == []


@pytest.mark.parametrize(
    "page", [p for p in pages() if p.source in ("notebooks/02_dpo.ipynb", "notebooks/notation.md")]
)
def test_formulas_are_drawn(show, site, page):
    sizes = show(page.target).evaluate(
        """() => { document.querySelectorAll("main details").forEach((each) => { each.open = true; });
        return [...document.querySelectorAll("math")].map((m) => m.getBoundingClientRect()).map((r) => [r.width, r.height]); }"""
    )
    assert len(sizes) == site.formulas[page.source] > 40
    assert all(width > 3 and height > 5 for width, height in sizes)


@pytest.mark.parametrize("width", [390, 1440])
def test_no_page_is_wider_than_the_screen(show, width):
    for target in ("index.html", "studies/results/guides.html", *KINDS):
        page = show(target, width)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, target
        page.context.close()


def test_wide_pictures_move_sideways_on_a_phone(show):
    page = show("notebooks/02_dpo.html", 390)
    sizes = page.evaluate("""() => [...document.querySelectorAll("main figure")].map((f) => {
        const img = f.querySelector("img"), drawn = img.getBoundingClientRect(), place = f.getBoundingClientRect();
        return [+img.getAttribute("width"), drawn.width, place.width, f.tabIndex]; })""")
    assert max(own for own, *_ in sizes) > 1000
    for own, drawn, place, tab in sizes:
        assert place <= 390
        assert drawn >= 0.69 * own or own < 560
        assert (drawn > place) <= (tab == 0)  # what moves can be reached by keyboard
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def barriers(page, **options) -> list[tuple[str, str]]:
    """What axe-core calls serious or critical on a page: the rule, and the first place."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"resultTypes": ["violations"], "preload": False, **options}).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier(show, site, scheme):
    longest = max(site.out.glob("notebooks/*.html"), key=lambda path: path.stat().st_size)
    for target in (*KINDS, f"notebooks/{longest.name}"):
        page = show(target, color_scheme=scheme)
        assert not barriers(page), target
        if target == "labs/loss.html":
            page.get_by_label("show").select_option("all, side by side")
            page.get_by_role("button", name="Pin this state").click()
            assert not barriers(page), f"{target}, all objectives"
        page.context.close()


def test_no_barrier_on_any_page(show, site):
    """Every page, but not its colours: those are of one style sheet, and looking at them takes two thirds of the time."""
    targets = sorted(str(path.relative_to(site.out)) for path in site.out.rglob("*.html"))
    assert len(targets) >= len(pages()) + len(LABS)
    quick, grave = {"rules": {"color-contrast": {"enabled": False}}}, {}
    page = show("docs/reading.html")  # one for all: axe-core is compiled once
    for target in targets:
        page.goto((site.out / target).as_uri())
        grave[target] = barriers(page, **quick)
    assert not {target: found for target, found in grave.items() if found}
    page.evaluate("document.querySelector('main').append(document.createElement('img'))")
    assert [rule for rule, _ in barriers(page, **quick)] == ["image-alt"]


def test_dark_and_light(show):
    page = show("notebooks/notation.html", color_scheme="light")
    button, paper = page.locator("#theme"), "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    button.press("Enter")
    assert page.evaluate(paper) == "rgb(20, 23, 26)"
    assert button.inner_text() == "Light"
    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert not page.locator(".menu").is_visible()


def test_paper_unfolds_and_folds_again(show):
    page = show("notebooks/02_dpo.html")
    shut = "document.querySelectorAll('main details:not([open])').length"
    before = page.evaluate(shut)
    assert before > 10
    assert page.evaluate(f"dispatchEvent(new Event('beforeprint')), {shut}") == 0
    assert page.evaluate(f"dispatchEvent(new Event('afterprint')), {shut}") == before


def settings() -> list[dict]:
    """Many ways to set the loss lab: its situations, with hyperparameters from end to end."""
    known = known_pair()
    names = ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl")
    rows = [*known["situations"].values(), (40.0, -40.0, 40.0, 0.0), (-40.0, 40.0, 0.0, 40.0), (0.5, 0.5, 1.0, 7.5)]
    hyper = itertools.product((0.01, 0.1, 3.0), (0.0, 0.35, 2.0), (0.0, 0.5, 2.0), ("linear", "exp"), (0.0, 1.0, 4.0))
    keys = ("beta", "alpha", "gamma", "shaping", "guide")
    every = [dict(zip(names, row, strict=True)) | dict(zip(keys, h, strict=True)) for h in hyper for row in rows]
    return every[::7]


def by_python(name: str, now: dict) -> list[float]:
    """Loss, slope, margin, its terms, and the coefficients and weights of every token."""
    known = known_pair()
    sides = []
    for side in ("chosen", "rejected"):
        r_hat = now["guide"] * torch.tensor(list(known[side].values()), dtype=torch.float64)
        given = {"guide_beta": GUIDE_BETA, "ref_logp": known["ref_logp"]}
        sides.append(spread(now[f"{side}_logratio"], now[f"{side}_kl"], r_hat, **given))
    hyper = OBJECTIVES[name].settings({**now, "guide_beta": GUIDE_BETA, "floor": F_FLOOR})
    found, terms = coefficients(name, *sides, **hyper), margin_terms(name, *sides, **hyper)
    slope = loss_at(name, found.margin, **hyper)[1]
    parts = [found.output.loss, slope, found.margin, *terms.values(), found.chosen.logps[0], found.rejected.logps[0]]
    for of in ("kl", "weights"):
        parts += [getattr(side, of)[0] for side in (found.chosen, found.rejected) if getattr(side, of) is not None]
    return [number for part in parts for number in part.flatten().tolist()]


def test_the_loss_labs_numbers_are_pythons(show):
    every, names = settings(), list(known_pair()["objectives"])
    assert len(every) > 100
    assert names == [name for name, entry in OBJECTIVES.items() if entry.paired]
    by_javascript = show("labs/loss.html").evaluate(
        """([names, every]) => names.map((name) => every.map((now) => {
            const { loss, slope, margin, terms, logps, kl, weights } = lab.compute(name, now);
            return [loss, slope, margin, ...terms, ...logps, ...(kl ?? []), ...(weights ?? [])]; }))""",
        [names, every],
    )
    for name, rows in zip(names, by_javascript, strict=True):
        for now, row in zip(every, rows, strict=True):
            assert row == pytest.approx(by_python(name, now), rel=1e-6, abs=1e-9), (name, now)


def test_the_loss_lab_says_what_no_policy_has(show):
    every = [*settings(), dict.fromkeys(("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"), 18.0)]
    said = show("labs/loss.html").evaluate("(every) => every.map((now) => lab.reach(now))", every)
    assert said == [_reach(now, kl=True) for now in every]
    assert {words.split(":")[0] for words in said} == {"Out of reach (✕)", "Within reach"}


def test_the_loss_lab_keeps_a_pinned_state(show):
    page, python = show("labs/loss.html"), loss_lab()
    facts, row = page.locator(".facts"), page.locator("table tr.now")
    assert page.get_by_role("button", name="Unpin").is_disabled()
    page.get_by_role("button", name="Pin this state").click()
    assert "loss +0.000, margin +0.000, slope +0.000." in facts.inner_text()
    page.get_by_label("situation").select_option("learned: a wide margin")
    assert "(was 0.6931)" in row.inner_text()
    python.pin_button.click()
    python.controls["situation"].value = "learned: a wide margin"
    changes = python.alt.split("Since the pinned state")[1].split("): ")[1]
    assert facts.inner_text().endswith(f"Since the pinned state: {changes}")
    page.get_by_role("button", name="Unpin").click()
    assert "was" not in row.inner_text()
    assert "pinned" not in facts.inner_text()


def cells_of_python(html: str) -> list[list[str]]:
    """The cells of the table that the notebook's widget shows, as text without white space."""
    rows = re.findall("<tr>(.*?)</tr>", html, re.DOTALL)
    cells = [re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"\s", "", unescape(re.sub("<[^>]+>", "", cell))) for cell in row] for row in cells]


PUT = (
    "(moves) => Object.entries(moves).forEach(([name, value]) => { lab.controls.put(name, value); lab.follow(name); })"
)
ROWS = """() => [...document.querySelectorAll(".columns tr")].map((row) =>
    [...row.cells].flatMap((cell) => [cell.textContent.replace(/\\s/g, ""), ...Array(cell.colSpan - 1).fill("")]))"""


@pytest.mark.parametrize("pinned", [False, True])
def test_the_loss_labs_columns_are_those_of_the_notebook(show, pinned):
    page, python = show("labs/loss.html"), loss_lab()
    names = list(known_pair()["objectives"])
    page.get_by_label("show").select_option("all, side by side")
    python.controls["show"].value = "all, side by side"
    assert page.get_by_label("objective", exact=True).is_disabled()
    assert not any(
        page.locator(f"#control-{name}").is_disabled() for name in known_pair()["controls"] if name != "objective"
    )
    assert not page.get_by_text("All objectives on this pair").is_visible()
    hyper = {"beta": 10**-0.5, "alpha": 0.7, "gamma": 0.4, "guide": 3.5}
    for number, name in enumerate(known_pair()["situations"]):
        if number == 1 and pinned:
            page.get_by_role("button", name="Pin this state").click()
            python.pin_button.click()
        moves = {"situation": name} | (hyper | {"shaping": ("linear", "exp")[number % 2]} if number > 1 else {})
        page.evaluate(PUT, moves)
        for control, value in moves.items():
            python.controls[control].value = value
        found, asked = page.evaluate(ROWS), cells_of_python(python.text.value)
        assert len(asked) == 1 + 3 + 2 + len(known_pair()["chosen"]) + len(known_pair()["rejected"])
        assert {len(row) for row in asked} == {1 + len(names)}
        assert found == asked, name
        assert page.evaluate("lab.text()") == python.alt.replace(". Within", ".Within").replace(". Out", ".Out")
    page.get_by_label("show").select_option("one objective")
    assert not page.locator(".columns").is_visible()
    assert page.get_by_text("All objectives on this pair").is_visible()


def test_the_loss_labs_columns_stay_where_they_were_moved_to(show):
    page = show("labs/loss.html", 390)
    page.get_by_label("show").select_option("all, side by side")
    room = page.locator(".scroll:has(.columns)")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert room.evaluate("e => e.scrollWidth - e.clientWidth") > 100
    room.evaluate("e => { e.scrollLeft = 150; }")
    page.get_by_label("log-ratio rejected").press("ArrowLeft")
    assert room.evaluate("e => e.scrollLeft") == 150
    left = "e => e.getBoundingClientRect().left - e.closest('.scroll').getBoundingClientRect().left"
    assert abs(page.locator(".columns tbody th").first.evaluate(left)) < 1  # names of rows stay in sight


def test_the_loss_lab_answers(show):
    page = show("labs/loss.html")
    page.get_by_label("objective").select_option("tdpo2")
    page.get_by_label("situation").select_option("half-way through training")
    assert page.evaluate("lab.controls.value('rejected_kl')") == 3.0
    before = page.locator(".facts").inner_text()
    page.get_by_label("β", exact=True).press("ArrowRight")
    after = page.locator(".facts").inner_text()
    assert before != after
    assert after.startswith("TDPO2: margin ")
    page.get_by_label("SeqKL rejected").press("ArrowRight")
    assert page.get_by_label("situation").input_value() == "set by hand"
    assert page.get_by_label("γ").is_disabled()
    page.get_by_label("objective").select_option("tgdpo")
    assert page.locator("svg[role=img]").count() == 4


def test_the_run_browser_shows_every_run(show):
    page = show("labs/runs.html")
    for run in runs()["runs"]:
        said = page.evaluate(
            """({ objective, beta, alpha }) => { const { controls, follow } = lab;
            for (const [name, value] of [["objective", objective], ["beta", beta], ["alpha", alpha]])
                { controls.put(name, value); follow(name); }
            return lab.text(); }""",
            {key: run[key] for key in ("objective", "beta", "alpha")},
        )
        alpha = f", alpha {run['alpha']:g}" if run["alpha"] else ""
        reward, kl = interval(run["metrics"]["reward"]), interval(run["metrics"]["kl"])
        start = f"{style_of(run['objective']).label}, beta {run['beta']:g}{alpha}: reward {reward} from "
        assert said.startswith(start)
        assert f"reference) {kl} nats" in said
        assert run["samples"][2]["text"].split()[-1] in page.locator(".sample").last.inner_text()


def test_the_frontier_lab_reads_the_grid_as_python_does(show):
    page = show("labs/frontier.html")
    places = [(name, key) for name, key, _ in frontier_grid.places()]
    found = page.evaluate(
        """(places) => places.map(([name, key]) => { const at = {};
        data.reads[name].forEach((axis, i) => { at[axis] = Number(key.split(",")[i]); });
        const run = lab.run(name, at);
        return [run.kl, run.reward, run.loss, run.logratio, lab.tree(run, 1).map((row) => row.policy)]; })""",
        places,
    )
    grid = frontier_grid.grid()
    ref = torch.tensor(page.evaluate("data.ref"), dtype=torch.float64) / 1e5
    for (name, _, setting), (kl, reward, loss, logratio, policy) in zip(frontier_grid.places(), found, strict=True):
        run = grid[needed(name, setting)]
        assert kl == pytest.approx(run.kl)
        assert reward == pytest.approx(run.returns)
        assert loss == pytest.approx(run.loss)
        assert logratio == pytest.approx(run.logratio.flatten().tolist())
        assert policy == pytest.approx((ref * run.logratio.flatten().exp()).tolist())
    facts = page.locator(".facts").last
    before = facts.inner_text()
    page.get_by_label("beta").press("ArrowRight")
    assert facts.inner_text() != before
    page.get_by_label("look closer at").select_option("tgdpo")
    assert "TGDPO ends at a return of " in facts.inner_text()


SLIDERS = """Object.fromEntries(Object.keys(data.axes).map((axis) => { const { each, shown } = lab.controls.made[axis];
    return [axis, [data.axes[axis][lab.controls.value(axis)], shown.textContent, each.stops.length]]; }))"""


def test_the_frontier_labs_presets_and_pin(show):
    page, grid, optima = show("labs/frontier.html"), frontier_grid.grid(), frontier_grid.optima()
    (says, facts), row = page.locator(".facts").all(), page.locator("tr.now").first
    chosen = page.get_by_label("what goes wrong")
    ends = "Object.fromEntries(Object.keys(data.reads).map((name) => [name, lab.run(name, lab.controls.values())]))"
    page.get_by_role("button", name="Pin this state").click()
    for name, preset in PRESETS.items():
        chosen.select_option(name)
        assert says.inner_text() == preset.words
        assert page.get_by_label("look closer at").input_value() == preset.show
        for objective, found in page.evaluate(ends).items():
            run, best = grid[needed(objective, preset.setting)], optima.get(needed(objective, preset.setting))
            assert (found["kl"], found["reward"]) == (run.kl, run.returns)
            assert (found["loss"], found["floor"]) == (run.loss, run.floor)
            assert found["logratio"] == run.logratio.flatten().tolist()
            assert found["optimum"] == (best and pytest.approx(best))
        old, run = (grid[needed(preset.show, setting)] for setting in (Setting(), preset.setting))
        assert f"{run.end[0]:.2f} ({run.end[0] - old.end[0]:+.2f})" in row.inner_text()
        assert f"ends at a return of {run.end[1]:.2f} and a KL of {run.end[0]:.2f} nats" in facts.inner_text()
        assert ("r̂ with the run's β" in facts.inner_text()) == preset.setting.run_beta
        after = frontier_grid.on_axes(preset.setting)
        for axis, (value, words, stops) in page.evaluate(SLIDERS).items():
            off = value not in KEPT["axes"][axis]
            assert (value, words.endswith(" (preset)"), stops) == (after[axis], off, len(KEPT["axes"][axis]) + off)
            assert f"{axis} {words.removesuffix(' (preset)')}" in facts.inner_text()
            after |= {axis: frontier_grid.on_axes(Setting())[axis]} if off else {}
        page.get_by_label("beta").press("ArrowRight")  # leaves the preset, and is on the grid again
        assert chosen.input_value() == ""
        assert says.inner_text().startswith("All settings are where")
        after["beta"] = min(beta for beta in KEPT["axes"]["beta"] if beta > preset.setting.beta)
        for axis, (value, words, stops) in page.evaluate(SLIDERS).items():
            assert (value, "preset" in words, stops) == (after[axis], False, len(KEPT["axes"][axis]))
    for name in ("too few pairs", ""):
        chosen.select_option(name)
    assert page.evaluate(SLIDERS)["data"][0] == KEPT["axes"]["data"][0]
    page.get_by_role("button", name="Unpin").click()
    assert "(" not in row.inner_text()
