"""Every model of Transformers with an expert-parallel plan, at ``ep_size`` 2, is one process of eager Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import core_model_loading as loading
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moe_recipes.models.loading.mixed_rows import mixes_rows
from tests.ranks.every_model import pages_rows, row_of, walk
from tests.small_configs import plan_bearing

FAST = ("gemma4_text", "hunyuan_v1_moe", "kimi_linear", "mixtral", "sarvam_moe", "zaya")
"""Beyond the four families of the other tests: dense layers in the plan, a router that is no module, joined rows, the
plainest, split rows, one expert a token."""

WITH_CAUSAL_LM = [kind for kind in plan_bearing() if CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING]


@pytest.mark.parametrize(
    "model_type", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in WITH_CAUSAL_LM]
)
def test_two_ranks_are_one_process_of_eager_transformers(model_type: str, tmp_path: Path) -> None:
    found = walk(model_type, tmp_path)
    assert found.outcome == "passes"
    assert row_of(found) == pages_rows()[0][model_type], "python -m tests.ranks.every_model --write"


def test_the_page_has_every_model_type_with_a_plan() -> None:
    rows, without = pages_rows()
    assert list(rows) == WITH_CAUSAL_LM
    assert without == [kind for kind in plan_bearing() if kind not in WITH_CAUSAL_LM]
    assert len(rows) >= 50


def test_what_moves_rows_is_told_from_what_keeps_them() -> None:
    def converter(*operations: loading.ConversionOps) -> loading.WeightConverter:
        return loading.WeightConverter("a.weight", "b.weight", operations=list(operations))

    experts = converter(loading.MergeModulelist(dim=0), loading.Concatenate(dim=1))
    assert not mixes_rows(experts)
    for operation in (
        loading.Concatenate(dim=0),
        loading.Chunk(dim=0),
        loading.Split(dim=0),
        loading.Interleave(dim=0),
    ):
        assert mixes_rows(converter(operation))
    assert mixes_rows(converter(loading.Transpose(0, 1)))
