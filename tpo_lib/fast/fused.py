"""`stats.pair_loss` without ever making an (N, T, V) tensor: the gradient is made in the forward pass, tile by tile.

The head runs on the response tokens of a few pairs, one tile at a time (tiles.py has the derivation). While the tile is there,
the objective is asked for its two numbers a token, g = dL / d log pi(y) and k = dL / d KL (autograd over the objective alone),
and dL/dh and dL/dW are added up at once; then the next tile takes its place.

Matrix products with the vocabulary: policy 1, reference 1 where the KL is read, dL/dh 1, dL/dW 1. TDPO1 reads log pi + KL
alone, and where nobody wants its statistics the policy's logits are not made either: reference 1, u 1, dL/dW 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpo_lib import losses, stats
from tpo_lib.fast.tiles import Asked, Gradients, Tile, Tiles, spread
from tpo_lib.types import LossOutput, Reading, TokenStats


@dataclass(frozen=True)
class Numbers:
    """TokenStats at the R response positions alone: (R,) each, or None."""

    mask: Tensor  # (N, T-1)
    logps: Tensor
    ref_logps: Tensor | None
    kl: Tensor | None
    guide_logps: Tensor | None
    rewards: Tensor | None = None
    weights: Tensor | None = None

    def put(self, index: slice | Tensor, tile, place: slice | Tensor = slice(None)) -> None:
        """Keep what was read of a tile, or of its rows `place`, at the positions `index`."""
        self.logps[index] = tile.logps[place]
        if self.kl is not None:
            self.kl[index], self.ref_logps[index] = tile.kl[place], tile.ref_logps[place]

    def token_stats(self, sequences: slice = slice(None), index: slice | Tensor = slice(None), **leaves) -> TokenStats:
        """The statistics of `sequences`, whose positions are `index`; `leaves` take the place of fields there."""
        mask, names = self.mask[sequences], [name for name, value in vars(self).items() if value is not None]
        fields = {name: getattr(self, name)[index] for name in names if name != "mask"} | leaves
        fields = {name: stats.unpack(value, mask) for name, value in fields.items() if value is not None}
        return TokenStats(**{"ref_logps": None, "mask": mask} | fields)


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected responses of a tile's pairs: its rows of the tile, its sequences in the batch."""

    rows: slice
    sequences: slice


def pair_loss(
    objective: Callable[[TokenStats, TokenStats | None], LossOutput],
    policy: Reading,
    labels: Tensor,
    ref: Reading | Tensor | None = None,
    *,
    guide: Reading | Tensor | None = None,
    with_kl: bool = False,
    given: Mapping[str, Tensor] | None = None,
    paired: bool = True,
    logged: bool = True,
    tile_bytes: int | None = None,
    look: Callable[[Tensor, Tile], None] | None = None,
) -> tuple[LossOutput, TokenStats | None]:
    """`stats.pair_loss`, equal in value and gradient, in less time and memory. What differs:

    Args:
        objective: no pair may depend on another in it.
        tile_bytes: size of one tile of logits; None chooses it from the device's memory. Pairs are taken together as far as
            they fit; one that is larger alone still is one tile.
        look: called with the positions and the tile of each group while the tile holds log pi; needs logged, and a `policy.head`.

    Returns:
        The statistics are not differentiable; None for them if they were not made.

    Raises:
        ValueError: also in backward, if the pairs' losses do not all carry the same weight (take their sum or mean: what
            flows into the head has been added up over the pairs by then).
    """
    if policy.head is None:  # not understood
        said = {"guide": guide, "with_kl": with_kl, "given": given}
        return stats.pair_loss(objective, policy, labels, ref, **said, paired=paired)
    starts = [part.start for part in stats.halves(len(labels))] if paired else [0]  # of the sides in the batch
    tiles, numbers = prepare(policy, labels, ref, guide=guide, with_kl=with_kl, given=given, tile_bytes=tile_bytes)
    reads_the_sum = getattr(objective, "func", objective) is losses.tdpo1  # of log pi and KL
    merged = reads_the_sum and with_kl and not logged and policy.head.softcap is None
    inputs = (policy.states, policy.head.weight, policy.head.bias)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    gradients = Gradients(tiles, needs) if any(needs) else None  # else: evaluation
    outputs = []
    for positions, sides in _grouped(numbers.mask, starts, tiles.rows, policy.rows):
        index, place = positions, slice(None)
        if policy.rows is not None:  # a sequence that stands in several pairs is one sequence of the tile
            index, place = policy.rows[positions].unique(return_inverse=True)
        tile = (tiles.read_merged if merged else tiles.read)(index)
        numbers.put(positions, tile, place)
        if look is not None:
            look(index, tile)
        output, asked = _ask(objective, numbers, positions, sides, gradient=gradients is not None)
        outputs.append(output)
        if found := tile.gradient(_summed(asked, place, len(index))) if asked else None:
            rows, dz, dh = found
            gradients.add(index[rows], dz, dh)
    tiles.free()
    tokens = numbers.token_stats()
    try:
        stats.check_finite(tokens)
    except stats.NotFinite:
        if merged:
            # which number it is
            return pair_loss(objective, policy, labels, ref, with_kl=True, given=given, tile_bytes=tile_bytes)
        raise
    output = _joined(outputs, len(starts))
    if gradients is not None:
        gradients.weight = None  # the body's backward pass needs the sums alone
        output = replace(output, loss=_Attached.apply(output.loss, gradients, *inputs))
    return output, None if merged else tokens


