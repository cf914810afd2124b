"""The rules: what each says in plain words, where the course explains it, and what to try. `checks` decides; `examine` asks all.

To add a rule, write its check and its entry in RULES; output, docs/doctor.md and the tests' table follow from the entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpo_lib.tools.doctor import checks, course
from tpo_lib.tools.doctor.checks import Look, Unseen, sides
from tpo_lib.tools.doctor.logs import Log

SEVERITIES = ("wrong", "look", "normal")
REWARDS, LOGPS = tuple(sides("", "rewards")), tuple(sides("", "logps"))
REFERENCE = ("dpo", "tdpo1", "tdpo2", "tgdpo", "ipo")  # their rewards are 0 where policy = reference
LOGISTIC = ("dpo", "tdpo1", "tdpo2", "tgdpo")  # -log sigma of the margin
PAIRED = (*REFERENCE, "simpo")
BREAK_IT, BOTH = "07_break_it.ipynb", "07_break_it.ipynb: 5. A symptom that is no bug: both rewards go down"
RATE = "02_dpo.ipynb: 16. Beta and the learning rate, together"
LOWER = "lower the learning rate tenfold, warm up longer, or raise beta"


@dataclass(frozen=True)
class Finding:
    """What was found in a run."""

    rule: str
    severity: str  # one of SEVERITIES
    title: str
    evidence: str  # numbers and steps
    why: str
    chapter: str  # of the course, and its section
    advice: str


@dataclass(frozen=True)
class Rule:
    """What is looked for in a log."""

    name: str
    severity: str  # of a finding; a check may give a lesser one
    title: str
    check: Callable[[Log], str | None]
    why: str
    chapter: str
    advice: str
    needs: tuple[str, ...] = ()  # metrics it reads; without one of them it is not made
    objectives: tuple[str, ...] | None = None  # that it is true of; None: of all


RULES = (
    Rule("not-finite", "wrong", "A number is NaN or infinite", checks.not_finite,
         "A step that was too large, fp16, or the logarithm of a softmax; nothing is learned after it.",
         f"{BREAK_IT}: Run K", f"look at the rows before it; log_softmax, not softmax().log(); bf16 or float32; {LOWER}"),
    Rule("nothing-scored", "wrong", "No response token is scored", checks.nothing_scored,
         "A sum over no tokens is 0: the mask is empty, or the prompt fills max_length and responses are cut away.",
         f"{BREAK_IT}: Runs I and J", "raise max_length above the longest prompt; check the mask (--model, --pairs)", LOGPS),
    Rule("no-gradient", "wrong", "No gradient reaches what is trained", checks.no_gradient,
         "Nothing that the loss depends on is trained: frozen or detached weights, an adapter that is not active, gradient "
         "checkpointing without enable_input_require_grads.",
         f"{BREAK_IT}: Run A", "count the parameters that require a gradient and have one after a step", ("grad_norm", "loss")),
    Rule("reference-moves", "wrong", "Rewards are exactly 0: the reference moves with the policy, or no weight changes",
         checks.reference_moves,
         "If the reference is the policy, every log-ratio is 0 whatever is learned, and nothing holds the policy.",
         f"{BREAK_IT}: Run A", "make the reference a frozen copy (of adapters: the base without); bf16 weights may be too coarse "
         "for a small rate", (*REWARDS, "loss"), REFERENCE),
    Rule("start-not-zero", "wrong", "The rewards are not 0 before the first update", checks.start_not_zero,
         "Policy and reference have the same weights then, unless dropout is on, or the reference is another checkpoint, in "
         "another precision, or reads other tokens.",
         f"{BREAK_IT}: Run D", "put both in eval mode (dropout 0); compare their weights (--model, --ref)", REWARDS, REFERENCE),
    Rule("first-loss", "wrong", "The first loss is not what a margin of 0 gives", checks.first_loss,
         "Where policy = reference the loss is -log sigma(0) = log 2 = 0.693 (IPO: 1/(2 beta)^2). A factor stands outside log "
         "sigma: beta, or a sum over micro-batches.",
         f"{BREAK_IT}: Run B", "multiply beta inside the sigmoid; take the mean over pairs", ("loss", *REWARDS), REFERENCE),
    Rule("loss-not-of-margins", "wrong", "The loss is smaller than its own margins allow", checks.loss_not_of_margins,
         "-log sigma is convex: the mean loss is no less than that of the mean margin. Loss and rewards are of different things.",
         f"{BREAK_IT}: Run B", "multiply beta inside the sigmoid; look for what scales or replaces the loss",
         ("loss", *REWARDS), (*LOGISTIC, "simpo")),
    Rule("swapped-sides", "wrong", "Chosen and rejected change places between log-probabilities and rewards",
         checks.swapped_sides,
         "A reward is beta times a log-ratio: the margin moves as the gap of the log-probabilities does, not against it.",
         f"{BREAK_IT}: Run H", "read one pair where it enters the loss: which text is called chosen?",
         (), REFERENCE),
    Rule("other-beta", "wrong", "Rewards are not beta times log-ratios: another beta, a mean for a sum, another reference",
         checks.other_beta,
         "On the same pairs rewards move by beta times what logps move by. Less by a response's length is a mean for a sum, "
         "more a division by beta; no straight line is a reference that changes.",
         f"{BREAK_IT}: Run C", "sum over the response; beta multiplies the log-ratio; freeze the reference",
         (), REFERENCE),
    Rule("below-half", "wrong", "Accuracy is below one half, the margin negative: swapped labels?", checks.below_half,
         "Training makes the chosen response the preferred one. Where held-out pairs alone say the reverse, the two tables "
         "disagree about which response is chosen.",
         f"{BREAK_IT}: Run H", f"read a few pairs of both tables; who fills the columns chosen and rejected? {LOWER}",
         ("rewards/accuracies", *REWARDS), PAIRED),
    Rule("loss-grows", "wrong", "The loss grows", course.loss_grows,
         "A loss above log 2 is worse than knowing nothing: sure of what is wrong. Steps are too large, or labels contradict.",
         RATE, LOWER, ("loss",)),
    Rule("rate-too-high", "wrong", "The learning rate is too high: spikes, or an overshoot", course.rate_too_high,
         "A step that is too large throws the policy off; then it is repaired, and comes nearer to its reference again.",
         RATE, f"{LOWER}; clip gradients lower", ("loss",)),
    Rule("floor", "wrong", "Token weights hit TGDPO's floor", course.floor_hit,
         "The derivation divides by f, so f must stay positive; tokens on the floor are hardly trained.",
         "05_tgdpo.ipynb: 8. The floor, and a shape that needs none", "lower alpha or guide_beta, or --shaping exp",
         ("guidance/floor_share",), ("tgdpo",)),
    Rule("guide-beta", "wrong", "guide_beta is not what the guide was trained with", course.guides_beta,
         "r_hat = guide_beta log(pi_hat/pi_ref) is in the guide's units; with a smaller one TGDPO is nearly DPO.",
         f"{BREAK_IT}: Run G", "give --guide-beta the guide's own", (), ("tgdpo",)),
    Rule("gradients", "look", "Gradients explode or vanish", course.gradients,
         "While there is something to learn, their norm stays within a factor of ten; clipping hides an explosion.",
         "02_dpo.ipynb: 6. The gradient, and the same push for every token", f"{LOWER}; bf16 or float32, not fp16",
         ("grad_norm", "loss")),
    Rule("stuck", "look", "The loss stays at log 2 and rewards near 0", course.stuck,
         "A reward is beta times a log-ratio: the policy is still its reference (the rate is too low, the run or its beta too "
         "small, the warm-up longer than the run), or a mean stands for a sum.",
         RATE, "raise the learning rate tenfold, or train longer", ("loss",), LOGISTIC),
    Rule("chosen-kl", "look", "The KL grows most on chosen responses", course.chosen_kl,
         "TDPO2 stops the gradient of the chosen KL; without that the loss pays for it (as TDPO1's does by definition).",
         f"{BREAK_IT}: Run F", "detach the chosen KL; is this TDPO2?", tuple(sides("", "kl")), ("tdpo2",)),
    Rule("margins-alone", "look", "The margin grows, the accuracy does not", course.margins_alone,
         "A few pairs carry the mean: outliers, long responses, or labels that are noise for the rest.",
         "01_preferences.ipynb: 11. Which pairs to keep", "look at margins pair by pair; leave out small gaps",
         ("rewards/accuracies", *REWARDS), PAIRED),
    Rule("not-held-out", "look", "What is learned does not carry over to held-out pairs", course.not_held_out,
         "Pairs are learned by heart, labels are noise, or held-out pairs are of another kind. A coin's accuracy is one half.",
         "06_compare.ipynb: 2. Where an interval comes from", f"more pairs, fewer epochs; check the labels; {LOWER}", (), PAIRED),
    Rule("kl-drift", "look", "The policy drifts from its reference, and nothing is bought with it", course.kl_drift,
         "Both rewards may fall while the held-out margin grows; once it has stopped, only KL is paid. Beyond some tens of nats "
         "samples have little in common with the pairs, and other judges tend to fall.",
         BOTH, "stop earlier, lower the rate, raise beta, or hold the KL by TDPO2's alpha", REWARDS, PAIRED),
    Rule("too-good", "look", "Everything is learned: loss near 0, accuracy 1", course.too_good,
         "Pairs are told apart by more than their content (length, padding, an EOS on one side), or learned by heart.",
         f"{BREAK_IT}: Run E", "look at held-out accuracy; --model and --pairs compare lengths and ends",
         ("loss", "rewards/accuracies"), PAIRED),
    Rule("lengths-grow", "look", "Responses grow longer", course.lengths_grow,
         "A summed reward pays for length where chosen responses are the longer ones.",
         "06_compare.ipynb: 8. What reward costs: diversity", "balance lengths; compare at equal length; SimPO takes means"),
    Rule("both-fall", "normal", "Both rewards fall, and the margin grows", course.both_fall,
         "The loss sees the margin alone, and a policy that moves takes its probability from what the reference writes.",
         BOTH, "nothing; watch the held-out margin", REWARDS, REFERENCE),
    Rule("no-reference", "normal", "Rewards start far below 0: there is no reference in them", course.no_reference,
         "SimPO's reward is beta times the mean log-probability of a token; the margin alone says something.",
         "05_tgdpo.ipynb: 11. One map for all objectives", "nothing", REWARDS, ("simpo",)),
)  # fmt: skip


def examine(log: Log) -> tuple[list[Finding], dict[str, str]]:
    """What the rules find, the worst first; and of those that could not be asked, {title: what to log}."""
    found, unseen = [], {}
    for rule in RULES:
        if rule.objectives is not None and log.loss_type not in rule.objectives:
            continue
        missing = [name for name in rule.needs if name not in log]
        evidence = Unseen(", ".join(missing)) if missing else rule.check(log)
        if isinstance(evidence, Unseen):
            unseen[rule.title] = str(evidence)
        elif evidence:
            severity = "look" if isinstance(evidence, Look) else rule.severity
            words = {name: getattr(rule, name) for name in ("title", "why", "chapter", "advice")}
            found.append(Finding(rule.name, severity, evidence=str(evidence), **words))
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)), unseen
