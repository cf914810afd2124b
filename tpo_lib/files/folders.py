"""What the name of a model stands for, and what its folder must be before anything is loaded: only JSON and headers are read."""

from __future__ import annotations

import difflib
import functools
import json
import re
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tpo_lib.files import store

LARGEST_JSON = 32 * 2**20  # bytes; the index of the largest models in shards has about 10 MB
MOST_LAYERS = 128  # a folder may name as many, whatever its files hold: this many cost nothing to lay out
# of a hub model, what is fetched at first, and what once that is found sound
TEXT = ["*.json", "*.txt", "*.model", "*.jinja", "adapter_model.safetensors"]
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors"]


@dataclass(frozen=True)
class Source:
    """Where a model is."""

    name: str  # an absolute folder or a hub name
    folder: Path  # the same folder, or the hub's snapshot of its files
    adapter: dict | None  # what its adapter_config.json says; None for a whole model


def is_path(name: str | Path) -> bool:
    """Whether a name can only be a place on this machine: it exists, is none of the hub's, or begins with a folder here.

    Example:
        >>> [is_path(name) for name in ("./gpt2", "runs/dpo/final", "C:/models", "owner/", "owner/name", "gpt2-large")]
        [True, True, True, True, False, False]
    """
    if isinstance(name, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).exists():
        return True
    return "/" in name and Path(name).parts[0] in {path.name for path in Path().iterdir() if path.is_dir()}