def prepare(policy: Reading, labels: Tensor, ref, *, guide, with_kl: bool, tile_bytes: int | None, given=None):
    """Check what was read, and read at once what no gradient flows into: (Tiles, Numbers), the other numbers still to come."""
    if with_kl and not isinstance(ref, Reading):
        raise ValueError(stats.KL_NEEDS_READING)
    mask = stats.response_mask(labels)  # (N, T-1)
    targets = labels[:, 1:][mask]  # (R,)
    stats.check_vocabulary(labels, policy.vocab)
    for name, reading in (("policy", policy), ("ref", ref), ("guide", guide)):
        _check(name, reading, len(targets), policy.vocab)
    rows = policy.rows
    first = None if rows is None else _first(rows, len(policy.states))  # (U,) of U states, a position that has it
    # under the KL, the reference is read tile by tile beside the policy, for its whole distribution is needed
    tiles = Tiles(policy, _at(targets, first), _at(ref, first) if with_kl else None, tile_bytes)
    empty = partial(torch.empty_like, targets, dtype=tiles.exact)

    def logps(reading: Reading | Tensor | None) -> Tensor | None:
        if isinstance(reading, Reading):
            return _at(tiles.logps(_at(reading, first)), rows)
        return None if reading is None else reading.detach().to(tiles.exact)

    known = {"ref_logps": empty() if with_kl else logps(ref), "guide_logps": logps(guide)}
    known |= {name: logps(values) for name, values in (given or {}).items()}
    return tiles, Numbers(mask, empty(), kl=empty() if with_kl else None, **known)


def _first(rows: Tensor, count: int) -> Tensor:
    """(count,) the first position that has each state."""
    positions = torch.arange(len(rows), device=rows.device)
    return torch.full_like(rows[:1].expand(count), len(rows)).scatter_reduce_(0, rows, positions, "amin")


def _at(values: Reading | Tensor, index: Tensor | None):
    """What was read, or numbers, at some positions; None: at all of them."""
    if isinstance(values, Tensor):
        return values if index is None else values[index]
    if index is None:
        return spread(values)
    return Reading(values.states[index if values.rows is None else values.rows[index]], values.head)


