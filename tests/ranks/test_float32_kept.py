"""What a family keeps in float32 is float32 where it is used, also under FSDP2's mixed precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from moe_recipes import AutoModelForCausalLM
from moe_recipes.kernels.chunk_scan import chunk_scan
from moe_recipes.models import mamba
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.models.float32_kept import kept_parameters
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import TOLERANCE, boost, whole_gradients, worst
from tests.tiny_models import save_tiny_model, tiny_config


def check_router_weights(folder: Path, ep_size: int) -> None:
    layout = DistributedConfig(fsdp_size=2, ep_size=ep_size, fsdp_mixed_precision=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=layout)
    file = load_file(folder / "model.safetensors")
    stored = [weight for name, weight in file.items() if name.endswith(".gate.weight")]
    used: list[torch.Tensor] = []

    def remember(router: torch.nn.Module, args: object) -> None:
        used.append(router.weight.detach().clone())

    routers = [block.router for block in moe_blocks(model)]
    for router in routers:
        router.register_forward_pre_hook(remember)
    ids = torch.arange(16).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()

    assert len(used) == len(stored) == len(routers) > 0
    for weight in used:
        assert weight.dtype == torch.float32
        assert any(torch.equal(weight, value) for value in stored)
        assert not torch.equal(weight, weight.bfloat16().float())
    assert all(router.weight.grad.dtype == torch.float32 for router in routers)
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_router_weights_are_not_rounded(tmp_path: Path, family: str, ep_size: int) -> None:
    run_on_ranks(save_tiny_model, 1, family, tmp_path)
    run_on_ranks(check_router_weights, 2, tmp_path, ep_size)


MAMBA = ("A_log", "D", "dt_bias")


def save_boosted(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("nemotron_h"), dtype=torch.float32)
    boost(model)
    model.save_pretrained(folder)


def stored_mamba(folder: Path) -> dict[str, torch.Tensor]:
    """The file's Mamba parameters, by the model's own names."""
    file = load_file(folder / "model.safetensors")
    return {n.replace("backbone.", "model."): v for n, v in file.items() if n.rpartition(".")[2] in MAMBA}


def check_mamba_parameters(folder: Path, ep_size: int, dp_replicate_size: int) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    layout = DistributedConfig(
        fsdp_size=ranks // dp_replicate_size, dp_replicate_size=dp_replicate_size, ep_size=ep_size,
        fsdp_mixed_precision=True,
    )  # fmt: skip
    stored = stored_mamba(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=layout).train()
    used: dict[str, torch.Tensor] = {}
    mamba.chunk_scan = lambda *tensors, D_H, dt_bias_H, **options: (
        used.update({f"{len(used) // 3}.A": tensors[2], f"{len(used) // 3}.D": D_H, f"{len(used) // 3}.dt": dt_bias_H}),
        chunk_scan(*tensors, D_H=D_H, dt_bias_H=dt_bias_H, **options),
    )[1]
    ids = torch.arange(32).mul(7 + rank).remainder(256).view(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()

    kept = kept_parameters(model)
    assert kept.keys() == stored.keys()
    assert any(not torch.equal(value, value.bfloat16().float()) for value in stored.values())
    for layer, name in enumerate(dict.fromkeys(name.rpartition(".")[0] for name in stored)):
        assert torch.equal(used[f"{layer}.A"], -stored[f"{name}.A_log"].exp())
        assert torch.equal(used[f"{layer}.D"], stored[f"{name}.D"])
        assert torch.equal(used[f"{layer}.dt"], stored[f"{name}.dt_bias"])
    for name, parameter in kept.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        gathered = [torch.empty_like(parameter.to_local()) for _ in range(ranks)]
        dist.all_gather(gathered, parameter.grad.to_local())
        assert all(torch.equal(gathered[0], other) for other in gathered), name
        assert gathered[0].abs().max() > 0
    assert model.model.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    biases = [router.e_score_correction_bias for router in (block.router for block in moe_blocks(model))]
    assert all(bias.dtype == torch.float32 for bias in biases)


@pytest.mark.parametrize(("ranks", "ep_size", "dp_replicate_size"), [(2, 1, 1), (2, 2, 1), (4, 2, 2)])
def test_mamba_parameters_are_not_rounded(tmp_path: Path, ranks: int, ep_size: int, dp_replicate_size: int) -> None:
    """Values, gradients and what the scan computes with, under FSDP2's mixed precision over bfloat16 weights."""
    run_on_ranks(save_boosted, 1, tmp_path)
    run_on_ranks(check_mamba_parameters, ranks, tmp_path, ep_size, dp_replicate_size)


def check_averaged_gradients(folder: Path) -> None:
    """In a trainer that is not this package's, gradients are means over the ranks, as FSDP2's are."""
    rank, ids = dist.get_rank(), torch.arange(64).mul(11).remainder(256).view(4, 16)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    plain(input_ids=ids, labels=ids).loss.backward()
    layout = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=layout)
    mine = ids[2 * rank : 2 * rank + 2]
    model.train()(input_ids=mine, labels=mine).loss.backward()
    error, name = worst(whole_gradients(model), {name: p.grad for name, p in plain.named_parameters()})
    assert error < TOLERANCE, f"{name}: {error}"
    # Replicas and shards are of one mesh, so that torch's own batched functions take them together.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()


def test_gradients_of_replicas_are_means_outside_of_the_trainer(tmp_path: Path) -> None:
    run_on_ranks(save_boosted, 1, tmp_path)
    run_on_ranks(check_averaged_gradients, 2, tmp_path)


def check_drawn() -> None:
    config = tiny_config("nemotron_h")
    for layout in (None, DistributedConfig(fsdp_size=2, fsdp_mixed_precision=True)):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, distributed_config=layout)
        kept = kept_parameters(model)
        assert len(kept) == 6
        for name, parameter in kept.items():
            assert parameter.dtype == torch.float32, (layout, name)
        value = next(p for name, p in kept.items() if name.endswith("dt_bias"))
        local = value.to_local() if layout else value
        ids = torch.arange(16)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    gathered = [torch.empty_like(local) for _ in range(2)]
    dist.all_gather(gathered, local.detach())
    assert torch.equal(*gathered)


def test_drawn_mamba_parameters_are_float32() -> None:
    run_on_ranks(check_drawn, 2)
