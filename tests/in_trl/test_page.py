"""The programs on docs/trl.md do what the page says: on the bundled model, and on stand-ins for the hub and a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import tiny
import torch

pytest.importorskip("trl", minversion="1.8")

PAGE = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
EXAMPLE, COLAB = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """As it stands: both trainers move their margins, and the guide is the model that DPO has left."""
    monkeypatch.chdir(tmp_path)
    made = {"__name__": "example"}
    exec(compile(EXAMPLE, "docs/trl.md", "exec"), made)
    for name in ("tdpo", "dpo", "tgdpo"):
        margins = [row["rewards/margins"] for row in made[name].state.log_history if "rewards/margins" in row]
        assert abs(margins[0]) < 1e-4 < margins[-1], name
    assert (tmp_path / "runs/trl/tdpo2/model.safetensors").exists()
    assert "TGDPO {'rewards/margins': 0." in capsys.readouterr().out


def test_the_colab_cell_runs(tmp_path, monkeypatch):
    """With one update of a tiny model on a CPU, in bf16."""
    monkeypatch.chdir(tmp_path)
    tiny.llama(0, vocab=320).save_pretrained(tmp_path / "model")
    tiny.tokenizer_of("byte").save_pretrained(tmp_path / "model")
    row = {"prompt": "a film", "chosen": " good", "rejected": " bad"}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([row] * 16))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    cell = COLAB.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model").replace(
        "max_steps=200", "max_steps=1, use_cpu=True"
    )
    made = {"__name__": "cell"}
    exec(compile(cell, "docs/trl.md", "exec"), made)
    assert made["trainer"].state.global_step == 1
    assert (tmp_path / "tdpo2/adapter_model.safetensors").exists()