def _check(name: str, reading: Reading | Tensor | None, positions: int, vocab: int) -> None:
    if reading is None:
        return
    found = reading if isinstance(reading, Tensor) else reading.states if reading.rows is None else reading.rows
    count = len(found)
    if count != positions:
        raise ValueError(f"{name} was read at {count} positions, but labels have {positions} response tokens")
    if isinstance(reading, Reading) and reading.vocab != vocab:
        raise ValueError(
            f"{name} has {reading.vocab} vocabulary entries, the policy {vocab}; they must share one tokenizer"
        )


def _grouped(mask: Tensor, starts: list[int], most: int, rows: Tensor | None) -> Iterator[tuple[Tensor, list[Side]]]:
    """The pairs in groups of at most `most` response tokens: their positions, chosen ones first, and whose they are."""
    counts = mask.sum(1).tolist()  # N integers
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    names = ends if rows is None else rows[ends[:-1]].tolist()  # the same for sequences that have the same states
    pairs = len(counts) // len(starts)

    def size(pairs: range) -> int:
        return sum({names[start + i]: counts[start + i] for start in starts for i in pairs}.values())

    first = 0
    while first < pairs:
        last = first + 1
        while last < pairs and size(range(first, last + 1)) <= most:
            last += 1
        positions, sides = [], []
        for start in starts:
            begin = len(positions)
            positions += range(ends[start + first], ends[start + last])
            sides.append(Side(slice(begin, len(positions)), slice(start + first, start + last)))
        yield torch.tensor(positions, device=mask.device), sides
        first = last


def _ask(objective, numbers: Numbers, index: Tensor, sides: list[Side], *, gradient: bool):
    """The objective's output on a tile's pairs, and the list of what it asks of each side."""
    names, wanted, parts = ("logps",) if numbers.kl is None else ("logps", "kl"), [], []
    with torch.enable_grad():
        for side in sides:
            at = index[side.rows]
            leaves = {name: getattr(numbers, name)[at].detach().requires_grad_(gradient) for name in names}
            parts.append(stats.as_asked(numbers.token_stats(side.sequences, at, **leaves)))
            wanted += leaves.values()
        output = objective(*parts, *[None] * (2 - len(parts)))
    if not gradient:
        return output, []
    found = iter(torch.autograd.grad(output.loss.sum(), wanted, allow_unused=True))
    asked = [Asked(side.rows, next(found), None if numbers.kl is None else next(found)) for side in sides]
    return replace(output, loss=output.loss.detach()), asked


def _summed(asked: list[Asked], place: slice | Tensor, count: int) -> list[Asked]:
    """What all positions together ask of the `count` rows of a tile, where position i has the row place[i]."""
    if isinstance(place, slice):
        return asked

    def total(name: str) -> Tensor | None:
        parts = [(place[side.rows], value) for side in asked if (value := getattr(side, name)) is not None]
        return sum(value.new_zeros(count).index_add_(0, at, value) for at, value in parts) if parts else None

    return [Asked(slice(0, count), total("g"), total("k"))]


def _joined(outputs: list[LossOutput], sides: int) -> LossOutput:
    """The outputs of consecutive tiles as one; token weights have the chosen ones first again."""

    def join(name: str, sides: int = 1) -> Tensor | None:
        parts = [getattr(output, name) for output in outputs]
        if parts[0] is None:
            return None
        return torch.cat([part.chunk(sides)[side] for side in range(sides) for part in parts])

    return LossOutput(*map(join, ("loss", "chosen_reward", "rejected_reward")), join("token_weights", sides))


class _Attached(torch.autograd.Function):
    """(B,) losses whose gradient is known already."""

    @staticmethod
    def forward(ctx, loss, gradients: Gradients, *inputs):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, weights):
        if not torch.equal(weights, weights[:1].expand_as(weights)):
            raise ValueError(
                f"the losses of a batch's pairs carry different weights in backward ({weights.tolist()[:4]} ...); the gradient "
                "was made for their sum: take loss.sum() or loss.mean(), or use stats.pair_loss"
            )
        return None, None, *ctx.gradients.take(weights[0])
