"""Queries and keys of latent attention in Triton, beside torch operations in float64.

Where there is no GPU but Triton, ``TRITON_INTERPRET=1`` runs the same tests on the CPU in its interpreter.
"""

from __future__ import annotations

import pytest
import torch

from moe_recipes.kernels.mla_heads import mla_heads, mla_heads_reference
from moe_recipes.kernels.triton import HAVE_TRITON, INTERPRETED

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not (HAVE_TRITON and INTERPRETED), reason="needs a CUDA GPU"),
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "wide"), [(3, 20, 12, 10), (20, 16, 8, 16), (128, 128, 64, 128)], ids=str
)
def test_values_and_every_gradient(heads: int, nope: int, rope: int, wide: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens = 5
    shapes = [(tokens, heads, nope + rope), (tokens, heads, nope + wide), (tokens, 7 + rope)]
    leaves = [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]
    angles = [torch.randn(tokens, rope, device=DEVICE).to(dtype) for _ in range(2)]
    shared = leaves[2][:, 7:]  # a part of a wider projection
    found = mla_heads(*leaves[:2], shared, *angles, nope=nope)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = mla_heads_reference(*exact[:2], exact[2][:, 7:], *(angle.double() for angle in angles), nope=nope)
    wanted = (*wanted, exact[1][..., nope:])
    rounding = 1e-6 if dtype == torch.float32 else 4e-3 if CUDA else 8e-3  # the interpreter cuts bfloat16 off
    assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) < rounding
    grads = [torch.randn_like(each) for each in found]
    mine = torch.autograd.grad(found, leaves, grads)
    theirs = torch.autograd.grad(wanted, exact, [grad.double() for grad in grads])
    assert max(relative(a, b) for a, b in zip(mine, theirs, strict=True)) < rounding
