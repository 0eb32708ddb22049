"""Where a step's time on the GPU goes: the profiler's kernels by kind of work, and the idle rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

PARTS = ("grouped GEMM", "GEMM", "attention", "communication", "optimizer", "row moves", "copies", "elementwise")

_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("communication", ("nccl", "_push_kernel", "_combine_kernel", "symmetric_memory")),
    ("grouped GEMM", ("groupproblemshape", "grouped", "ptrarray")),
    ("attention", ("sdpa", "fmha", "flash", "cudnn")),
    ("GEMM", ("nvjet", "gemm", "cutlass", "cublas", "splitk")),
    ("optimizer", ("adam", "_step_kernel")),
    (
        "row moves",
        (
            "_take_kernel",
            "_sum_kernel",
            "_sum_backward_kernel",
            "_collect_kernel",
            "indexselect",
            "index_select",
            "gather",
        ),
    ),
    ("copies", ("memcpy", "memset", "split_with_sizes_copy", "chunk_cat", "catarray")),
)


class Kernel(NamedTuple):
    """One kernel or copy on the device; times in microseconds from any origin."""

    name: str
    start: float
    end: float


def part_of(name: str) -> str:
    """Kind of work of a kernel by its name; what no sign matches is elementwise: norms, activations, casts, sums."""
    lowered = name.lower()
    return next((part for part, signs in _SIGNS if any(sign in lowered for sign in signs)), "elementwise")


def parts_ms(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds by part; ``span`` from the first kernel's start to the last one's end; ``idle``, the span without a
    kernel. Kernels on several streams overlap, so the parts may add up to more than the busy time."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    if not ordered:
        return {}
    totals = dict.fromkeys(PARTS, 0.0)
    busy, busy_until = 0.0, ordered[0].start
    for kernel in ordered:
        totals[part_of(kernel.name)] += (kernel.end - kernel.start) / 1000
        busy += max(0.0, kernel.end - max(kernel.start, busy_until)) / 1000
        busy_until = max(busy_until, kernel.end)
    span = (busy_until - ordered[0].start) / 1000
    return {**totals, "idle": span - busy, "span": span}


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """``parts_ms`` of one call of ``step``; None on the CPU. The profiler slows the host: ``idle`` is too large."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    events = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return parts_ms(
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if not getattr(event, "is_user_annotation", False)
    )
