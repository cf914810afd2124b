"""Named experiments: which models, prompts and pairs, how to train, where each value comes from, and what it takes.

python -m tpo_lib presets
python -m tpo_lib run --preset smollm2-135m --imdb DIR
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from tpo_lib.config import TrainConfig
from tpo_lib.files import smollm2
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs.settings import CompareConfig
from tpo_lib.runs.sft import SftConfig
from tpo_lib.runs.stage import QUICK, StageConfig, pocket_stage_config

OURS = "ours"


@dataclass(frozen=True)
class Preset:
    """An experiment by name.

    Attributes:
        words: what it is, one line.
        needs: hardware, time and memory, and whether they were measured.
        source: where the values come from (a paper, its authors' code, or ours), so that nobody takes ours for the papers'.
        stage: models, prompts and pairs that all its runs share.
        train: settings of a single run, for `train`.
        run: what differs in a comparison's runs.
        objectives: {objective: hyperparameters} where a comparison departs from the records' `pocket`.
        imdb: fields of the stage that differ where a folder of IMDb's reviews is given.
        quick, quick_run: fields of stage and runs that differ with --quick.
        evaluations: of every run, see `settings.schedule`; with --quick three at most.
    """

    words: str
    needs: str
    source: dict[str, str]
    stage: StageConfig
    train: TrainConfig
    run: dict = field(default_factory=dict)
    objectives: dict[str, dict] = field(default_factory=dict)
    imdb: dict = field(default_factory=dict)
    quick: dict = field(default_factory=dict)
    quick_run: dict = field(default_factory=dict)
    evaluations: int = 5

    @property
    def model(self) -> str:
        """Folder or hub name of the start model; SmolLM2 from where `get` left it."""
        return smollm2.name() if self.stage.model == smollm2.HUB else self.stage.model


_SMALL = pocket_stage_config()
_SMOL = replace(_SMALL, model=smollm2.HUB, prompts="pocket", min_gap=0.2, precision="auto", evaluation_samples=1)
_SMOL_RUN = {"lr": 1e-4, "batch_size": 32, "warmup_steps": 5, "log_every": 2, "keep": 1, "max_length": 128}
_REVIEWS = {"prompts": "imdb", "sft": SftConfig(reviews=2000, tokens=64, lr=1e-4, batch_size=32, precision="auto")}
_PAPER = {"optimizer": "rmsprop", "lr": 5e-6, "schedule": "constant", "warmup_steps": 150}
_GPT2 = StageConfig(
    model="openai-community/gpt2-large",
    reward="siebert/sentiment-roberta-large-english",
    judge="lvwerra/distilbert-imdb",
    prompts="imdb",
    train_prompts=25_000,
    held_out_prompts=512,
    max_pairs=150_000,
    max_held_out_pairs=512,
    max_new_tokens=48,
    min_gap=0.0,
    max_length=512,
    precision="auto",
    sampled_together=512,
    samples_per_prompt=4,
    held_out_samples=4,
    sft=SftConfig(reviews=25_000, tokens=512, lr=1e-5, batch_size=16, precision="auto"),
)

_READY_QUICK = {"max_pairs": 512, "max_held_out_pairs": 64, "held_out_prompts": 16}


def _ready(model: str, pairs: str, length: int, **more) -> StageConfig:
    """A stage on pairs that others made: all of them, no reward; what is reported are held-out pairs and KL."""
    sizes = {"train_prompts": 0, "held_out_prompts": 128, "max_pairs": 10**6, "max_held_out_pairs": 512}
    return StageConfig(
        model=model,
        reward=None,
        judge=None,
        pairs=pairs,
        **sizes,
        samples_per_prompt=4,
        held_out_samples=4,
        max_new_tokens=256,
        min_gap=0.0,
        max_length=length,
        precision="auto",
        sampled_together=32,
        **more,
    )


EIGHT = "eight GPUs of 80 GB with --checkpointing, in shards by `accelerate launch ... train`, not by run (estimated)"


def _ultrafeedback(model: str, pairs: str, needs: str, processes: int = 1) -> Preset:
    """An update is 128 pairs in all its processes."""
    each = 64 // processes
    return Preset(
        words=f"TGDPO's setting: {model} on UltraFeedback pairs; gated: accept its licence on the hub first",
        needs=needs,
        source={
            "model, pairs": "the TGDPO paper",
            "alpha .5, lr 7e-7 cosine, warm-up .1, 1 epoch, batch 128, cutoff 2048, bf16": "the TGDPO authors' example settings",
            f"2 x {each} pairs a process, 128 in an update of {processes}": OURS,
            "beta .1": "the TGDPO authors' example settings; the paper says .01",
            "guide_beta": "ours: the beta of the DPO run that guides",
        },
        stage=_ready(model, f"mk1111/{pairs}", 2048),
        train=TrainConfig(
            beta=0.1, lr=7e-7, schedule="cosine", warmup_steps=46, batch_size=2, accumulation=each, max_length=2048
        ),
        objectives={"tdpo2": {"alpha": 0.5}, "tgdpo": {"alpha": 0.5}},
        quick=_READY_QUICK,
        evaluations=1,
    )


PRESETS = {
    "pocket": Preset(
        words="the bundled model of 3 M parameters on prompts it writes itself",
        needs="two CPU cores, 1.4 GB, seven minutes; measured",
        source={"beta": "DPO's and TDPO's default", "everything else": f"{OURS}, chosen for the pocket model"},
        stage=_SMALL,
        train=TrainConfig(beta=0.1, lr=2e-4),
        run={"lr": 3e-4, "batch_size": 32, "warmup_steps": 5, "log_every": 2, "keep": 1, "max_length": 128},
        quick=QUICK,
        evaluations=10,  # nine points below the end, four of them under 10 nats whatever the objective
        # six, and 96 prompts, take 5.5 minutes for 7; chords between so few then rank objectives that lie on one curve
    ),
    "smollm2-135m": Preset(
        words="SmolLM2-135M-Instruct, a real small Llama, on openings by the pocket model or of IMDb's reviews",
        needs="two CPU cores with bf16, 13 GB, an hour and a half; measured with two evaluations of a run in an hour",
        source={
            "beta": "DPO's and TDPO's default",
            "everything else": f"{OURS}: the pocket model's, at a lower learning rate",
        },
        stage=_SMOL,
        train=TrainConfig(beta=0.1, lr=1e-4, precision="auto"),
        run=_SMOL_RUN,
        imdb=_REVIEWS,
        quick=QUICK,
        quick_run={"batch_size": 16},
        evaluations=4,  # one takes a minute
    ),
    "smollm2-360m": Preset(
        words="the same with SmolLM2-360M-Instruct",
        needs="one GPU of 24 GB, or of 16 GB with --checkpointing (estimated)",
        source={"everything": f"{OURS}: as smollm2-135m"},
        stage=replace(_SMOL, model="HuggingFaceTB/SmolLM2-360M-Instruct"),
        train=TrainConfig(beta=0.1, lr=5e-5, precision="auto"),
        run=_SMOL_RUN | {"lr": 5e-5},
        imdb=_REVIEWS,
        quick=QUICK,
        evaluations=4,
    ),
    "gpt2-imdb": Preset(
        words="the papers' IMDb recipe with GPT-2 small, already fine-tuned on IMDb, and a DistilBERT as reward",
        needs="one T4 in fp16, about two hours (estimated)",
        source={
            "beta, optimizer, lr, warmup_steps, batch (16 x 4 = 64)": "the TDPO authors' code",
            "prompts of 2 to 8 tokens, 4 completions, 6 pairs": "the DPO paper, by people who rebuilt it",
            "model, reward, 4,000 prompts": f"{OURS}, to fit a free GPU",
        },
        stage=replace(
            _GPT2,
            model="lvwerra/gpt2-imdb",
            reward="lvwerra/distilbert-imdb",
            judge=None,
            sft=None,
            train_prompts=4000,
            max_pairs=24_000,
            max_length=128,
        ),
        train=TrainConfig(beta=0.1, **_PAPER, batch_size=16, accumulation=4),
        objectives={"tdpo2": {"alpha": 0.5}},
        quick=QUICK | {"held_out_prompts": 64},
        quick_run={"warmup_steps": 2, "batch_size": 16, "accumulation": 1, "lr": 2e-5},
    ),
    "gpt2-large-imdb": Preset(
        words="the papers' own: gpt2-large, an epoch of SFT on IMDb, 25,000 prompts, RoBERTa-large as reward",
        needs="one GPU of 80 GB, about a day (estimated)",
        source={
            "model, reward, prompts, completions, SFT": "the DPO paper, by people who rebuilt it",
            "beta, optimizer, lr, warmup_steps, batch, max_length, clip": "the TDPO authors' code",
            "schedule, judge, lr of SFT": f"{OURS} where the papers are silent: constant after the warm-up",
        },
        stage=_GPT2,
        train=TrainConfig(beta=0.1, **_PAPER, batch_size=64, max_length=512),
        objectives={"tdpo2": {"alpha": 0.5}},
        quick=QUICK | {"sft": SftConfig(reviews=256, tokens=128, batch_size=16)},
        quick_run={"warmup_steps": 2, "batch_size": 16, "lr": 2e-5},
    ),
    "imdb-ready-pairs": Preset(
        words="IMDb pairs that others sampled from a fine-tuned gpt2-large, ready to train on",
        needs="one GPU of 48 GB, or of 24 GB with --checkpointing, a few hours (estimated)",
        source={
            "pairs, model": "insub's sets on the hub",
            "beta, optimizer, lr, warmup_steps": "the TDPO authors' code",
            "length, batch": OURS,
        },
        stage=_ready(
            "insub/gpt2-large-imdb-fine-tuned",
            "insub/imdb_prefix20_forDPO_gpt2-large-imdb-FT_siebert_sentiment-roberta-large-english",
            256,
        ),
        train=TrainConfig(beta=0.1, **_PAPER, batch_size=16, accumulation=4, max_length=256),
        objectives={"tdpo2": {"alpha": 0.5}},
        quick=_READY_QUICK,
        quick_run={"warmup_steps": 2, "batch_size": 16, "accumulation": 1},
        evaluations=2,
    ),
    "llama-3.2-1b-lora": Preset(
        words="Llama-3.2-1B-Instruct with adapters on UltraFeedback; gated: accept its licence on the hub first",
        needs="one GPU of 40 GB, or of 24 GB with --checkpointing (estimated)",
        source={"everything": f"{OURS}, sized for one consumer GPU"},
        stage=_ready("meta-llama/Llama-3.2-1B-Instruct", "trl-lib/ultrafeedback_binarized", 1024),
        train=TrainConfig(
            beta=0.1, lr=2e-5, lora_rank=16, batch_size=4, accumulation=16, warmup_steps=20, max_length=1024
        ),
        quick=_READY_QUICK,
        evaluations=1,
    ),
    "pythia-2.8b-hh": Preset(
        words="TDPO's dialogue setting: Pythia-2.8B on Anthropic/hh-rlhf",
        needs="one GPU of 141 GB, or of 80 GB with --checkpointing (estimated)",
        source={
            "model, pairs, beta, alpha, optimizer, warmup_steps, batch, lengths": "the TDPO authors' settings",
            "start without SFT, batch as 8 x 8": f"{OURS}: the authors fine-tune on the chosen responses first (--loss-type sft)",
        },
        stage=_ready("EleutherAI/pythia-2.8b", "Anthropic/hh-rlhf", 512),
        train=TrainConfig(beta=0.1, **_PAPER, batch_size=8, accumulation=8, max_length=512),
        objectives={"tdpo2": {"alpha": 0.5}},
        quick=_READY_QUICK,
        quick_run={"warmup_steps": 2, "batch_size": 8, "accumulation": 1},
        evaluations=1,
    ),
    "llama3-8b-uf-pairrm": _ultrafeedback(
        "meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b-instruct-ultrafeedback", EIGHT, processes=8
    ),
    "llama3-8b-uf-armorm": _ultrafeedback(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "llama3-8b-instruct-ultrafeedback-armorm",
        EIGHT,
        processes=8,
    ),
    "llama3.2-3b-uf-armorm": _ultrafeedback(
        "meta-llama/Llama-3.2-3B-Instruct",
        "llama3.2-3b-instruct-ultrafeedback-armorm",
        "one GPU of 141 GB with --checkpointing (estimated)",
    ),
    "gemma2-2b-uf-armorm": _ultrafeedback(
        "google/gemma-2-2b-it", "gemma2-2b-it-ultrafeedback-armorm", "one GPU of 141 GB (estimated)"
    ),
}


def comparison(
    name: str = "pocket", *, quick: bool = False, seed: int = 0, imdb: str | None = None, **given
) -> CompareConfig:
    """The comparison of a preset: every objective that learns from pairs, `pocket` of the records where the preset says nothing.

    Args:
        quick: the small one, of `--quick`.
        imdb: folder of IMDb's reviews; a preset that can do without then takes its prompts from there.
        given: fields of StageConfig that differ.

    Raises:
        ValueError: reviews or prompts are named that nothing would read.
    """
    preset = PRESETS[name]
    reviews = preset.imdb | {"imdb": imdb} if imdb else {}
    changes = {"model": preset.model, "seed": seed} | reviews | (preset.quick if quick else {})
    stage = replace(preset.stage, **changes | given)
    if stage.pairs and (imdb or "prompts" in given):
        raise ValueError(
            f"--{'imdb' if imdb else 'prompts'} has no effect with {name}, whose pairs are {stage.pairs}; leave it out"
        )
    if imdb and stage.prompts != "imdb" and not stage.sft:
        raise ValueError(f"--imdb has no effect: the prompts of {name} come from {stage.prompts}; add --prompts imdb")
    common = replace(preset.train, **preset.run | (preset.quick_run if quick else {}))
    common = replace(common, max_length=stage.max_length, seed=seed, device=stage.device)
    evaluations = min(3, preset.evaluations) if quick else preset.evaluations
    return CompareConfig(stage, objectives(common, preset.objectives), evaluations)


def objectives(common: TrainConfig, known: dict[str, dict]) -> tuple[TrainConfig, ...]:
    """A run of every objective that learns from pairs: its hyperparameters in `known`, else `pocket` of its record."""
    entries = {name: entry.hyperparameters for name, entry in OBJECTIVES.items() if entry.paired}
    own = {name: {key: h.pocket for key, h in entry.items()} | known.get(name, {}) for name, entry in entries.items()}
    return tuple(replace(common, loss_type=name, hyper=values) for name, values in own.items())


def changed(config: CompareConfig, settings: Sequence[str]) -> CompareConfig:
    """A comparison with single fields replaced, each given as "stage.min_gap=0.1", "train.lr=1e-5" or "sft.reviews=500".

    Raises:
        ValueError: there is no such field, or it has no such value.
    """
    for setting in settings:
        place, _, text = setting.partition("=")
        part, _, name = place.partition(".")
        known = {"stage": StageConfig, "train": TrainConfig, "sft": SftConfig}
        names = [each.name for each in fields(known.get(part, StageConfig))]
        if not text or part not in known or (name not in names and part != "train"):
            raise ValueError(
                f"--set {setting!r}: write PART.NAME=VALUE, PART is stage, train or sft; {part} has {', '.join(names)}"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text  # a name
        if part == "train":
            config = replace(config, objectives=tuple(replace(run, **{name: value}) for run in config.objectives))
        elif part == "stage":
            config = replace(config, stage=replace(config.stage, **{name: value}))
        elif config.stage.sft is None:
            raise ValueError(f"--set {setting}: there is no fine-tuning in this comparison; name --imdb FOLDER")
        else:
            config = replace(config, stage=replace(config.stage, sft=replace(config.stage.sft, **{name: value})))
    return config


def table() -> str:
    """All presets in words, for the terminal: what they are, what they need, and where their values come from."""
    lines = []
    for name, preset in PRESETS.items():
        stage = preset.stage
        sampled = f"{stage.train_prompts:,} prompts ({stage.prompts}), {stage.samples_per_prompt} completions each"
        rows = [("needs", preset.needs), ("model", preset.model), ("pairs", stage.pairs or sampled)]
        rows += [("reward", stage.reward or "none: held-out pairs and KL alone")]
        rows += [("source", f"{what}: {source}") for what, source in preset.source.items()]
        lines += [f"{name}: {preset.words}", *(f"    {word:8}{said}" for word, said in rows)]
    return "\n".join(lines)
