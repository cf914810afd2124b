"""What the metrics of studies are called, in tables and on axes; what is not here, `plots.AXIS` has."""

from __future__ import annotations

from tpo_lib.runs.plots import AXIS, style_of

CREDIT = "rank correlation with the true credit"  # of the token reward
MOVED = "change of log π of a token, nats: "
WORDS = {  # metric: (in a table, on an axis); where one begins another, the longer comes first
    "second_judge": ("second judge", AXIS["second_judge"]),
    "ref_nats": ("surprisal", "surprisal under the reference, nats per token"),
    "self_bleu_2": ("self-BLEU-2", "self-BLEU of two-grams, within a prompt"),
    "distinct_2_within": ("distinct-2 within a prompt", AXIS["distinct_2_within"]),
    "credit_rho_within": ("credit ρ within responses", f"{CREDIT},\nwithin responses"),
    "credit_rho_early": ("credit ρ, first third", f"{CREDIT},\nfirst third"),
    "credit_rho_mid": ("credit ρ, second third", f"{CREDIT},\nsecond third"),
    "credit_rho_late": ("credit ρ, last third", f"{CREDIT},\nlast third"),
    "credit_rho_rare": ("credit ρ, rare tokens", f"{CREDIT},\nrare tokens"),
    "credit_rho": ("credit ρ", CREDIT),
    "credit_slope": ("credit slope", "slope over the true credit"),
    "moved_chosen_good": ("Δ log π, chosen desirable", f"{MOVED}chosen, desirable"),
    "moved_chosen_bad": ("Δ log π, chosen undesirable", f"{MOVED}chosen, undesirable"),
    "moved_rejected_good": ("Δ log π, rejected desirable", f"{MOVED}rejected, desirable"),
    "moved_rejected_bad": ("Δ log π, rejected undesirable", f"{MOVED}rejected, undesirable"),
    "rare": ("rare tokens", "tokens with a reference probability\nbelow 1e-4 (share)"),
    "seqkl_chosen": ("SeqKL chosen", AXIS["seqkl_chosen"]),
    "seqkl_rejected": ("SeqKL rejected", AXIS["seqkl_rejected"]),
    "seqkl_margin": ("SeqKL margin", AXIS["seqkl_margin"]),
    "seqkl_mean": ("SeqKL", AXIS["seqkl_chosen"]),
    "logratio_var": ("log-ratio variance", "variance of log π(y) / π_ref(y), nats²"),
    "step_gain": ("own states minus the data's", "worth of a token, own states minus the data's,\nnats of log-odds"),
    "step_own": ("worth in own states", "worth of a token in the policy's own states,\nnats of log-odds"),
    "step_data": ("worth in the data's states", "worth of a token in the data's states,\nnats of log-odds"),
    "kl": ("KL", AXIS["kl"]),
    "floor": ("tokens on the floor,", "tokens on the floor (share)"),
}


def axis(metric: str) -> str:
    """A metric's axis label, with its unit; without words, its name."""
    return WORDS[metric][1] if metric in WORDS else AXIS.get(metric, metric)


def heading(key: str) -> str:
    """An endpoint's key, as `study.keys` makes it, in words.

    Example:
        >>> heading("kl at best second_judge"), heading("credit_rho_rare at 5 nats")
        ('KL at best second judge', 'credit ρ, rare tokens at 5 nats')
    """
    return " ".join(WORDS[word][0] if word in WORDS else word.replace("_", " ") for word in key.split())


def versus(a: str, b: str, sign: str = "-") -> str:
    """What two methods differ in; a condition that both have, after a comma, is said once.

    Example:
        >>> versus("tdpo2 α0.5", "dpo"), versus("tdpo2, 50 pairs", "dpo, 50 pairs")
        ('TDPO2 α0.5 - DPO', 'TDPO2 - DPO, 50 pairs')
    """
    (first, _, mine), (second, _, other) = (style_of(name).label.partition(", ") for name in (a, b))
    if mine == other:
        return f"{first} {sign} {second}" + (f", {other}" if other else "")
    return f"{style_of(a).label} {sign} {style_of(b).label}"
