"""The page of `inspect`: the core's numbers at every token, text that is never interpreted, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch

from tpo_course.coefficients import coefficients
from tpo_lib import stats
from tpo_lib.cli import main
from tpo_lib.config import TrainConfig
from tpo_lib.data import encode_pairs
from tpo_lib.evaluation import pair_stats, pair_values
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.files.pairs import load_pairs
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import fingerprint
from tpo_lib.runs.run import fit
from tpo_lib.tools.pieces import Pieces
from tpo_lib.tools.tokenwise import SIDES

ROWS = [
    {"prompt": f"the film {'really ' * (i % 4)}is", "chosen": f" good and fine {i}", "rejected": " bad" + " plot" * i}
    for i in range(9)
]
EVIL = {
    "prompt": "<script>alert(1)</script> \"two\" 'one' & </script><!--",
    "chosen": " مرحبا \u202eevil\u202c \x07 </script><script>document.title = 1</script>",
    "rejected": " naïve 😀👨‍👩‍👧\u2028 <b onclick='x'>你好</b>\n\t&lt;",
}
HYPER = {"tgdpo": {"beta": 0.3, "alpha": 4.0, "guide_beta": 0.5}, "tdpo2": {"beta": 0.3, "alpha": 0.7}, "simpo": {}}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Three models of one tokenizer, and pairs."""
    folder = tmp_path_factory.mktemp("inspect")
    for seed, name in enumerate(("policy", "ref", "guide")):
        tiny.checkpoint_folder(folder / name, lambda vocab, seed=seed: tiny.llama(seed, vocab))
    written(folder / "pairs.jsonl", ROWS)
    return folder


