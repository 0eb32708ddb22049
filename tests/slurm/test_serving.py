"""slurm/serve.sh and slurm/eval.sh on the test cluster, with small stand-ins for an engine and lm-eval."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.slurm.lab import Lab
from tests.slurm.site import ROOT

DEADLINE_S = 120
pytestmark = [pytest.mark.slow, pytest.mark.slurm]

SERVER = """\
import http.server, json, os, pathlib, signal, sys

folder = pathlib.Path({folder!r})
(folder / f"words-{{os.environ['SLURM_NODEID']}}.json").write_text(json.dumps(sys.argv[1:]))
if (folder / "refuses").exists():
    sys.exit("ValueError: no such layout")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(5)
        self.send_response(200 if (folder / "healthy").exists() else 503)
        self.end_headers()

    def log_message(self, *words):
        pass


def end(signum, frame):
    (folder / "ended").write_text(str(signum))
    os._exit(0)


signal.signal(signal.SIGTERM, end)
if os.environ["SLURM_NODEID"] != "0":  # only the first node answers
    signal.pause()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("0.0.0.0", port), Handler).serve_forever()
"""
LM_EVAL = """\
import json, pathlib, sys, urllib.request

if sys.argv[1] == "-c":
    sys.exit(0)
value = dict(zip(sys.argv, sys.argv[1:]))
facts = dict(word.split("=", 1) for word in value["--model_args"].split(","))
urllib.request.urlopen(facts["base_url"].removesuffix("/v1/completions") + "/health")
if value["--tasks"] == "nosuch":
    sys.exit("ValueError: Tasks not found: nosuch")
out = pathlib.Path(value["--output_path"]) / facts["model"]
out.mkdir()
(out / "results_now.json").write_text(json.dumps({"words": sys.argv[1:]}))
print("|gsm8k|0.5|")
"""


class Served:
    """A run folder with an export, and what stands in for an engine's Python."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder, self.run = lab, folder, folder / "run"
        export = self.run / "export"
        export.mkdir(parents=True)
        (export / "config.json").write_text('{\n  "model_type": "nemotron_h"\n}\n')
        (export / "tokenizer_config.json").write_text("{}")
        self.environment = {}
        for name, text in (("MOE_SERVE_PYTHON", SERVER.format(folder=str(folder))), ("MOE_EVAL_PYTHON", LM_EVAL)):
            program = folder / f"{name}.py"
            program.write_text(text)
            python = folder / name
            python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
            python.chmod(0o755)
            self.environment[name] = str(python)

    def submit(self, script: str, *words: str, options: tuple[str, ...] = ()) -> str:
        command = [*options, f"slurm/{script}.sh", str(self.run), *words]
        return self.lab.sbatch(*command, cwd=ROOT, env=self.environment)

    def url_file(self, job: str) -> Path:
        return self.run / "serve" / f"{job}.url"

    def ended_with(self, job: str, code: int) -> str:
        record = self.lab.wait_for_end(job, DEADLINE_S)
        said = self.lab.output_of(job)
        assert record.exit_code == f"{code}:0", said
        assert not self.url_file(job).exists()
        assert self.lab.run("squeue", "-h").stdout == ""
        return said


@pytest.fixture
def served(lab: Lab, tmp_path: Path) -> Served:
    tmp_path.chmod(0o755)
    return Served(lab, tmp_path)


def test_serve_waits_for_health_prints_the_address_and_stops_cleanly(served: Served) -> None:
    job = served.submit("serve", "gpus=2", "--max-model-len", "64")
    served.lab.wait_for(lambda: (served.folder / "words-0.json").exists(), DEADLINE_S, job)
    assert not served.url_file(job).exists()
    (served.folder / "healthy").touch()
    served.lab.wait_for(served.url_file(job).exists, DEADLINE_S, job)
    url = served.url_file(job).read_text().strip()
    assert f"run is served at {url}" in served.lab.output_of(job)
    words = json.loads((served.folder / "words-0.json").read_text())
    assert words[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(served.run / "export")]
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert "--enable-expert-parallel" in words
    assert words[-4:] == ["--mamba-ssm-cache-dtype", "float32", "--max-model-len", "64"]
    assert f":{words[words.index('--port') + 1]}/v1" in url
    served.lab.run("scancel", "--batch", "--signal=TERM", job)  # as the time limit does
    assert "vllm was stopped" in served.ended_with(job, 0)
    assert (served.folder / "ended").read_text() == "15"


