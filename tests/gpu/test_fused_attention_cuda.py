"""cuDNN's attention and FlashAttention-2 with windows, documents, sinks and narrow values, beside float64 scores.

Where there is no GPU but Triton, ``TRITON_INTERPRET=1`` runs the sinks' kernels on the CPU in its interpreter.
"""

from __future__ import annotations

import pytest
import torch

from moe_recipes.kernels import attention as kernels
from moe_recipes.kernels.attention import Mask, add_sink, allowed, attention, attention_reference, sink_gradient
from moe_recipes.kernels.triton import HAVE_TRITON, INTERPRETED

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not (HAVE_TRITON and INTERPRETED), reason="needs a CUDA GPU"),
]
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
ROWS, LENGTH = 2, 333
BORDERS = [0, 130, 131, 260, LENGTH, LENGTH + 300, 2 * LENGTH]
HEADS = {"gpt_oss": (8, 2, 64, 64), "mla": (4, 4, 192, 128), "nano": (8, 2, 128, 128)}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@needs_gpu
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("family", HEADS)
def test_output_and_every_gradient(family: str, window: int | None, packed: bool, sinks: bool) -> None:
    torch.manual_seed(0)
    heads, groups, width, narrow = HEADS[family]
    shapes = [(heads, width), (groups, width), (groups, narrow)]
    tensors = [torch.randn(ROWS, LENGTH, *shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    if sinks:
        tensors.append(torch.randn(heads, device="cuda").bfloat16().requires_grad_())
    borders = torch.tensor(BORDERS, dtype=torch.int32, device="cuda") if packed else None
    mask = Mask(scale=width**-0.5, window=window, borders=borders)
    out = attention(*tensors[:3], mask=mask, sinks_H=tensors[3] if sinks else None)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    seen = allowed(mask, rows=ROWS, length=LENGTH, device=out.device)
    wanted = attention_reference(*exact[:3], exact[3] if sinks else None, seen, scale=mask.scale)
    grad = torch.randn_like(out)
    assert relative(out, wanted) < 6e-3
    pairs = zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True)
    assert all(relative(mine, theirs) < 1.2e-2 for mine, theirs in pairs)


@needs_gpu
def test_whole_rows_take_cudnn_and_the_rest_skips_what_it_does_not_see() -> None:
    query = torch.empty(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    borders = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    recent = torch.backends.cudnn.version() >= kernels.CUDNN_SINCE and torch.cuda.get_device_capability() >= (9, 0)
    whole = kernels._CuDNN if recent else kernels._Flash2
    assert kernels._kernel(query, Mask(scale=1.0)) is whole
    assert kernels._kernel(query, Mask(scale=1.0, window=3)) is kernels._Flash2
    assert kernels._kernel(query, Mask(scale=1.0, borders=borders)) is kernels._Flash2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(3, 24), (8, 64)])
def test_sinks_after_a_kernel(heads: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = torch.randn(2, 7, heads, width, device=DEVICE).to(dtype)
    lse, sinks = 3 * torch.randn(2, heads, 7, device=DEVICE), torch.randn(heads, device=DEVICE).to(dtype)
    with_sinks, new = add_sink(out, lse, sinks)
    wide = sinks.double()[:, None]
    factor = (lse.double() - torch.logaddexp(lse.double(), wide.expand_as(lse))).exp()
    rounding = 4e-3 if dtype == torch.bfloat16 else 1e-6
    if not CUDA and dtype == torch.bfloat16:
        rounding = 8e-3  # the interpreter cuts bfloat16 off
    assert relative(with_sinks, out.double() * factor.transpose(1, 2)[..., None]) < rounding
    assert relative(new, torch.logaddexp(lse.double(), wide.expand_as(lse))) < 1e-6
    grad = torch.randn_like(out)
    share = (wide - new.double()).exp().transpose(1, 2)
    wanted = -(share * (grad.double() * with_sinks.double()).sum(-1)).sum((0, 1))
    assert relative(sink_gradient(grad, with_sinks, new, sinks), wanted) < rounding
