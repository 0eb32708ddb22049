"""Mamba-2's scan in chunks, in plain torch, for the CPU and for GPUs without mamba-ssm.

    state_t = exp(dt_t A) state_(t-1) + dt_t x_t B_t^T          y_t = state_t C_t + D x_t

Within a chunk of L tokens this is a masked product like attention's; between chunks only the state travels. One chunk
is computed at a time, in float32, and again in the backward pass: beside its inputs and output the scan holds the
state at each chunk's start, H x P x N numbers, and a few matrices of H x L x L.

Each document of a packed row is scanned for itself, from a state of zeros: what another one holds cannot even change
the rounding.

Dimensions: b rows, l and s tokens of a chunk, g groups of r heads (h = g x r), p head size, n state size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_recipes.kernels.documents import Run


@dataclass(frozen=True, kw_only=True)
class ScanShape:
    """What of a scan is no tensor."""

    chunk_size: int
    dt_limit: tuple[float, float]
    """Limits of the time step after its softplus."""

    runs: Sequence[Run]
    """The documents; together they hold every token once."""


class _Chunk:
    """One chunk in float32, and what its forward and backward pass both need."""

    def __init__(self, tensors: Sequence[Tensor], at: tuple[slice, slice], dt_limit: tuple[float, float]) -> None:
        x_BSHP, dt_BSH, A_h, B_BSGN, C_BSGN, D_h, dt_bias_h = tensors
        x_blhp, B_blgn = x_BSHP[at], B_BSGN[at]
        b, length, h, p = x_blhp.shape
        g = B_blgn.shape[2]
        self.split = (b, length, g, h // g, p)
        self.A_h, self.D_h = A_h.float(), D_h.float()
        self.dt_raw_blh = dt_BSH[at].float() + dt_bias_h.float()
        self.dt_free_blh = F.softplus(self.dt_raw_blh)
        self.dt_blh = self.dt_free_blh.clamp(*dt_limit)
        self.x_bgrlp = self.by_head(x_blhp.float())
        self.dt_bgrl1 = self.by_head(self.dt_blh[..., None])
        self.xdt_bgrlp = self.x_bgrlp * self.dt_bgrl1
        self.B_bgln, self.C_bgln = B_blgn.float().transpose(1, 2), C_BSGN[at].float().transpose(1, 2)
        # Summed in float64: differences of long sums would lose the short steps between them.
        sums = (self.dt_blh * self.A_h).double().cumsum(1)
        sums = self.by_head(sums[..., None])
        decay = (sums - sums.transpose(-1, -2)).float()
        later = torch.ones(length, length, dtype=torch.bool, device=x_blhp.device).triu_(1)
        self.decay_bgrls = decay.masked_fill_(later, -torch.inf).exp_()
        self.since_start_bgrl1 = sums.float().exp()
        self.until_end_bgrl1 = (sums[..., -1:, :] - sums).float().exp()
        self.kept_bgr11 = self.since_start_bgrl1[..., -1:, :]
        self.mixing_bgrls = self.decay_bgrls * (self.C_bgln @ self.B_bgln.transpose(-1, -2))[:, :, None]

    def by_head(self, tensor_blhx: Tensor) -> Tensor:
        """``[b, l, h, x]`` as ``[b, g, r, l, x]``, without a copy."""
        return tensor_blhx.unflatten(2, self.split[2:4]).permute(0, 2, 3, 1, 4)

    def by_token(self, tensor_bgrlx: Tensor) -> Tensor:
        """The way back: ``[b, l, h, x]``."""
        return tensor_bgrlx.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def flat(self, tensor_bgrlp: Tensor) -> Tensor:
        """The heads of a group beside each other: ``[b, g, l, rp]``."""
        return tensor_bgrlp.transpose(2, 3).flatten(3)

    def heads(self, tensor_bglq: Tensor) -> Tensor:
        """The way back: ``[b, g, r, l, p]``."""
        return tensor_bglq.unflatten(3, self.split[3:]).transpose(2, 3)

    def carried(self, state_bgqn: Tensor) -> Tensor:
        """What the state before the chunk adds to the output."""
        return self.heads(self.C_bgln @ state_bgqn.transpose(-1, -2)) * self.since_start_bgrl1

    def decayed(self, state_bgqn: Tensor) -> Tensor:
        """What is left at the chunk's end of the state before it."""
        return (state_bgqn.unflatten(2, self.split[3:]) * self.kept_bgr11).flatten(2, 3)

    def forward(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output ``[b, l, h, p]`` and the state after the chunk ``[b, g, rp, n]``; state None is zeros."""
        y = self.mixing_bgrls @ self.xdt_bgrlp
        y.addcmul_(self.x_bgrlp, self.D_h.view(*self.split[2:4], 1, 1))
        new = self.flat(self.xdt_bgrlp * self.until_end_bgrl1).transpose(-1, -2) @ self.B_bgln
        if state is not None:
            y += self.carried(state)
            new += self.decayed(state)
        return self.by_token(y), new

    def backward(self, grad_y_blhp: Tensor, state: Tensor | None, grad_new: Tensor | None) -> tuple[Tensor, ...]:
        """Gradients of x, dt, A, B, C, D, dt_bias and the state before the chunk; None is zeros."""
        grad_y = self.by_head(grad_y_blhp.float()).contiguous()
        grad_mixing = grad_y @ self.xdt_bgrlp.transpose(-1, -2)
        grad_xdt = self.mixing_bgrls.transpose(-1, -2) @ grad_y
        through = self.mixing_bgrls.mul_(grad_mixing)  # the gradient of the decay's exponent, a difference of sums
        through.diagonal(dim1=-2, dim2=-1).zero_()  # it is 0 there, and large beside what is left after subtraction
        grad_sums = through.sum(-1, keepdim=True).double() - through.sum(-2)[..., None]
        grad_scores = grad_mixing.mul_(self.decay_bgrls).sum(2)
        grad_B, grad_C = grad_scores.transpose(-1, -2) @ self.C_bgln, grad_scores @ self.B_bgln
        grad_state = None
        if state is not None:
            grad_sums += (grad_y * self.carried(state)).sum(-1, keepdim=True)
            grad_carried = self.flat(grad_y * self.since_start_bgrl1)
            grad_C += grad_carried @ state
            grad_state = grad_carried.transpose(-1, -2) @ self.C_bgln
        if grad_new is not None:
            weighted = self.xdt_bgrlp * self.until_end_bgrl1
            grad_weighted = self.heads(self.B_bgln @ grad_new.transpose(-1, -2))
            grad_B += self.flat(weighted) @ grad_new
            grad_xdt.addcmul_(grad_weighted, self.until_end_bgrl1)
            lost = weighted.mul_(grad_weighted).sum(-1, keepdim=True)
            grad_sums -= lost
            grad_sums[..., -1:, :] += lost.sum(-2, keepdim=True)
            if state is not None and grad_state is not None:
                grad_kept = self.decayed(grad_new)
                grad_state += grad_kept
                whole = (grad_kept * state).unflatten(2, self.split[3:]).sum((-1, -2))
                grad_sums[..., -1, 0] += whole
        return self._inputs(grad_y, grad_xdt, grad_sums, grad_B, grad_C, grad_state)

    def _inputs(
        self, grad_y: Tensor, grad_xdt: Tensor, grad_sums: Tensor, grad_B: Tensor, grad_C: Tensor,
        grad_state: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """From the gradients of ``xdt`` and of the sums of ``dt * A`` to those of the inputs."""
        grad_x = torch.addcmul(grad_xdt * self.dt_bgrl1, grad_y, self.D_h.view(*self.split[2:4], 1, 1))
        grad_D = (grad_y * self.x_bgrlp).sum((0, 3, 4)).flatten()
        grad_step = self.by_token(grad_sums.flip(-2).cumsum(-2).flip(-2))[..., 0].float()  # of dt * A
        grad_A = (grad_step * self.dt_blh).sum((0, 1))
        grad_dt = self.by_token((grad_xdt * self.x_bgrlp).sum(-1, keepdim=True))[..., 0] + grad_step * self.A_h
        grad_dt = grad_dt * (self.dt_free_blh == self.dt_blh) * self.dt_raw_blh.sigmoid()
        grads = (self.by_token(grad_x), grad_dt, grad_A, grad_B.transpose(1, 2), grad_C.transpose(1, 2), grad_D)
        return (*grads, grad_dt.sum((0, 1)), grad_state)  # type: ignore[return-value]


def _chunks(shape: ScanShape) -> Iterator[tuple[tuple[slice, slice], bool, bool]]:
    """``((rows, tokens), first of its document, last of its document)``."""
    for run in shape.runs:
        for start in range(run.start, run.end, shape.chunk_size):
            end = min(start + shape.chunk_size, run.end)
            yield (run.rows, slice(start, end)), start == run.start, end == run.end


_PER_HEAD = (2, 5, 6)
"""Which inputs are one number a head: their gradients are added up, the others' lie where their tokens do."""


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: ScanShape, *tensors: Tensor) -> Tensor:
        y_BSHP = torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
        states: list[Tensor | None] = []
        state: Tensor | None = None
        for at, first, _ in _chunks(shape):
            states.append(None if first else state)
            y_BSHP[at], state = _Chunk(tensors, at, shape.dt_limit).forward(states[-1])
        ctx.shape, ctx.states = shape, states
        ctx.save_for_backward(*tensors)
        return y_BSHP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHP: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads = [
            torch.zeros(t.shape, dtype=torch.float32 if i in _PER_HEAD else t.dtype, device=t.device)
            for i, t in enumerate(tensors)
        ]
        grad_state: Tensor | None = None
        for (at, _, last), state in zip(reversed(list(_chunks(ctx.shape))), reversed(ctx.states), strict=True):
            chunk = _Chunk(tensors, at, ctx.shape.dt_limit)
            *found, grad_state = chunk.backward(grad_BSHP[at], state, None if last else grad_state)
            for i, (grad, part) in enumerate(zip(grads, found, strict=True)):
                if i in _PER_HEAD:
                    grad += part
                else:
                    grad[at] = part
        return None, *(grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))


def chunk_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    *,
    D_H: Tensor,
    dt_bias_H: Tensor,
    shape: ScanShape,
) -> Tensor:
    """The scan's output ``[B, S, H, P]`` in x's dtype, computed in float32.

    Args:
        dt_BSH: before its bias and softplus.
        A_H: negative.
        B_BSGN, C_BSGN: one for each of G groups of heads.
    """
    return _ChunkScan.apply(shape, x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H)
