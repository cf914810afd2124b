"""One run of a study: a function of its spec, which leaves a record in a folder that is named by the spec's content.

A spec is a dict as JSON has it:

    data      what it trains on, the fields of `bench.Data`
    online    the fields of PPOConfig that are not its defaults, of a run on its own samples; else
    train     the fields of TrainConfig that are not its defaults; loss_type may be FILE.py:NAME
    guide     of objectives that need one: the `train` of the DPO run that guides; guide_data: in which fields its data differ
    guided_by what becomes of it, the spec of `guides.make`; without it the model guides as it is
    match     alpha, guide_beta, ...: the run is DPO at `guides.matched_beta` of a TGDPO run with these and that guide
    best_of   nothing is trained: that many samples of every test prompt by the start are scored
    kl        "reverse": TDPO's term is KL(policy || reference), see `reverse_kl`
    evaluate  {"on": "test" | "validation", "at": [updates], "samples": of a prompt, "seed": of the sampling}
    measures  names in `measures.MEASURES`, taken at every evaluation

Its record is {"spec", "points": [{"step", "metrics", "by_prompt"}, ...], "training": [rows], "seconds", "versions"}: the start
first, then as trained. Every run computes in one thread, so that its figures do not depend on how many run side by side.
Seconds are of the processor, for the same reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model

from tpo_lib import ppo, train
from tpo_lib.config import TrainConfig, run_settings
from tpo_lib.fast import FastPath
from tpo_lib.files import store
from tpo_lib.files.own_code import is_own
from tpo_lib.intervals import bootstrap
from tpo_lib.models import choose_device, choose_precision, frozen_copy
from tpo_lib.pairing import score_samples
from tpo_lib.runs import own, runs
from tpo_lib.sampling import generate
from tpo_lib.studies import bench, guides, reverse_kl
from tpo_lib.studies.measures import Seen, measure

FORMAT = 1  # of records and of what runs do; raise it where the figures change
FIX = "remove it, and the run is made anew"
NO_GUIDE = guides.Guide(None)
WRITER_BETA = 0.1  # of the DPO policy that writes pairs
DIGITS = 6  # significant ones kept of a figure


def key(spec: dict) -> str:
    """What a run's folder is called: 24 digits of the content of its spec, and of the objective's own file where it has one.

    A GPU draws other samples than a CPU, so where one makes the run its kind and what it computes in count, too.
    """
    sources = [each["loss_type"] for each in (spec.get("train"), spec.get("guide")) if each]
    own_code = [store.sha256_file(name.rpartition(":")[0]) for name in sources if is_own(name)]
    device = choose_device()
    made = {"device": device.type, "precision": choose_precision(device)} if device.type != "cpu" else {}
    return store.content_key({"format": FORMAT, "spec": spec, "own": own_code} | made)[:24]


def record_path(spec: dict, folder: Path) -> Path:
    """Where the record of a run lies, or will."""
    return folder / key(spec) / "record.json"


def execute(spec: dict, folder: Path) -> Path:
    """Make the run, unless its record is there; returns the record's place. Two processes never make the same one twice."""
    path = record_path(spec, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.alone(path):
        if not path.exists():
            torch.set_num_threads(1)
            store.write_json(path, _made(spec, folder))
    return path


def read(spec: dict, folder: Path) -> dict:
    """The record of a run that was made."""
    return store.read_json(record_path(spec, folder), FIX)


def _made(spec: dict, folder: Path) -> dict:
    begun, evaluating = time.process_time(), 0.0
    data = _data(spec, folder)
    how = spec["evaluate"]
    if "best_of" in spec:
        return _best_of(spec, data.stage) | {"spec": spec, "seconds": {"in all": time.process_time() - begun}}
    stage = data.on(how["on"], how["samples"])
    points = [_start(spec, stage, folder)]
    train_it, config, note = _training(spec, data, folder)

    def evaluate(step: int, policy) -> None:
        nonlocal evaluating
        if step in how["at"]:
            clock = time.process_time()
            points.append({"step": step} | _point(spec, stage, policy, config))
            evaluating += time.process_time() - clock

    clock = time.process_time()
    result = train_it(callbacks=[evaluate])
    seconds = {"training": time.process_time() - clock - evaluating, "evaluating": evaluating}
    seconds["in all"] = time.process_time() - begun
    if result.steps != how["at"][-1]:
        raise ValueError(
            f"the run made {result.steps} updates and is evaluated at {how['at']}: the last must be the end"
        )
    made = {
        "spec": spec,
        "points": points,
        "training": result.metrics,
        "seconds": seconds,
        "guide": note,
        "pairs": data.note,
    }
    return store.rounded(made, DIGITS) | {"versions": runs.versions()}


def _training(spec: dict, data: bench.Bench, folder: Path) -> tuple[Callable, TrainConfig | None, dict]:
    """What trains, given callbacks; its settings, if it trains on pairs; and what is known of its guide."""
    if "online" in spec:
        return partial(_online, ppo.PPOConfig(**spec["online"]), data), None, {}
    guide, config, stage = _guide(spec, data, folder), config_of(spec["train"]), data.stage
    if "match" in spec:
        matched = guides.matched_beta(guide, stage.pairs, reference=stage.start, beta=config.beta, **spec["match"])
        config, guide = replace(config, beta=matched["beta"]), guides.Guide(None, matched)
    pair_loss = reverse_kl.pair_loss if spec.get("kl") == "reverse" else None
    return partial(_trained, config, data, guide, pair_loss=pair_loss), config, guide.note


def _best_of(spec: dict, stage) -> dict:
    """{"scores": {scorer: (P, K)}} of K samples of every test prompt by the start, out of which the best of n are chosen."""
    how = {"samples_per_prompt": spec["best_of"], "max_new_tokens": stage.config.max_new_tokens}
    drawn = generate(stage.start, stage.tokenizer, stage.held_out_prompts, seed=spec["evaluate"]["seed"], **how)
    scorers = {"reward": stage.reward, "judge": stage.judge, "second_judge": stage.second_judge}
    found = {
        name: score_samples(scorer, stage.tokenizer, stage.held_out_prompts, drawn).tolist()
        for name, scorer in scorers.items()
        if scorer
    }
    return {"scores": store.rounded(found, DIGITS)}


def config_of(settings: dict) -> TrainConfig:
    """The settings of a run; an objective of one's own is loaded."""
    loss_type = settings["loss_type"]
    name = own.load_objective(loss_type) if is_own(loss_type) else loss_type
    return TrainConfig(**settings | {"loss_type": name, "eval_every": 1})


def _trained(config: TrainConfig, data: bench.Bench, guide=NO_GUIDE, callbacks=(), pair_loss=None) -> train.TrainResult:
    fast, stage = FastPath(), data.stage
    policy, reference = stage.policy(config), fast.reader(stage.start, config)
    more = {"guide": guide.reader, "pair_loss": pair_loss or fast.pair_loss, "progress": False}
    more["callbacks"] = [*guide.callbacks, *callbacks]
    return train.fit(config, fast.reader(policy.eval(), config), reference, stage.pairs, **more)


def _online(config: ppo.PPOConfig, data: bench.Bench, callbacks) -> ppo.PPOResult:
    stage = data.stage
    known = (stage.policy(), stage.start, stage.tokenizer, stage.reward, data.training)
    return ppo.fit(config, *known, callbacks=callbacks, progress=False)


def _data(spec: dict, folder: Path) -> bench.Bench:
    """What a run trains on, and is evaluated on."""
    data = bench.Data(**spec["data"])
    plain = {name: value for name, value in spec["data"].items() if name not in ("writer", "labels")}
    made, writer = bench.build(bench.Data(**plain), folder / "pairs"), None
    if data.writer:
        shared = {name: value for name, value in spec["train"].items() if name in run_settings()}
        train = shared | {"loss_type": "dpo", "beta": WRITER_BETA, "max_steps": data.writer}
        writer = _model({"data": plain, "guide": train}, folder)
    return made.by(data, writer, folder / "pairs") if data.writer or data.labels else made


def _guide(spec: dict, data: bench.Bench, folder: Path) -> guides.Guide:
    """What guides a run, by its `guide` and `guided_by`."""
    model = _model(spec, folder) if "guide" in spec else None
    if "guided_by" not in spec and "match" not in spec:
        return guides.Guide(model)
    stage = data.stage
    known = {"reference": stage.start, "tokenizer": stage.tokenizer, "reward": stage.reward, "model": model}
    beta = spec["train"].get("guide_beta") or spec["guide"]["beta"]
    return guides.make(spec.get("guided_by", {"kind": "model"}), stage.pairs, beta=beta, **known)


def _model(spec: dict, folder: Path):
    """The frozen policy of the run that guides: read, or trained by now and kept."""
    what = {"data": spec["data"] | spec.get("guide_data", {}), "train": spec["guide"]}
    path = folder / key(what) / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _data(what, folder)
    guide = frozen_copy(data.stage.start)
    with store.alone(path):
        if path.exists():
            load_model(guide, path)
        else:
            trained = _trained(config_of(spec["guide"]), data).policy
            store.write_file(path, partial(save_model, trained))
            guide = frozen_copy(trained)
    return guide


def _start(spec: dict, stage, folder: Path) -> dict:
    """The untrained start as a point; one evaluation serves all runs of the same prompts and random numbers."""
    how = {name: spec["evaluate"][name] for name in ("on", "samples", "seed")} | {"measures": spec.get("measures")}
    path = folder / "starts" / f"{key({'data': spec['data'], 'evaluate': how})}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.alone(path):
        if not path.exists():
            store.write_json(path, {"step": 0} | _point(spec, stage, stage.start))
    return store.read_json(path, FIX)


def _point(spec: dict, stage, policy, config: TrainConfig | None = None) -> dict:
    """The evaluation of a policy, with the measures that the spec names."""
    stage = replace(stage, config=replace(stage.config, seed=spec["evaluate"]["seed"]))
    found = stage.evaluate(policy)
    by_prompt = {name: list(map(float, values)) for name, values in found.by_prompt.items()}
    metrics = {name: asdict(metric) for name, metric in found.metrics.items()}
    if names := spec.get("measures"):
        measured = measure(names, Seen(stage, policy, found, config or TrainConfig()))
        by_prompt |= measured
        metrics |= {name: asdict(bootstrap(values, seed=0)) for name, values in measured.items()}
    return store.rounded({"metrics": metrics, "by_prompt": by_prompt}, DIGITS)
