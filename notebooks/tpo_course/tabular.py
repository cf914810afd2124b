"""Training in the enumerable token world: a policy with one logit per state, fitted to the exact expected loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tpo_course.world import TokenWorld, lookup


class TabularPolicy(nn.Module):
    """One logit per state and token, with a language model's interface: (N, T) states in, (N, T + 1, V) logits out.

    Args:
        logits: (S, V) start, for instance `world.ref_logps`; copied.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, states: Tensor) -> Tensor:
        return lookup(self.logits, states)

    def logps(self) -> Tensor:
        """(S, V) log pi(a|s), detached: what the exact functions of the world take."""
        return self.logits.detach().log_softmax(-1)


@dataclass(frozen=True)
class Fit:
    """A trained policy."""

    policy: TabularPolicy  # where training stopped
    losses: list[float]  # expected loss before every step
    grad_norm: float  # largest absolute entry of the expected loss's gradient at the end; small means converged


OPTIMIZERS = {
    "lbfgs": partial(  # with a strong Wolfe line search; stops by itself
        torch.optim.LBFGS,
        lr=1.0,
        max_iter=20,
        history_size=50,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    ),
    "adam": partial(torch.optim.Adam, lr=0.05),
    "sgd": partial(torch.optim.SGD, lr=0.1),  # plain gradient steps
}


def minimise(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int = 200,
    optimizer: str = "lbfgs",
    lr: float | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Fit:
    """Minimise a scalar function of (S, V) logits, full batch.

    Args:
        loss: (S, V) logits -> scalar, differentiable.
        start: (S, V) logits to start from.
        steps: at most this many.
        optimizer: a key of OPTIMIZERS.
        lr: step size; None is the one in OPTIMIZERS.
        callback: called as callback(step, log-probabilities) before every step.

    Raises:
        ValueError: the optimizer is unknown, or the loss stopped being a finite number (the message says when).

    Example:
        >>> target = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
        >>> fit = minimise(lambda z: -(target * z.log_softmax(-1)).sum(), torch.zeros(1, 2, dtype=torch.float64))
        >>> [round(p, 6) for p in fit.policy.logps().exp()[0].tolist()]
        [0.75, 0.25]
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    policy, losses = TabularPolicy(start), []
    update = OPTIMIZERS[optimizer](policy.parameters(), **({"lr": lr} if lr else {}))

    def closure() -> Tensor:
        update.zero_grad()
        value = loss(policy.logits)
        value.backward()
        return value

    for step in range(steps):
        if callback is not None:
            callback(step, policy.logps())
        losses.append(float(update.step(closure).detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {step} ({optimizer}, lr={lr}); lower lr")
        if optimizer == "lbfgs" and step and losses[-2] - losses[-1] <= 1e-16:
            break  # a whole round of the line search found nothing better
    closure()
    return Fit(policy, losses, float(policy.logits.grad.abs().max()))


def fit_tabular(
    world: TokenWorld,
    objective: str | Callable,
    *,
    start: Tensor | None = None,
    steps: int = 200,
    optimizer: str = "lbfgs",
    lr: float | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    **options,
) -> Fit:
    """Train a tabular policy on `world.expected_loss`: the objectives of `losses`, without sampling noise.

    Args:
        objective, options: as for `TokenWorld.expected_loss`: guide, and what the objective takes.
        start: (S, V) logits; None starts from pi_ref, as training does.
        steps, optimizer, lr, callback: as for `minimise`.

    Raises:
        ValueError: "tdpo2" is given to lbfgs: with its stop-gradient the update is no gradient of the value, and a line
            search on the value stops anywhere.

    Example:
        >>> world = TokenWorld(vocab_size=3, horizon=2, seed=0, num_prompts=1)
        >>> fit = fit_tabular(world, "dpo", beta=1.0)
        >>> _, optimum = world.soft_optimum(beta=1.0)
        >>> bool(world.kl(optimum, fit.policy.logps()).max() < 1e-6)
        True
    """
    if objective == "tdpo2" and optimizer == "lbfgs":
        raise ValueError("tdpo2's stop-gradient misleads lbfgs's line search; pass optimizer='adam' or 'sgd'")

    def loss(logits: Tensor) -> Tensor:
        return world.expected_loss(objective, logits, **options)

    start = world.ref_logps if start is None else start
    return minimise(loss, start, steps=steps, optimizer=optimizer, lr=lr, callback=callback)
