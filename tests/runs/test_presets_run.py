"""Every preset from its start to its report, on tiny stand-ins saved as the hub has its models, tokenizers and data sets."""

import json
import random
import re
from dataclasses import replace

import pandas
import pytest
import tiny

from tpo_lib.runs import compare, presets
from tpo_lib.runs.plan import plan
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.settings import CompareConfig
from tpo_lib.runs.sft import SftConfig

SIZES = {
    "train_prompts": 8,
    "held_out_prompts": 4,
    "max_pairs": 16,
    "max_held_out_pairs": 4,
    "max_new_tokens": 6,
    "min_gap": 0.0,
}
SIZES |= {"sampled_together": 16, "max_length": 48, "precision": "no"}
WORDS = [
    "a good film with a fine plot",
    "a bad film with a poor plot",
    "good fun and a fine plot",
    "the plot is bad and poor",
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders that stand in for the hub: a model, a chat model, a classifier, reviews, and pairs in each layout."""
    root = tmp_path_factory.mktemp("hub")
    tiny.checkpoint_folder(root / "model")
    tiny.checkpoint_folder(root / "chat")
    settings = json.loads((root / "chat" / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (root / "chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    tiny.classifier(root / "classifier")
    draw = random.Random(0)
    words = " ".join(WORDS).split()
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(600)]  # beginnings that differ
    reviews = {"text": texts, "label": [0, 1] * 300}
    for split in ("train", "test", "unsupervised"):
        (root / "imdb").mkdir(exist_ok=True)
        pandas.DataFrame(reviews).to_parquet(root / "imdb" / f"{split}.parquet")
    rows = [(f"{WORDS[i % 4]} {i}", WORDS[(i + 1) % 4], WORDS[(i + 2) % 4] + " so") for i in range(40)]
    sides = [(prompt, dict(zip(("chosen", "rejected"), both, strict=True))) for prompt, *both in rows]

    def told(prompt: str, words: str) -> list[dict]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": words}]

    def transcript(prompt: str, words: str) -> str:
        return f"\n\nHuman: {prompt}\n\nAssistant: {words}"

    layouts = {
        "prefix": [{"text": p} | {side: f"{p} {words}" for side, words in both.items()} for p, both in sides],
        "transcripts": [{side: transcript(p, words) for side, words in both.items()} for p, both in sides],
        "instruction": [{"instruction": p, **both} for p, both in sides],
        "messages": [{side: told(p, words) for side, words in both.items()} for p, both in sides],
    }
    for name, table in layouts.items():
        for split, part in (("train", table[:32]), ("test", table[32:])):
            (root / name).mkdir(exist_ok=True)
            pandas.DataFrame(part).to_json(root / name / f"{split}.jsonl", orient="records", lines=True)
    return root


def stand_in(name: str, root) -> CompareConfig:
    """The preset's quick comparison with everything small, and what it would download replaced by folders of the same form."""
    config = presets.comparison(name, quick=True)
    stage, pairs = config.stage, {"imdb": "prefix", "llama": "messages", "pythia": "transcripts"}
    form = next((form for key, form in pairs.items() if name.startswith(key)), "instruction")
    changes = SIZES | {"model": str(root / ("chat" if form == "messages" else "model"))}
    changes |= {"pairs": str(root / form)} if stage.pairs else {}
    if stage.reward and "/" in stage.reward and "pocket" not in stage.reward:
        changes |= {"reward": str(root / "classifier"), "judge": stage.judge and str(root / "classifier")}
    if stage.prompts == "imdb":
        changes |= {"imdb": str(root / "imdb")}
    if stage.sft:
        changes |= {"sft": SftConfig(reviews=16, tokens=16, batch_size=8)}
    train = {"batch_size": 4, "accumulation": 2, "warmup_steps": 1, "max_length": 48, "max_steps": 1, "precision": "no"}
    train |= {"lora_rank": min(2, config.objectives[0].lora_rank)}
    runs = tuple(replace(run, **train) for run in config.objectives if run.loss_type in ("dpo", "tdpo2", "tgdpo"))
    return replace(config, stage=replace(stage, **changes), objectives=runs)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "pocket"])  # test_compare has that one
def test_a_preset_runs_from_its_start_to_its_report(name, hub, tmp_path, capsys):
    config = stand_in(name, hub)
    summary = compare.run(config, tmp_path / name, progress=False)
    assert list(summary["objectives"]) == ["dpo", "tdpo2", "tgdpo"]
    assert {"kl", "accuracy_logratio", "entropy"} <= set(summary["objectives"]["tdpo2"])
    assert ("reward" in summary["objectives"]["dpo"]) == bool(config.stage.reward)
    assert ("sft perplexity_after" in summary["config"]) == bool(config.stage.sft)
    report = (tmp_path / name / "report.md").read_text()
    assert "What it cost" in report
    assert (tmp_path / name / "frontier.png").stat().st_size > 10_000
    costs = summary["costs"]
    assert set(costs) == {"start, prompts and pairs", "dpo", "tdpo2", "tgdpo"}
    assert all(cost["seconds"] > 0 for cost in costs.values())
    assert costs["dpo"]["tokens"] > 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_plan_names_every_part_and_writes_nothing(hub, tmp_path):
    for name in ("gpt2-large-imdb", "pythia-2.8b-hh"):
        said = plan(stand_in(name, hub), tmp_path / name)
        parts = [line.split()[0] for line in said.splitlines()[:-2]]
        assert parts == [*(["fine-tuning"] if name.startswith("gpt2") else []), "pairs", "dpo", "tdpo2", "tgdpo", "in"]
        assert re.search(r"memory about \d+\.\d GB on cpu in no, disk about 0\.0 GB", said)
        assert not (tmp_path / name).exists()
