"""Solutions of the exercises in 08_scale.ipynb."""

import torch


def vocabulary_bytes(pairs, length, vocab, with_kl):
    alive = 7 if with_kl else 3
    return alive * (2 * pairs) * length * vocab * 4  # a pair is two sequences, a float32 four bytes


def logit_gradient(logits, ref_logits, targets, g, k):
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    one_hot = torch.zeros_like(logits).scatter(-1, targets[:, None], 1.0)
    return g[:, None] * (one_hot - p) + k[:, None] * (p - q)


def tiled_logsumexp(states, weight, columns):
    found = torch.full((len(states),), -torch.inf, dtype=states.dtype)
    for start in range(0, len(weight), columns):
        tile = states @ weight[start : start + columns].T  # (R, columns), dropped before the next one
        found = torch.logaddexp(found, tile.logsumexp(-1))
    return found


def token_batches(lengths, max_tokens):
    batch, size, found = 0, 0, [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if size and 2 * (size + 1) * lengths[i] > max_tokens:  # sorted upwards, so the newest pair is the longest
            batch, size = batch + 1, 0
        found[i], size = batch, size + 1
    return found
