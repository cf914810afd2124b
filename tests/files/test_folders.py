"""What a name stands for, and what a model's folder must be before it is loaded: hostile, damaged, foreign and missing ones."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from tpo_lib import cli, models
from tpo_lib.files.load import POCKET, load_classifier, load_config, load_model, load_tokenizer
from tpo_lib.runs.run import origin


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_fingerprint_sees_what_the_configuration_changes(tmp_path):
    folder = tiny.checkpoint_folder(tmp_path / "a")
    before = models.fingerprint(load_model(folder))
    change(folder, pad_token_id=3, use_cache=False)
    folder = folder.rename(tmp_path / "b")
    assert models.fingerprint(load_model(folder)) == before  # another place, other special tokens: the same model
    change(folder, rms_norm_eps=1e-3)
    assert models.fingerprint(load_model(folder)) != before


CODE = """open({mark!r}, "w").write("it ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class MyConfig(LlamaConfig):
    model_type = "mine"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A checkpoint with code beside it that leaves a mark when it runs, and a user who says yes to everything."""
    mark = tmp_path / "mark"
    folder = tiny.checkpoint_folder(tmp_path / "foreign")
    for name in ("mine.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield folder
    assert not mark.exists()
    assert len(sys.stdin.read()) == 2 * 99  # nor was anything asked


LOADERS = [load_model, load_tokenizer, load_config, load_classifier]


@pytest.mark.parametrize("load", LOADERS)
def test_no_code_of_a_model_ever_runs(foreign, load):
    with pytest.raises(OSError, match=r"brings code of its own .custom_generate., which is never run"):
        load(foreign)
    shutil.rmtree(foreign / "custom_generate")
    classes = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    change(foreign, model_type="mine", architectures=["MyModel"], auto_map=classes)
    with pytest.raises(OSError, match=r"its config.json asks for code of its own .auto_map: .*, which is never run"):
        load(foreign)


def test_no_code_of_a_tokenizer_ever_runs(foreign):
    shutil.rmtree(foreign / "custom_generate")
    path = foreign / "tokenizer_config.json"
    said = {"auto_map": {"AutoTokenizer": [None, "mine.MyTokenizer"]}, "tokenizer_class": "MyTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(OSError, match=r"its tokenizer_config.json asks for code of its own"):
        load_tokenizer(foreign)


def test_code_that_transformers_has_taken_over_is_left_alone(foreign, capsys):
    """Phi-3 and others still name the files they once needed; what is used is said, once."""
    shutil.rmtree(foreign / "custom_generate")
    expected = models.fingerprint(load_model(foreign))
    change(foreign, auto_map={"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"})
    assert [models.fingerprint(load_model(foreign)) for _ in range(2)] == [expected] * 2
    assert capsys.readouterr().err.count("is not run; transformers' own ['LlamaForCausalLM'] is used") == 1


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "name",
    [
        "./dpo/final",
        "/nowhere/dpo",
        "runs/dop",
        "runs/dpo/fnal",
        "..",
        "runs\\dpo",
        "C:/runs/dpo",
        "runs/",
        "a/b/c",
        "../x",
    ],
)
def test_a_name_that_looks_like_a_path_never_asks_the_hub(load, name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "dpo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    there = {"..": "it has no", "runs/": "it has no"}.get(name, "does not exist")
    with pytest.raises(OSError, match=re.escape(repr(name)) + f".*{there}|could not be loaded"):
        load(name)


def test_a_typo_is_answered_with_what_is_called_alike(tmp_path, monkeypatch):
    for name in ("dpo", "tdpo1", "simpo"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"model 'runs/dop' does not exist: did you mean runs/dpo"):
        load_model("runs/dop")
    with pytest.raises(OSError, match=r"'rnus/dpo/final' does not exist: did you mean runs\?"):
        load_model("rnus/dpo/final")
    with pytest.raises(
        OSError, match=r"'run' could not be loaded: it is not a local folder \(did you mean ./runs\?\), and the hub"
    ):
        load_model("run")


DAMAGED = [
    ({"num_hidden_layers": 10_000_000}, "has num_hidden_layers = 10000000, its files only 11 weights"),
    ({"num_hidden_layers": 0}, "has num_hidden_layers = 0: a model has layers"),
    ({"num_hidden_layers": 2}, r"lack 9 weights .* random: model.layers.1.input_layernorm.weight, "),
    ({"hidden_size": 10_000_000}, "describes 4,630,000,000 weights, its files hold 7,408"),
    ({"vocab_size": 10**9}, "describes 16,000,002,608 weights"),
    ({"vocab_size": 310}, r"lack . weights .* or have them in another shape, .*model.embed_tokens.weight"),
    ({"num_labels": 10**9}, "has num_labels = 1000000000"),
    ({"nested": {"n_layers": 10**6}}, "has n_layers = 1000000"),
    ({"tie_word_embeddings": False}, r"lack 1 weights that LlamaForCausalLM needs.*: lm_head.weight"),
    ({"num_attention_heads": 3}, "hidden size .16. is not a multiple"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"weights are quantised \(bitsandbytes\)"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification, and a causal"),
    ({"model_type": "mine"}, "model type `mine`"),
]


@pytest.mark.parametrize(("values", "message"), DAMAGED)
def test_a_configuration_that_does_not_fit_its_weights_is_refused(values, message, tmp_path):
    folder = tiny.checkpoint_folder(tmp_path)
    change(folder, **values)
    with pytest.raises(OSError, match="could not be loaded: .*" + message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000, "config.json cannot be read .RecursionError"),
        ("config.json", "[" + " " * 33 * 2**20 + "]", "config.json cannot be read .*more than 33554432 bytes"),
        ("config.json", "[1]", "config.json holds a list where an object belongs"),
        ("config.json", "{", "config.json cannot be read .JSONDecodeError"),
        ("generation_config.json", "{", "generation_config.json cannot be read .JSONDecodeError"),
        ("model.safetensors", "no header", "model.safetensors was truncated or altered"),
        ("custom_generate", "", "brings code of its own"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, content, message, tmp_path):
    folder = tiny.checkpoint_folder(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(OSError, match="could not be loaded: .*" + message):
        load_model(folder)


@pytest.mark.parametrize(
    "content", ["garbage", '{"a":' * 100_000 + "1" + "}" * 100_000, "{}", '{"model": {"type": "BPE"}}']
)
def test_a_tokenizer_that_cannot_be_read_is_named(content, tmp_path):
    (tiny.checkpoint_folder(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(OSError, match=r"tokenizer '.*' could not be loaded: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_says_what_to_put_there(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"could not be loaded: its folder holds none; copy tokenizer.json and"):
        load_tokenizer(tmp_path)


def test_a_folder_of_another_kind_says_what_is_there_instead(tmp_path):
    for name, message in (
        ("q.gguf", "no config.json but q.gguf, a quantised model; convert it"),
        ("w.pt", "w.pt, pickled"),
    ):
        (tmp_path / name).write_text("")
        with pytest.raises(OSError, match=message):
            load_model(tmp_path)
        (tmp_path / name).unlink()
    tiny.checkpoint_folder(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(OSError, match=r"no config.json; the folders checkpoints/step-00000001 in it have"):
        load_model(tmp_path)
    with pytest.raises(OSError, match=r"it is a file; pass the folder it lies in"):
        load_model(tmp_path / "checkpoints" / "step-00000001" / "model.safetensors")


def test_layers_that_would_be_left_out_are_refused_and_other_weights_told(tmp_path, capsys):
    folder = tiny.checkpoint_folder(tmp_path)
    held = load_file(folder / "model.safetensors")
    more = {"v_head.weight": torch.zeros(1, 16)}
    save_file(held | more, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder)
    assert "LlamaForCausalLM has no use for 1 weights: v_head.weight" in capsys.readouterr().err
    deeper = {
        name.replace("layers.0", "layers.1"): weight.clone() for name, weight in held.items() if "layers.0" in name
    }
    save_file(held | deeper, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"have layers that its config.json leaves out: model.layers.1"):
        load_model(folder)


def test_a_model_that_reads_both_ways_is_no_language_model(tmp_path):
    import transformers

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=300, **shape)).save_pretrained(str(tmp_path))
    with pytest.raises(OSError, match="it is a BertForMaskedLM, and a causal language model is needed"):
        load_model(tmp_path)


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    folder = tiny.checkpoint_folder(tmp_path)
    kept = load_model(folder).bfloat16()
    kept.save_pretrained(str(folder))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.float()) for p, q in zip(loaded.parameters(), kept.parameters(), strict=True))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub client; returns a function that puts the files of a folder into it under a name."""

    def put(folder, name):
        place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        return shutil.copytree(folder, place / "snapshots" / ("0" * 40))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return put


def test_a_model_of_the_hub_is_checked_and_loaded_from_its_snapshot(tmp_path, hub):
    folder = tiny.checkpoint_folder(tmp_path / "local")
    hub(folder, "owner/good")
    model = load_model("owner/good")
    assert models.fingerprint(model) == models.fingerprint(load_model(folder))
    assert origin(model)["name"] == "owner/good"  # not the snapshot's folder: a preset's model is known by its name
    assert len(load_tokenizer("owner/good")) == 300
    change(hub(folder, "owner/deep"), num_hidden_layers=10**7)
    with pytest.raises(OSError, match=r"model 'owner/deep' could not be loaded: its config.json has num_hidden_layers"):
        load_model("owner/deep")
    (hub(folder, "owner/pickled") / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model 'owner/pickled' could not be loaded: "):
        load_model("owner/pickled")


def test_an_adapter_of_the_hub_finds_its_base_there(tmp_path, hub):
    peft = pytest.importorskip("peft", reason="extra peft is not installed")
    hub(tiny.checkpoint_folder(tmp_path / "local"), "owner/base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    unmerged = peft.get_peft_model(load_model("owner/base"), config).eval()
    unmerged.save_pretrained(str(tmp_path / "adapter"))
    hub(tmp_path / "adapter", "owner/adapter")
    model, ids = load_model("owner/adapter"), torch.arange(9)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, unmerged(input_ids=ids).logits)
    assert len(load_tokenizer("owner/adapter")) == 300
    assert load_config("owner/adapter").hidden_size == 16


def test_every_call_of_the_library_that_could_run_code_forbids_it():
    for path in Path(models.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("from_pretrained", "from_config"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--model", "./nope"], "model './nope' does not exist"),
        (["train", "--loss-type", "tgdpo", "--guide", "./nope"], "guide './nope' does not exist"),
        (["train", "--pairs", "./nope.jsonl"], "--pairs './nope.jsonl' does not exist"),
        (["train", "--eval-pairs", "./nope.jsonl"], "--eval-pairs './nope.jsonl' does not exist"),
        (["pairs", "--output", "x.jsonl", "--reward", "./nope"], "reward './nope' does not exist"),
        (["evaluate", "./nope"], "policy './nope' does not exist"),
        (["evaluate", str(POCKET), "--judge", "./nope"], "judge './nope' does not exist"),
    ],
)
def test_a_typo_is_refused_before_anything_is_loaded(command, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tpo_lib.files.load._load", lambda *_: pytest.fail("a model was loaded"))
    more = ["--output-dir", str(tmp_path)] if command[0] == "train" else []
    with pytest.raises(SystemExit) as left:
        cli.main([*command, *more])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_gated_model_says_where_its_licence_is_accepted(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    class Gated(GatedRepoError):
        def __init__(self) -> None:
            Exception.__init__(self, "403 Client Error")

    def download(*_, **__):
        raise Gated

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        OSError, match=r"gated: accept its licence on https://huggingface\.co/meta-llama/Llama-3\.2-1B-Instruct"
    ):
        load_model("meta-llama/Llama-3.2-1B-Instruct")
