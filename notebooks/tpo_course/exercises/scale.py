"""Exercises of 08_scale.ipynb: bytes, the logits' gradient from two numbers, a softmax in tiles, batches by tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tpo_course.exercise import Case, Exercise, Mistake, Option, Question, Quiz

NOTEBOOK = "08_scale.ipynb"


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- 1. how many bytes


def _bytes_cases() -> tuple[Case, ...]:
    return (
        Case({"pairs": 8, "length": 128, "vocab": 50257, "with_kl": True}, "TDPO on GPT-2's vocabulary"),
        Case({"pairs": 32, "length": 512, "vocab": 128256, "with_kl": False}, "DPO on Llama 3's vocabulary"),
        Case({"pairs": 1, "length": 2, "vocab": 3, "with_kl": True}, "a tiny batch"),
    )


def _bytes(pairs: int, length: int, vocab: int, with_kl: bool) -> int:
    return (7 if with_kl else 3) * 2 * pairs * length * vocab * 4


vocabulary_bytes = Exercise(
    name="vocabulary_bytes",
    title="How many bytes",
    what="Return the bytes of the (N, T, V) tensors that the textbook step has alive at its peak, with a KL or without one. "
    "<code>pairs</code> is B, <code>length</code> is T, <code>vocab</code> is V. All of them are float32.",
    why="One line of arithmetic tells you before you rent a GPU whether the step fits on it.",
    difficulty=1,
    minutes=4,
    hints=(
        "One tensor first: how many sequences, how many positions, how many logits at each, how many bytes a logit?",
        "A pair is two sequences. The counts are 7 with a KL and 3 without.",
    ),
    right=_bytes,
    cases=_bytes_cases,
    mistakes=(
        Mistake(
            "Half of it is there. Either N = 2B was forgotten (a pair is two sequences), or you took two bytes a number: autocast "
            "shortens the product with the head, but softmax and logarithm are taken in float32.",
            lambda pairs, length, vocab, with_kl: _bytes(pairs, length, vocab, with_kl) // 2,
        ),
        Mistake(
            "You counted one tensor. At the peak several are alive at once: see the curve above.",
            lambda pairs, length, vocab, with_kl: 2 * pairs * length * vocab * 4,
        ),
        Mistake(
            "You counted numbers, not bytes: a float32 has four.",
            lambda pairs, length, vocab, with_kl: _bytes(pairs, length, vocab, with_kl) // 4,
        ),
        Mistake(
            "The two counts are swapped: it is the KL that needs both models' whole distributions.",
            lambda pairs, length, vocab, with_kl: _bytes(pairs, length, vocab, not with_kl),
        ),
        Mistake(
            "You counted 7 either way. Without a KL, nothing of the reference outlives its gather: 3.",
            lambda pairs, length, vocab, with_kl: _bytes(pairs, length, vocab, True),
        ),
    ),
    solution="scale",
)


# ---- 2. dL/dz from g and k


def _gradient_cases() -> tuple[Case, ...]:
    def case(rows: int, vocab: int, seed: int, words: str = "", with_kl: bool = True) -> Case:
        given = {"logits": _normal(rows, vocab, seed=seed), "ref_logits": _normal(rows, vocab, seed=seed + 1)}
        given["targets"] = torch.arange(rows) * 3 % vocab
        given["g"] = _normal(rows, seed=seed + 2)
        given["k"] = _normal(rows, seed=seed + 3) * with_kl
        return Case(given, words)

    return (
        case(4, 7, 0),
        case(5, 5, 10, "as many positions as tokens"),
        case(3, 6, 20, "an objective without KL", False),
    )


def _gradient(logits: Tensor, ref_logits: Tensor, targets: Tensor, g: Tensor, k: Tensor, dim: int = -1) -> Tensor:
    p, q = logits.softmax(dim), ref_logits.softmax(dim)
    return g[:, None] * (_one_hot(logits, targets) - p) + k[:, None] * (p - q)


def _one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, targets[:, None], 1.0)


logit_gradient = Exercise(
    name="logit_gradient",
    title="A whole row of gradients from two numbers",
    what="Return dL/dz, shape (R, V). <code>logits</code> and <code>ref_logits</code> are (R, V), <code>targets</code> (R,) are "
    "the tokens y, <code>g</code> and <code>k</code> (R,) are dL/d log &pi;(y) and dL/dKL. No autograd.",
    why="This is all a backward pass through the vocabulary needs to know about the objective, and the reason why no graph has to "
    "be kept.",
    difficulty=2,
    minutes=6,
    hints=(
        "It is the equation above, with g and k as columns: <code>g[:, None]</code>.",
        "p and q are softmaxes over the last dimension; e<sub>y</sub> is a row of zeros with a 1 at y.",
        "<code>torch.zeros_like(logits).scatter(-1, targets[:, None], 1.0)</code> makes e<sub>y</sub>.",
    ),
    right=_gradient,
    cases=_gradient_cases,
    mistakes=(
        Mistake(
            "The first bracket has the wrong sign: raising log &pi;(y) means raising z<sub>y</sub>, so it is e<sub>y</sub> - p. "
            "(p - e<sub>y</sub> is the gradient of the cross-entropy.)",
            lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, -g, k),
        ),
        Mistake(
            "The second bracket has the wrong sign: KL(q || p) grows where p exceeds q, so it is p - q.",
            lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, g, -k),
        ),
        Mistake(
            "You left out e<sub>y</sub>: only the normaliser is differentiated, and every token is pushed alike.",
            lambda logits, ref_logits, targets, g, k: (
                _gradient(logits, ref_logits, targets, g, k) - g[:, None] * _one_hot(logits, targets)
            ),
        ),
        Mistake(
            "You left out p: z<sub>y</sub> is not the only logit that log &pi;(y) depends on, the normaliser holds all of them.",
            lambda logits, ref_logits, targets, g, k: (
                _gradient(logits, ref_logits, targets, g, k) + g[:, None] * logits.softmax(-1)
            ),
        ),
        Mistake(
            "The KL's part is missing. With k = 0 that is DPO; TDPO needs it.",
            lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, g, 0 * k),
        ),
        Mistake(
            "g and k are exchanged: g belongs to log &pi;(y), k to the KL.",
            lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, k, g),
        ),
        Mistake(
            "You normalised over the positions (dimension 0). Every row is a distribution over the vocabulary.",
            lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, g, k, dim=0),
        ),
        Mistake(
            "q is the reference's softmax, not its logits.",
            lambda logits, ref_logits, targets, g, k: (
                _gradient(logits, ref_logits, targets, g, k) + k[:, None] * (ref_logits.softmax(-1) - ref_logits)
            ),
        ),
    ),
    solution="scale",
)


# ---- 3. log-sum-exp over tiles of the vocabulary


def _lse_cases() -> tuple[Case, ...]:
    steep = _normal(3, 4, seed=3) * 40
    return (
        Case({"states": _normal(5, 4, seed=1), "weight": _normal(12, 4, seed=2), "columns": 4}),
        Case(
            {"states": _normal(5, 4, seed=1), "weight": _normal(11, 4, seed=2), "columns": 4},
            "a last tile that is not full",
        ),
        Case({"states": _normal(2, 4, seed=4), "weight": _normal(6, 4, seed=5), "columns": 100}, "a single tile"),
        Case({"states": steep, "weight": _normal(9, 4, seed=6) * 30, "columns": 3}, "logits in the thousands"),
    )


def _tiles(states: Tensor, weight: Tensor, columns: int, whole: bool = True):
    last = len(weight) if whole else len(weight) // columns * columns
    return [states @ weight[i : min(i + columns, last)].T for i in range(0, max(last, 1), columns)]


def _fold(parts: list[Tensor], join) -> Tensor:
    found = parts[0]
    for part in parts[1:]:
        found = join(found, part)
    return found


def _not_rescaled(states: Tensor, weight: Tensor, columns: int) -> Tensor:
    peak, total = torch.full((len(states),), -torch.inf, dtype=states.dtype), 0.0
    for z in _tiles(states, weight, columns):
        peak = torch.maximum(peak, z.max(-1).values)
        total = total + (z - peak[:, None]).exp().sum(-1)
    return peak + total.log()


tiled_logsumexp = Exercise(
    name="tiled_logsumexp",
    title="A softmax that never sees the whole row",
    what="Return log &Sigma;<sub>v</sub> exp z<sub>v</sub>, shape (R,), for z = states W<sup>T</sup>, from tiles of at most "
    "<code>columns</code> vocabulary entries: never make more than (R, <code>columns</code>) logits at a time. "
    "<code>states</code> is (R, d), <code>weight</code> (V, d). Logits may be in the thousands.",
    why="The normaliser is the only thing in log &pi;(y) that looks at the whole vocabulary. If it can be had in pieces, so can "
    "the rest. (fused.py cuts along the positions instead, which leaves every row whole; a GPU kernel cuts both ways.)",
    difficulty=3,
    minutes=10,
    hints=(
        "What do you have to remember of the tiles you have seen? One number a position.",
        "log(e<sup>a</sup> + e<sup>b</sup>) of two logarithms is <code>torch.logaddexp(a, b)</code>, and it is safe.",
        "Start from -inf, or from the first tile: <code>(states @ weight[i : i + columns].T).logsumexp(-1)</code>.",
    ),
    right=lambda states, weight, columns: (states @ weight.T).logsumexp(-1),
    cases=_lse_cases,
    mistakes=(
        Mistake(
            "You added the tiles' log-sum-exps. Their exponentials add: log(e<sup>a</sup> + e<sup>b</sup>).",
            lambda states, weight, columns: sum(z.logsumexp(-1) for z in _tiles(states, weight, columns)),
        ),
        Mistake(
            "You kept the largest of the tiles' log-sum-exps. Close where one tile dominates, but the others count too.",
            lambda states, weight, columns: _fold(
                [z.logsumexp(-1) for z in _tiles(states, weight, columns)], torch.maximum
            ),
        ),
        Mistake(
            "You return the last tile's log-sum-exp: carry the running one along.",
            lambda states, weight, columns: _tiles(states, weight, columns)[-1].logsumexp(-1),
        ),
        Mistake(
            "The last tile is missing where it is not full: the vocabulary is no multiple of the tile.",
            lambda states, weight, columns: _fold(
                [
                    z.logsumexp(-1) if z.numel() else z.sum(-1) - torch.inf
                    for z in _tiles(states, weight, columns, False)
                ],
                torch.logaddexp,
            ),
        ),
        Mistake(
            "The formula is right, but exp of a logit in the thousands is inf. Take the largest logit out before you "
            "exponentiate; logsumexp and logaddexp do.",
            lambda states, weight, columns: sum(z.exp().sum(-1) for z in _tiles(states, weight, columns)).log(),
        ),
        Mistake(
            "The running sum was made relative to an older maximum. When the maximum grows, multiply the sum by "
            "exp(old - new) first.",
            _not_rescaled,
        ),
        Mistake(
            "You averaged the exponentials; they are summed.",
            lambda states, weight, columns: (
                (states @ weight.T).logsumexp(-1) - torch.tensor(float(len(weight)), dtype=states.dtype).log()
            ),
        ),
    ),
    solution="scale",
)


# ---- 4. batches by tokens


def _budget(lengths: list[int], max_tokens: int, *, sort=True, sides: int = 2, padded=True, strict=False) -> list[int]:
    order = sorted(range(len(lengths)), key=lambda i: lengths[i]) if sort else range(len(lengths))
    found, number, members = [0] * len(lengths), 0, []
    for i in order:
        more = [*members, lengths[i]]
        cost = sides * (max(more) * len(more) if padded else sum(more))
        if members and (cost >= max_tokens if strict else cost > max_tokens):
            number, more = number + 1, [lengths[i]]
        found[i], members = number, more
    return found


def _budget_cases() -> tuple[Case, ...]:
    return (
        Case({"lengths": [9, 2, 3, 8, 4, 2, 9], "max_tokens": 24}),
        Case({"lengths": [5, 5, 5, 5], "max_tokens": 20}, "a batch that fills the budget exactly"),
        Case({"lengths": [10, 1, 1, 1, 1, 1, 1, 10], "max_tokens": 20}, "two long pairs among short ones"),
        Case({"lengths": [6], "max_tokens": 12}, "a single pair"),
    )


token_batches = Exercise(
    name="token_batches",
    title="Batches of equal cost",
    what="Sort the pairs by length and fill batches in that order; a batch of B pairs whose longest has length T takes 2BT tokens, "
    "padding included, and may take at most <code>max_tokens</code>. Return for each pair, in the order given, the number of its "
    "batch (from 0). <code>lengths[i]</code> is the length of the longer of pair i's two sequences; none is too long alone.",
    why="Memory and time follow tokens, not pairs. A budget in tokens keeps both level, so the longest batch no longer decides "
    "what fits.",
    difficulty=3,
    minutes=10,
    hints=(
        "<code>sorted(range(n), key=lambda i: lengths[i])</code> gives the order in which to fill.",
        "Sorted upwards, the newest pair is the longest: with it, a batch of b pairs takes 2 (b + 1) lengths[i].",
        "If that exceeds the budget, start a new batch with this pair; else the pair joins.",
    ),
    right=_budget,
    cases=_budget_cases,
    mistakes=(
        Mistake(
            "You did not sort. A short pair beside a long one is padded to its length.",
            lambda lengths, max_tokens: _budget(lengths, max_tokens, sort=False),
        ),
        Mistake(
            "A pair is two sequences: the batch takes 2BT tokens, not BT.",
            lambda lengths, max_tokens: _budget(lengths, max_tokens, sides=1),
        ),
        Mistake(
            "You added up the lengths. Padding counts too: every pair takes as much as the longest of its batch.",
            lambda lengths, max_tokens: _budget(lengths, max_tokens, padded=False),
        ),
        Mistake(
            "A batch may fill its budget exactly: start a new one only where it would take <i>more</i>.",
            lambda lengths, max_tokens: _budget(lengths, max_tokens, strict=True),
        ),
        Mistake(
            "You sorted downwards. That is as economical, but the batches are asked for in order of length.",
            lambda lengths, max_tokens: _downwards(lengths, max_tokens),
        ),
        Mistake(
            "The numbers are right, but in sorted order. Entry i belongs to pair i as it was given.",
            lambda lengths, max_tokens: sorted(_budget(lengths, max_tokens)),
        ),
    ),
    solution="scale",
)


def _downwards(lengths: list[int], max_tokens: int) -> list[int]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    numbers = _budget([lengths[i] for i in order], max_tokens, sort=False)
    return [numbers[order.index(i)] for i in range(len(lengths))]


quiz = Quiz(
    (
        Question(
            "You switch to bf16 autocast. What happens to the seven (N, T, V) tensors of textbook TDPO?",
            (
                Option("They halve.", False, "The product with the head does; softmax, logarithm and KL are float32."),
                Option(
                    "They stay as large.",
                    True,
                    "Log-probabilities need float32, and all seven are made after the cast.",
                ),
                Option("They vanish.", False, "No precision removes a tensor; only another order of computation does."),
            ),
        ),
        Question(
            "Why can DPO's reference be cached as one number a token, and TDPO's not?",
            (
                Option(
                    "TDPO reads the KL over the whole vocabulary.",
                    True,
                    "One log-probability does not tell the distribution. Its hidden state does, together with the head: d numbers, not V.",
                ),
                Option(
                    "TDPO's reference is trained.",
                    False,
                    "It is frozen as DPO's is; otherwise nothing could be cached.",
                ),
                Option(
                    "TDPO has two log-probabilities a token.", False, "TGDPO has: reference and guide. That is 8 bytes."
                ),
            ),
        ),
        Question(
            "What does a backward pass through the vocabulary have to know about the objective?",
            (
                Option(
                    "The loss function itself.", False, "It never calls it: it only needs the slopes at this token."
                ),
                Option(
                    "Two numbers a token.",
                    True,
                    "g on log &pi;(y) and k on the KL. The rest, p, q and y, is not the objective's.",
                ),
                Option("All the logits of the batch.", False, "Each position's gradient needs its own p and q alone."),
            ),
        ),
        Question(
            "Your model has a vocabulary of 4,096 and short responses. How much does the fused step save?",
            (
                Option("As much as with 128,256: it is the same algorithm.", False, "What it avoids has V in it."),
                Option(
                    "Little: weights and activations dominate.", True, "Measure before you optimise; the chapter did."
                ),
                Option("Nothing but accuracy.", False, "It is exact: loss and gradient agree to rounding."),
            ),
        ),
        Question(
            "A batch of 32 pairs runs out of memory now and then, mostly it does not. What helps at the same cost?",
            (
                Option("A batch of 16 pairs.", False, "It halves the peak, and wastes most batches' room."),
                Option(
                    "A budget in tokens.",
                    True,
                    "The peak follows 2BT. Long pairs then come in smaller batches, short ones in larger.",
                ),
                Option("More padding.", False, "Padding is what you pay for and do not use."),
            ),
        ),
    )
)
