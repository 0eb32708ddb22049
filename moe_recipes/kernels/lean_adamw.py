"""One AdamW step over many tensors: bfloat16 weights with an exact float32 master, moments in 8 bits.

A parameter costs 6.06 bytes beside its gradient:

    weight      bfloat16  \\  together the bits of the float32 master: the weight is the master rounded, the remainder
    remainder   int16     /   the difference of the two as integers
    moments     int8, uint8 codes and, for every 128 of them along a row, the float32 value of the largest

A code c stands for ``(c / 127)^2`` of the largest first moment with its sign, and for ``(c / 255)^2`` of the largest
root of a second moment: fine steps near zero, where most values are. Moments are rounded up or down at random, in
proportion to what lies between: rounded to the nearest, a second moment whose step changes it by less than half a code
would never move. The dice are a hash of (step, parameter, place in the whole parameter), so every layout of the ranks
and every device throws the same. A second moment above zero never gets the code 0, or its weight would leap.

CPU and CUDA give the same bits: no fused multiply-add, IEEE square root and division, step-wide factors from the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_recipes.kernels.triton import tl, triton

BLOCK = 128
"""Moments that share a scale; they lie side by side in one row of one parameter."""

_CHUNK = 16384
"""Elements a program works through, a multiple of ``_TILE`` and ``BLOCK``."""

_TILE = 1024
_MASK = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Part:
    """One parameter on this rank, flat and contiguous, with its state; a step changes all of it in place."""

    weight: Tensor
    """bfloat16 (with ``remainder``) or float32 (without)."""

    remainder: Tensor | None
    """int16."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    """int8 and uint8 codes with scales, or float32 without."""

    exp_avg_scale: Tensor | None
    exp_avg_sq_scale: Tensor | None
    """float32, one for every ``BLOCK`` codes."""

    offset: int
    """Place of the first element in the whole parameter."""

    seed: int
    """Of the parameter, 32 bits; the same on every rank."""

    weight_decay: float

    @property
    def kind(self) -> tuple[bool, bool]:
        """What one launch has in common: a remainder or none, codes or float32 moments."""
        return self.remainder is not None, self.exp_avg_scale is not None


@dataclass(frozen=True, kw_only=True)
class Step:
    """Factors of one step, equal for all parameters."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    number: int
    """Counted from 1."""

    grad_factor: float = 1.0
    """What every gradient is multiplied with first, such as a clipping factor."""

    step_size: float = field(init=False)
    root_factor: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", self.lr / (1 - self.beta1**self.number))
        object.__setattr__(self, "root_factor", 1 / math.sqrt(1 - self.beta2**self.number))

    @property
    def salt(self) -> int:
        return self.number * 0x85EBCA77 & _MASK