def no_such_path(kind: str, name: str | Path) -> FileNotFoundError:
    """The error for a path where there is nothing, with what is called alike in the last folder of it that there is."""
    path = Path(name)
    while not path.parent.exists():
        path = path.parent
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [str(path.parent / entry) for entry in difflib.get_close_matches(path.name, there, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is no {path.name!r} in {path.parent.resolve()}"
    return FileNotFoundError(f"{kind} {str(name)!r} does not exist: {hint}")


def unusable(kind: str, name: str | Path, reason: object) -> OSError:
    """The error for something that is there and cannot be used."""
    if isinstance(reason, Exception) and not isinstance(reason, OSError):
        reason = one_line(reason)
    return OSError(f"{kind} {str(name)!r} could not be loaded: {reason}")


def one_line(error: Exception) -> str:
    """An error, however many lines it has, as a part of a sentence."""
    text = " ".join(str(error).split())[:500] or "no reason given"
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


@functools.cache
def tell(sentence: str) -> None:
    """Say something about a folder on stderr, once however often it is loaded."""
    print(sentence, file=sys.stderr)


def read_settings(path: Path) -> dict:
    """Read a JSON object; ValueError where it is none, larger than 32 MB, or deeper than Python reads."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__} where an object belongs")
    return content


def find(kind: str, name: str | Path) -> Source:
    """Find a model or tokenizer by folder, training run (its `final`) or hub name; of the hub's the text files are fetched.

    Raises:
        OSError: nothing is there, or it can be had only by running code that came with it.
        store.CheckpointError: the folder is one of ours, and a file in it was altered.
    """
    local = is_path(name)
    folder = Path(name) if local else _fetch(kind, str(name))
    if not folder.exists():
        raise no_such_path(kind, name)
    if (folder / "final").is_dir() and not (folder / "config.json").exists():
        folder = folder / "final"
    folder = folder.resolve()
    if local:
        store.verify_loaded(folder)
    try:
        if not folder.is_dir():
            raise ValueError("it is a file; pass the folder it lies in")
        _refuse_code(folder)
        adapter = folder / "adapter_config.json"
        settings = read_settings(adapter) if adapter.is_file() else None
        if settings is not None and list(folder.glob("model*.safetensors")):
            raise ValueError("it holds a whole model and an adapter, which may or may not be merged; keep one of them")
    except ValueError as error:
        raise unusable(kind, name, error) from error
    return Source(str(folder) if local else str(name), folder, settings)


def base_of(source: Source) -> str:
    """Where the base of an adapter is: a folder, named from here or from the adapter's own folder, or a hub name.

    Raises:
        ValueError: the adapter names none, or one that is not there, or that may be either of two folders.
    """
    base, file = source.adapter.get("base_model_name_or_path"), f"{source.folder}/adapter_config.json"
    place = f"{file} (base_model_name_or_path)"
    if not base or not isinstance(base, str):
        raise ValueError(f"it is an adapter, and {file} names no base model (base_model_name_or_path)")
    there = {path.resolve() for path in (Path(base), source.folder / base) if path.is_dir()}
    if len(there) > 1:
        raise ValueError(f"its base model may be {' or '.join(map(str, sorted(there)))}; write one of them into {file}")
    if source.folder in there:
        raise ValueError(f"it is an adapter, and {file} names itself as its base model")
    if there:
        return str(there.pop())
    if is_path(base):
        raise ValueError(f"its base model {base!r} is not there; put it back, or name where it is now in {place}")
    if source.adapter.get("revision") not in (None, "main"):
        named = f"revision {source.adapter['revision']} of {base}"
        raise ValueError(f"its base is {named}; download that, and name its folder in {place}")
    return base


def _fetch(kind: str, name: str, patterns: list[str] = TEXT, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        reason = (
            f"it is gated: accept its licence on https://huggingface.co/{name}, then log in here with `hf auth login`"
        )
        raise unusable(kind, name, reason) from error
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(name, [path.name for path in Path().iterdir() if path.is_dir()], n=1)
        hint = f" (did you mean ./{near[0]}?)" if near else ""
        reason = (
            f"it is not a local folder{hint}, and the hub gave no such thing ({one_line(error)}). Check the name and the "
            "network, pass a local folder, or use --preset pocket, which needs no download."
        )
        raise unusable(kind, name, reason) from error


def _refuse_code(folder: Path) -> None:
    """Raise ValueError if a folder works only, or would work otherwise, with code of its own."""
    import transformers

    if (folder / "custom_generate").exists():
        raise ValueError("it brings code of its own (custom_generate), which is never run; remove that from a copy")
    keys = {"config.json": "architectures", "tokenizer_config.json": "tokenizer_class", "generation_config.json": ""}
    for name, key in keys.items():
        settings = read_settings(folder / name) if (folder / name).is_file() else {}
        if "auto_map" not in settings:
            continue
        named = settings.get(key) or []
        known = [hasattr(transformers, str(each)) for each in (named if isinstance(named, list) else [named])]
        if not (known and all(known)):
            raise ValueError(
                f"its {name} asks for code of its own (auto_map: {settings['auto_map']}), which is never run; choose a model "
                f"whose {key} transformers knows"
            )
        tell(f"{folder}: the code that its {name} names is not run; transformers' own {named} is used")


def check_weights(source: Source) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of a model's or adapter's folder; of a hub model without the usual names, none.

    Raises:
        ValueError: it holds a GGUF file, pickles or quantised weights; a file is missing or damaged; config.json describes
            a model many times larger than its files.
    """
    folder, whole = source.folder, source.adapter is None
    config = _check_config(source) if whole else {}
    stem = "model" if whole else "adapter_model"
    names, index = {f"{stem}.safetensors"}, folder / f"{stem}.safetensors.index.json"
    if not (folder / f"{stem}.safetensors").is_file() and index.is_file():
        names = set(map(str, read_settings(index).get("weight_map", {}).values()))
    missing = [name for name in sorted(names) if not (folder / name).is_file()]
    if missing and (source.name == str(folder) or not whole):
        raise ValueError(_what_is_there_instead(folder, missing[0]))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in [] if missing else sorted(names):
        try:
            with safe_open(str(folder / name), framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} was truncated or altered ({one_line(error)}); copy it again") from error
    _check_counts(config, shapes)
    return shapes


def _check_config(source: Source) -> dict:
    """The configuration of a whole model, whose weights are here afterwards; ValueError if it cannot be trained."""
    if not (source.folder / "config.json").is_file():
        raise ValueError(_what_is_there_instead(source.folder))
    config = read_settings(source.folder / "config.json")
    how = config.get("quantization_config")
    if how is not None:
        how = how.get("quant_method") if isinstance(how, dict) else how
        raise ValueError(f"its weights are quantised ({how}), which cannot be trained; take the whole model instead")
    if source.name != str(source.folder):
        _fetch("model", source.name, WEIGHTS, revision=source.folder.name)
    return config


def _what_is_there_instead(folder: Path, name: str = "config.json") -> str:
    """Why a folder without a file that is needed cannot be loaded, and what would help."""
    pickled = "pickled weights, which may run code as they are read; save them as safetensors"
    quantised = "a quantised model; convert it to safetensors with transformers (gguf_file=, then save_pretrained)"
    for pattern, problem in {"*.gguf": quantised, "*.bin": pickled, "*.pt*": pickled}.items():
        if found := sorted(folder.glob(pattern)):
            return f"it has no {name} but {found[0].name}, {problem}"
    below = [*sorted(folder.glob("*/config.json")), *sorted(folder.glob("checkpoints/*/*config.json"))]
    there = ", ".join(dict.fromkeys(str(path.parent.relative_to(folder)) for path in below))
    return f"it has no {name}" + (f"; the folders {there} in it have" if below else "")


def _check_counts(config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError where a configuration counts more layers, experts or labels than its files can hold."""
    bounds = {
        r"(layers?|experts|blocks|groups)$": max(MOST_LAYERS, len(shapes)),
        r"num_labels$": max((n for shape in shapes.values() for n in shape), default=10**6),
    }
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, shapes)
        if not isinstance(value, int):
            continue
        said = f"its config.json has {key} = {value}"
        if any(re.search(pattern, key) and value > bound for pattern, bound in bounds.items()):
            raise ValueError(f"{said}, its files only {len(shapes)} weights; one of them is damaged")
        if key in ("num_hidden_layers", "num_layers", "n_layers", "n_layer") and value < 1:
            raise ValueError(f"{said}: a model has layers; repair that number")


def check_size(model, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError if a model laid out on the meta device is many times what its files hold."""
    held = sum(map(prod, shapes.values()))
    for what, tensors in (("weights", model.parameters()), ("buffers", model.buffers())):
        asked = sum(tensor.numel() for tensor in tensors)
        if shapes and asked > 2 * held + 2**28:
            raise ValueError(f"its config.json describes {asked:,} {what}, its files hold {held:,}; one is damaged")
