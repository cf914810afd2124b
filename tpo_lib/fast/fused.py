r"""The numbers of `stats.py` and the gradient of any objective, without ever making an (N, T, V) tensor.

The textbook path turns every hidden state into V logits, keeps them, and lets autograd walk back through them. Here the
head runs on response positions only, one tile of rows at a time, and a tile is dropped before the next one is made.

Derivation. Let z = h W^T + b be the logits at one position, p = softmax(z), q the reference's distribution and y the token.

    log pi(y)  = z_y - logsumexp(z)              d log pi(y) / dz = e_y - p
    KL(q || p) = sum_v q_v (log q_v - log p_v)   d KL / dz        = p - q

An objective reads the vocabulary through these two numbers alone. If g = dL / d log pi(y) and k = dL / d KL, then

    dL/dz = g (e_y - p) + k (p - q),    dL/dh = dL/dz W,    dL/dW = sum over positions of (dL/dz)^T h.

So all that a backward pass needs from the objective is g and k, two numbers a token. Where they come from makes two paths:

`token_stats` gives TokenStats that autograd can differentiate: backward makes every tile a second time. Any loss of them
works. Matrix products with the vocabulary (u each): policy 1 + reference 1 forward, the same again and 2 for h and W backward.

`pair_loss` asks the objective for g and k while the tile of a pair is still there (autograd over the objective alone, on
tensors of one pair's tokens), and adds up dL/dh and dL/dW at once: 4u.

`pair_loss(..., merged=True)` is for an objective that reads the two numbers as their sum alone, as TDPO1 does. In it the
policy's log-sum-exp cancels:

    log pi(y) + KL(q || p) = z_y - sum_v q_v z_v + sum_v q_v log q_v = h u + c,    u = W_y - sum_v q_v W_v.

It is linear in h, u is its gradient, and the policy's logits are never made: reference 1, u 1 and dL/dW 1 are 3u.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpo_lib import stats
from tpo_lib.types import Head, LossOutput, Reading, TokenStats

TILE_BYTES = 48 << 20  # one tile of float32 logits on a CPU; where the KL is asked for, two are alive
BLOCK_COLUMNS = 512  # on a CPU, logits are made so many columns at a time
BLOCK_BYTES = 1 << 20  # on a CPU, softmax and KL walk a tile in blocks that stay in its cache
WEIGHED_APART = (
    "merged=True is for an objective whose loss has one gradient for logps and kl, token by token, as TDPO1's has; "
    "this one weighs them differently"
)


def choose_tile_bytes(device: torch.device) -> int:
    """Size of one tile of logits: 48 MiB on a CPU, on a GPU a sixteenth of what is free, at most 1 GiB.

    Every tile reads and writes the whole gradient of the head's weight, so large tiles are faster; they cost memory.
    """
    if device.type != "cuda":
        return TILE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(max(free // 16, TILE_BYTES), 1 << 30)


def token_stats(
    policy: Reading,
    labels: Tensor,
    ref: Reading | Tensor | None,
    *,
    guide: Reading | Tensor | None = None,
    with_kl: bool = False,
    tile_bytes: int | None = None,
) -> TokenStats:
    """`stats.token_stats` from hidden states: equal in value and gradient, without a vocabulary-sized tensor.

    Args:
        policy: hidden states and head of the policy; gradients flow into both (a frozen head skips its own). If its head
            is None (not understood), the textbook path is taken, with all logits at once.
        labels: (N, T) integer, -100 outside the response, not shifted.
        ref: the frozen reference: a Reading (its hidden size may differ), or (R,) log-probabilities of the response tokens
            where they are known already, or None.
        guide: as ref, of TGDPO's guide.
        with_kl: also compute KL(ref || policy) over the whole vocabulary; needs ref as a Reading.
        tile_bytes: size of one tile of logits; None chooses it from the device's memory.

    Returns:
        TokenStats with (N, T-1) fields in nats, exactly 0 off-mask.

    Raises:
        ValueError: as `stats.token_stats`; or with_kl is asked for and ref is no Reading.
    """
    if policy.head is None:
        return _textbook(policy, labels, ref, guide, with_kl)
    tiles = _Tiles(policy, labels, ref, guide, with_kl, tile_bytes)
    logps, kl = _TokenStats.apply(policy.states, policy.head.weight, policy.head.bias, tiles)
    return tiles.token_stats(slice(None), logps, kl if with_kl else None)


def pair_loss(
    objective: Callable[[TokenStats, TokenStats], LossOutput],
    policy: Reading,
    labels: Tensor,
    ref: Reading | Tensor | None = None,
    *,
    guide: Reading | Tensor | None = None,
    with_kl: bool = False,
    merged: bool = False,
    tile_bytes: int | None = None,
) -> tuple[LossOutput, TokenStats | None]:
    """`objective(*stats.split(token_stats(...)))`, its gradient made in the forward pass while a pair's tile is there.

    Args:
        objective: (chosen, rejected) -> LossOutput, in which no pair depends on another; for instance
            `functools.partial(losses.tdpo2, beta=0.1, alpha=0.5)`.
        policy, labels, ref, guide, with_kl: as in `token_stats`; N = 2B sequences, all chosen first.
        merged: the objective reads logps and kl as their sum alone (`losses.Objective.merged`), and nobody wants the
            statistics: one product less. A soft-capped policy is read in full all the same, for its logits are not linear.
        tile_bytes: as in `token_stats`. Pairs are taken together as far as they fit; one that is larger alone still is one tile.

    Returns:
        LossOutput, whose loss (B,) is differentiable, and the statistics, which are not; None for these if they were not made.

    Raises:
        NotFinite: a statistic is not finite; see `stats.check_finite`.
        ValueError: as `token_stats`; merged is asked for and the objective weighs logps and kl differently; in backward, if
            the pairs' losses do not all carry the same weight (take their sum or mean: what flows into the head has been
            added up over the pairs by then).
    """
    if len(labels) % 2:
        raise ValueError(
            f"{len(labels)} sequences cannot be split into pairs; stack all chosen first, then all rejected"
        )
    if policy.head is None:
        tokens = _textbook(policy, labels, ref, guide, with_kl)
        stats.check_finite(tokens)
        return objective(*stats.split(tokens)), tokens
    tiles = _Tiles(policy, labels, ref, guide, with_kl, tile_bytes)
    states, head = policy.states, policy.head
    merged = merged and with_kl and head.softcap is None
    inputs = (states, head.weight, head.bias)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    gradients = _Gradients(inputs, head, needs, tiles) if any(needs) else None  # else: evaluation
    logps = torch.empty_like(tiles.targets, dtype=tiles.exact)
    kl = torch.empty_like(logps) if with_kl else None
    outputs = []
    for pairs, index, chosen in tiles.pairs():
        values = (tiles.read_merged if merged else tiles.read)(states, head, index)  # without a graph
        logps[index] = values[0]
        if kl is not None:
            kl[index] = values[1]
        output, asked = _ask(objective, tiles, pairs, index, chosen, values, gradient=gradients is not None)
        outputs.append(output)
        if merged and asked:
            gradients.add(index, *tiles.to_merged_gradient(asked))
            continue
        live = [rows for rows, g, k in asked if tiles.to_logit_gradient(rows, index[rows], g, k)]
        if live:
            span = slice(live[0].start, live[-1].stop)
            gradients.add(index[span], tiles.buffers["policy"][span])
    tiles.buffers.clear()
    tokens = tiles.token_stats(slice(None), logps, kl)
    try:
        stats.check_finite(tokens)
    except stats.NotFinite:
        if not merged:
            raise
        return pair_loss(  # which of the two numbers it is
            objective, policy, labels, ref, guide=guide, with_kl=True, tile_bytes=tile_bytes
        )
    if tiles.weighed_apart:
        raise ValueError(WEIGHED_APART)
    output = _joined(outputs)
    if gradients is not None:
        gradients.weight = None  # the body's backward pass needs the sums alone
        output = replace(output, loss=_Attached.apply(output.loss, gradients, *inputs))
    return output, None if merged else tokens


def _textbook(policy: Reading, labels: Tensor, ref, guide, with_kl: bool) -> TokenStats:
    """All logits at once: what is computed where a head is not understood, and what everything here is compared with."""
    logits = [reading.logits() if isinstance(reading, Reading) else None for reading in (ref, guide)]
    tokens = stats.token_stats(policy.logits(), labels, logits[0], guide_logits=logits[1], with_kl=with_kl)
    known = {"ref_logps": ref, "guide_logps": guide}
    known = {name: stats.unpack(x.detach(), tokens.mask) for name, x in known.items() if isinstance(x, Tensor)}
    return replace(tokens, **known)


def _ask(objective, tiles: _Tiles, pairs: slice, index: Tensor, chosen: int, values, *, gradient: bool) -> tuple:
    """The objective's output on a tile's pairs, and per side (rows of the tile, dL/dlogp or None, dL/dKL or None)."""
    b = len(tiles.mask) // 2
    sides = [
        (slice(0, chosen), pairs),
        (slice(chosen, len(index)), slice(b + pairs.start, b + pairs.stop)),
    ]
    with torch.enable_grad():
        leaves = [[v if v is None else v[rows].detach().requires_grad_(gradient) for v in values] for rows, _ in sides]
        parts = [
            tiles.token_stats(sequences, *leaf, index[rows])
            for (rows, sequences), leaf in zip(sides, leaves, strict=True)
        ]
        output = objective(*parts)
    if not gradient:
        return output, []
    wanted = [leaf for side in leaves for leaf in side if leaf is not None]
    found = iter(torch.autograd.grad(output.loss.sum(), wanted, allow_unused=True))
    asked = [
        (rows, *(None if leaf is None else next(found) for leaf in side))
        for (rows, _), side in zip(sides, leaves, strict=True)
    ]
    return replace(output, loss=output.loss.detach()), asked


def _joined(outputs: list[LossOutput]) -> LossOutput:
    """The outputs of consecutive tiles as one; token weights have the chosen ones first again."""

    def join(name: str) -> Tensor:
        return torch.cat([getattr(output, name) for output in outputs])

    weights = None
    if outputs[0].token_weights is not None:
        halves = [output.token_weights.chunk(2) for output in outputs]
        weights = torch.cat([half[side] for side in (0, 1) for half in halves])
    return LossOutput(join("loss"), join("chosen_reward"), join("rejected_reward"), weights)


def _may_forbid(reading: Reading) -> bool:
    """Whether logits may be -inf: as somebody else gave them, or by the head's bias."""
    head = reading.head
    return head is None or (head.bias is not None and bool(head.bias.isinf().any()))


