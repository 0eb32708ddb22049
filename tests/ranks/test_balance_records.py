"""What metrics.jsonl says of the experts' load in a real run on two ranks: every token once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.runs import VOCAB_SIZE, records, train, write_task
from tests.tiny_models import tiny_config

STEPS, SEQ_LEN, EXPERTS, TOP_K = 3, 64, 8, 2


@pytest.mark.slow
def test_load_max_violation_and_dead_experts_of_every_layer(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe")
    config.vocab_size = VOCAB_SIZE
    recipe = write_task(
        tmp_path / "task", config, parallel={"fsdp_size": 2, "ep_size": 2}, checkpoint={"export": False},
        train={"steps": STEPS, "grad_accum_steps": 2, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001},
        log={"expert_load_every_steps": 2},
    )  # fmt: skip
    done = train(recipe, tmp_path / "run")
    assert done.returncode == 0, done.stdout
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [1, 2, 3]
    assert ["expert_load" in record for record in found] == [True, True, False]
    for record in found:
        assert record["aux_loss"] >= 0.9  # 1 is perfect balance
        assert record["z_loss"] > 0
        assert record["max_violation"] == pytest.approx(max(record["max_violation_of_layer"].values()), abs=1e-4)
        assert record["dead_experts"] == sum(record["dead_experts_of_layer"].values())
        assert set(record["max_violation_of_layer"]) == set(record["dead_experts_of_layer"]) == {"0", "1"}
    for record in found[:2]:
        for layer, load in record["expert_load"].items():
            assert len(load) == EXPERTS
            # Two ranks, two microbatches of one row each; padding of a row counts for nothing.
            assert 0 < sum(load) <= 2 * 2 * SEQ_LEN * TOP_K
            assert sum(load) % TOP_K == 0
            mean = sum(load) / EXPERTS
            assert record["max_violation_of_layer"][layer] == pytest.approx(max(load) / mean - 1, abs=1e-4)
            assert record["dead_experts_of_layer"][layer] == load.count(0)
        assert len({sum(load) for load in record["expert_load"].values()}) == 1
