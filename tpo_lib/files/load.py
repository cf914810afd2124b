"""Loading models, tokenizers and configurations by folder or hub name: safetensors alone, and no code that came with them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tpo_lib.files import adapters, folders
from tpo_lib.files.words import read_words


def _bundled() -> Path:
    """The folder of the bundled model, in `data` of a checkout, or in the package `tpo_data` where this was installed."""
    checkout = Path(__file__).resolve().parents[2] / "data"
    installed = None if (checkout / "pocket").is_dir() else importlib.util.find_spec("tpo_data")
    return (Path(installed.origin).parent if installed else checkout) / "pocket"


POCKET = _bundled()


def load_tokenizer(name: str | Path):
    """Load a tokenizer from a folder or the hub; one without a pad token pads with EOS, an adapter without one has its base's.

    Raises:
        OSError: it cannot be found or read, or would run code of its own.
    """
    from transformers import AutoTokenizer

    source = folders.find("tokenizer", name)
    try:
        if source.adapter is not None and not list(source.folder.glob("token*")):
            return load_tokenizer(folders.base_of(source))
        if words := read_words(source.folder):
            return words
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # the readers of a dozen formats raise whatever they meet
        there = source.adapter is not None or list(source.folder.glob("*token*"))  # an adapter may have its base's
        reason = error if there else "its folder holds none; copy tokenizer.json and tokenizer_config.json into it"
        raise folders.unusable("tokenizer", name, reason) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """Load a causal language model from a folder or the hub, in eval mode (gradients flow, dropout does not act).

    Weights are kept in `dtype`; train in float32 and let accelerate's autocast use the shorter type. The folder of a PEFT
    adapter gives its base with the adapter merged into it: a plain model, like any other.

    Raises:
        OSError: it cannot be found; it has no safetensors weights, or not all the weights that the model needs; it would run
            code of its own; an adapter's base is missing, or cannot take the adapter up exactly.
        ImportError: it is an adapter and peft is not installed.
    """
    return _load("model", name, dtype).to(device).eval()


def load_classifier(name: str | Path, *, device: torch.device | str = "cpu"):
    """Load a text classifier in float32, as `load_model` does a language model."""
    return _load("classifier", name, torch.float32).to(device).eval()


def load_config(name: str | Path):
    """The configuration of a model, or of an adapter's base; errors are those of `load_model` that need no weights."""
    from transformers import AutoConfig

    source = folders.find("model", name)
    try:
        if source.adapter is not None:
            return load_config(folders.base_of(source))
        folders.check_weights(source)
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise folders.unusable("model", name, error) from error


def _load(kind: str, name: str | Path, dtype: torch.dtype, brought: dict[str, tuple[int, ...]] | None = None):
    """A whole model, or a base with its adapter merged into it; `brought` are weights that an adapter will lay over it."""
    source = folders.find(kind, name)
    try:
        shapes = folders.check_weights(source)
        if source.adapter is None:
            with _quiet():
                return _load_whole(kind, source, shapes, dtype, brought or {})
        config = adapters.settings(source, shapes)
        base = _load(kind, folders.base_of(source), dtype, shapes | (brought or {}))
        return adapters.merge_into(base, source, config, shapes)
    except ImportError:
        raise
    except Exception as error:  # whatever transformers and peft raise over what is in a folder
        raise folders.unusable(kind, name, error) from error


def _load_whole(kind: str, source: folders.Source, shapes: dict, dtype: torch.dtype, brought: dict):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if kind == "model" else AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    named = ", ".join(config.architectures or [])
    if kind == "model" and (config.is_encoder_decoder or re.search("For(?!CausalLM|ConditionalGeneration)", named)):
        # its body would load, and its head mean nothing
        raise ValueError(f"it is a {named or config.model_type}, and a causal language model is needed")
    heads = [shape[0] for name, shape in brought.items() if len(shape) == 2 and "lora" not in name]
    if kind == "classifier" and heads and min(heads) != config.num_labels:
        config.num_labels = min(heads)  # an adapter does not say how many; its last layer has the fewest rows
    with torch.device("meta"):
        folders.check_size(auto.from_config(config, trust_remote_code=False), shapes)
    model, found = auto.from_pretrained(
        source.folder if shapes else source.name,  # the hub may have converted what was saved as pickles
        config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
    )  # fmt: skip
    mismatched = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in found["mismatched_keys"]}
    absent = mismatched | set(found["missing_keys"]) - {name.removeprefix("base_model.model.") for name in brought}
    if absent:
        raise ValueError(
            f"its files lack {len(absent)} weights that {type(model).__name__} needs, or have them in another shape, and they "
            f"would be random: {', '.join(sorted(absent)[:4])}; choose a folder that was saved as a whole"
        )
    _check_unused(model, source.name, sorted(found["unexpected_keys"]))
    model.name_or_path = source.name  # the base that adapters on it will name
    return model


def _check_unused(model, name: str, unused: list[str]) -> None:
    """Say which weights a model has no use for; raise ValueError if they are of layers like those that it has."""
    known = {re.sub(r"\d+", "0", weight) for weight in model.state_dict()}
    layers = [weight for weight in unused if re.sub(r"\d+", "0", weight) in known]
    if layers:
        raise ValueError(f"its files have layers that its config.json leaves out: {', '.join(layers[:4])}; repair it")
    if unused:
        what = f"{len(unused)} weights: {', '.join(unused[:4])}"
        folders.tell(f"{name}: {type(model).__name__} has no use for {what}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling on many lines what is told here on one."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def same_weights(one, other) -> bool:
    """Whether two models have the same weights; most that differ do in the first."""
    pairs = zip(one.parameters(), other.parameters(), strict=False)
    return all(a.shape == b.shape and torch.equal(a.to(b), b) for a, b in pairs)
