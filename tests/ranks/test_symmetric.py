"""Rows through memory that all ranks write: the bits of the all-to-all dispatcher, and the step again where they do
not fit."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers.activations import ACT2FN

from moe_recipes.config.errors import RecipeError
from moe_recipes.moe import all_to_all, symmetric
from moe_recipes.train.loop import train_step
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import build_run, rank_batches, save_weights, whole

LOOSE, TIGHT = 1.15, 0.25
"""Capacity factors: the default, and one that leaves no layer room for the rows of the step before."""

STEPS = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("weights")

    def saved(family: str) -> Path:
        if not (root / family).exists():
            run_on_ranks(save_weights, 1, family, root / family)
        return root / family

    return saved


def steps_of(folder: Path, calls: Counter[str], **options: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What some steps on the same batches said, with the calls of each transport; and the weights afterwards."""
    run = build_run(folder, **options)
    found = []
    for _ in range(STEPS):
        calls.clear()
        stats = train_step(run, rank_batches(folder.name))
        found.append((stats.loss, stats.grad_norm, stats.expert_counts.tolist(), dict(calls)))
    return found, {name: whole(parameter).clone() for name, parameter in run.model.named_parameters()}


def count_calls() -> Counter[str]:
    """Of the transports, in this process."""
    plan, order, calls = all_to_all.make_plan, symmetric.expert_order, Counter[str]()

    def counted_plan(*args: Any, **kwargs: Any) -> Any:
        calls["all_to_all"] += 1
        return plan(*args, **kwargs)

    def counted_order(*args: Any, **kwargs: Any) -> Any:
        calls["symmetric"] += 1
        return order(*args, **kwargs)

    all_to_all.make_plan, symmetric.expert_order = counted_plan, counted_order
    return calls


def check_same_steps(folder: Path, ep_size: int, factor: float, checkpointing: str) -> None:
    calls = count_calls()
    options = {"ep_size": ep_size, "checkpointing": checkpointing}
    wanted, wanted_weights = steps_of(folder, calls, **options)
    dispatch = {"ep_implementation": symmetric.NAME, "expert_capacity_factor": factor}
    got, got_weights = steps_of(folder, calls, dispatch=dispatch, **options)
    layer_calls = wanted[0][3]["all_to_all"]
    first, others = {"all_to_all": layer_calls}, {"symmetric": layer_calls}
    if factor == TIGHT:
        others["all_to_all"] = layer_calls
    assert [calls for *_, calls in got] == [first] + [others] * (STEPS - 1)
    assert [said for *said, _ in got] == [said for *said, _ in wanted]
    assert [name for name in wanted_weights if not torch.equal(wanted_weights[name], got_weights[name])] == []


CASES = [
    pytest.param(family, ranks, ep_size, factor, checkpointing, marks=marks)
    for family, ranks, ep_size, factor, checkpointing, marks in (
        ("qwen3_moe", 2, 2, TIGHT, "none", ()),
        ("qwen3_moe", 2, 2, LOOSE, "full", pytest.mark.slow),
        ("qwen3_moe", 2, 2, TIGHT, "full", pytest.mark.slow),
        ("qwen3_moe", 4, 4, LOOSE, "none", pytest.mark.slow),
        ("qwen3_moe", 4, 2, LOOSE, "full", pytest.mark.slow),
        ("qwen3_moe_starved", 2, 2, LOOSE, "none", pytest.mark.slow),
        ("qwen3_moe_starved", 4, 4, TIGHT, "full", pytest.mark.slow),
        ("nemotron_h", 2, 2, LOOSE, "none", pytest.mark.slow),
        ("nemotron_h", 2, 2, TIGHT, "full", pytest.mark.slow),
    )
]


@pytest.mark.parametrize(("family", "ranks", "ep_size", "factor", "checkpointing"), CASES)
def test_steps_have_the_bits_of_all_to_all(weights, family, ranks, ep_size, factor, checkpointing):
    """With experts on one rank alone too, and with no room: then each step is computed again."""
    run_on_ranks(check_same_steps, ranks, weights(family), ep_size, factor, checkpointing)