class _Tiles:
    """Positions, frozen models and the buffers that every tile of logits uses again."""

    def __init__(self, policy: Reading, labels: Tensor, ref, guide, with_kl: bool, tile_bytes: int | None) -> None:
        if with_kl and not isinstance(ref, Reading):
            raise ValueError("with_kl=True needs ref as a Reading: the KL is taken over the reference's distribution")
        self.mask = stats.response_mask(labels)  # (N, T-1)
        self.targets = labels[:, 1:][self.mask]  # (R,)
        self.vocab = policy.vocab
        stats.check_vocabulary(labels, self.vocab)
        for name, reading in (("policy", policy), ("ref", ref), ("guide", guide)):
            self._check(name, reading)
        self.device, self.exact = policy.states.device, torch.promote_types(policy.states.dtype, torch.float32)
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind)
        self.compute = torch.get_autocast_dtype(kind) if autocast else policy.states.dtype  # of the matrix products
        self.rows = max(1, (tile_bytes or choose_tile_bytes(self.device)) // (self.exact.itemsize * self.vocab))
        self.buffers: dict[str, Tensor] = {}
        self.cast: dict[int, Tensor] = {}  # weights in the type of the products, where theirs is another
        self.weighed_apart: Tensor | bool = False
        self.head = policy.head
        self.forbids = with_kl and (_may_forbid(policy) or _may_forbid(ref))
        self.ref = ref if with_kl else None  # read tile by tile beside the policy, for its whole distribution is needed
        self.ref_logps = torch.empty_like(self.targets, dtype=self.exact) if with_kl else self._frozen_logps(ref)
        self.guide_logps = self._frozen_logps(guide)

    def _check(self, name: str, reading: Reading | Tensor | None) -> None:
        if reading is None:
            return
        count = len(reading) if isinstance(reading, Tensor) else len(reading.states)
        if count != len(self.targets):
            raise ValueError(
                f"{name} was read at {count} positions, but labels have {len(self.targets)} response tokens"
            )
        if isinstance(reading, Reading) and reading.vocab != self.vocab:
            raise ValueError(
                f"{name} has {reading.vocab} vocabulary entries, the policy {self.vocab}; they must share one tokenizer"
            )

    def slices(self) -> Iterator[slice]:
        """The R positions in tiles of at most `self.rows`."""
        return (slice(i, min(i + self.rows, len(self.targets))) for i in range(0, len(self.targets), self.rows))

    def pairs(self) -> Iterator[tuple[slice, Tensor, int]]:
        """The B pairs in tiles: which pairs, the positions of their chosen and rejected tokens, how many are chosen ones."""
        counts = self.mask.sum(1).tolist()  # N integers
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        b, first = len(counts) // 2, 0
        while first < b:
            last, rows = first, 0
            while last < b and (last == first or rows + counts[last] + counts[b + last] <= self.rows):
                rows += counts[last] + counts[b + last]
                last += 1
            chosen, rejected = range(ends[first], ends[last]), range(ends[b + first], ends[b + last])
            yield slice(first, last), torch.tensor([*chosen, *rejected], device=self.device), len(chosen)
            first = last

    def read(self, states: Tensor, head: Head, index: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probability and KL at the positions `index`; the tile stays in the buffers for `logit_gradient`."""
        targets = self.targets[index, None]  # (rows, 1)
        logp = self._logits("policy", states[index], head)  # (rows, V)
        lse = logp.gather(-1, targets)  # (rows, 1)
        q = None if self.ref is None else self._logits("ref", self.ref.states[index], self.ref.head)
        kl, ref_logps = (torch.empty(len(logp), dtype=self.exact, device=self.device) for _ in range(2))
        for block in self._blocks(len(logp)):
            logp[block] = torch.log_softmax(logp[block], -1)
            if q is not None:
                gap = torch.log_softmax(q[block], -1)  # log q
                ref_logps[block] = gap.gather(-1, targets[block])[:, 0]
                torch.exp(gap, out=q[block])
                gap.sub_(logp[block]).mul_(q[block])  # q (log q - log p)
                if self.forbids:  # 0 inf is NaN
                    gap.masked_fill_(q[block] == 0, 0.0)
                kl[block] = gap.sum(-1)
        if q is not None:
            self.ref_logps[index] = ref_logps
        logps = logp.gather(-1, targets)
        self.lse = lse - logps  # (rows, 1)
        return logps[:, 0], kl if q is not None else None

    def to_logit_gradient(self, rows: slice, index: Tensor, g: Tensor | None, k: Tensor | None) -> bool:
        """Turn rows of the tile that was read last into g (e_y - p) + k (p - q), times d logits / d (h W^T).

        Returns False, and leaves them, where the loss depends on neither number (g and k are None).
        """
        if g is None and k is None:
            return False
        g = torch.zeros_like(k) if g is None else g
        logp, q = (self.buffers[name][rows] if name in self.buffers else None for name in ("policy", "ref"))
        for block in self._blocks(len(logp)):
            slope = None
            if self.head.softcap is not None:  # d (c tanh(x / c)) / dx = 1 - (z / c)^2
                slope = 1 - ((logp[block] + self.lse[rows][block]) / self.head.softcap).square_()
            dz = logp[block].exp_()  # p
            dz *= (-g if k is None else k - g)[block, None]
            if k is not None:
                dz.addcmul_(q[block], -k[block, None])
            dz.scatter_add_(-1, self.targets[index][block, None], g[block, None])
            if slope is not None:
                dz *= slope
            if self.head.scale != 1:
                dz *= self.head.scale
        return True

    def read_merged(self, states: Tensor, head: Head, index: Tensor) -> tuple[Tensor, Tensor]:
        """(log pi(y) + KL, zeros) at the positions `index`; e_y - q and u stay for `to_merged_gradient`."""
        targets = self.targets[index, None]  # (rows, 1)
        q = self._logits("ref", self.ref.states[index], self.ref.head)  # (rows, V)
        value, ref_logps = (torch.empty(len(q), dtype=self.exact, device=self.device) for _ in range(2))
        for block in self._blocks(len(q)):
            log_q = torch.log_softmax(q[block], -1)
            ref_logps[block] = log_q.gather(-1, targets[block])[:, 0]
            torch.exp(log_q, out=q[block])
            if self.forbids:
                log_q.masked_fill_(q[block] == 0, 0.0)
            value[block] = log_q.mul_(q[block]).sum(-1)  # sum_v q_v log q_v
            q[block].neg_()
        self.ref_logps[index] = ref_logps
        if head.bias is not None:
            bias = head.bias.detach().to(self.exact)
            expected = q @ bias if not self.forbids else (q * bias).masked_fill_(q == 0, 0.0).sum(-1)  # -sum_v q_v b_v
            value += head.scale * (bias[targets[:, 0]] + expected)
        difference = q.scatter_add_(-1, targets, torch.ones_like(targets, dtype=self.exact))  # e_y - q
        self.slope = (difference.to(self.compute) @ self.weight(head)).to(self.exact).mul_(head.scale)  # u, (rows, d)
        value += torch.linalg.vecdot(states[index].detach().to(self.exact), self.slope)
        return value, torch.zeros_like(value)

    def to_merged_gradient(self, asked: list[tuple]) -> tuple[Tensor, Tensor]:
        """What was read last as (dL/dz, dL/dh): g (e_y - q) and g u, with g = dL / d (log pi(y) + KL)."""
        if any(x is None for side in asked for x in side):
            raise ValueError(WEIGHED_APART)
        g, k = (torch.cat([side[i] for side in asked]) for i in (1, 2))  # (rows,), chosen then rejected
        self.weighed_apart = self.weighed_apart | (g != k).any()
        difference = self.buffers["ref"][: len(g)]
        return difference.mul_((g * self.head.scale)[:, None]), self.slope.mul_(g[:, None])

    def token_stats(
        self, sequences: slice, logps: Tensor, kl: Tensor | None, index: slice | Tensor = slice(None)
    ) -> TokenStats:
        """Numbers at the positions `index`, which are all those of `sequences`, as TokenStats."""
        mask = self.mask[sequences]

        def unpack(values: Tensor | None) -> Tensor | None:
            return None if values is None else stats.unpack(values, mask)

        ref, guide = (None if x is None else x.to(self.exact)[index] for x in (self.ref_logps, self.guide_logps))
        return TokenStats(unpack(logps), unpack(ref), mask, unpack(kl), unpack(guide))

    def _frozen_logps(self, reading: Reading | Tensor | None) -> Tensor | None:
        """(R,) log-probabilities of the response tokens under a frozen model."""
        if reading is None or isinstance(reading, Tensor):
            return None if reading is None else reading.detach()
        out = torch.empty_like(self.targets, dtype=self.exact)
        for tile in self.slices():
            logits = self._logits("policy", reading.states[tile], reading.head)
            for block in self._blocks(len(logits)):
                out[tile][block] = torch.log_softmax(logits[block], -1).gather(-1, self.targets[tile][block, None])[
                    :, 0
                ]
        return out

    def _logits(self, name: str, states: Tensor, head: Head | None) -> Tensor:
        """(rows, d) states -> (rows, V) logits in the buffer `name`."""
        if name not in self.buffers or len(self.buffers[name]) < len(states):
            rows = max(len(states), min(self.rows, len(self.targets)))
            self.buffers.pop(name, None)
            self.buffers[name] = torch.empty(rows, self.vocab, dtype=self.exact, device=self.device)
        out = self.buffers[name][: len(states)]
        if head is None:
            return out.copy_(states)
        states, weight = states.detach().to(self.compute), self.weight(head)
        for part in self._columns():
            if self.compute == self.exact:
                torch.mm(states, weight[part].T, out=out[:, part])
            else:
                out[:, part] = torch.mm(states, weight[part].T)
        if head.bias is not None:
            out += head.bias.detach()
        if head.scale != 1:
            out *= head.scale
        return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)

    def weight(self, head: Head) -> Tensor:
        """The head's weight in the type of the products; where that is another type, it is converted once for all tiles."""
        weight = head.weight.detach()
        if weight.dtype == self.compute:
            return weight
        if weight.data_ptr() not in self.cast:
            self.cast[weight.data_ptr()] = weight.to(self.compute)
        return self.cast[weight.data_ptr()]

    def _columns(self) -> Iterator[slice]:
        """The vocabulary, cut so that a CPU multiplies into its cache: 1.3 times as fast as in one piece."""
        step = self.vocab if self.device.type != "cpu" else BLOCK_COLUMNS
        return (slice(i, min(i + step, self.vocab)) for i in range(0, self.vocab, step))

    def _blocks(self, rows: int) -> Iterator[slice]:
        """A tile's rows, cut so that a block fits a CPU's cache; on a GPU the tile is one block."""
        step = rows if self.device.type != "cpu" else max(1, BLOCK_BYTES // (self.exact.itemsize * self.vocab))
        return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


class _Gradients:
    """dL/dh, dL/dW and dL/db, added up tile by tile; what is not needed stays None."""

    def __init__(
        self, inputs: tuple[Tensor, Tensor, Tensor | None], head: Head, needs: Sequence[bool], tiles: _Tiles
    ) -> None:
        self.inputs, self.weight = [x if x is None else x.detach() for x in inputs], tiles.weight(head)
        kinds = (inputs[0].dtype, tiles.exact, tiles.exact)
        self.sums = [
            torch.zeros_like(x, dtype=kind) if need and x is not None else None
            for x, need, kind in zip(inputs, needs, kinds, strict=True)
        ]

    def add(self, index: slice | Tensor, dz: Tensor, dh: Tensor | None = None) -> None:
        """Add the part of one tile: dz (rows, V) in float32 at the positions `index`, and dz W where it is known already."""
        (states, *_), (to_states, to_weight, to_bias) = self.inputs, self.sums
        if to_bias is not None:
            to_bias += dz.sum(0)
        dz = dz.to(self.weight.dtype)
        if to_states is not None:
            to_states[index] = (dz @ self.weight if dh is None else dh).to(states.dtype)
        if to_weight is not None and dz.dtype == to_weight.dtype:
            to_weight.addmm_(dz.T, states[index].to(dz.dtype))
        elif to_weight is not None:
            to_weight += dz.T @ states[index].to(dz.dtype)

    def take(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """The sums, times a factor, in the types of their tensors; they are given away once."""
        if self.sums is None:
            raise RuntimeError(
                "the gradient of pair_loss was made once, in its forward pass; run it again for another backward"
            )
        sums, self.sums = self.sums, None
        if factor is not None:
            sums = [x if x is None else x.mul_(factor) for x in sums]
        return [x if x is None else x.to(like.dtype) for x, like in zip(sums, self.inputs, strict=True)]


class _TokenStats(torch.autograd.Function):
    """Hidden states and head -> (R,) log-probabilities and KL; backward makes every tile once more."""

    @staticmethod
    def forward(ctx, states, weight, bias, tiles: _Tiles):
        ctx.tiles = tiles
        ctx.save_for_backward(states, weight, bias)
        head = replace(tiles.head, weight=weight, bias=bias)
        logps, kl = zip(*(tiles.read(states, head, tile) for tile in tiles.slices()), strict=True)
        tiles.buffers.clear()
        logps = torch.cat(logps)
        return logps, torch.zeros_like(logps) if tiles.ref is None else torch.cat(kl)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, k):
        tiles, inputs = ctx.tiles, ctx.saved_tensors
        head = replace(tiles.head, weight=inputs[1], bias=inputs[2])
        gradients = _Gradients(inputs, head, ctx.needs_input_grad[:3], tiles)
        for tile in tiles.slices():
            tiles.read(inputs[0], head, tile)
            rows = slice(0, tile.stop - tile.start)
            tiles.to_logit_gradient(rows, tile, g[tile], None if tiles.ref is None else k[tile])
            gradients.add(tile, tiles.buffers["policy"][rows])
        tiles.buffers.clear()
        return *gradients.take(), None


class _Attached(torch.autograd.Function):
    """(B,) losses whose gradient is known already."""

    @staticmethod
    def forward(ctx, loss, gradients: _Gradients, *inputs):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, weights):
        if not torch.equal(weights, weights[:1].expand_as(weights)):
            raise ValueError(
                f"the losses of a batch's pairs carry different weights in backward ({weights.tolist()[:4]} ...); the gradient "
                "was made for their sum: take loss.sum() or loss.mean(), or use token_stats"
            )
        return None, None, *ctx.gradients.take(weights[0])
