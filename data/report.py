"""The README of data/pocket: what was built, how, and every figure that was measured."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure


def write(folder: Path, facts: dict) -> None:
    """Write README.md, loss.png and provenance.json below `folder` from the facts that `pocket.build` measured."""
    (folder / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
    loss_figure(facts["log"], facts["nats_per_token"]).savefig(folder / "loss.png", dpi=110)
    (folder / "README.md").write_text(readme(facts))


def loss_figure(log: list[dict], nats: float) -> Figure:
    """Training and validation loss over steps, in nats a token."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in log], [row["loss"] for row in log], color="#0072B2", lw=1, label="training")
    valid = [row for row in log if "valid_loss" in row]
    axes.plot(
        [row["step"] for row in valid],
        [row["valid_loss"] for row in valid],
        "o",
        color="#D55E00",
        label="IMDb test, 256 windows",
    )
    axes.axhline(nats, color="black", lw=1, ls="--", label=f"IMDb test, 4,096 windows: {nats:.3f}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", ylim=(nats - 0.2, nats + 2.5))
    axes.legend(frameon=False)
    return figure


def readme(facts: dict) -> str:
    """The README as Markdown."""
    config, sentiment, tokens = facts["config"], facts["sentiment"], facts["tokens"]
    rows = [
        f"| {name}, {where} | {q['accuracy']:.3f} | {q['ece']:.3f} | {q['brier']:.3f} | {q['std']:.3f} | {q['n']:,} |"
        for name, key in (("additive reward", "reward"), ("judge", "judge"))
        for where, q in (
            (f"windows of {sentiment['window']} tokens", facts[f"{key}_windows"]),
            ("whole reviews", facts[f"{key}_whole"]),
        )
    ]
    seen = sum(config["cycles"]) * config["batch_size"] * config["context"]
    samples = []
    for prompt, texts in facts["samples"].items():
        samples += [f"**{prompt}** …", "", *(f"1. {' '.join(text.split())}" for text in texts), ""]
    return f"""# The pocket model

A Llama-architecture language model of {facts["parameters"]:,} parameters, an additive sentiment reward and an independent
judge, all trained on IMDb movie reviews from scratch, small enough for two CPU cores. Nothing here is text of a review.

    python -m tpo_lib pocket --imdb DIR      # parquet files; without --imdb the hub data set stanfordnlp/imdb

## Language model

{config["num_layers"]} layers, width {config["hidden_size"]}, {config["num_heads"]} heads, byte-level BPE of {config["vocab_size"]:,} tokens, tied embeddings, weights stored as bfloat16.
Trained for {" + ".join(f"{steps:,}" for steps in config["cycles"])} steps of {config["batch_size"]} x {config["context"]} tokens, {seen / 1e6:.1f} M in all, {seen / tokens["train"]:.2f} times over the {tokens["train"] / 1e6:.1f} M tokens in
{facts["reviews"]:,} distinct training and unsupervised reviews; reviews that also stand in the test split are left out.
Muon for the matrices of the blocks (lr {config["muon_lr"]}), AdamW for embeddings and norms (lr {config["lr"]}), seed {config["seed"]}.

**IMDb test: {facts["nats_per_token"]:.3f} nats a token, perplexity {facts["perplexity"]:.1f}** ({facts["scored_tokens"]:,} tokens: the second halves of windows of {config["context"]}
spread evenly over the test reviews).

![Loss over training](loss.png)

## Reward and judge

The reward is log-odds = b + sum of one weight for every token and one for every pair of neighbouring tokens (hashed into
{sentiment["bigrams"]:,} cells), trained on windows of {sentiment["window"]} tokens from one half of the labelled training reviews. The judge is the pocket
body with a classification head, fine-tuned on windows of {sentiment["judge_tokens"][0]} to {sentiment["judge_tokens"][1]} tokens from the other half; it never labels a pair. Measured on
IMDb test (a window carries the label of its review, which many a window does not show):

| scores | accuracy | calibration error | Brier | spread (std) | n |
|---|---|---|---|---|---|
{chr(10).join(rows)}

On the language model's own {sentiment["window"]}-token samples the reward has mean {facts["start"]["reward"]["mean"]:.3f} and standard deviation {facts["start"]["reward"]["std"]:.3f}, the judge {facts["start"]["judge"]["mean"]:.3f} and {facts["start"]["judge"]["std"]:.3f}.

## Samples

Three unfiltered samples of {sentiment["window"]} tokens at temperature 1 for each of three prompts:

{chr(10).join(samples)}
## Source and licence

Data: Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011 (the Large Movie Review Dataset, `stanfordnlp/imdb`).
SHA-256 of the cleaned texts of a split, joined by NUL bytes:

{chr(10).join(f"- {split}: `{digest}`" for split, digest in facts["data"].items())}

All settings, seeds and figures: `provenance.json`. The weights are released under the licence of this repository (MIT); they
are statistics of the reviews, which remain their authors' own.
"""