def test_a_step_that_is_computed_again_draws_the_same_random_numbers(weights, tmp_path):
    """With dropout in the attention."""
    folder = tmp_path / "qwen3_moe"
    shutil.copytree(weights("qwen3_moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    run_on_ranks(check_same_steps, 2, folder, 2, TIGHT, "none")


class Experts(torch.nn.Module):
    """As much of Transformers' gated experts as a dispatcher looks at; local ones."""

    has_gate = has_bias = is_transposed = False
    act_fn = ACT2FN["relu2"]
    config = SimpleNamespace(_experts_implementation="moe_recipes")

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up_proj = torch.nn.Parameter(torch.randn(num_experts, hidden, width))
        self.down_proj = torch.nn.Parameter(torch.randn(num_experts, width, hidden))


def layer_call(dispatcher: Any, tokens: int, seed: int, *, choose: str) -> list[torch.Tensor]:
    """Output and all gradients of one call on this rank's own tokens."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    x = torch.randn(tokens, 8, generator=generator).requires_grad_()
    score = torch.rand(tokens, 8, generator=generator)
    if choose == "first rank":
        score[:, :3] += 1
    weight = torch.rand(tokens, 3, generator=generator).requires_grad_()
    out = dispatcher(x, score.topk(3).indices, weight)
    wanted = [x, weight, *dispatcher.experts.parameters()]
    return [out, *torch.autograd.grad(out, wanted, torch.randn(out.shape, generator=generator))]


def check_ragged_layer() -> None:
    """Calls of every size on every rank, and after one that fills the buffers one that leaves most of them alone."""
    torch.manual_seed(dist.get_rank())
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    one = symmetric.SymmetricDispatcher(Experts(8 // ranks, 8, 12), mesh["ep"], mesh["tp"])
    calls = count_calls()
    for seed, choose in enumerate(["any", "first rank", "any", "first rank"]):
        for tokens in ([9, 9, 9, 9], [9, 0, 4, 1], [0, 0, 0, 7]):
            mine = tokens[dist.get_rank()] + seed  # the first call of each round makes the buffers larger
            wanted = layer_call(one, mine, seed, choose=choose)
            one.recent.append(24 * ranks * max(tokens) + 1)
            calls.clear()
            with symmetric.RoutedRows(1.0) as rows:
                got = layer_call(one, mine, seed, choose=choose)
                assert rows.missing(rows.counts(got[0].device).tolist()) == 0
            assert calls == {"symmetric": 1}
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_ranks_may_have_other_numbers_of_tokens():
    run_on_ranks(check_ragged_layer, 4)


def check_room_of_every_call() -> None:
    """A call that had no room is not forgotten when the next one, of more tokens, gets more and needs none."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    torch.manual_seed(dist.get_rank())
    one = symmetric.SymmetricDispatcher(Experts(8 // ranks, 8, 12), mesh["ep"], mesh["tp"])
    one.recent.append(4)
    with symmetric.RoutedRows(1.0) as rows:
        needed = []
        for tokens, choose in ((9, "any"), (400, "first rank")):
            layer_call(one, tokens, 0, choose=choose)
            needed.append(rows.counts(torch.device("cpu")).item())
    last = dist.get_rank() == ranks - 1
    assert needed[0] > 4
    assert not last or needed[1] == needed[0]
    assert rows.missing([needed[1]]) == needed[1] - 4


def test_a_call_without_room_shows_after_buffers_have_grown():
    run_on_ranks(check_room_of_every_call, 2)


def check_refusal(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"^parallel.ep_implementation=moe_recipes_symmetric: .* leave the key out$"):
        build_run(folder, ep_size=2, dispatch={"ep_implementation": symmetric.NAME})


@pytest.mark.slow
def test_experts_with_biases_are_refused(weights):
    run_on_ranks(check_refusal, 2, weights("gpt_oss"))
