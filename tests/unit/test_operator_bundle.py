"""``bundle``: what is in it, and that a canary key that lies everywhere in a run is nowhere in the archive."""

from __future__ import annotations

import base64
import json
import re
import stat
import tarfile
from pathlib import Path

import pytest

from moe_recipes.config.cluster import load_cluster
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.operator.redact import Redactor
from moe_recipes.launch.slurm.spec import JobSpec, write_spec
from tests.unit.operator_runs import answered, real_run, refused, slurm_run, write_event, write_log, write_status

HF = "hf_CanaryCanaryCanaryCanary0123456789"
WANDB = "deadbeef" * 5
ODD = "team-token.without.any.pattern"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def contents(archive: Path) -> dict[str, str]:
    """Text by path, without the folder that holds everything."""
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        assert {member.name.split("/")[0] for member in members} == {archive.name.removesuffix(".tar.gz")}
        assert all(member.isfile() and member.mode == 0o600 for member in members)
        return {
            member.name.partition("/")[2]: (tar.extractfile(member) or pytest.fail(member.name)).read().decode()
            for member in members
        }


def packed(*words: str, cwd: Path, **environment: str) -> tuple[dict[str, str], dict[str, object]]:
    answer = json.loads(answered("bundle", *words, "--json", cwd=cwd, **environment))
    path = cwd / answer["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return contents(path), answer


def test_a_real_run_is_packed_with_its_logs_and_without_weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = real_run(tmp_path_factory.getbasetemp())
    here = tmp_path_factory.mktemp("bundle")
    files, _ = packed(str(run_dir), cwd=here)
    logs = [f"attempts/{attempt}/rank-0000{rank}.log" for attempt in (1, 2) for rank in (0, 1)]
    assert set(files) >= {
        "README.txt",
        "environment-names.txt",
        "events.jsonl",
        "files.txt",
        "manifest.json",
        "metrics-tail.jsonl",
        "recipe.json",
        "status.json",
        "status.txt",
        "why.txt",
        *logs,
    }
    folder = RunFolder(run_dir)
    assert json.loads(files["status.json"]) == folder.read_status()
    assert files["events.jsonl"] == folder.events.read_text()
    commit = json.loads(files["manifest.json"])["git"]["commit"]
    assert re.fullmatch(r"[0-9a-f]{40}", commit), "the commit of the code is no key, and support needs it"
    assert "verdict   attempt 2: done" in files["status.txt"]
    assert "attempt   2 of" in files["why.txt"]
    assert len(files["metrics-tail.jsonl"].splitlines()) == 60
    assert "expert_load" not in files["metrics-tail.jsonl"]
    assert "ckpt/latest" in files["files.txt"]
    assert not any("safetensors" in name or "wandb" in name for name in files)


def canary_run(tmp_path: Path) -> RunFolder:
    """A run whose every file holds the keys, and whose cluster file names the file of secrets."""
    folder = slurm_run(tmp_path / "runs" / "big")
    secrets = tmp_path / "secrets"
    secrets.write_text(f"HF_TOKEN={ODD}\nWANDB_API_KEY={WANDB}\n")
    secrets.chmod(0o600)
    cluster = tmp_path / "lab.yaml"
    cluster.write_text(
        "slurm: {partition: main, gpus_per_node: 8, time: '01:00:00'}\ncontainer: {runtime: none}\n"
        f"paths: {{runs: {tmp_path}/runs, secrets: {secrets}}}\nenv: {{SOME: '{HF}'}}\n"
    )
    keys = f"{HF} {WANDB} {ODD} Authorization: Basic {base64.b64encode(f'api:{WANDB}'.encode()).decode()}"
    for rank in (0, 1):
        write_log(folder, 2, rank, f"start\nWANDB_API_KEY={WANDB}\n{keys}\n" + "x\n" * 40000 + f"{keys}\nlast\n")
    (folder.attempts / "2" / "rank-00001.exit.json").write_text(json.dumps({"cause": keys}))
    write_status(folder, "2026-01-01T00:04:00Z", state="failed", step=3, cause=f"bad key {ODD}", exit_code=70)
    write_event(folder, "2026-01-01T00:04:00Z", "note", text=keys)
    folder.update_manifest(command=["train", "--key", HF], git={"commit": COMMIT, "dirty": False}, more=keys)
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"step": 31, "step_s": 1.0, "loss": 2.0, "note": keys}) + "\n")
    (folder.path / f"{HF}.txt").write_text("a name that is a key")
    spec = JobSpec(
        work="train",
        recipe=json.loads(folder.recipe.read_text()),
        recipe_file="big.yaml",
        overrides=(f"log.wandb_project={ODD}",),
        cluster=load_cluster(cluster),
        run_dir=str(folder.path),
        num_nodes=1,
        tasks_per_node=2,
        shakedown=False,
        code_dir="/code",
        time_limit_s=3600,
    )
    write_spec(folder.slurm / "4242" / "spec.json", spec)
    (folder.slurm / "4242" / "4242_0_log.err").write_text(f"srun: {keys}\n")
    return folder