def combined_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """float32 master of a bfloat16 weight and its remainder, any shape."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 weight, the master rounded half away from zero, and int16 remainder, any shape."""
    bits = master.view(torch.int32)
    high = (bits.to(torch.int64) + 0x8000 >> 16).to(torch.int32)
    remainder = (bits.to(torch.int64) - (high.to(torch.int64) << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), remainder


def _dice_reference(part: Part, salt: int) -> tuple[Tensor, Tensor]:
    """Two uniform values in [0, 1) for each element, float32."""
    place = torch.arange(part.weight.numel(), dtype=torch.int64, device=part.weight.device) + part.offset
    x = (place * 0x9E3779B1 & _MASK) ^ ((part.seed + salt) & _MASK)
    x = x ^ x >> 16
    x = x * 0x7FEB352D & _MASK
    x = x ^ x >> 15
    x = x * 0x846CA68B & _MASK
    x = x ^ x >> 16
    return (x & 0xFFFF).to(torch.float32) / 65536, (x >> 16).to(torch.float32) / 65536


def _decode_reference(codes: Tensor, scale: Tensor, levels: float) -> Tensor:
    share = codes.to(torch.float32) * (1 / levels)
    return (share.abs() * share).view(-1, BLOCK).mul(scale.unsqueeze(1)).view(-1)


def _encode_reference(value: Tensor, dice: Tensor, levels: float, *, at_least_one: bool) -> tuple[Tensor, Tensor]:
    """Signed codes as float32, and scales. The square of a code is linear in the value; ``square`` lies between two."""
    scale = value.abs().view(-1, BLOCK).amax(dim=1)
    # As a tensor: torch turns a number divided by a tensor into a product with the reciprocal, rounded twice.
    inverse = torch.where(scale > 0, torch.full_like(scale, levels * levels) / scale, 0.0)
    square = value.abs().view(-1, BLOCK).mul(inverse.unsqueeze(1)).view(-1)
    low = square.to(torch.float64).sqrt().floor().clamp(max=levels - 1).to(torch.float32)
    code = low + (dice * (2 * low + 1) < square - low * low).to(torch.float32)
    if at_least_one:
        code = torch.where((value > 0) & (code < 1), 1.0, code)
    return torch.where(value < 0, -code, code), scale


def step_reference(parts: Sequence[Part], grads: Sequence[Tensor], step: Step) -> None:
    """The step in torch operations, each rounded once; float32 throughout.

    Args:
        grads: one a part, flat, bfloat16 or float32.
    """
    for part, given in zip(parts, grads, strict=True):
        master = part.weight if part.remainder is None else combined_master(part.weight, part.remainder)
        grad = given.to(torch.float32) * _f32(step.grad_factor)
        m, v = part.exp_avg, part.exp_avg_sq
        if part.exp_avg_scale is not None and part.exp_avg_sq_scale is not None:
            m = _decode_reference(m, part.exp_avg_scale, 127.0)
            root = _decode_reference(v, part.exp_avg_sq_scale, 255.0)
            v = root * root
        m = m * _f32(step.beta1) + grad * _f32(1 - step.beta1)
        v = v * _f32(step.beta2) + grad * grad * _f32(1 - step.beta2)
        root = _sqrt(v)
        update = m / (root * _f32(step.root_factor) + _f32(step.eps)) * _f32(step.step_size)
        new = master * _f32(1 - step.lr * part.weight_decay) - update
        if part.remainder is None:
            part.weight.copy_(new)
        else:
            weight, remainder = split_master(new)
            part.weight.copy_(weight)
            part.remainder.copy_(remainder)
        if part.exp_avg_scale is not None and part.exp_avg_sq_scale is not None:
            dice_m, dice_v = _dice_reference(part, step.salt)
            codes, scale = _encode_reference(m, dice_m, 127.0, at_least_one=False)
            part.exp_avg.copy_(codes.to(torch.int8))
            part.exp_avg_scale.copy_(scale)
            codes, scale = _encode_reference(root, dice_v, 255.0, at_least_one=True)
            part.exp_avg_sq.copy_(codes.to(torch.uint8))
            part.exp_avg_sq_scale.copy_(scale)
        else:
            part.exp_avg.copy_(m)
            part.exp_avg_sq.copy_(v)


def _sqrt(value: Tensor) -> Tensor:
    """The float32 nearest to the root; torch's own on the CPU is off by a bit now and then."""
    return value.to(torch.float64).sqrt().to(torch.float32)


def _f32(value: float) -> float:
    """The value as the kernel gets it: rounded to float32."""
    return torch.tensor(value, dtype=torch.float32).item()


@triton.jit
def _encode(value, dice, LEVELS: tl.constexpr, AT_LEAST_ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[blocks, BLOCK]`` to signed codes and ``[blocks, 1]`` scales; the fast root is mended to the exact floor."""
    size = tl.abs(value)
    scale = tl.max(size, axis=1, keep_dims=True)
    some = scale > 0
    levels = tl.full(scale.shape, LEVELS * LEVELS, tl.float32)
    square = size * tl.where(some, tl.div_rn(levels, tl.where(some, scale, 1.0)), 0.0)
    low = tl.floor(tl.sqrt(square))
    low -= (low * low > square).to(tl.float32)
    low += ((low + 1) * (low + 1) <= square).to(tl.float32)
    low = tl.minimum(low, LEVELS - 1)
    code = low + (dice * (2 * low + 1) < square - low * low).to(tl.float32)
    if AT_LEAST_ONE:
        code = tl.where((value > 0) & (code < 1), 1.0, code)
    return tl.where(value < 0, -code, code), scale


@triton.jit
def _decode(codes, scales, place, group, inside, group_inside, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    share = tl.load(codes + place, mask=inside, other=0).to(tl.float32) * (1 / LEVELS)
    return tl.abs(share) * share * tl.load(scales + group, mask=group_inside, other=0.0)


@triton.jit
def _place(table, which, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointer to element ``start`` of a tensor. Without the hint loads are one element wide: it comes from memory."""
    pointer = tl.load(table + which).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _dice(place, seed):  # type: ignore[no-untyped-def]
    x = (place * 0x9E3779B1) ^ seed
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return (x & 0xFFFF).to(tl.float32) * (1 / 65536), (x >> 16).to(tl.float32) * (1 / 65536)


@triton.jit
def _step_kernel(  # type: ignore[no-untyped-def]
    weights, grads, remainders, firsts, first_scales, seconds, second_scales, lengths, offsets, seeds, decays,
    chunk_tensor, chunk_start, grad_factor, beta1, rest1, beta2, rest2, root_factor, eps, step_size, salt,
    REMAINDER: tl.constexpr, CODES: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.load(chunk_tensor + tl.program_id(0))
    start = tl.multiple_of(tl.load(chunk_start + tl.program_id(0)), CHUNK)
    left = (tl.load(lengths + which) - start).to(tl.int32)  # 32-bit places within a chunk are half the arithmetic
    if CODES:
        left = tl.multiple_of(left, BLOCK)
    kept = tl.load(decays + which)
    first_place = (tl.load(offsets + which) + start).to(tl.uint32)
    seed = tl.load(seeds + which).to(tl.uint32) + salt.to(tl.uint32)
    grad_at = _place(grads, which, start, GRAD, ALIGNED)
    weight_at = _place(weights, which, start, tl.int16 if REMAINDER else tl.float32, ALIGNED)
    rest_at = _place(remainders, which, start, tl.int16, ALIGNED)
    m_at = _place(firsts, which, start, tl.int8 if CODES else tl.float32, ALIGNED)
    v_at = _place(seconds, which, start, tl.uint8 if CODES else tl.float32, ALIGNED)
    m_scale_at = _place(first_scales, which, start // BLOCK, tl.float32, False)
    v_scale_at = _place(second_scales, which, start // BLOCK, tl.float32, False)
    for tile in range(0, CHUNK, TILE):
        group = tile // BLOCK + tl.arange(0, TILE // BLOCK)[:, None]
        place = group * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside, group_inside = place < left, group * BLOCK < left
        grad = tl.load(grad_at + place, mask=inside, other=0.0).to(tl.float32) * grad_factor
        if REMAINDER:
            high = tl.load(weight_at + place, mask=inside, other=0).to(tl.int32) << 16
            low = tl.load(rest_at + place, mask=inside, other=0).to(tl.int32)
            master = (high + low).to(tl.float32, bitcast=True)
        else:
            master = tl.load(weight_at + place, mask=inside, other=0.0)
        if CODES:
            m = _decode(m_at, m_scale_at, place, group, inside, group_inside, 127.0)
            root = _decode(v_at, v_scale_at, place, group, inside, group_inside, 255.0)
            v = root * root
        else:
            m = tl.load(m_at + place, mask=inside, other=0.0)
            v = tl.load(v_at + place, mask=inside, other=0.0)
        m = m * beta1 + grad * rest1
        v = v * beta2 + grad * grad * rest2
        root = tl.sqrt_rn(v)
        master = master * kept - tl.div_rn(m, root * root_factor + eps) * step_size
        if REMAINDER:
            bits = master.to(tl.int32, bitcast=True)
            # Half away from zero. The sum may pass the largest int32 for a NaN alone.
            high = (bits + 0x8000) >> 16
            tl.store(weight_at + place, high.to(tl.int16), mask=inside)
            tl.store(rest_at + place, (bits - (high << 16)).to(tl.int16), mask=inside)
        else:
            tl.store(weight_at + place, master, mask=inside)
        if CODES:
            dice_m, dice_v = _dice(first_place + place.to(tl.uint32), seed)
            m, scale = _encode(m, dice_m, 127.0, False)
            tl.store(m_scale_at + group, scale, mask=group_inside)
            v, scale = _encode(root, dice_v, 255.0, True)
            tl.store(v_scale_at + group, scale, mask=group_inside)
        tl.store(m_at + place, m.to(m_at.dtype.element_ty), mask=inside)
        tl.store(v_at + place, v.to(tl.int32).to(tl.uint8) if CODES else v, mask=inside)


def _aligned(tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


class Plan:
    """Tables of one kind of parts on the device, made once: what a launch needs apart from the gradients' places."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self.kind = list(parts), parts[0].kind
        self.device = parts[0].weight.device

        def table(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device)

        def places(tensors: Sequence[Tensor | None]) -> Tensor:
            return table([0 if tensor is None else tensor.data_ptr() for tensor in tensors], torch.int64)

        lengths = torch.tensor([part.weight.numel() for part in parts])
        counts = (lengths + _CHUNK - 1) // _CHUNK
        tensors = torch.arange(len(parts)).repeat_interleave(counts)
        first_chunk = counts.cumsum(0) - counts
        starts = (torch.arange(len(tensors)) - first_chunk[tensors]) * _CHUNK
        self.tables = [
            places([part.weight for part in parts]),
            places([part.remainder for part in parts]),
            places([part.exp_avg for part in parts]),
            places([part.exp_avg_scale for part in parts]),
            places([part.exp_avg_sq for part in parts]),
            places([part.exp_avg_sq_scale for part in parts]),
            lengths.to(self.device),
            table([part.offset for part in parts], torch.int64),
            table([part.seed for part in parts], torch.int64),
        ]
        states = ("weight", "remainder", "exp_avg", "exp_avg_sq")
        self.aligned = all(_aligned([getattr(part, name) for part in parts]) for name in states)
        self.chunk_tensor, self.chunk_start = tensors.to(self.device, torch.int32), starts.to(self.device)

    def launch(self, grads: Sequence[Tensor], step: Step) -> None:
        """One step of these parts on the device, in place; ``grads`` as in ``step_reference``, all of one dtype."""
        remainder, codes = self.kind
        pinned = self.device.type == "cuda"
        kept = [1 - step.lr * part.weight_decay for part in self.parts]
        where = torch.tensor([grad.data_ptr() for grad in grads], dtype=torch.int64, pin_memory=pinned)
        decays = torch.tensor(kept, dtype=torch.float32, pin_memory=pinned)
        weights, *states = self.tables
        _step_kernel[(len(self.chunk_tensor),)](
            weights, where.to(self.device, non_blocking=True), *states, decays.to(self.device, non_blocking=True),
            self.chunk_tensor, self.chunk_start,
            step.grad_factor, step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2,
            step.root_factor, step.eps, step.step_size, step.salt,
            REMAINDER=remainder, CODES=codes, ALIGNED=self.aligned and _aligned(grads),
            GRAD=tl.bfloat16 if grads[0].dtype == torch.bfloat16 else tl.float32,
            CHUNK=_CHUNK, TILE=_TILE, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
