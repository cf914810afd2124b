"""What the bundled model wrote for the chapters' stage, taken in place of writing it anew: `drawn.zip` beside the model.

Another CPU, or another number of threads, rounds otherwise. One token in some thousands then comes out as another, a few of 704
responses differ, with them the number of pairs, and with that the order of all. So a chapter has one set of pairs everywhere.

python -m tpo_lib.runs.drawn        # draws it again: after a change of the model, its tokenizer, or what decides a sample
"""

import json
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from tpo_lib.files import store
from tpo_lib.files.load import POCKET

FILE = POCKET.parent / "drawn.zip"  # prompts.json; samples-KEY.json, each the entry KEY of `pairing.sample_cached`
OF_CHAPTER_9 = {"train_prompts": 64, "held_out_prompts": 24, "max_pairs": 80, "max_held_out_pairs": 24}
STAGES = ({}, OF_CHAPTER_9)  # changes of `pocket_stage`; {} is that of all others
# What decides the prompts and the samples of a stage on the bundled model.
DECIDES = "train_prompts held_out_prompts samples_per_prompt held_out_samples max_new_tokens sampled_together prompts precision"


def prompts(config) -> tuple[list[str], list[str]] | None:
    """Training and held-out prompts of a StageConfig whose samples are kept; None of any other."""
    if config.model != str(POCKET) or config.sft or not FILE.is_file():
        return None
    with zipfile.ZipFile(FILE) as kept:
        found = json.loads(kept.read("prompts.json")).get(_name(config))
    return found and tuple(found)


def lay_out(cache_dir: Path) -> Path:
    """A cache of pairs within this one that holds the kept samples, and no others of the same prompts."""
    folder = cache_dir / f"drawn-{store.sha256_file(FILE)[:16]}"
    with zipfile.ZipFile(FILE) as kept:
        for name in kept.namelist():
            entry = folder / Path(name).stem
            if name.startswith("samples-") and not entry.is_dir():
                text = kept.read(name)
                store.write_atomically(entry, lambda to, text=text: (to / "samples.json").write_bytes(text))
    return folder


def _name(config) -> str:
    return " ".join(f"{name}={getattr(config, name)}" for name in [*DECIDES.split(), "seed"])


def write(cache_dir: Path) -> None:
    """Write the file: prompts drawn now, and the samples of a cache that holds no others; those it lacks are drawn."""
    from tpo_lib.runs.stage import build_stage, pocket_stage_config, stage_prompts

    FILE.unlink(missing_ok=True)  # or its own prompts would be taken
    texts = {}
    for changes in STAGES:
        config = replace(pocket_stage_config(quick=True), **changes)
        stage = build_stage(config, cache_dir=cache_dir)
        texts[_name(config)] = stage_prompts(config, stage.start, stage.tokenizer, None)
    files = {f"{path.parent.name}.json": path.read_text() for path in sorted(cache_dir.glob("samples-*/samples.json"))}
    with zipfile.ZipFile(FILE, "w") as kept:
        for name, text in {"prompts.json": json.dumps(texts), **files}.items():
            kept.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)  # without the hour: the same bytes again


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
