"""Every measured figure in the pages is the one in the committed JSON."""

from __future__ import annotations

import json
from pathlib import Path

from moe_recipes.bench.report import PAGES, TABLES, parts_table, replaced, table

ROOT = Path(__file__).parents[2]


def test_pages_show_what_the_files_say():
    for name, pages in PAGES.items():
        text = TABLES[name](ROOT / "benchmarks")
        for page in pages:
            found = (ROOT / page).read_text()
            assert f"<!-- {name}: begin -->" in found
            assert found == replaced(found, text, name), f"{page}: run `python -m moe_recipes.bench.report --write`"


def test_the_bound_is_that_of_the_products_alone(tmp_path):
    parts = dict.fromkeys(("communication", "row moves", "elementwise", "copies", "optimizer", "idle"), 25.0)
    parts |= {"grouped GEMM": 20.0, "GEMM": 20.0, "attention": 10.0, "span": 200.0}
    result = {"arm": "ours", "ep_size": 2, "micro_batch_size": 4, "parts_ms": parts}
    result |= {"tokens_per_s_per_gpu": 1000.0, "step_s": 0.2}
    card = {
        "results": [result, {"arm": "transformers", "failed": "x"}],
        "manifest": {"recipe": {"name": "r", "parallel": {}}},
    }
    (tmp_path / "a.json").write_text(json.dumps(card))
    assert "| `r` | ours | 2 | 4 | 1,000 | 4,000 | 20 | 20 | 10 | 25 |" in parts_table(tmp_path)


def test_table_computes_the_ratio_from_the_file(tmp_path):
    arm = {
        "gate": "real", "ep_size": 2, "micro_batch_size": 4, "activation_checkpointing": "none",
        "tokens_per_s_per_gpu_without_optimizer": 9.0,
        "peak_allocated_gib": 1.0, "peak_reserved_gib": 2.0,
    }  # fmt: skip
    results = [
        {**arm, "arm": "ours", "tokens_per_s_per_gpu": 300.0},
        {**arm, "arm": "transformers", "tokens_per_s_per_gpu": 200.0},
    ]
    manifest = {
        "recipe": {"name": "r", "parallel": {"fsdp_size": 2}},
        "packages": dict.fromkeys(("torch", "transformers", "triton", "flashoptim"), "1"),
    }
    card = {"gpus": ["NVIDIA X, 1, 2"], "results": results, "manifest": manifest}
    (tmp_path / "a.json").write_text(json.dumps(card))
    assert "| `r` | 2 x X | 2 | 4 | real | **300** | 200 | 1.50 | 9 / 9 |" in table(tmp_path)


def test_an_arm_that_failed_or_is_missing_is_said(tmp_path):
    shape = {"gate": "real", "ep_size": 2, "micro_batch_size": 4, "activation_checkpointing": "none"}
    manifest = {
        "recipe": {"name": "r", "parallel": {"fsdp_size": 2}},
        "packages": dict.fromkeys(("torch", "transformers", "triton", "flashoptim"), "1"),
    }
    results = [{**shape, "arm": "ours", "failed": "out of memory"}]
    (tmp_path / "a.json").write_text(json.dumps({"gpus": ["NVIDIA X, 1, 2"], "results": results, "manifest": manifest}))
    assert "| real | out of memory | missing | - |" in table(tmp_path)
