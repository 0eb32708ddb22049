"""Every probe of a node with a real good and a real bad case. The merge of many nodes is test_preflight_report.py."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
import typing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moe_recipes.config.errors import InfrastructureError
from moe_recipes.config.recipe import Optim
from moe_recipes.config.run_folder import write_json
from moe_recipes.launch.preflight import container, disk, gpus, inputs, limits
from moe_recipes.launch.preflight.clock import clock_server
from moe_recipes.launch.preflight.probe import Probe, ProbeFunction, passed, probe_from_dict, probe_to_dict, run_probes
from moe_recipes.plan.states import STATE_BYTES
from moe_recipes.train.optim import build_optimizer, optimizer_entries, prepare_state
from tests.unit.preflight_cases import make_recipe

# A real answer of nvidia-smi 580.159.04 for gpus.FIELDS.
H100 = "{}, NVIDIA H100 80GB HBM3, 580.159.04, 81559, 0, Enabled, 0, No, No, 1980, 1980, Not Active, Not Active, 40"


def ask(function: ProbeFunction) -> Probe:
    """The probe as a node asks it: errors become answers."""
    (found,) = run_probes({"it": function}, node="here", time_limits_s={"it": 60})
    return found


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def h100s(count: int, **changed: str) -> list[gpus.Gpu]:
    found = gpus.parse_gpus("\n".join(H100.format(index) for index in range(count)) + "\n")
    found[-1] |= {key.replace("__", "."): value for key, value in changed.items()}
    return found


def test_a_probe_that_hangs_fails_in_time_and_holds_up_no_other() -> None:
    never = threading.Event()
    start = time.monotonic()
    slow, quick = run_probes(
        {"slow": lambda: passed(never.wait()), "quick": passed}, node="n", time_limits_s={"slow": 0.2}
    )
    assert time.monotonic() - start < 10
    assert (slow.verdict, quick.verdict, slow.node) == ("fail", "pass", "n")
    assert "no answer within 0.2 s" in slow.message
    never.set()


def test_errors_become_answers_with_their_exit_code() -> None:
    gone = ask(lambda: passed(Path("/no/such/file").read_bytes().decode()))
    assert (gone.verdict, gone.message) == ("fail", "/no/such/file: No such file or directory")
    broken = ask(lambda: passed({}["key"]))
    assert (broken.verdict, broken.exit_code) == ("fail", 70)
    assert probe_from_dict(json.loads(json.dumps(probe_to_dict(broken)))) == broken


def test_gpus_as_nvidia_smi_prints_them(tmp_path: Path) -> None:
    lines = "\n".join(H100.format(index) for index in range(8))
    tool = script(tmp_path / "nvidia-smi", f"cat <<'END'\n{lines}\nEND")
    found = gpus.read_gpus(tool)
    assert found is not None
    assert gpus.driver_of(found) == "580.159.04"
    probes = [gpus.gpu_count(found, 8), gpus.gpu_ecc(found), gpus.gpu_clocks(found), gpus.gpu_memory(found, 1024)]
    assert [(probe.verdict, probe.value) for probe in probes] == [("pass", 8), ("pass", 0), ("pass", 1980), ("pass", 0)]


def test_bad_gpus() -> None:
    assert gpus.gpu_count(h100s(7), 8).verdict == "fail"
    assert gpus.gpu_count(h100s(8, name="NVIDIA A100"), 8).verdict == "fail"
    for key, value in (
        ("ecc__errors__uncorrected__volatile__total", "3"),
        ("remapped_rows__pending", "Yes"),
        ("remapped_rows__failure", "Yes"),
        ("ecc__mode__current", "Disabled"),
    ):
        bad = gpus.gpu_ecc(h100s(8, **{key: value}))
        assert (bad.verdict, "GPU 7" in bad.message) == ("fail", True), key
    assert gpus.gpu_clocks(h100s(8, clocks_throttle_reasons__hw_slowdown="Active")).verdict == "fail"
    assert gpus.gpu_clocks(h100s(8, clocks__max__sm="1410")).verdict == "fail"
    full = gpus.gpu_memory(h100s(8, memory__used="40000"), 1024)
    assert (full.verdict, full.value) == ("fail", 40000)


def test_gpus_that_cannot_tell_are_no_pass(tmp_path: Path) -> None:
    assert gpus.read_gpus(str(tmp_path / "nvidia-smi")) is None
    for probe in (gpus.gpu_count(None, 8), gpus.gpu_ecc(None), gpus.gpu_clocks(None), gpus.gpu_memory(None, 1)):
        assert probe.verdict == "not_available"
    keys = ("ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure", "clocks.max.sm")
    silent = [{**gpu, **dict.fromkeys(keys, "[N/A]"), "memory.used": "[N/A]"} for gpu in h100s(1)]
    assert gpus.gpu_ecc(silent).verdict == "not_available"
    assert gpus.gpu_clocks(silent).verdict == "not_available"
    assert gpus.gpu_memory(silent, 1).verdict == "not_available"


def test_a_failing_nvidia_smi_is_the_nodes_fault(tmp_path: Path) -> None:
    tool = script(tmp_path / "nvidia-smi", "echo 'Unable to determine the device handle for GPU0'; exit 15")
    with pytest.raises(InfrastructureError, match="ended with 15: Unable to determine the device handle"):
        gpus.read_gpus(tool)
    with pytest.raises(InfrastructureError, match="14 fields"):
        gpus.parse_gpus("0, NVIDIA\n")


def test_shared_memory_and_locked_memory(tmp_path: Path) -> None:
    assert limits.shared_memory(1, None, str(tmp_path)).verdict == "pass"
    small = limits.shared_memory(8, 1e9, str(tmp_path))
    assert (small.verdict, small.floor) == ("fail", int(1e9 * 2**30))
    assert limits.locked_memory(str(tmp_path / "none")).verdict == "not_available"
    (tmp_path / "mlx5_0").mkdir()
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, before[1]))
        bad = limits.locked_memory(str(tmp_path))
        assert (bad.verdict, bad.value, bad.floor) == ("fail", 65536, "unlimited")
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def test_open_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1100, before[1]))
        assert limits.open_files(1).verdict == "pass"
        bad = limits.open_files(128)
        assert (bad.verdict, bad.value, bad.floor) == ("fail", 1100, 2048)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_clock_against_the_batch_hosts() -> None:
    with clock_server() as port:
        good = limits.clock(("127.0.0.1", port))
    assert (good.verdict, abs(good.value) < 0.5) == ("pass", True)
    with clock_server(lambda: time.time() + 30) as port:
        behind = limits.clock(("127.0.0.1", port))
    assert behind.verdict == "fail"
    assert behind.value == pytest.approx(-30, abs=0.5)
    assert "30.0 s behind the batch host's" in behind.message
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert "cannot be reached" in limits.clock(("127.0.0.1", port)).message
    assert limits.clock(None).verdict == "not_available"


def test_checkpoint_write_and_read_back(tmp_path: Path) -> None:
    size = 1 << 20
    assert disk.write_probe(tmp_path / "p", node="a", nonce="x", num_bytes=size).verdict == "pass"
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["a.bin"]
    good = disk.read_back_probe(tmp_path / "p", peer="a", nonce="x", num_bytes=size)
    assert (good.verdict, good.value) == ("pass", size)
    slow = disk.write_probe(tmp_path / "p", node="a", nonce="x", num_bytes=size, floor_gb_per_s=1e6)
    assert (slow.verdict, slow.floor) == ("fail", 1e6)


def test_bad_checkpoint_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bad = disk.write_probe(tmp_path / "file" / "p", node="a", nonce="x", num_bytes=10)
    assert (bad.verdict, bad.exit_code) == ("fail", 73)
    assert "Not a directory" in bad.message
    missing = disk.read_back_probe(tmp_path, peer="b", nonce="x", num_bytes=10, wait_s=0.3)
    assert "b.bin: not seen here within 0.3 s" in missing.message
    early = disk.read_back_probe(tmp_path / "not yet", peer="b", nonce="x", num_bytes=10, wait_s=0.3)
    assert "b.bin: not seen here within 0.3 s" in early.message, "the writer beside it makes the folder"
    data = bytearray(disk.payload("x", "b", 1000))
    data[999] ^= 1
    disk.payload_file(tmp_path, "b").write_bytes(data)
    assert (
        "reads other bytes than b wrote" in disk.read_back_probe(tmp_path, peer="b", nonce="x", num_bytes=1000).message
    )
    assert disk.payload("x", "a", 1000) != disk.payload("x", "b", 1000) != disk.payload("y", "b", 1000)


def test_space_for_the_checkpoints_and_the_export(tmp_path: Path) -> None:
    assert disk.space_probe(tmp_path, make_recipe()).verdict == "pass"
    big = {"source": "package:qwen3_30b_a3b", "weights": "random", "dtype": "bfloat16"}
    asked = make_recipe(model=big, checkpoint={"keep_last": 10**6}, optim={"name": "flash_adamw"})
    bad = disk.space_probe(tmp_path, asked)
    assert (bad.verdict, bad.exit_code) == ("fail", 73)
    # 2 weight + 2 rest of the master + 2 moments of 8 bits with a 16-bit scale for 32 values each; export: 2.
    assert bad.floor == int(30_532_122_624 * ((10**6 + 1) * (2 + 2 + 2 * (1 + 2 / 32)) + 2))
    none = make_recipe(checkpoint={"keep_last": 1, "export": False})
    with_export = make_recipe(checkpoint={"keep_last": 1, "export": True})
    lean, full = (disk.space_probe(tmp_path, recipe).floor for recipe in (none, with_export))
    assert full * 6 == lean * 7, "two checkpoints of 12 bytes a parameter, and 4 for the export"


@pytest.mark.parametrize(
    ("name", "dtype"), [("adamw", torch.float32), ("adamw", torch.bfloat16), ("lean_adamw", torch.bfloat16)]
)
def test_bytes_a_parameter_are_those_of_the_real_optimizer(name: str, dtype: torch.dtype) -> None:
    model = torch.nn.Linear(1024, 256, bias=False, dtype=dtype)
    optimizer = build_optimizer(model, make_recipe(optim={"name": name}).optim)
    prepare_state(optimizer, step=1)
    state = optimizer_entries(model, optimizer, rank=0).values()
    stored = sum(entry.tensor.numel() * entry.tensor.element_size() for entry in state)
    expected = STATE_BYTES[(name, str(dtype).removeprefix("torch."))]
    assert stored / model.weight.numel() + dtype.itemsize == pytest.approx(expected, rel=1e-3)


def test_bytes_of_every_optimizer_are_known() -> None:
    names = {name for name, _ in STATE_BYTES}
    assert names | {"auto"} == {*typing.get_args(typing.get_type_hints(Optim)["name"])}


def test_inodes(tmp_path: Path) -> None:
    if os.statvfs(tmp_path).f_files == 0:
        assert disk.inodes_probe(tmp_path, make_recipe()).verdict == "not_available"
        return
    assert disk.inodes_probe(tmp_path, make_recipe()).verdict == "pass"
    assert disk.inodes_probe(tmp_path, make_recipe(checkpoint={"keep_last": 10**12})).verdict == "fail"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of two shards with their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("a", "b"):
        save_file({name: np.zeros((10, 3), np.float32)}, folder / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in ("a", "b")}
    write_json(folder / inputs.INDEX, {"metadata": {"total_size": 240}, "weight_map": weight_map})
    return folder


def model_answer(folder: Path) -> Probe:
    files = {"source": str(folder), "weights": "pretrained"}
    return ask(lambda: inputs.model_files(make_recipe(model=files, data={"format": "text", "train": ["x.jsonl"]})))


def test_model_files(model: Path) -> None:
    good = model_answer(model)
    assert (good.verdict, good.value, good.floor) == ("pass", 240, 240), good
    assert ask(lambda: inputs.model_files(make_recipe())).verdict == "not_available"


def test_bad_model_files(model: Path) -> None:
    shard = model / "b.safetensors"
    whole = shard.read_bytes()
    for data, words, code in (
        (whole[:-4], "cut short", 74),
        (whole + b"0", "too long", 74),
        (b"<html>", "not a safetensors file", 74),
        (None, "No such file or directory", 66),
    ):
        shard.unlink() if data is None else shard.write_bytes(data)
        bad = model_answer(model)
        assert (bad.verdict, bad.exit_code) == ("fail", code)
        assert str(shard) in bad.message
        assert words in bad.message
    save_file({"b": np.zeros((9, 3), np.float32)}, shard)
    assert "hold 228 bytes of tensors, the index says 240" in model_answer(model).message
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json or tokenizer_config.json" in model_answer(model).message


def test_pinned_revision_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def answer(revision: str | None) -> Probe:
        recipe = make_recipe(model={"source": "org/name", "weights": "pretrained", "revision": revision})
        return ask(lambda: inputs.offline_hub(recipe, {"HF_HUB_OFFLINE": "1"}))

    good = answer(commit)
    assert (good.verdict, good.value, good.message) == ("pass", commit, "")
    assert "model.revision is open" in answer(None).message
    missing = answer("b" * 40)
    assert (missing.verdict, missing.exit_code) == ("fail", 66)
    assert f"hf download org/name --revision {'b' * 40}" in missing.message
    assert ask(lambda: inputs.offline_hub(make_recipe())).verdict == "not_available"


def test_data_sample(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def answer() -> Probe:
        return ask(lambda: inputs.data_sample(make_recipe(data={"format": "auto", "train": [str(path)]})))

    missing = answer()
    assert (missing.verdict, missing.exit_code) == ("fail", 66)
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    good = answer()
    assert (good.verdict, good.value) == ("pass", 2), good
    path.write_text('{"text": "one"}\n{"text": \n')
    bad = answer()
    assert (bad.verdict, bad.exit_code) == ("fail", 65)
    assert f"{path}:2: invalid JSON" in bad.message
    path.write_text("")
    assert "holds no row" in answer().message
    assert inputs.data_sample(make_recipe()).verdict == "not_available"


def test_the_data_sample_asks_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that is there and would answer gets no question."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        bad = ask(lambda: inputs.data_sample(make_recipe(data={"format": "auto", "train": ["hf:org/none"]})))
        hub.shutdown()
    assert (bad.verdict, bad.exit_code, asked) == ("fail", 66, []), bad


def test_secrets_file(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_text("HF_TOKEN=hf_0123456789\n")
    path.chmod(0o600)
    good = ask(lambda: inputs.secrets_file(str(path)))
    assert (good.verdict, good.value) == ("pass", ["HF_TOKEN"])
    path.chmod(0o644)
    bad = ask(lambda: inputs.secrets_file(str(path)))
    assert (bad.verdict, bad.exit_code) == ("fail", 77)
    assert "hf_0123456789" not in str(bad)
    assert inputs.secrets_file(None).verdict == "not_available"


def test_container_flags(tmp_path: Path) -> None:
    flags = " ".join(container.PYXIS_FLAGS)
    assert container.container_flags("pyxis", srun=script(tmp_path / "a", f"echo '{flags}'")).verdict == "pass"
    bad = container.container_flags("pyxis", srun=script(tmp_path / "b", "echo '--nodes'"))
    assert (bad.verdict, bad.exit_code) == ("fail", 78)
    assert "lacks --container-image" in bad.message
    assert container.container_flags("pyxis", srun=str(tmp_path / "none")).verdict == "not_available"
    assert container.container_flags("none").verdict == "not_available"


def test_image_file(tmp_path: Path) -> None:
    image = tmp_path / "x.sqsh"
    assert container.image_file(str(image)).exit_code == 66
    image.write_bytes(b"<html>")
    assert "not a squashfs file" in container.image_file(str(image)).message
    image.write_bytes(b"hsqs and more")
    plain = container.image_file(str(image))
    assert (plain.verdict, plain.message) == ("pass", "no record x.sqsh.json to compare with")
    record = {"sha256": plain.value, "size_bytes": 13, "source": "s", "digest": None, "imported": "", "tool": "t"}
    write_json(tmp_path / "x.sqsh.json", {**record, "moe_recipes": "0"})
    assert container.image_file(str(image)).value == plain.value
    before = container.image_sample(str(image))
    image.write_bytes(b"hsqs and MORE")
    bad = ask(lambda: container.image_file(str(image)))
    assert (bad.verdict, bad.exit_code) == ("fail", 78)
    assert "its record says" in bad.message
    assert container.image_sample(str(image)) != before
    assert container.image_file(None).verdict == "not_available"


def test_environment_inside_against_what_the_job_sets() -> None:
    wanted = {"NCCL_DEBUG": "WARN", "HF_HOME": "/hf"}
    assert container.environment(wanted, {**wanted, "PATH": "/bin"}).verdict == "pass"
    bad = container.environment(wanted, {"NCCL_DEBUG": "INFO"})
    assert (bad.verdict, bad.value) == ("fail", {"missing": ["HF_HOME"], "differ": ["NCCL_DEBUG"]})
    assert "INFO" not in str(bad)
    outside = container.environment_facts({"A": "1", "B": "1", "HF_TOKEN": "hf_secret"})
    inside = container.environment_facts({"A": "2", "C": "1", "HF_TOKEN": "hf_other"})
    assert outside["HF_TOKEN"] == inside["HF_TOKEN"] == "", "no hash of a secret is written either"
    found = container.environment_difference(outside, inside)
    assert found.value == {"only outside": ["B"], "only inside": ["C"], "differ": ["A"]}