def written(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def inspected(place: Path, tmp_path: Path, *more: str, model="policy", pairs="pairs.jsonl") -> tuple[dict, str]:
    """What the page holds, and its HTML."""
    page = tmp_path / "page.html"
    where = ["--model", str(place / model), "--pairs", str(place / pairs), "--output", str(page), "--device", "cpu"]
    main(["inspect", *where, "--json", *more])
    html = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert "<" not in data
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert json.loads(data)["pairs"] == found["pairs"]
    return found | {"quantities": json.loads(data)["quantities"]}, html


def refused(capsys, line: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *line])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("name", HYPER)
def test_the_page_has_the_numbers_of_the_textbook(place, tmp_path, name):
    entry, hyper = OBJECTIVES[name], HYPER[name]
    paths = {"ref": "ref_logps", "guide": "guide_logps"}
    there = [flag for flag, need in paths.items() if need in entry.needs]
    flags = [word for flag in there for word in (f"--{flag}", str(place / flag))]
    flags += [word for key, value in hyper.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    found, _ = inspected(place, tmp_path, "--loss-type", name, "--max-tokens", "60", *flags)

    models = {flag: load_model(place / flag) for flag in ("policy", *there)}
    tokenizer, ref, given = load_tokenizer(place / "policy"), models.get("ref"), entry.settings(hyper)
    pairs, _ = encode_pairs(load_pairs(place / "pairs.jsonl")[0], tokenizer, max_length=128)
    how = {"guide": models.get("guide"), "with_kl": ref is not None}
    tokens = pair_stats(models["policy"], ref, pairs, 0, **how)
    pushed, values = coefficients(name, *stats.split(tokens), **given), pair_values(tokens, name, given)
    expected = {"logp": tokens.logps, "slope": torch.cat([pushed.chosen.logps, pushed.rejected.logps])}
    if ref is not None:
        expected |= {"logratio": tokens.logps - tokens.ref_logps, "kl": tokens.kl}
    if tokens.guide_logps is not None:
        expected["guided"] = given["guide_beta"] * (tokens.guide_logps - tokens.ref_logps)
    if "kl" in entry.needs:
        expected["kl_slope"] = torch.cat([pushed.chosen.kl, pushed.rejected.kl])
    if pushed.chosen.weights is not None:
        expected["weight"] = torch.cat([pushed.chosen.weights, pushed.rejected.weights])
        share = (expected["weight"][tokens.mask] <= 0.01).double().mean().item()
        assert 0 < share == pytest.approx(found["summary"]["floor_share"], rel=1e-5)
    assert set(found["quantities"]) == set(expected)
    assert [row["row"] for row in found["pairs"]] == list(range(9))
    for i, row in enumerate(found["pairs"]):
        assert row["loss"] == pytest.approx(pushed.output.loss[i].item(), rel=1e-5, abs=1e-5)
        assert row["margin"] == pytest.approx(pushed.margin[i].item(), rel=1e-5, abs=1e-5)
        for k, side in enumerate(SIDES):
            at = i + 9 * k
            for key, value in expected.items():
                assert row[side][key] == pytest.approx(value[at][tokens.mask[at]].tolist(), rel=1e-5, abs=1e-5), key
            assert len(row[side]["pieces"]) == len(row[side]["logp"])
            if ref is not None:
                assert row[f"seqkl_{side}"] == pytest.approx(tokens.kl[at].sum().item(), rel=1e-4)
    assert found["summary"]["accuracy"]["mean"] == pytest.approx(values["own_accuracy"].mean().item(), abs=1e-5)
    digests = {each["what"]: each["sha256"] for each in found["models"]}
    names = {"policy": "policy", "ref": "reference", "guide": "guide"}
    assert digests == {names[flag]: fingerprint(model) for flag, model in models.items()}


def test_token_rewards_of_the_pairs_stand_in_the_place_of_a_guide_and_weights_in_every_number_of_the_loss(
    place, tmp_path
):
    flags = ["--loss-type", "tgdpo", "--ref", str(place / "ref"), "--beta", "0.3", "--alpha", "4"]
    guide = ["--guide", str(place / "guide"), "--guide-beta", "0.5"]
    told = [
        "guide",
        "--model",
        str(place / "guide"),
        "--ref",
        str(place / "ref"),
        "--guide-beta",
        "0.5",
        "--device",
        "cpu",
    ]
    main([*told, "--pairs", str(place / "pairs.jsonl"), "--output", str(tmp_path / "told.jsonl")])
    expected, _ = inspected(place, tmp_path, *flags, *guide)
    found, _ = inspected(place, tmp_path, *flags, pairs=tmp_path / "told.jsonl")
    assert "Token rewards guide, times guide_beta 1." in found["words"]
    assert [each["what"] for each in found["models"]] == ["policy", "reference"]
    rewards = [x for row in found["pairs"] for side in SIDES for x in row[side]["guided"]]
    assert max(rewards) > 0 > min(rewards)
    for mine, other in zip(found["pairs"], expected["pairs"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for side in SIDES:
            for name in ("guided", "weight", "slope", "logratio"):
                assert mine[side][name] == pytest.approx(other[side][name], rel=1e-3, abs=1e-5), name

    twice = [{"start": 0, "end": len(row["chosen"]), "value": 2.0} for row in ROWS]
    rows = [row | {"chosen_token_weights": [span]} for row, span in zip(ROWS, twice, strict=True)]
    written(tmp_path / "weights.jsonl", rows)
    flags = ["--loss-type", "dpo", "--ref", str(place / "ref"), "--beta", "0.3"]
    plain, _ = inspected(place, tmp_path, *flags)
    found, _ = inspected(place, tmp_path, *flags, "--most", "4", pairs=tmp_path / "weights.jsonl")
    assert len(found["pairs"]) == 4
    for row in found["pairs"]:
        before = plain["pairs"][row["row"]]
        *ratios, last = row["chosen"]["logratio"]  # the token that ends the response has no character
        assert row["chosen"]["logratio"] == pytest.approx(before["chosen"]["logratio"], rel=1e-4)
        assert row["chosen"]["reward"] == pytest.approx(0.3 * (2 * sum(ratios) + last), rel=1e-4, abs=1e-5)
        assert row["margin"] == pytest.approx(row["chosen"]["reward"] - row["rejected"]["reward"], abs=1e-5)
        slopes = row["chosen"]["slope"]
        assert slopes[0] == pytest.approx(2 * slopes[-1], rel=1e-4)
        assert slopes[-1] == pytest.approx(-row["rejected"]["slope"][0], rel=1e-4)
    assert "Token weights multiply the log-ratio and KL of their token." in found["words"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_in_the_data_is_interpreted_and_nothing_is_lost(place, tmp_path):
    name = "<b>&'\".jsonl"
    written(place / name, [EVIL])
    found, html = inspected(place, tmp_path, "--ref", str(place / "ref"), "--max-length", "500", pairs=name)
    tags = Tags()
    tags.feed(html)
    assert [attrs for tag, attrs in tags.found if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in tags.found if tag in ("b", "img", "link", "iframe")]
    assert not [attrs for _, attrs in tags.found if set(attrs) & {"src", "href", "onclick", "action"}]
    assert "default-src 'none'" in html
    (row,) = found["pairs"]
    assert row["prompt"].endswith(EVIL["prompt"])
    for side in SIDES:
        text = re.sub("⟨[0-9A-F ]+⟩", "", "".join(row[side]["pieces"]))
        assert text == EVIL[side] + load_tokenizer(place / "policy").eos_token
    assert "😀" in "".join(row["rejected"]["pieces"])


@pytest.mark.parametrize("form", tiny.FORMS)
def test_pieces_put_together_are_the_text(form):
    tokenizer = tiny.tokenizer_of(form)
    head = tokenizer("the film")["input_ids"]
    ids = tokenizer(" is really fine</s> good")["input_ids"][1:]
    pieces, text = Pieces(tokenizer)(head, ids), tokenizer.decode(head + ids, clean_up_tokenization_spaces=False)
    assert len(pieces) == len(ids)
    assert text.endswith("".join(pieces))
    assert "".join(pieces).replace(" ", "") == "isreallyfine</s>good"


def test_bytes_of_sentencepiece_make_characters():
    class Fallback:
        names = ("▁a", "<0xC3>", "<0xA9>", "<0xFF>", "b")
        convert_ids_to_tokens = names.__getitem__

        def decode(self, ids, **_) -> str:
            return "".join(self.names[i] for i in ids).replace("▁", " ")

    assert Pieces(Fallback())([], [0, 1, 2, 4, 3, 4]) == [" a", "⟨C3⟩", "⟨A9⟩é", "b", "⟨FF⟩�", "b"]


def test_of_many_pairs_some_are_drawn_and_keep_their_rows(place, tmp_path, capsys):
    bad = [*ROWS[:4], {"prompt": "the " * 100, "chosen": "a", "rejected": "b"}, *ROWS[4:]]
    written(place / "bad.jsonl", bad)
    flags = ("--most", "6", "--max-length", "40", "--seed", "3")
    whole = json.dumps(inspected(place, tmp_path, "--max-length", "40", "--on-bad-rows", "skip", pairs="bad.jsonl")[0])
    found, html = inspected(place, tmp_path, *flags, "--on-bad-rows", "skip", pairs="bad.jsonl")
    rows = [row["row"] for row in found["pairs"]]
    assert rows == sorted(rows)
    assert 4 not in rows
    assert len(rows) == 5
    all_rows = {row["row"]: row for row in json.loads(whole)["pairs"]}
    assert all(row["prompt"] == all_rows[row["row"]]["prompt"] for row in found["pairs"])
    assert "a random sample of seed 3, --most 6" in found["words"][0]
    assert found["words"][0].startswith("5 of 10 pairs")
    assert "1 rows skipped (the first: row 4, column" in html
    capsys.readouterr()
    line = ["--model", str(place / "policy"), "--pairs", str(place / "bad.jsonl"), *flags]
    assert "row 4, column 'prompt'" in refused(capsys, line)


@pytest.mark.filterwarnings("error:one prompt makes an interval")
def test_of_one_prompt_there_are_means_without_an_interval(place, tmp_path, capsys):
    rows = [ROWS[0], ROWS[0] | {"rejected": " dull"}]
    found, html = inspected(place, tmp_path, pairs=written(tmp_path / "one.jsonl", rows))
    mean = sum(row["loss"] for row in found["pairs"]) / 2
    assert found["summary"]["loss"] == pytest.approx(mean, rel=1e-5)
    assert f"<td>{mean:.3f}</td>" in html
    assert f"loss               {mean:.3f}\n" in capsys.readouterr().out


def test_a_run_brings_its_objective_and_its_reference(place, tmp_path, capsys):
    start = place / "start"
    shutil.copytree(place / "ref", start)
    tokenizer, policy = load_tokenizer(start), load_model(start)
    pairs, _ = encode_pairs(load_pairs(place / "pairs.jsonl")[0], tokenizer, max_length=64)
    settings = {"beta": 0.25, "alpha": 0.1, "batch_size": 3, "max_length": 64, "device": "cpu", "lr": 1e-2}
    config = TrainConfig(loss_type="tdpo2", output_dir=str(place / "run"), **settings)
    fit(config, policy, load_model(start), pairs, tokenizer=tokenizer, progress=False)
    found, _ = inspected(place, tmp_path, model="run")
    assert [found["settings"][key] for key in ("objective", "beta", "alpha", "max_length")] == ["tdpo2", 0.25, 0.1, 64]
    assert [each["what"] for each in found["models"]] == ["policy", "reference"]
    assert found["models"][1]["sha256"] == fingerprint(load_model(start))
    assert max(map(abs, found["pairs"][0]["chosen"]["logratio"])) > 1e-3

    line = ["--model", str(place / "run"), "--pairs", str(place / "pairs.jsonl"), "--output", str(tmp_path / "x.html")]
    tiny.llama(7, 300).save_pretrained(str(start))
    capsys.readouterr()
    assert re.search(
        "start has changed since the run in .*, whose reference it was: .*--ref", refused_last(capsys, line)
    )
    shutil.rmtree(start)
    assert "tdpo2 needs a reference: pass --ref DIR, or --loss-type sft" in refused(capsys, line)
    found, _ = inspected(place, tmp_path, "--loss-type", "sft", model="run")
    assert re.search("without|Without", found["notes"][0])
    assert "start, which is not here any more" in found["notes"][0]


def refused_last(capsys, line) -> str:
    """What is said at the end, where the pairs were counted before."""
    with pytest.raises(SystemExit):
        main(["inspect", *line])
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_be_shown_is_refused_in_a_sentence(place, tmp_path, capsys):
    tiny.checkpoint_folder(place / "wide", lambda vocab: tiny.llama(0, 320))
    shutil.rmtree(place / "alien", ignore_errors=True)
    shutil.copytree(place / "ref", place / "alien")
    tiny.tokenizer_of("first").save_pretrained(str(place / "alien"))
    shutil.copytree(place / "ref", place / "mute")
    for file in (place / "mute").glob("token*"):
        file.unlink()
    shutil.copy(place / "pairs.jsonl", place / "json.json")
    ref, guide, pairs = (str(place / name) for name in ("ref", "guide", "pairs.jsonl"))
    line = ["--model", str(place / "policy"), "--pairs", pairs, "--output", str(tmp_path / "x.html")]
    capsys.readouterr()
    for more, said in (
        (["--loss-type", "dpo"], "dpo needs a reference: pass --ref DIR"),
        (["--ref", ref, "--alpha", "0.5"], "--alpha has no effect with dpo, which takes --beta"),
        (["--ref", ref, "--loss-type", "tgdpo"], "tgdpo needs a guide: pass --guide DIR"),
        (["--guide", guide, "--guide-beta", "1"], "tgdpo needs a reference: pass --ref DIR"),
        (["--ref", ref, "--guide", guide], "does not say which beta it was trained with; pass it as --guide-beta"),
        (
            ["--ref", ref, "--guide", guide, "--loss-type", "ipo"],
            "--guide has no effect with ipo, which reads no guide",
        ),
        (["--loss-type", "dppo"], "loss_type='dppo' is unknown; choose one of sft, dpo"),
        (["--ref", ref, "--beta", "-1"], "beta=-1.0 must be greater than 0"),
        (["--ref", str(place / "nothing")], "nothing' does not exist"),
        (["--ref", str(place / "alien")], "alien has another vocabulary than"),
        (["--output", str(tmp_path / "x.txt")], "must end in .html"),
        (["--output", str(tmp_path)], "must end in .html"),
        (["--most", "0"], "must be at least 1"),
        (
            ["--output", str(place / "json.html"), "--json", "--pairs", str(place / "json.json")],
            "choose another --output",
        ),
        (["--pairs", str(place / "no.jsonl")], "no.jsonl' does not exist"),
        (["--model", str(place / "mute")], "Save one beside the model, or name with --ref a model that has it."),
    ):
        assert said in refused(capsys, [*line, *more]), more
    assert "vocabulary of 320, the policy of 300" in refused_last(capsys, [*line, "--ref", str(place / "wide")])
    exploding = ["--ref", ref, "--guide", guide, "--guide-beta", "1", "--shaping", "exp", "--alpha", "1e4"]
    assert re.search(
        r"row \d: the loss of tgdpo \(beta 0.1, alpha 10000.0.* is (nan|inf)", refused_last(capsys, [*line, *exploding])
    )
    assert not (tmp_path / "x.html").exists()
    found, _ = inspected(place, tmp_path, "--ref", ref, model="mute")
    assert found["notes"] == [f"{place / 'mute'} has no tokenizer that can be read: its reference's is used."]


def test_the_bundled_model_against_itself_has_no_log_ratio(place, tmp_path):
    found, html = inspected(place.parent, tmp_path, "--ref", str(POCKET), model=POCKET, pairs=place / "pairs.jsonl")
    for row in found["pairs"]:
        for side in SIDES:
            assert set(row[side]["logratio"]) == {0.0}
            assert row[side]["kl"] == pytest.approx([0] * len(row[side]["kl"]), abs=1e-5)
    assert found["summary"]["accuracy"]["mean"] == 0.5
    assert found["pairs"][0]["chosen"]["pieces"][:2] == [" good", " and"]
    assert "5a5c62a3a39b" in html
