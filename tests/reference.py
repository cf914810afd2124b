"""The same numbers as tpo_lib, one token at a time in plain Python floats: slow, obvious, and sharing no code with it.

Everything takes nested lists (or tensors, which are turned into lists): labels (N, T) with -100 outside the response,
logits (N, T, V), N = 2B sequences, chosen first. Position t-1 of the logits predicts token t.
"""

from __future__ import annotations

import math

IGNORE = -100
FLOOR = 0.01


def as_list(values) -> list:
    """Tensor or list -> nested list of Python numbers."""
    return values.tolist() if hasattr(values, "tolist") else values


def log_softmax(row: list[float]) -> list[float]:
    """log(exp(z_i) / sum_j exp(z_j)) for every entry of one row."""
    top = max(row)
    total = 0.0
    for z in row:
        total += math.exp(z - top)
    return [z - top - math.log(total) for z in row]


def scored(labels: list[int]) -> list[int]:
    """Positions t of one sequence whose token is scored: in the response and not the first."""
    return [t for t in range(1, len(labels)) if labels[t] != IGNORE]


def logps(logits, labels) -> list[list[float]]:
    """(N, T-1) log-probability of every response token, 0 elsewhere."""
    logits, labels = as_list(logits), as_list(labels)
    result = [[0.0] * (len(row) - 1) for row in labels]
    for n, row in enumerate(labels):
        for t in scored(row):
            result[n][t - 1] = log_softmax(logits[n][t - 1])[row[t]]
    return result


def kl_of_rows(p_logits: list[float], q_logits: list[float]) -> float:
    """KL(p || q) of two rows of logits: a token p excludes adds nothing, one that only q excludes adds infinity."""
    total = 0.0
    for log_p, log_q in zip(log_softmax(p_logits), log_softmax(q_logits), strict=True):
        if log_p > -math.inf:
            total += math.exp(log_p) * (log_p - log_q)
    return total


def kl(ref_logits, policy_logits, labels) -> list[list[float]]:
    """(N, T-1) KL(ref || policy) at every response token, 0 elsewhere."""
    ref_logits, policy_logits, labels = as_list(ref_logits), as_list(policy_logits), as_list(labels)
    result = [[0.0] * (len(row) - 1) for row in labels]
    for n, row in enumerate(labels):
        for t in scored(row):
            result[n][t - 1] = kl_of_rows(ref_logits[n][t - 1], policy_logits[n][t - 1])
    return result


def guidance(guide_logp: float, ref_logp: float, is_chosen: bool, h: dict) -> float:
    """TGDPO's weight of one token."""
    r_hat = h["guide_beta"] * (guide_logp - ref_logp)
    signed = h["alpha"] * r_hat if is_chosen else -h["alpha"] * r_hat
    weight = math.exp(signed) if h.get("shaping", "linear") == "exp" else 1 + signed
    return max(weight, h.get("floor", FLOOR))


def reward(name: str, n: int, is_chosen: bool, policy, ref, guide, labels, h: dict) -> float:
    """The implicit reward of sequence n under objective `name` with hyperparameters h, summed token by token."""
    log_pi, log_ref, log_guide = logps(policy, labels), logps(ref, labels), logps(guide, labels)
    token_kl = kl(ref, policy, labels)
    positions = scored(labels[n])
    total = 0.0
    for t in positions:
        c = t - 1
        ratio = log_pi[n][c] - log_ref[n][c]
        if name in ("dpo", "ipo"):
            total += h["beta"] * ratio
        elif name == "tdpo1":
            total += h["beta"] * (ratio + token_kl[n][c])
        elif name == "tdpo2":
            total += h["beta"] * (ratio + h["alpha"] * token_kl[n][c])
        elif name == "tgdpo":
            total += h["beta"] * guidance(log_guide[n][c], log_ref[n][c], is_chosen, h) * ratio
        elif name == "simpo":
            total += h["beta"] * log_pi[n][c] / len(positions)
        elif name == "sft":
            total += log_pi[n][c] / len(positions)
    return total


def loss(name: str, policy, ref, guide, labels, h: dict) -> list[dict[str, float]]:
    """One {loss, chosen, rejected} a pair."""
    policy, ref, guide, labels = as_list(policy), as_list(ref), as_list(guide), as_list(labels)
    result = []
    pairs = len(labels) // 2
    for b in range(pairs):
        chosen = reward(name, b, True, policy, ref, guide, labels, h)
        rejected = reward(name, pairs + b, False, policy, ref, guide, labels, h)
        margin = chosen - rejected - h.get("gamma", 0.0)
        value = -chosen if name == "sft" else math.log(1 + math.exp(-margin))
        if name == "ipo":
            value = (margin / h["beta"] - 1 / (2 * h["beta"])) ** 2
        result.append({"loss": value, "chosen": chosen, "rejected": rejected})
    return result


def logit_gradient(name: str, policy, ref, guide, labels, h: dict) -> list:
    """d sum(loss) / d policy_logits (N, T, V), each entry from the closed form of its objective.

    With e_y the one-hot target, p and q the policy's and the reference's probabilities, c = beta sigma(-margin):
    chosen  dpo, tdpo2 c(p - e_y); tdpo1 c(q - e_y); tgdpo c f (p - e_y); simpo c(p - e_y)/|y|;
    ipo as dpo with c = 2 (1/(2 beta) - margin/beta);
    rejected  dpo, ipo c(e_y - p); tdpo1 c(e_y - q); tdpo2 c[(e_y - p) + alpha(p - q)]; tgdpo, simpo as above, sign flipped.
    """
    policy, ref, guide, labels = as_list(policy), as_list(ref), as_list(guide), as_list(labels)
    values = loss(name, policy, ref, guide, labels, h)
    log_ref, log_guide = logps(ref, labels), logps(guide, labels)
    pairs, vocab = len(labels) // 2, len(policy[0][0])
    result = [[[0.0] * vocab for _ in row] for row in labels]
    for n, row in enumerate(labels):
        value, is_chosen = values[n % pairs], n < pairs
        margin = value["chosen"] - value["rejected"] - h.get("gamma", 0.0)
        c = h.get("beta", 1.0) / (1 + math.exp(margin)) if name != "sft" else 1.0
        if name == "ipo":
            c = 2 * (1 / (2 * h["beta"]) - margin / h["beta"])
        for t in scored(row):
            p = [math.exp(x) for x in log_softmax(policy[n][t - 1])]
            q = [math.exp(x) for x in log_softmax(ref[n][t - 1])]
            for v in range(vocab):
                e = 1.0 if v == row[t] else 0.0
                slope = e - p[v]  # of log pi(y)
                if name == "tdpo1":
                    slope = e - q[v]
                elif name == "tdpo2" and not is_chosen:
                    slope += h["alpha"] * (p[v] - q[v])
                elif name == "tgdpo":
                    slope *= guidance(log_guide[n][t - 1], log_ref[n][t - 1], is_chosen, h)
                elif name in ("simpo", "sft"):
                    slope /= len(scored(row))
                if name == "sft" and not is_chosen:
                    slope = 0.0
                result[n][t - 1][v] = -c * slope if is_chosen else c * slope
    return result
