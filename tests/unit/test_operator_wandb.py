"""``wandb-sync`` with real wandb and real offline folders against a stand-in of its server: each step arrives once."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_recipes.config.run_folder import RunFolder
from tests.unit.operator_runs import STEPS, answered, real_run, refused, written_run
from tests.unit.wandb_server import WandbServer, wandb_server

KEY = "0" * 40


def offline(tmp_path_factory: pytest.TempPathFactory, place: Path) -> RunFolder:
    """A copy of the real run of two attempts, as it was when step 20 was the newest one."""
    pytest.importorskip("wandb")
    shutil.copytree(real_run(tmp_path_factory.getbasetemp()), place)
    folder = RunFolder(place)
    assert len(list((place / "wandb").glob("offline-run-*"))) == 2
    lines = folder.metrics.read_text().splitlines(keepends=True)
    folder.metrics.write_text("".join(lines[:20]) + lines[20][:40])
    folder.write_status("running", step=20)
    return folder


def sync(folder: RunFolder, server: WandbServer, **environment: str) -> dict[str, object]:
    here = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, **environment}
    answer: dict[str, object] = json.loads(answered("wandb-sync", str(folder.path), "--json", **here))
    return answer


def test_a_run_of_two_attempts_can_be_sent_again_and_again(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = offline(tmp_path_factory, tmp_path / "real")
    run_id = (folder.path / "wandb_id").read_text()
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with wandb_server() as server:
        first = sync(folder, server)
        assert (first["rows"], first["step"]) == (20, 20)
        assert server.steps(run_id) == list(range(1, 21))
        assert sync(folder, server)["rows"] == 0, "nothing new"
        shutil.copy(real_run(tmp_path_factory.getbasetemp()) / "metrics.jsonl", folder.metrics)
        last = sync(folder, server)
        assert (last["rows"], last["step"]) == (STEPS - 20, STEPS)
        assert server.steps(run_id) == list(range(1, STEPS + 1)), "both attempts, each step once, none moved"
        assert list(server.history) == [run_id]
        sent = [row for _, row in sorted(server.history[run_id].items())]
        records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        assert [row["loss"] for row in sent] == [record["loss"] for record in records]
        assert "expert_load/layer_00/expert_000" in sent[9]
        assert f"Basic {base64.b64encode(f'api:{KEY}'.encode()).decode()}" in server.keys
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    del before[folder.metrics], after[folder.metrics]
    assert after == before, "nothing in the run folder was touched"


def test_the_key_comes_from_the_file_of_secrets(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = offline(tmp_path_factory, tmp_path / "real")
    secrets = tmp_path / "secrets"
    secrets.write_text(f"WANDB_API_KEY={'1' * 40}\n")
    secrets.chmod(0o600)
    with wandb_server() as server:
        said = answered(
            "wandb-sync", str(folder.path), "--secrets", str(secrets), cwd=tmp_path, WANDB_BASE_URL=server.url
        )
        assert said.startswith(f"{folder.path}: sent 20 steps, W&B has step 20: {server.url}/")
        assert f"Basic {base64.b64encode(f'api:{chr(49) * 40}'.encode()).decode()}" in server.keys
    secrets.chmod(0o640)
    assert "mode 0640" in refused(77, "wandb-sync", str(folder.path), "--secrets", str(secrets), cwd=tmp_path)


def test_what_cannot_be_sent_is_one_line(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = offline(tmp_path_factory, tmp_path / "real")
    with wandb_server() as server:
        here = {"WANDB_BASE_URL": server.url}
        assert "WANDB_API_KEY" in refused(77, "wandb-sync", str(folder.path), cwd=tmp_path, **here)
        server.refuse = True
        said = refused(77, "wandb-sync", str(folder.path), cwd=tmp_path, **here, WANDB_API_KEY=KEY)
        assert said.startswith("W&B refuses the key: "), said
        server.refuse = False
        online = folder.path / "wandb" / "run-20990101_000000-x"
        online.mkdir()
        assert "is online" in refused(64, "wandb-sync", str(folder.path), **here, WANDB_API_KEY=KEY)
        folder.write_status("done", exit_code=0)
        assert sync(folder, server)["rows"] == 20, "what trained online before can be completed once it has ended"
    plain = written_run(tmp_path / "plain")
    assert "holds no step yet" in refused(66, "wandb-sync", str(plain.path), WANDB_API_KEY=KEY)
    shutil.copy(folder.metrics, plain.metrics)
    assert "has no W&B run" in refused(66, "wandb-sync", str(plain.path), WANDB_API_KEY=KEY)


@pytest.mark.slow
def test_wandbs_own_sync_sends_all_rows_again(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Why ``wandb sync`` is not used. Where this fails, wandb may have mended it."""
    folder = offline(tmp_path_factory, tmp_path / "real")
    runs = sorted(str(path) for path in (folder.path / "wandb").glob("offline-run-*"))
    run_id = (folder.path / "wandb_id").read_text()
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-synced", *runs]
    with wandb_server() as server:
        here = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        for _ in range(2):
            done = subprocess.run(command, env=here, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        sent = [row for _, row in sorted(server.history[run_id].items())]
    assert len(sent) == 2 * STEPS