def test_a_canary_is_nowhere_in_the_archive(tmp_path: Path) -> None:
    folder = canary_run(tmp_path)
    own = {"HF_TOKEN": "hf_OfThisShellOfThisShell01", "PATH": "/usr/bin:/bin"}
    files, answer = packed("4242", cwd=tmp_path, **own)
    everything = "\n".join([*files, *files.values()])
    encoded = base64.b64encode(f"api:{WANDB}".encode()).decode()
    for canary in (HF, WANDB, ODD, encoded, own["HF_TOKEN"]):
        assert canary not in everything, canary
    sources = "".join(path.read_text() for path in folder.path.rglob("*") if path.is_file())
    assert min(sources.count(canary) for canary in (HF, WANDB, ODD, encoded)) > 3, "they were there to be found"
    masked = answer["masked"]
    assert isinstance(masked, dict)
    assert masked["WANDB_API_KEY"] > 5
    assert masked["HF_TOKEN"] > 5
    assert masked["Hugging Face token"] > 5
    assert COMMIT in files["manifest.json"]
    assert "<Hugging Face token>.txt" in files["files.txt"]
    assert "HF_TOKEN\n" in files["environment-names.txt"], "names of variables only"
    assert files["attempts/2/rank-00000.log"].startswith("["), "the end of a long log, and said so"
    assert files["attempts/2/rank-00000.log"].endswith("last\n")
    assert "slurm/4242/spec.json" in files
    assert "slurm/4242/4242_0_log.err" in files
    assert "scontrol" in files["scontrol-show-job.txt"]


def test_a_file_of_secrets_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    canary_run(tmp_path)
    (tmp_path / "secrets").chmod(0o644)
    files, answer = packed("4242", cwd=tmp_path)
    assert "keys were masked by their look alone" in str(answer["note"])
    assert "keys were masked by their look alone" in files["README.txt"]
    assert WANDB not in "".join(files.values())


def test_links_are_not_followed_and_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    private = tmp_path / "private"
    private.write_text("somebody's own")
    (folder.attempts / "2" / "rank-00009.log").symlink_to(private)
    files, _ = packed("4242", cwd=tmp_path)
    assert "somebody's own" not in "".join(files.values())
    said = refused(73, "bundle", "4242", "-o", str(tmp_path / "no" / "x.tar.gz"), cwd=tmp_path)
    assert said == f"{tmp_path}/no/x.tar.gz: cannot be written: No such file or directory; name another place with -o"


KEYS = {
    "hf": "token is hf_abcdefghijklmnopqrstuvwxyz012345 here",
    "wandb": "key 0123456789abcdef0123456789abcdef01234567 here",
    "new wandb": "key wandb_v1_Abc123_xyz here",
    "aws id": "AKIAIOSFODNN7EXAMPLE",
    "aws secret": 'aws_secret_access_key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"',
    "bearer": "Authorization: Bearer abc.def-123_456",
    "github": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "ngc": "nvapi-abcdefghijklmnopqrstuvwxyz",
    "password": "https://user:hunter2hunter2@host/x",
    "json": '{"api_key": "abc123def456ghi789"}',
    "private": "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----\nafter",
}


@pytest.mark.parametrize("text", KEYS.values(), ids=KEYS.keys())
def test_what_looks_like_a_key_is_masked(text: str) -> None:
    redact = Redactor({})
    said = redact(text)
    assert said != text
    assert "<" in said
    secret = max(re.split(r"[\s\"'@]|://|user:", text), key=len)
    assert secret not in said
    assert sum(redact.masked.values()) == 1


def test_ordinary_text_stays() -> None:
    text = (
        'step 120/200 | loss 5.1593 | 2,369 tok/s/rank {"num_tokens": 131072, "tokens_per_s": 12345678.123456}\n'
        "saved runs/demo/ckpt/step-00000200 sha256 of 64 hex: " + "ab" * 32 + "\n"
        f"commit {COMMIT}\ntoken embeddings were tied; the secret is out\nMASTER_ADDR=node1 Basic Latin\n"
        "model.tokenizer: tokenizers/x  pad_token: <|endoftext|>  https://host:8080/a@b\n"
    )
    redact = Redactor({}, keep=[COMMIT])
    assert redact(text) == text
    assert not +redact.masked
