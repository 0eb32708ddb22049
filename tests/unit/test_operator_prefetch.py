"""``prefetch`` with the real hub client against a hub on this machine: pins, sizes, hashes, damage, offline checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.unit.hub_server import HubServer, Repo, hub_server
from tests.unit.operator_runs import RECIPE, answered, refused

MODEL, DATA = "a" * 40, "b" * 40
WEIGHTS = bytes(range(256)) * 4096
ROWS = "".join(json.dumps({"messages": [{"role": "user", "content": f"say {n}"}]}) + "\n" for n in range(9)).encode()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    model = {
        "config.json": b'{"model_type": "qwen3_moe"}',
        "model-00001-of-00001.safetensors": WEIGHTS,
        "odd name [1].txt": b"x",
        "pytorch_model.bin": b"the same again, as a pickle",
        "sub/tokenizer.json": b"{}",
    }
    repos = {
        "models/team/moe": Repo(model, MODEL),
        "models/team/pickles": Repo({"pytorch_model.bin": b"x", "config.json": b"{}"}, MODEL),
        "datasets/team/chats": Repo({"train.jsonl": ROWS, "README.md": b"chats"}, DATA),
    }
    with hub_server(repos) as server:
        yield server


def recipe(folder: Path, *, data: bool = False, **model: object) -> Path:
    plain = {**RECIPE, "model": {"source": "team/moe", "revision": MODEL, **model}}
    if data:
        plain["data"] = {"train": ["hf:team/chats:train"], "revision": DATA, "seq_len": 64}
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def where(hub: HubServer, folder: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}


def snapshot(folder: Path) -> Path:
    return folder / "hf" / "hub" / "models--team--moe" / "snapshots" / MODEL


def test_model_and_data_are_fetched_checked_and_checked_again_offline(hub: HubServer, tmp_path: Path) -> None:
    path, here = recipe(tmp_path, data=True), where(hub, tmp_path)
    said = answered("prefetch", str(path), cwd=tmp_path, **here)
    data = tmp_path / "hf" / "hub" / "datasets--team--chats" / "snapshots" / DATA
    assert said == (
        "team/moe: fetching 4 of 4 files, 1.0 MB\n"
        f"model team/moe at {MODEL}: 4 files, 1.0 MB, every size and hash is the hub's: {snapshot(tmp_path)}\n"
        "team/chats: fetching 2 of 2 files, 482 bytes\n"
        f"dataset team/chats at {DATA}: 2 files, 482 bytes, every size and hash is the hub's: {data}\n"
        "hf:team/chats:train: 9 rows\n"
    )
    assert (snapshot(tmp_path) / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert not (snapshot(tmp_path) / "pytorch_model.bin").exists(), "weights in another format are not fetched"
    loaded = len(hub.downloads)
    again = json.loads(answered("prefetch", str(path), "--json", cwd=tmp_path, **here))
    assert [(r["kind"], r["num_files"], r["num_bytes"]) for r in again["repositories"]] == [
        ("model", 4, 1048606),
        ("dataset", 2, 482),
    ]
    assert len(hub.downloads) == loaded, "what is there and right is not fetched again"
    offline = {**here, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    assert "every size and hash" in answered("prefetch", str(path), "--check", cwd=tmp_path, **offline)
    assert "HF_HUB_OFFLINE is set" in refused(78, "prefetch", str(path), cwd=tmp_path, **offline)


def test_damage_in_the_cache_is_found_offline_and_mended_online(hub: HubServer, tmp_path: Path) -> None:
    path, here = recipe(tmp_path), where(hub, tmp_path)
    answered("prefetch", str(path), cwd=tmp_path, **here)
    weights = snapshot(tmp_path) / "model-00001-of-00001.safetensors"
    blob = weights.resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"\0")
    said = refused(74, "prefetch", str(path), "--check", cwd=tmp_path, **here)
    assert said.startswith(f"team/moe at {MODEL}: model-00001-of-00001.safetensors has sha256 ")
    blob.write_bytes(WEIGHTS[:-1])
    said = refused(74, "prefetch", str(path), "--check", cwd=tmp_path, **here)
    assert "model-00001-of-00001.safetensors has 1,048,575 bytes, the hub has 1,048,576" in said
    config = (snapshot(tmp_path) / "config.json").resolve()
    config.write_bytes(config.read_bytes().replace(b"qwen", b"qven"))
    assert "config.json has sha1 " in refused(74, "prefetch", str(path), "--check", cwd=tmp_path, **here)
    mended = answered("prefetch", str(path), cwd=tmp_path, **here)
    assert "config.json: has sha1 " in mended
    assert "; fetching it again\n" in mended
    assert "fetching 2 of 4 files" in mended
    assert weights.read_bytes() == WEIGHTS
    weights.unlink()
    said = refused(66, "prefetch", str(path), "--check", cwd=tmp_path, **here)
    assert "model-00001-of-00001.safetensors is missing" in said


def test_a_file_that_arrives_damaged_is_refused_and_not_left_behind(hub: HubServer, tmp_path: Path) -> None:
    path, here = recipe(tmp_path), where(hub, tmp_path)
    repo = hub.repos["models/team/moe"]
    repo.served["model-00001-of-00001.safetensors"] = b"\1" + WEIGHTS[1:]
    said = refused(74, "prefetch", str(path), cwd=tmp_path, progress=True, **here)
    assert "model-00001-of-00001.safetensors has sha256 " in said
    assert said.endswith("removed what was wrong, run prefetch again")
    assert not (snapshot(tmp_path) / "model-00001-of-00001.safetensors").exists()
    assert "was never prefetched" in refused(66, "prefetch", str(path), "--check", cwd=tmp_path, **here)
    repo.served.clear()
    answered("prefetch", str(path), cwd=tmp_path, **here)


def test_a_file_of_another_size_than_the_hub_says_is_refused(hub: HubServer, tmp_path: Path) -> None:
    path, here = recipe(tmp_path), where(hub, tmp_path)
    hub.repos["models/team/moe"].served["sub/tokenizer.json"] = b"{} "
    said = refused(74, "prefetch", str(path), cwd=tmp_path, progress=True, **here)
    assert "sub/tokenizer.json has 3 bytes, the hub has 2; removed" in said
    assert not (snapshot(tmp_path) / "sub" / "tokenizer.json").exists()


def test_what_is_not_pinned_is_refused_with_the_pin(hub: HubServer, tmp_path: Path) -> None:
    path, here = recipe(tmp_path, data=True), where(hub, tmp_path)
    loose = ("--set", "model.revision=null", "--set", "data.revision=main")
    assert refused(64, "prefetch", str(path), *loose, cwd=tmp_path, **here) == (
        "model.revision is not set, data.revision=main: pin the commit, in the recipe or with:"
        f" --set model.revision={MODEL} --set data.revision={DATA}"
    )
    assert hub.downloads == []
    assert "only a commit of 40 hex digits can be checked" in refused(
        64, "prefetch", str(path), "--check", *loose, cwd=tmp_path, **here
    )
    hub_tokenizer = recipe(tmp_path, tokenizer="team/other")
    data = ("--set", "data.format=text", "--set", "data.train=[x.jsonl]")
    assert "cannot be pinned" in refused(64, "prefetch", str(hub_tokenizer), *data, cwd=tmp_path, **here)


def test_what_the_hub_does_not_have_and_a_hub_that_is_away(hub: HubServer, tmp_path: Path) -> None:
    path, here = recipe(tmp_path), where(hub, tmp_path)
    other = ("--set", "model.source=team/none")
    assert refused(66, "prefetch", str(path), *other, cwd=tmp_path, **here) == (
        f"model team/none at {MODEL}: the hub has no such thing, or HF_TOKEN may not see it"
    )
    wrong = ("--set", f"model.revision={'c' * 40}")
    assert "the hub has no such thing" in refused(66, "prefetch", str(path), *wrong, cwd=tmp_path, **here)
    away = {**here, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "the hub was not reached" in refused(69, "prefetch", str(path), cwd=tmp_path, **away)
    pickles = ("--set", "model.source=team/pickles")
    assert "has no .safetensors files" in refused(66, "prefetch", str(path), *pickles, cwd=tmp_path, **here)


def test_random_weights_need_no_weights_and_a_packaged_model_nothing(hub: HubServer, tmp_path: Path) -> None:
    path, here = recipe(tmp_path, weights="random"), where(hub, tmp_path)
    assert "3 files" in answered("prefetch", str(path), cwd=tmp_path, **here)
    assert not (snapshot(tmp_path) / "model-00001-of-00001.safetensors").exists()
    path.write_text(yaml.safe_dump(RECIPE))
    assert answered("prefetch", str(path), cwd=tmp_path, **here) == (
        "some: model and data are not from the hub; nothing to fetch\n"
    )


def test_the_cluster_file_says_where_and_with_which_token(hub: HubServer, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text("HF_TOKEN=hf_Canary0123456789abcdef\n")
    secrets.chmod(0o600)
    cluster = tmp_path / "lab.yaml"
    cluster.write_text(
        "slurm: {partition: main, gpus_per_node: 8, time: '01:00:00'}\ncontainer: {runtime: none}\n"
        f"paths: {{runs: {tmp_path}/runs, hf_home: {tmp_path}/shared, secrets: {secrets}}}\n"
    )
    here = {**where(hub, tmp_path), "HF_HUB_CACHE": str(tmp_path / "mine")}
    answered("prefetch", str(recipe(tmp_path)), "--cluster", str(cluster), cwd=tmp_path, **here)
    assert (tmp_path / "shared" / "hub" / "models--team--moe" / "snapshots" / MODEL / "config.json").is_file()
    secrets.chmod(0o644)
    assert "mode 0644" in refused(
        77, "prefetch", str(recipe(tmp_path)), "--cluster", str(cluster), cwd=tmp_path, **here
    )
