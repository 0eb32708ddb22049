"""A benchmark's script on the cluster: one task of its node starts the ranks of the arms and leaves the figures."""

from __future__ import annotations

import json

import pytest

from tests.slurm.site import JOB_S, Site

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

SHAPE = "{hidden_size: 64, num_hidden_layers: 2, num_experts: 8, moe_intermediate_size: 32, vocab_size: 512}"
SMALL = (
    "--arms", "ours,automodel", "--gates", "real", "--batches", "1", "--steps", "2", "--warmup", "1",
    "--set", f"model.config_overrides={SHAPE}", "--set", "data.seq_len=64", "--set", "model.dtype=float32",
    "--set", "parallel.fsdp_size=2", "--set", "parallel.ep_size=2", "--set", "optim.name=adamw",
)  # fmt: skip


def test_the_script_of_a_benchmark_leaves_its_figures(site: Site) -> None:
    job = site.script("bench_qwen3_30b", *SMALL)
    site.lab.wait_for_state(job, "COMPLETED", JOB_S)
    run = site.run("bench_qwen3_30b_8gpu")
    ours, rival = json.loads((run.path / "bench.json").read_text())["results"]
    assert (ours["arm"], ours["ep_size"], ours["gate"]) == ("ours", 2, "real")
    assert ours["tokens_per_s_per_gpu"] > 0
    assert rival["missing"].endswith("nemo_automodel is not installed there")
    assert [(end["kind"], end["exit_code"]) for end in run.endings] == [("done", 0)]
    assert len(list(run.path.glob("attempts/1/rank-*.exit.json"))) == 1


def test_a_benchmark_that_is_asked_wrongly_is_not_requeued(site: Site) -> None:
    job = site.script("bench_qwen3_30b", "--arms", "theirs")
    record = site.lab.wait_for_end(job, JOB_S)
    assert (record.state, record.exit_code) == ("FAILED", "64:0"), site.lab.output_of(job)
    assert len(site.lab.job_records(job)) == 1
    assert "--arms theirs: must be of ours, transformers, automodel" in site.lab.output_of(job)
