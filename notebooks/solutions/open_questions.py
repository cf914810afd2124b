"""Solutions of the exercises in 09_open_questions.ipynb."""


def softmax_weights(r_hat, mask, alpha):
    scores = (alpha * r_hat).masked_fill(~mask, float("-inf"))  # what is no response has no share
    return mask.sum(-1, keepdim=True) * scores.softmax(-1)  # (N, T-1): shares add up to 1, times the length: mean 1


def state_worth(logits, ref_logits, credit, beta):
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)  # (R, V)
    return (logps.exp() * (credit - beta * (logps - ref_logps))).sum(-1)  # (R,), KL(pi || pi_ref) inside the sum


def averaged(average, policy, decay, updates):
    keep = pow(decay, updates)
    return [keep * mine + (1 - keep) * theirs for mine, theirs in zip(average, policy, strict=True)]
