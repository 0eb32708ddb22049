"""Kernels by kind, with names as CUDA's profiler gives them on an H100."""

from __future__ import annotations

import pytest
import torch

from moe_recipes.bench.parts import Kernel, part_of, parts_ms, profiled

NAMES = {
    "_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm6kernel13GemmUniversalINS5_17"
    "GroupProblemShapeIN4cute5tupleIJiiiEEEEE": "grouped GEMM",
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "GEMM",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1": "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*, void const*)": "attention",
    "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "_triton_adam_kernel": "optimizer",
    "_step_kernel": "optimizer",
    "_take_kernel": "row moves",
    "_sum_backward_kernel": "row moves",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::detail::chunk_cat_cuda_kernel<float, c10::BFloat16>": "copies",
    "_weighted_backward_kernel": "elementwise",
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>": "elementwise",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_known_by_its_name(name):
    assert part_of(name) == NAMES[name]


def test_overlapping_kernels_are_busy_once():
    kernels = [
        Kernel("nvjet_a", 0.0, 1000.0),
        Kernel("ncclDevKernel_AllGather", 500.0, 2500.0),
        Kernel("_step_kernel", 4000.0, 5000.0),
    ]
    parts = parts_ms(reversed(kernels))
    assert parts["GEMM"] == 1.0
    assert parts["communication"] == 2.0
    assert parts["optimizer"] == 1.0
    assert parts["span"] == 5.0
    assert parts["idle"] == pytest.approx(1.5)
    assert parts_ms([]) == {}


def test_the_cpu_has_no_kernels_to_show():
    assert profiled(lambda: None, torch.device("cpu")) is None
