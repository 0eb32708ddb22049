"""The chunked scan and its convolution beside a token-by-token reference: values, gradients, borders, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moe_recipes.kernels import causal_conv
from moe_recipes.kernels.causal_conv import causal_conv_silu
from moe_recipes.kernels.chunk_scan import ScanShape, chunk_scan
from moe_recipes.kernels.documents import document_runs
from moe_recipes.kernels.gated_norm import gated_group_norm
from tests.unit.scan_reference import documents, slow_conv, slow_gated_norm, slow_scan

H, P, G, N, CHUNK = 6, 5, 2, 3, 16
NO_LIMIT = (0.0, float("inf"))
ROWS = {
    "odd length": [[77], [77]],
    "one token": [[1], [1]],
    "whole chunks": [[32], [32]],
    "shorter than a chunk": [[7], [7]],
    "packed": [[5, 1, 40, 31], [33, 16, 16, 12]],
    "packed, one row": [[1, 2, 3, 50]],
}


def scan_inputs(num_rows: int, length: int) -> list[Tensor]:
    torch.manual_seed(0)
    per_token = [(num_rows, length, H, P), (num_rows, length, H), (num_rows, length, G, N)]
    x, dt, B, C = (torch.randn(shape) for shape in (*per_token, per_token[2]))
    return [x, dt, -torch.exp(torch.linspace(-3, 2, H)), B, C, torch.randn(H), torch.linspace(-9, 1, H)]


def run_scan(inputs: list[Tensor], limit: tuple[float, float], document_BS: Tensor | None) -> Tensor:
    runs = document_runs(document_BS, (inputs[0].shape[0], inputs[0].shape[1]))
    shape = ScanShape(chunk_size=CHUNK, dt_limit=limit, runs=runs)
    return chunk_scan(*inputs[:5], D_H=inputs[5], dt_bias_H=inputs[6], shape=shape)


def with_gradients(outs: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(outs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [outs, *torch.autograd.grad(outs, inputs, weights.bfloat16().to(outs.dtype))]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        error = float((mine.detach().double() - theirs.detach()).norm() / theirs.detach().norm().clamp(min=1e-30))
        assert error < tolerance, (index, error)


@pytest.mark.parametrize("limit", [NO_LIMIT, (0.05, 0.4)], ids=["no limit", "limits"])
@pytest.mark.parametrize("rows", ROWS)
def test_scan_is_the_recurrence(rows: str, limit: tuple[float, float]) -> None:
    document_BS = documents(ROWS[rows])
    inputs = scan_inputs(*document_BS.shape)
    slow, fast = ([each.to(dtype).requires_grad_() for each in inputs] for dtype in (torch.float64, torch.float32))
    expected = with_gradients(slow_scan(slow, limit, document_BS), slow)
    found = run_scan(fast, limit, None if document_BS.max() == 0 else document_BS)
    assert_same(with_gradients(found, fast), expected, 1e-6)


def test_scan_of_bfloat16_is_computed_in_float32() -> None:
    document_BS = documents(ROWS["packed"])
    inputs = [each.bfloat16() if each.ndim > 1 else each for each in scan_inputs(*document_BS.shape)]
    slow, fast = [each.double().requires_grad_() for each in inputs], [each.requires_grad_() for each in inputs]
    expected = with_gradients(slow_scan(slow, NO_LIMIT, document_BS), slow)
    found = with_gradients(run_scan(fast, NO_LIMIT, document_BS), fast)
    assert [each.dtype for each in found[1:]] == [each.dtype for each in fast]
    # One rounding of each result: a scan in bfloat16 would be off by ten times that.
    assert_same(found, expected, 3e-3)


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_convolution_is_the_filter(monkeypatch: pytest.MonkeyPatch, rows: str, block: int) -> None:
    monkeypatch.setattr(causal_conv, "BLOCK", block)
    document_BS = documents(ROWS[rows])
    torch.manual_seed(0)
    inputs = [torch.randn(*document_BS.shape, 7), torch.randn(7, 4), torch.randn(7)]
    slow, fast = ([each.to(dtype).requires_grad_() for each in inputs] for dtype in (torch.float64, torch.float32))
    expected = with_gradients(slow_conv(*slow, document_BS), slow)
    runs = document_runs(document_BS, (document_BS.shape[0], document_BS.shape[1]))
    assert_same(with_gradients(causal_conv_silu(*fast, runs), fast), expected, 1e-6)


@pytest.mark.parametrize("length", [1, 77, 600])
def test_gated_norm_is_the_formula(length: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, 12), torch.randn(2, length, 12), torch.randn(12)]
    slow, fast = ([each.to(dtype).requires_grad_() for each in inputs] for dtype in (torch.float64, torch.float32))
    expected = with_gradients(slow_gated_norm(*slow, groups=3, eps=1e-5), slow)
    assert_same(with_gradients(gated_group_norm(*fast, group_size=4, eps=1e-5), fast), expected, 1e-6)


def test_a_packed_document_is_bit_for_bit_the_document_alone() -> None:
    document_BS = documents(ROWS["packed, one row"])
    inputs, weight, bias = scan_inputs(*document_BS.shape), torch.randn(H * P, 4), torch.randn(H * P)
    alone = [each[:, 6:] if each.ndim > 1 else each for each in inputs]
    packed = run_scan(inputs, NO_LIMIT, document_BS)
    assert torch.equal(packed[:, 6:], run_scan(alone, NO_LIMIT, None))
    runs = document_runs(document_BS, (1, document_BS.shape[1]))
    filtered = causal_conv_silu(inputs[0].flatten(2), weight, bias, runs)
    one = document_runs(None, (1, document_BS.shape[1] - 6))
    assert torch.equal(filtered[:, 6:], causal_conv_silu(alone[0].flatten(2), weight, bias, one))


def test_nothing_of_a_document_reaches_another() -> None:
    """Not even what is not a number: a mask after the fact would let it through."""
    document_BS = documents(ROWS["packed, one row"])
    inputs = scan_inputs(*document_BS.shape)
    for each in inputs:
        if each.ndim > 1:
            each[:, :6] = torch.nan
    fast = [each.requires_grad_() for each in inputs]
    runs = document_runs(document_BS, (1, document_BS.shape[1]))
    filtered = causal_conv_silu(fast[0].flatten(2), torch.ones(H * P, 4), None, runs).view_as(fast[0])
    out = run_scan([filtered, *fast[1:]], NO_LIMIT, document_BS)
    assert out[:, 6:].isfinite().all()
    (grad,) = torch.autograd.grad(out[:, 6:].sum(), fast[0])
    assert grad[:, 6:].isfinite().all()


MEASURE = """
import resource, sys, torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from moe_recipes.models.mamba import lean_mamba
heads, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(1)
config = NemotronHConfig(hidden_size=256, hybrid_override_pattern="M", mamba_num_heads=heads, mamba_head_dim=64,
                         n_groups=8, ssm_state_size=128, conv_kernel=4, chunk_size=128)
mixer = NemotronHMamba2Mixer(config, layer_idx=0).to(dtype)
lean_mamba(mixer)
hidden = torch.randn(1, 4096, 256, dtype=dtype, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mixer(hidden).square().mean().backward()
assert hidden.grad.isfinite().all() and mixer.A_log.grad.abs().max() > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [(64, "float32"), pytest.param(256, "bfloat16", marks=pytest.mark.slow)],
    ids=["Nano", "Ultra"],
)
def test_a_layer_of_4096_tokens_stays_under_2_gib(heads: int, dtype: str) -> None:
    """Forward and backward of a mixer with real heads, groups and states, in a process of its own: what its peak of
    resident memory rises by. Transformers' own forward takes 2.5 GiB for Nano's."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(heads), dtype], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    mib = float(done.stdout)
    assert 200 < mib < 2048, mib  # the lower bound: so much are a layer's activations, so something was measured