SPREAD = {
    "vllm": {"--tensor-parallel-size": "8", "--pipeline-parallel-size": "2", "--nnodes": "2"},
    "sglang": {"--tp-size": "8", "--ep-size": "8", "--pp-size": "2", "--nnodes": "2", "--mamba-ssm-dtype": "float32"},
}


@pytest.mark.parametrize("engine", list(SPREAD))
def test_one_server_over_two_nodes(served: Served, engine: str) -> None:
    (served.folder / "healthy").touch()
    job = served.submit("serve", f"engine={engine}", options=("--nodes=2",))
    served.lab.wait_for(served.url_file(job).exists, DEADLINE_S, job)
    served.lab.wait_for(lambda: (served.folder / "words-1.json").exists(), DEADLINE_S, job)
    first, second = (json.loads((served.folder / f"words-{node}.json").read_text()) for node in (0, 1))
    own = len(first) - 2
    assert first[:own] == second[:own]
    assert first[own:] == ["--node-rank", "0"]
    assert second[own:] == ["--node-rank", "1", *(["--headless"] if engine == "vllm" else [])]
    for word, value in SPREAD[engine].items():
        assert first[first.index(word) + 1] == value
    served.lab.run("scancel", job)
    served.lab.wait_for_end(job, DEADLINE_S)
    served.lab.wait_for(lambda: not served.url_file(job).exists(), DEADLINE_S, job)


def test_a_server_that_refuses_dies_or_never_answers(served: Served) -> None:
    (served.folder / "refuses").touch()
    refused = served.ended_with(served.submit("serve"), 78)
    assert "vllm ended with 1 before it was healthy: ValueError: no such layout" in refused
    (served.folder / "refuses").unlink()
    silent = served.ended_with(served.submit("serve", "wait_s=3"), 70)
    assert "vllm was not healthy after 3 s" in silent
    assert (served.folder / "ended").exists()
    (served.folder / "healthy").touch()
    job = served.submit("serve")
    served.lab.wait_for(served.url_file(job).exists, DEADLINE_S, job)
    with pytest.raises(OSError):  # noqa: PT011  (the connection breaks in one of several ways)
        urllib.request.urlopen(
            served.url_file(job).read_text().strip().replace("/v1", "/die").replace("node1", "0.0.0.0")
        )
    assert "while it served" in served.ended_with(job, 69)


def test_eval_starts_a_server_scores_and_ends_it(served: Served) -> None:
    (served.folder / "healthy").touch()
    job = served.submit("eval", "tasks=gsm8k", "--max-model-len", "64", "--", "--num_fewshot", "8")
    said = served.ended_with(job, 0)
    assert "|gsm8k|0.5|" in said
    assert "vllm was stopped" in said
    assert json.loads((served.folder / "words-0.json").read_text())[-2:] == ["--max-model-len", "64"]
    (results,) = served.run.glob(f"eval/{job}/**/results*.json")
    assert str(results) in said
    assert json.loads(results.read_text())["words"][-2:] == ["--num_fewshot", "8"]
    assert (served.folder / "ended").exists()
    (served.folder / "ended").unlink()
    failed = served.ended_with(served.submit("eval", "tasks=nosuch"), 70)
    assert "lm-eval ended with 1: ValueError: Tasks not found: nosuch" in failed
    assert (served.folder / "ended").exists()
    (served.folder / "refuses").touch()
    assert "no server, so no score" in served.ended_with(served.submit("eval", "tasks=gsm8k"), 78)
