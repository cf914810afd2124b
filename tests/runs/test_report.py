"""The report: every number where it belongs, nothing interpreted that came from outside, one file that needs no other."""

from __future__ import annotations

import base64
import copy
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from test_plots import curves, metric, training_rows

from tpo_lib.files.load import POCKET
from tpo_lib.intervals import bootstrap
from tpo_lib.runs import report, seeds

EVIL = '<script>alert("x")</script> | *bold* `code` [link](http://example.org) & <img src=http://example.org/x.png>\n# title'


def summary() -> dict:
    points = curves()
    numbers = {name: {k: v for k, v in rows[-1].items() if isinstance(v, dict)} for name, rows in points.items()}
    runs = [{"loss_type": name, "beta": 2.0 if name == "simpo" else 0.1, "lr": 3e-4, "device": None} for name in points]
    return {
        "objectives": numbers,
        "start": {k: v for k, v in points["dpo"][0].items() if isinstance(v, dict)},
        "config": {"model": "data/pocket", "train_prompts": 512, "objectives": runs},
        "seed": 11,
        "versions": {"torch": "2.13.0"},
        "wall_time_s": 372.4,
    }


def samples(count: int = 2) -> dict:
    row = {"before_reward": 0.31, "after_reward": 0.96, "before_judge": 0.4, "after_judge": None}
    return {
        name: [{"prompt": f"{EVIL} {i}", "before": EVIL, "after": "fine"} | row for i in range(count)]
        for name in curves()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write_report(folder, summary(), curves(), samples(), training_rows())
    return folder


class Page(HTMLParser):
    """Tags, attributes and visible text, and a check that every tag is closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.text, self.attributes, self.style = [], [], [], [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
        else:
            self.text.append(data)


@pytest.fixture
def unillustrated(monkeypatch):
    """Drawing takes a second: left out where the text alone is looked at."""
    monkeypatch.setattr(report, "_figures", lambda curves, training: {})


@pytest.fixture
def page(written) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


# ---- the page


def test_the_page_is_well_formed_and_says_what_was_run(page):
    assert page.open == []
    text = " ".join(page.text)
    for piece in ("DPO, TDPO1, TDPO2, TGDPO, SimPO", "Seed 11", "6 min 12 s", "data/pocket", "2.13.0", "0.0003"):
        assert piece in text
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in page.style


def test_the_page_needs_no_other_file_and_no_address(page, written):
    names = {"src", "href", "srcset", "data", "action", "poster"}
    sources = [value for _, name, value in page.attributes if name in names]
    assert len(sources) == 5
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in page.style
    assert "@import" not in page.style
    pictures = {path.read_bytes() for path in written.glob("*.png")}
    assert {base64.b64decode(value.partition(",")[2]) for value in sources} == pictures


def test_what_comes_from_outside_is_text_in_the_page(page, written):
    source = (written / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "<img src=http" not in source
    shown = " ".join("".join(page.text).split())
    assert " ".join(EVIL.split()) in shown  # and nothing of it is lost


def test_names_versions_and_settings_are_escaped_too(tmp_path, unillustrated):
    bad = summary()
    bad["versions"] = {"<b>torch": "<i>1"}
    bad["config"] = {"<u>key": "<s>value"}
    bad["objectives"]["<em>new"] = bad["objectives"]["dpo"]
    report.write_report(tmp_path, bad, curves(), {"<em>new": samples(1)["dpo"]})
    for file in ("report.html", "report.md"):
        assert not re.search(r"<(b|i|u|s|em)>", (tmp_path / file).read_text(encoding="utf-8"))


# ---- the Markdown


@pytest.mark.parametrize("seen", [0, 67])
def test_how_prompts_and_pairs_came_about_is_said(tmp_path, unillustrated, seen):
    facts, left_out = summary(), "3 empty text, 3,447 gap below min_gap"
    pairs = {"candidates": 4800, "kept": 1350, "left_out": left_out, "min_gap": 0.4, "trained": 1280}
    lengths = {"training": (2, 4.96, 8), "held-out": (3, 5.5, 8)}
    facts["data"] = {"pairs": pairs, "prompt_tokens": lengths, "seen": seen, "held_out_prompts": 160, "samples": 4}
    report.write_report(tmp_path, facts, curves(), {})
    text = " ".join((tmp_path / "report.md").read_text().split())
    assert "labels are free of noise" in text
    assert "Pairs whose scores differ by less than 0.4 were dropped" in text
    kept = "Of 4,800 pairs of completions 1,350 were kept (3 empty text, 3,447 gap below min\\_gap left out), and 1,280 are"
    assert kept in text
    assert (
        "Training prompts have 2 to 8 tokens, 5.0 on average; held-out prompts have 3 to 8 tokens, 5.5 on average."
        in text
    )
    none = "No held-out prompt equals, begins or continues a training prompt."
    some = "67 of the 160 held-out prompts equal, begin or continue a training prompt."
    assert [none in text, some in text] == [not seen, bool(seen)]
    assert "Every evaluation drew 4 samples of every held-out prompt." in text
    facts["data"] |= {"pairs": None, "samples": 1}
    report.write_report(tmp_path, facts, curves(), {})
    text = (tmp_path / "report.md").read_text()
    assert "labelled the pairs" not in text
    assert "Every evaluation drew" not in text


def test_markdown_links_are_relative_and_lead_to_pictures(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert links == ["frontier.png", "frontier_judge.png", "seqkl.png", "diversity.png", "training.png"]
    assert all((written / link).stat().st_size > 10_000 for link in links)


def test_markdown_interprets_nothing_that_comes_from_outside(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(http", text)  # an escaped bracket starts no link
    assert "&lt;script&gt;" in text
    row = next(line for line in text.splitlines() if line.startswith("|") and "title 0" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4  # three cells, whatever the sample holds
    assert r"\*bold\*" in row
    assert r"\`code\`" in row
    assert not any(line.startswith("# title") for line in text.splitlines())


def test_samples_stand_beside_each_other_with_their_scores(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "after TDPO2" in text
    assert "reward 0.31, judge 0.40: " in text
    assert "reward 0.96: fine" in text  # no judge, no judge's score


def test_the_first_samples_are_shown_and_it_says_so(tmp_path, unillustrated):
    report.write_report(tmp_path, summary(), curves(), samples(50))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"The first {report.SHOWN} of 50 held-out prompts, not chosen." in text
    assert text.count("reward 0.96") == 5 * report.SHOWN


# ---- tables


def test_summary_table_is_aligned_and_fits_the_width():
    for width in (60, 100, 1000):
        blocks = report.summary_table(summary(), width=width).split("\n\n")
        assert (len(blocks) == 1) == (width == 1000)
        for block in blocks:
            lines = block.splitlines()
            assert [line.split()[0] for line in lines[1:]] == ["start", "DPO", "TDPO1", "TDPO2", "TGDPO", "SimPO"]
            assert max(map(len, lines)) <= width
            column = lines[0].index(lines[0].strip().split("   ")[0])
            assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def test_summary_table_shows_each_number_with_its_interval():
    numbers = {
        "reward": {"mean": 0.871, "low": 0.849, "high": 0.892, "n": 4},
        "kl": {"mean": 9.96, "low": 9.0, "high": 11, "n": 4},
    }
    text = report.summary_table({"objectives": {"dpo": numbers, "simpo": {"reward": numbers["reward"]}}})
    assert text.splitlines()[1] == "DPO     0.87 [0.85, 0.89]   10.0 [9.0, 11.0]"
    assert "-0.0" not in report.summary_table(
        {"objectives": {"dpo": {"kl": dict.fromkeys(("mean", "low", "high"), -1e-4)}}}
    )
    assert text.splitlines()[2] == "SimPO   0.87 [0.85, 0.89]   -"  # a metric one of them lacks


def test_settings_that_differ_stand_in_a_table_of_their_own(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "| lr | 0.0003 |" in text
    assert "| SimPO" in text
    rows = text[text.index("| loss\\_type | beta |") :].splitlines()
    assert rows[2] == "| dpo | 0.1 |"
    assert rows[6] == "| simpo | 2.0 |"
    assert "device" not in text  # nothing was set


def test_levels_at_equal_kl_are_interpolated():
    def point(kl: float, reward: float) -> dict:
        return {"kl": metric(kl), "reward": metric(reward)}

    data = {
        "dpo": [point(0, 0.5), point(4, 0.7), point(3, 0.9), point(10, 0.8)],  # turns back: the first crossing counts
        "tdpo2": [point(0, 0.5), point(8, 0.9)],
        "simpo": [point(0, 0.5), point(2, 0.6)],
    }
    levels, rows = report.at_equal(data, "kl", "reward")
    assert levels == [0.2, 0.5, 1.0, 2.0, 5.0]
    assert rows["tdpo2"] == pytest.approx([0.5 + 0.4 * (level / 8) ** 0.5 for level in levels])  # in the root of the KL
    assert rows["dpo"][3] == pytest.approx(0.5 + 0.2 * 0.5**0.5)
    assert rows["dpo"][4] == pytest.approx(0.9 - 0.1 * (5**0.5 - 3**0.5) / (10**0.5 - 3**0.5))
    assert rows["simpo"][3:] == [pytest.approx(0.6), None]
    other = {name: [{"entropy": p["kl"], "reward": p["reward"]} for p in points] for name, points in data.items()}
    assert report.at_equal(other, "entropy", "reward")[1]["tdpo2"] == pytest.approx([0.6, 0.7, 0.8, 0.9])  # straight
    assert report.at_equal({"dpo": [point(0, 0.5)]}, "kl", "reward") == ([], {"dpo": []})


# ---- what is told apart


def test_without_paired_numbers_overlap_decides():
    numbers = summary()
    for name, low, high in (
        ("dpo", 0.5, 0.6),
        ("tdpo1", 0.55, 0.65),
        ("tdpo2", 0.7, 0.8),
        ("tgdpo", 0.8, 0.9),
        ("simpo", 0.1, 0.2),
    ):
        numbers["objectives"][name]["reward"] = {"mean": (low + high) / 2, "low": low, "high": high, "n": 64}
    told = report.findings(numbers)
    assert "TDPO2 lies above DPO: their intervals do not overlap." in told
    assert told[-1].endswith("make them equal: TGDPO and TDPO2; TDPO1 and DPO.")
    assert len(told) == 10 - 2 + 1


def test_paired_differences_decide_where_there_are_any():
    numbers = summary()
    numbers["differences"] = {
        "reward": [
            {"a": "dpo", "b": "tdpo2", "mean": -0.04, "low": -0.06, "high": -0.02, "n": 64},
            {"a": "dpo", "b": "simpo", "mean": 0.03, "low": 0.01, "high": 0.05, "n": 64},
            {"a": "tdpo1", "b": "tgdpo", "mean": 0.01, "low": -0.02, "high": 0.04, "n": 64},
        ]
    }
    assert report.findings(numbers) == [
        "TDPO2 lies above DPO by 0.040 [0.020, 0.060].",
        "DPO lies above SimPO by 0.030 [0.010, 0.050].",
        "Not told apart by this evaluation, which does not make them equal: TDPO1 and TGDPO (difference 0.010 [-0.020, 0.040]).",
    ]


def test_paired_differences_are_made_from_what_the_curves_kept(tmp_path, unillustrated):
    data = curves()
    for shift, points in enumerate(data.values()):
        points[-1]["by_prompt"] = {"reward": [0.1 * shift + 0.3 * (i % 3) for i in range(12)], "kl": [0.0] * 12}
    report.write_report(tmp_path, summary(), data, {})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "TDPO1 lies above DPO by 0.100 [0.100, 0.100]." in text  # the prompts' own spread cancels
    assert "SimPO lies above DPO by 0.400 [0.400, 0.400]." in text


def test_the_report_says_of_every_judge_whether_the_reward_was_over_optimised(tmp_path, unillustrated):
    data, numbers = curves(), summary()
    for points in data.values():
        for point in points:
            point["second_judge"] = metric(1 - point["reward"]["mean"])  # falls as the reward rises
            around = [0.01 * (i % 3 - 1) for i in range(12)]
            names = ("reward", "judge", "second_judge")
            point["by_prompt"] = {name: [point[name]["mean"] + v for v in around] for name in names}
    report.write_report(tmp_path, numbers, data, {})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    section = text[text.index("## Over-optimisation") :].partition("\n## ")[0]
    first, second = section.partition("By second judge:")[::2]
    assert first.count(": not seen. From update") == len(data) == second.count(": seen. From update 0 to the end")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Over-optimisation" in page.text


# ---- less than everything


def test_without_judge_pairs_and_samples_there_is_less_to_write(tmp_path):
    data, numbers = curves(), copy.deepcopy(summary())
    for rows in [*data.values(), [numbers["start"]], numbers["objectives"].values()]:
        for row in rows:
            for name in ("judge", "seqkl_chosen", "seqkl_rejected", "seqkl_margin", "own_accuracy"):
                row.pop(name, None)
    report.write_report(tmp_path, numbers, data, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "diversity.png",
        "frontier.png",
        "report.html",
        "report.md",
    ]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "judge" not in text
    assert "Samples" not in text
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).open == []


def test_the_same_numbers_write_the_same_report(written, tmp_path):
    report.write_report(tmp_path, summary(), curves(), samples(), training_rows())
    for name in ("report.md", "report.html", "frontier.png"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


# ---- settings and seeds


def seeded() -> tuple[dict, dict]:
    """Summary and curves of three settings, three seeds and 30 prompts; the second is .2 better, the third like the first."""
    generator = np.random.default_rng(0)
    prompts = generator.normal(size=30) * 0.1

    def point(step: int, better: float, shift: float) -> dict:
        values = 0.5 + better + shift + prompts + 0.02 * generator.normal(size=30)
        held = {"reward": values.tolist(), "accuracy_logratio": (values > 0.5).astype(float).tolist()}
        made = {name: bootstrap(held[name], seed=0).as_dict() for name in held}
        return {"step": step, "pairs_seen": 32 * step, "by_prompt": held, "kl": metric(step / 10)} | made

    better = {"dpo β.1": 0.0, "tdpo2 β.1 α.5": 0.2, "dpo β.5": 0.0}
    data = {}
    for name, gain in better.items():
        runs = [[point(0, 0, 0), *(point(step, gain, shift) for step in (10, 20))] for shift in (-0.02, 0.0, 0.02)]
        data[name] = [seeds.merged(at, seed=0) for at in zip(*runs, strict=True)]
    facts = summary()
    facts["objectives"] = {
        name: {key: value for key, value in points[-1].items() if isinstance(value, dict) and "mean" in value}
        for name, points in data.items()
    }
    facts["start"] = {}
    facts["config"] = {"seeds": [3, 4, 5]}
    return facts, data


def test_seeds_and_prompts_stand_apart(tmp_path, unillustrated):
    facts, data = seeded()
    report.write_report(tmp_path, facts, data, {})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "3 settings of 2 objectives with 3 seeds each" in text
    assert "Seeds 3, 4, 5, 6 min 12 s" in text
    assert "a second seed may differ" not in text
    reward = facts["objectives"]["dpo β.1"]["reward"]
    row = next(line for line in text.splitlines() if line.startswith(f"| DPO β.1 | {reward['mean']:.3f} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:5] == [f"{reward['seed_sd']:.3f}", f"{reward['evaluation']:.3f}"]
    assert cells[5] == ", ".join(f"{seed:.3f}" for seed in reward["seeds"])
    assert 0.015 < reward["seed_sd"] < 0.025
    assert 0.02 < reward["evaluation"] < 0.06


def test_settings_are_told_apart_over_seeds_and_prompts_and_holm_is_counted(tmp_path, unillustrated):
    facts, data = seeded()
    report.write_report(tmp_path, facts, data, {})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- TDPO2 β.1 α.5 lies above DPO β.1 by 0." in text
    assert "make them equal: DPO β.1 and DPO β.5 (difference" in text
    assert "Of 3 comparisons 2 are told apart one at a time, 2 after Holm's correction for all 3 at once" in text
    assert "By pair accuracy at the end of training:" in text
    assert "95% interval over seeds and prompts" in text


def test_what_does_not_survive_holm_is_marked():
    numbers = summary()
    entry = {"mean": 0.03, "low": 0.01, "high": 0.05, "n": 64}
    numbers["differences"] = {
        "reward": [
            {"a": "dpo", "b": "simpo", "p": 0.001, "holm": 0.003} | entry,
            {"a": "dpo", "b": "tdpo1", "p": 0.04, "holm": 0.08} | entry,
            {"a": "tdpo1", "b": "simpo", "p": 0.9, "holm": 0.9} | entry | {"low": -0.01},
        ]
    }
    told = report.findings(numbers)
    assert told[0] == "DPO lies above SimPO by 0.030 [0.010, 0.050]."
    assert told[1] == "DPO lies above TDPO1 by 0.030 [0.010, 0.050]*."
    assert told[3].startswith("Of 3 comparisons 2 are told apart one at a time, 1 after Holm's correction")
    assert told[3].endswith("below 5% (*: not after it).")


def test_many_settings_are_told_setting_by_setting():
    labels = [f"dpo β.{i}" for i in range(1, 8)]  # 21 comparisons
    entries = [
        {
            "a": a,
            "b": b,
            "mean": -0.1,
            "low": -0.2,
            "high": -0.05 if b == labels[-1] else 0.05,
            "n": 9,
            "p": 0.01,
            "holm": 0.02,
        }
        for a, b in itertools.combinations(labels, 2)
    ]
    told = report.findings({"objectives": {}, "differences": {"reward": entries}})
    assert len(told) == 1 + 1 + 1
    assert told[0].startswith("DPO β.7 lies above DPO β.1 by 0.100 [0.050, 0.200], DPO β.2 by")
    assert "DPO β.2 or DPO β.1 or" not in told[1]
    assert "Not told apart" in told[1]
    assert told[2].startswith("Of 21 comparisons 6")


def test_without_a_reward_the_frontier_is_of_pair_accuracy_by_log_ratio(monkeypatch):
    drawn = []
    monkeypatch.setattr(report.plots, "frontier", lambda curves, y: drawn.append(y))
    _, data = seeded()
    for points in data.values():
        for point in points:
            del point["reward"]
    report._figures(data, None)
    assert drawn == ["accuracy_logratio"]


def test_tokens_are_shown_in_both_reports_and_escaped(tmp_path, unillustrated):
    side = {"pieces": ["<i>", " film"], "logratio": [1.0, -1.0], "kl": [0.1, 0.2]}
    maps = {"dpo": [{"prompt": EVIL, "chosen": side, "rejected": side}], "simpo": []}
    report.write_report(tmp_path, summary(), curves(), {}, tokens=maps)
    text, source = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    page = Page(source)
    assert page.open == []
    assert "<script" not in source
    assert " ".join(EVIL.split()) in " ".join("".join(page.text).split())
    assert source.count("<span title=") == 5 + 2 * 2 * 2
    assert re.findall(r"!\[[^\]]*\]\((tokens[^)]*)\)", text) == ["tokens_logratio.png", "tokens_kl.png"]
    assert all((tmp_path / f"tokens_{name}.png").stat().st_size > 5000 for name in ("logratio", "kl"))


def test_a_run_of_the_bundled_model_is_told_what_several_seeds_say_of_its_objectives(tmp_path):
    facts = summary()
    facts["config"]["model"] = str(POCKET)
    facts["objectives"] = {name: facts["objectives"][name] for name in ("dpo", "tdpo2")}
    report.write_report(tmp_path, facts, {name: curves()[name] for name in ("dpo", "tdpo2")}, {})
    said = (tmp_path / "report.md").read_text().split("## What several seeds say")[1].split("\n## ")[0]
    assert "TDPO2's frontier lies above DPO's" in said
    assert "TDPO1's" not in said  # an objective that was not run
    facts["config"]["model"] = "gpt2"
    report.write_report(tmp_path, facts, {name: curves()[name] for name in ("dpo", "tdpo2")}, {})
    assert "several seeds say" not in (tmp_path / "report.md").read_text()


def test_a_finding_is_held_against_the_study_of_the_same_pair_and_no_other(tmp_path, unillustrated):
    kept = {"n": 64, "low": 0.01, "high": 0.05, "mean": 0.03}
    pairs = [("tgdpo", "dpo"), ("dpo", "simpo"), ("tdpo1", "simpo"), ("tdpo1", "dpo")]
    entries = [{"a": a, "b": b} | kept for a, b in pairs[:3]] + [{"a": "tdpo1", "b": "dpo"} | kept | {"low": -0.01}]
    facts = summary() | {"differences": {"judge": entries}}
    facts["config"] |= {"model": str(POCKET), "objectives": [{"loss_type": "tgdpo", "alpha": 1.0}]}
    reverse, same, nothing, open_ = report.findings(facts, "judge")
    assert "; study 1 (5 seeds, TGDPO α1): -0.009 [-0.015, -0.003] by the area, the reverse; -0.002 [" in reverse
    assert reverse.endswith(" at equal KL, not told apart.")
    assert "; study 1 (5 seeds): 0.021 [0.012, 0.029] by the area, confirmed; 0.015 [" in same
    assert nothing == "TDPO1 lies above SimPO by 0.030 [0.010, 0.050]."  # the study has no such comparison
    assert "TDPO1 and DPO (difference 0.030 [-0.010, 0.050]; study 1 (5 seeds): -0.010 [-0.021, 0.001] by the" in open_
    facts["config"]["objectives"] = [{"loss_type": "tgdpo", "alpha": 0.5}]
    assert (
        "TGDPO α0.5): -0.003 [-0.009, 0.003] by the area, 0.004 [-0.007, 0.014]" in report.findings(facts, "judge")[0]
    )
    facts["config"]["objectives"] = [{"loss_type": "tgdpo", "alpha": 0.7}]  # none of the study's: the one that it chose
    assert "(5 seeds, TGDPO α1)" in report.findings(facts, "judge")[0]
    entries[0] |= {"a": "dpo", "b": "tgdpo"}  # as found there
    assert "TGDPO α1): 0.009 [0.003, 0.015] by the area, confirmed" in report.findings(facts, "judge")[0]
    entries[0] |= {"b": "tgdpo α.7"}  # a setting among others
    assert "study" not in report.findings(facts, "judge")[0]
    report.write_report(tmp_path, facts, curves(), {})
    assert "Study 1 compared these objectives over 5 seeds" in (tmp_path / "report.md").read_text()
    facts["config"]["model"] = "gpt2"
    assert "study" not in "".join(report.findings(facts, "judge"))
    report.write_report(tmp_path, facts, curves(), {})
    assert "Study 1" not in (tmp_path / "report.md").read_text()
