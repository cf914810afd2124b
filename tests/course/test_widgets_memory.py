"""The memory lab: every control changes the bytes it should, and picture and table say what the library computes."""

from __future__ import annotations

import base64
import io
import re
import time
from dataclasses import replace

import matplotlib.image
import pytest
from matplotlib.colors import to_hex

from tpo_course.widgets import memory_lab as exported
from tpo_course.widgets.memory_lab import GPU_TILE, LOOKS, memory_lab
from tpo_lib.fast.memory import GPUS, SHAPES, step_memory
from tpo_lib.losses import OBJECTIVES


@pytest.fixture(scope="module")
def shared():
    return memory_lab()


@pytest.fixture
def lab(shared):
    """One lab for all tests, its controls back at the start."""
    start = {"model": "GPT-2 large", "vocab": 50257, "length": 512, "pairs": 16, "scored": 0.6, "objective": "tdpo2"}
    for name, value in {
        **start,
        "precision": "float32",
        "optimizer": "adamw",
        "cached": False,
        "step": "both steps",
    }.items():
        shared.controls[name].value = value
    return shared


def cells(lab) -> dict[str, list[str]]:
    """The table: {row: cells}."""
    rows = re.findall(r"<tr>(.*?)</tr>", lab.text.value)
    parsed = [[re.sub(r"<[^>]*>", "", c) for c in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    return {name: texts for name, *texts in parsed}


def expected(**changed) -> dict:
    given = {"length": 512, "pairs": 16, "scored": 0.6, "objective": "tdpo2", "tile_bytes": GPU_TILE} | changed
    shape = given.pop("shape", SHAPES["GPT-2 large"])
    return {name: step_memory(shape, fused=fused, **given) for name, fused in (("textbook", False), ("fused", True))}


def test_it_is_exported_and_shows_what_the_library_computes(lab):
    assert exported is memory_lab
    assert lab.found == expected()
    assert cells(lab)[""] == ["textbook", "fused"]
    assert cells(lab)["together"] == [f"{memory.total / 1e9:,.2f} GB" for memory in expected().values()]
    assert (
        "GPT-2 large, V = 50,257, T = 512, B = 16, 60% of the positions scored; TDPO2, float32, AdamW, without"
        in lab.text.value
    )


@pytest.mark.parametrize(
    ("control", "value", "changed", "said"),
    [
        ("length", 1024, {"length": 1024}, "T = 1024"),
        ("pairs", 64, {"pairs": 64}, "B = 64"),
        ("scored", 1.0, {"scored": 1.0}, "100% of the positions"),
        ("objective", "simpo", {"objective": "simpo"}, "SimPO"),
        ("precision", "bf16 (autocast)", {"precision": "bf16"}, "bf16"),
        ("optimizer", "rmsprop", {"optimizer": "rmsprop"}, "RMSprop"),
        ("cached", True, {"cached": True}, "with caches"),
        ("vocab", 128256, {"shape": replace(SHAPES["GPT-2 large"], vocab=128256)}, "V = 128,256"),
        ("model", "Llama-3.1-8B", {"shape": SHAPES["Llama-3.1-8B"]}, "Llama-3.1-8B, V = 128,256"),
    ],
)
def test_every_control_changes_what_it_should(lab, control, value, changed, said):
    before = lab.picture.value
    lab.controls[control].value = value
    assert lab.found == expected(**changed) != expected()
    assert said in lab.text.value
    assert said in lab.alt
    assert lab.picture.value != before


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_bars_are_the_parts(lab, objective):
    lab.controls["objective"].value = objective
    ax = lab.figure.axes[0]
    for place, memory in enumerate(lab.found.values()):
        bars = [bar for container in ax.containers for bar in container if round(bar.get_y() + 0.31) == place]
        assert [bar.get_width() for bar in bars] == pytest.approx([size / 1e9 for size in memory.parts.values()])
        assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [LOOKS[part][0] for part in memory.parts]
        assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(memory.total / 1e9)
    named = {text.get_text() for text in ax.get_legend().get_texts()}
    assert named == {part for memory in lab.found.values() for part, size in memory.parts.items() if size}


def test_no_two_parts_look_alike():
    assert len(set(LOOKS.values())) == len(LOOKS)
    parts = {part for fused in (True, False) for part in expected()["fused" if fused else "textbook"].parts}
    assert parts == set(LOOKS)


def test_the_table_says_what_fits(lab):
    for model in SHAPES:
        lab.controls["model"].value = model
        for gpu, size in GPUS.items():
            assert cells(lab)[f"fits into {gpu}"] == ["yes" if m.total <= size else "no" for m in lab.found.values()]
    assert cells(lab)["fits into 80 GB"] == ["no", "no"]  # 8B with AdamW in float32
    lab.controls["model"].value = "pocket"
    assert cells(lab)["fits into 16 GB"] == ["yes", "yes"]


def test_one_step_alone(lab):
    lab.controls["step"].value = "fused alone"
    assert list(lab.found) == ["fused"]
    assert cells(lab)[""] == ["fused"]
    lab.controls["step"].value = "textbook alone"
    assert list(lab.found) == ["textbook"]
    assert "hidden states" not in cells(lab)


def test_caches_are_told(lab):
    assert "on disk, each pair" not in cells(lab)
    lab.controls["cached"].value = True
    tokens = round(0.6 * 32 * 512)
    assert lab.found["fused"].disk == tokens * 1280 * 4 // 16
    assert cells(lab)["on disk, each pair"] == [f"{tokens * 1280 * 4 // 16 / 1e6:,.2f} MB"] * 2
    lab.controls["objective"].value = "dpo"
    assert "frozen models" not in cells(lab)
    assert cells(lab)["on disk, each pair"] == [f"{tokens * 4 // 16 / 1e3:,.2f} kB"] * 2


def test_the_picture_has_one_size_and_its_values_as_text(lab):
    sizes = set()
    for name in SHAPES:
        lab.controls["model"].value = name
        source = re.search(r"base64,([^\"]+)", lab.picture.value)[1]
        sizes.add(matplotlib.image.imread(io.BytesIO(base64.b64decode(source))).shape[:2])
        assert f'alt="{name}' in lab.picture.value
        assert f"textbook {cells(lab)['together'][0]}" in lab.alt
    assert len(sizes) == 1
    assert lab._repr_mimebundle_()["text/plain"] == lab.alt


def test_controls_work_in_ipywidgets_7_and_print_their_value(lab):
    for control in lab.controls.values():
        assert control.description
        if hasattr(control, "continuous_update") and hasattr(control, "readout"):
            assert control.continuous_update  # a move is answered in less than a tenth of a second
            assert control.readout


def test_a_move_redraws_at_once(lab):
    seconds = []
    for pairs in (1, 2, 4, 8, 32, 64, 128):
        began = time.process_time()
        lab.controls["pairs"].value = pairs
        seconds.append(time.process_time() - began)
    assert sorted(seconds)[3] <= 0.2, seconds  # half of it on a quiet machine
