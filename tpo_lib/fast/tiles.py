"""Logits tile by tile: some rows of (R, V) at a time, read, turned into a gradient in place, and overwritten by the next.

Derivation. Let z = h W^T + b be the logits at one position, p = softmax(z), q the reference's distribution and y the token.

    log pi(y)  = z_y - logsumexp(z)              d log pi(y) / dz = e_y - p
    KL(q || p) = sum_v q_v (log q_v - log p_v)   d KL / dz        = p - q

An objective reads the vocabulary through these two numbers alone. If g = dL / d log pi(y) and k = dL / d KL, then

    dL/dz = g (e_y - p) + k (p - q),    dL/dh = dL/dz W,    dL/dW = sum over positions of (dL/dz)^T h.

Where a loss reads the two as their sum alone, as TDPO1's does (g = k), the policy's log-sum-exp cancels:

    log pi(y) + KL(q || p) = z_y - sum_v q_v z_v + sum_v q_v log q_v = h u + c,    u = W_y - sum_v q_v W_v.

It is linear in h, u is its gradient, and the policy's logits are never made (`MergedTile`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpo_lib import stats
from tpo_lib.types import Head, Reading

TILE_BYTES = 48 << 20  # one tile of float32 logits on a CPU; where the KL is asked for, two are alive
BLOCK_COLUMNS = 512  # on a CPU, logits are made so many columns at a time
BLOCK_BYTES = 1 << 20  # on a CPU, softmax and KL walk a tile in blocks that stay in its cache


def choose_tile_bytes(device: torch.device) -> int:
    """Size of one tile of logits: 48 MiB on a CPU, on a GPU a sixteenth of what is free, at most 1 GiB.

    Every tile reads and writes the whole gradient of the head's weight, so large tiles are faster; they cost memory.
    """
    if device.type != "cuda":
        return TILE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(max(free // 16, TILE_BYTES), 1 << 30)


@dataclass(frozen=True)
class Asked:
    """What a loss asks of some rows of a tile: g = dL / d log pi(y) and k = dL / d KL, (rows,) each; None: it reads neither."""

    rows: slice
    g: Tensor | None
    k: Tensor | None


@dataclass
class Tile:
    """Rows of logits as they were read; the buffers are those of the next tile too."""

    tiles: Tiles
    targets: Tensor  # (rows, 1)
    logps: Tensor  # (rows,) nats
    kl: Tensor | None  # (rows,) nats; without a reference None, as are ref_logps and q
    ref_logps: Tensor | None
    logp: Tensor  # (rows, V) log pi; `gradient` overwrites it
    q: Tensor | None  # (rows, V) the reference's probabilities
    lse: Tensor  # (rows, 1) logsumexp of the policy's logits

    def gradient(self, asked: Sequence[Asked]) -> tuple[slice, Tensor, None] | None:
        """The rows that a loss reads and its gradient there with respect to h W^T; None where it reads none."""
        live = [side for side in asked if not (side.g is None and side.k is None)]
        for side in live:
            self._turn(side)
        if not live:
            return None
        rows = slice(live[0].rows.start, live[-1].rows.stop)
        return rows, self.logp[rows], None

    def _turn(self, side: Asked) -> None:
        """log pi -> g (e_y - p) + k (p - q), times d logits / d (h W^T)."""
        g, k, head = side.g, side.k, self.tiles.policy.head
        g = torch.zeros_like(k) if g is None else g
        logp, q, targets, lse = (x if x is None else x[side.rows] for x in (self.logp, self.q, self.targets, self.lse))
        for block in self.tiles.blocks(len(logp)):
            slope = None
            if head.softcap is not None:  # d (c tanh(x / c)) / dx = 1 - (z / c)^2
                slope = 1 - ((logp[block] + lse[block]) / head.softcap).square_()
            dz = logp[block].exp_()  # p
            dz *= (-g if k is None else k - g)[block, None]
            if k is not None:
                dz.addcmul_(q[block], -k[block, None])
            dz.scatter_add_(-1, targets[block], g[block, None])
            if slope is not None:
                dz *= slope
            if head.scale != 1:
                dz *= head.scale


@dataclass
class MergedTile:
    """Rows read as log pi(y) + KL alone, for a loss that has one gradient for both."""

    tiles: Tiles
    logps: Tensor  # (rows,) log pi(y) + KL
    kl: Tensor  # (rows,) zeros, so that the sum of the two is right
    ref_logps: Tensor
    difference: Tensor  # (rows, V) e_y - q
    slope: Tensor  # (rows, d) u

    def gradient(self, asked: Sequence[Asked]) -> tuple[slice, Tensor, Tensor]:
        """All rows, dL/d(h W^T) = g (e_y - q), and dL/dh = g u, which needs no product any more."""
        g = torch.cat([side.g for side in asked])  # (rows,), chosen then rejected
        dz = self.difference.mul_((g * self.tiles.policy.head.scale)[:, None])
        return slice(0, len(g)), dz, self.slope.mul_(g[:, None])


class Tiles:
    """Makes tiles of a policy's logits, and of the reference's beside them, in buffers that all tiles share."""

    def __init__(self, policy: Reading, targets: Tensor, ref: Reading | None = None, tile_bytes: int | None = None):
        self.policy, self.targets, self.ref = policy, targets, ref
        self.vocab, self.device = policy.vocab, policy.states.device
        self.exact = torch.promote_types(policy.states.dtype, torch.float32)  # type of every number
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind)
        self.compute = torch.get_autocast_dtype(kind) if autocast else policy.states.dtype  # of the matrix products
        self.rows = max(1, (tile_bytes or choose_tile_bytes(self.device)) // (self.exact.itemsize * self.vocab))
        self._forbids = ref is not None and (_may_forbid(policy) or _may_forbid(ref))
        self._buffers: dict[str, Tensor] = {}
        self._cast: dict[int, Tensor] = {}  # weights in the type of the products, where theirs is another

    def slices(self) -> Iterator[slice]:
        """The R positions in tiles of at most `rows`."""
        return _cut(len(self.targets), self.rows)

    def read(self, index: slice | Tensor) -> Tile:
        """Read the positions `index`."""
        targets, policy, ref = self.targets[index, None], self.policy, self.ref  # (rows, 1)
        logp = self._logits("policy", policy.states[index], policy.head)  # (rows, V)
        lse = logp.gather(-1, targets)  # (rows, 1)
        q = None if ref is None else self._logits("ref", ref.states[index], ref.head)
        kl, ref_logps = (torch.empty(len(logp), dtype=self.exact, device=self.device) for _ in range(2))
        for block in self.blocks(len(logp)):
            logp[block] = torch.log_softmax(logp[block], -1)
            if q is not None:
                gap = torch.log_softmax(q[block], -1)  # log q
                ref_logps[block] = gap.gather(-1, targets[block])[:, 0]
                torch.exp(gap, out=q[block])
                gap.sub_(logp[block]).mul_(q[block])  # q (log q - log p)
                if self._forbids:  # 0 inf is NaN
                    gap.masked_fill_(q[block] == 0, 0.0)
                kl[block] = gap.sum(-1)
        logps = logp.gather(-1, targets)
        known = (None, None) if q is None else (kl, ref_logps)
        return Tile(self, targets, logps[:, 0], *known, logp, q, lse - logps)

    def read_merged(self, index: slice | Tensor) -> MergedTile:
        """Read the positions `index` as log pi(y) + KL; the policy's head must not be soft-capped."""
        targets, head = self.targets[index, None], self.policy.head  # (rows, 1)
        q = self._logits("ref", self.ref.states[index], self.ref.head)  # (rows, V)
        value, ref_logps = (torch.empty(len(q), dtype=self.exact, device=self.device) for _ in range(2))
        for block in self.blocks(len(q)):
            log_q = torch.log_softmax(q[block], -1)
            ref_logps[block] = log_q.gather(-1, targets[block])[:, 0]
            torch.exp(log_q, out=q[block])
            if self._forbids:
                log_q.masked_fill_(q[block] == 0, 0.0)
            value[block] = log_q.mul_(q[block]).sum(-1)  # sum_v q_v log q_v
            q[block].neg_()
        if head.bias is not None:
            bias = head.bias.detach().to(self.exact)
            expected = q @ bias if not self._forbids else (q * bias).masked_fill_(q == 0, 0.0).sum(-1)  # -sum_v q_v b_v
            value += head.scale * (bias[targets[:, 0]] + expected)
        difference = q.scatter_add_(-1, targets, torch.ones_like(targets, dtype=self.exact))  # e_y - q
        slope = (difference.to(self.compute) @ self.weight(head)).to(self.exact).mul_(head.scale)  # u, (rows, d)
        value += torch.linalg.vecdot(self.policy.states[index].detach().to(self.exact), slope)
        return MergedTile(self, value, torch.zeros_like(value), ref_logps, difference, slope)

    def logps(self, reading: Reading) -> Tensor:
        """(R,) log-probabilities of the targets under any model."""
        out = torch.empty_like(self.targets, dtype=self.exact)
        for tile in self.slices():
            logits = self._logits("policy", reading.states[tile], reading.head)
            for block in self.blocks(len(logits)):
                logp = torch.log_softmax(logits[block], -1)
                out[tile][block] = logp.gather(-1, self.targets[tile][block, None])[:, 0]
        return out

    def free(self) -> None:
        """Let go of the buffers; tiles that were read are gone."""
        self._buffers.clear()

    def _logits(self, name: str, states: Tensor, head: Head | None) -> Tensor:
        """(rows, d) states -> (rows, V) logits in the buffer `name`."""
        if name not in self._buffers or len(self._buffers[name]) < len(states):
            rows = max(len(states), min(self.rows, len(self.targets)))
            self._buffers.pop(name, None)
            self._buffers[name] = torch.empty(rows, self.vocab, dtype=self.exact, device=self.device)
        out = self._buffers[name][: len(states)]
        if head is None:
            return out.copy_(states)
        states, weight = states.detach().to(self.compute), self.weight(head)
        # on a CPU, products into its cache are 1.3 times as fast as in one piece
        for part in _cut(self.vocab, BLOCK_COLUMNS if self.device.type == "cpu" else self.vocab):
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
        """The head's weight in the type of the products, converted once for all tiles."""
        weight = head.weight.detach()
        if weight.dtype == self.compute:
            return weight
        if weight.data_ptr() not in self._cast:
            self._cast[weight.data_ptr()] = weight.to(self.compute)
        return self._cast[weight.data_ptr()]

    def blocks(self, rows: int) -> Iterator[slice]:
        """A tile's rows, cut so that a block fits a CPU's cache; on a GPU the tile is one block."""
        step = rows if self.device.type != "cpu" else max(1, BLOCK_BYTES // (self.exact.itemsize * self.vocab))
        return _cut(rows, step)


def _cut(count: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def response_logps(reading: Reading, labels: Tensor) -> Tensor:
    """(R,) log-probabilities of the response tokens, in nats, in the order of `stats.response_mask`."""
    mask = stats.response_mask(labels)
    stats.check_vocabulary(labels, reading.vocab)
    reading = spread(reading)
    return Tiles(reading, labels[:, 1:][mask]).logps(reading)


def spread(reading: Reading) -> Reading:
    """The same with a state of its own for every position."""
    return reading if reading.rows is None else Reading(reading.states[reading.rows], reading.head)


class Gradients:
    """dL/dh, dL/dW and dL/db, added up tile by tile; what is not needed stays None."""

    def __init__(self, tiles: Tiles, needs: Sequence[bool]) -> None:
        states, head = tiles.policy.states, tiles.policy.head
        self.inputs = [x if x is None else x.detach() for x in (states, head.weight, head.bias)]
        self.weight = tiles.weight(head)
        half = states.dtype == torch.float16  # the loss scale multiplies what is kept before it may be rounded
        kinds = (tiles.exact if half else states.dtype, tiles.exact, tiles.exact)
        self.sums = [
            torch.zeros_like(x, dtype=kind) if need and x is not None else None
            for x, need, kind in zip(self.inputs, needs, kinds, strict=True)
        ]

    def add(self, index: slice | Tensor, dz: Tensor, dh: Tensor | None = None) -> None:
        """Add the part of one tile: dz (rows, V) in float32 at the positions `index`, and dz W where it is known already."""
        (states, *_), (to_states, to_weight, to_bias) = self.inputs, self.sums
        if to_bias is not None:
            to_bias += dz.sum(0)
        if self.weight.dtype == torch.float16:
            return self._add_half(index, dz, dh)
        dz = dz.to(self.weight.dtype)
        if to_states is not None:
            to_states[index] += (dz @ self.weight if dh is None else dh).to(states.dtype)
        if to_weight is not None and dz.dtype == to_weight.dtype:
            to_weight.addmm_(dz.T, states[index].to(dz.dtype))
        elif to_weight is not None:
            to_weight += dz.T @ states[index].to(dz.dtype)

    def _add_half(self, index: slice | Tensor, dz: Tensor, dh: Tensor | None) -> None:
        """The same by float16 products: scaled here, for the loss scale comes in backward, after small entries became 0."""
        (states, *_), (to_states, to_weight, _) = self.inputs, self.sums
        scale = _power(16, dz)
        dz = (dz * scale).half()  # (rows, V)
        if to_states is not None:
            to_states[index] += ((dz @ self.weight).float() / scale if dh is None else dh).to(to_states.dtype)
        if to_weight is not None:
            h = states[index].float()
            large = _power(1, h)  # a sum over rows of 16 x 1 stays within float16
            to_weight += (dz.T @ (h * large).half()).float() / (scale * large)

    def take(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """The sums, times a factor, in the types of their tensors; they are given away once."""
        if self.sums is None:
            raise RuntimeError("the gradient of pair_loss was made once, in forward; run it again for another backward")
        sums, self.sums = self.sums, None
        if factor is not None:
            sums = [x if x is None else x.mul_(factor) for x in sums]
        return [x if x is None else x.to(like.dtype) for x, like in zip(sums, self.inputs, strict=True)]


def _power(most: float, values: Tensor) -> Tensor:
    """The power of two, as a float32 scalar, that brings the largest absolute value to about `most`; no synchronisation."""
    largest = values.detach().abs().amax().float().clamp(2.0**-100, 2.0**100)
    return torch.exp2(torch.floor(torch.log2(most / largest)))


def _may_forbid(reading: Reading) -> bool:
    """Whether logits may be -inf: as somebody else gave them, or by the head's bias."""
    head = reading.head
    return head is None or (head.bias is not None and bool(head.bias.isinf().any()))
