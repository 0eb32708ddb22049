"""Ranks as real processes: exit codes, signals, first causes, logs, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.local import run_ranks

ROOT = Path(__file__).resolve().parents[2]
HEADER = """
import json, os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
folder = sys.argv[1]
def status(state, code, **more):
    with open(folder + "/status.json", "w") as file:
        json.dump({"state": state, "exit_code": code, **more}, file)
def leave_mark():
    open(folder + "/mark", "w").close()
def wait_for_mark():
    while not os.path.exists(folder + "/mark"):
        time.sleep(0.02)
"""


def launch(folder: Path, body: str, *, num_ranks: int = 2, uses_status: bool = True) -> int:
    script = folder / "child.py"
    script.write_text(HEADER + body)
    return run_ranks(
        [sys.executable, str(script), str(folder)],
        num_ranks=num_ranks,
        folder=RunFolder(folder),
        uses_status=uses_status,
        grace_s=0.5,
        term_s=0.5,
    ).exit_code


def log(folder: Path, rank: int) -> str:
    return (folder / "attempts" / "latest" / f"rank-{rank:05d}.log").read_text()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_every_rank_knows_itself_and_writes_its_own_log(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    body = """
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTHONUNBUFFERED")
print(json.dumps({key: os.environ[key] for key in keys}))
"""
    assert launch(tmp_path, body, num_ranks=3) == 0
    told = [json.loads(log(tmp_path, rank)) for rank in range(3)]
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in told] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {one["MASTER_PORT"] for one in told} == {told[0]["MASTER_PORT"]}
    assert {(one["WORLD_SIZE"], one["MASTER_ADDR"]) for one in told} == {("3", "127.0.0.1")}
    shown = capfdbinary.readouterr().out
    assert b'"RANK": "0"' in shown
    assert b'"RANK": "1"' not in shown
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "end"]


def test_the_first_failing_rank_gives_the_code_and_its_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
if rank == 1:
    print("moe-recipes: error: a.jsonl:7: not JSON", file=sys.stderr)
    print("some warning at exit", flush=True)
    leave_mark()
    os._exit(65)
wait_for_mark()
time.sleep(0.3)
sys.exit(1)
"""
    assert launch(tmp_path, body) == 65
    status = RunFolder(tmp_path).read_status()
    assert status is not None
    assert (status["state"], status["rank"], status["exit_code"]) == ("failed", 1, 65)
    assert status["cause"] == "rank 1: a.jsonl:7: not JSON"
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("moe-recipes: error: rank 1: a.jsonl:7: not JSON; log: ")
    assert said[0].endswith("attempts/1/rank-00001.log")


def test_ranks_that_hang_after_a_failure_are_ended_with_their_children(tmp_path: Path) -> None:
    body = """
if rank == 1:
    wait_for_mark()
    sys.exit(20)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "60"])
with open(folder + "/pids", "w") as file:
    print(os.getpid(), child.pid, file=file)
leave_mark()
time.sleep(60)
"""
    started = time.monotonic()
    assert launch(tmp_path, body) == 20
    assert time.monotonic() - started < 10
    time.sleep(0.2)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert [pid for pid in pids if is_running(pid)] == []


def test_children_of_ranks_that_ended_well_are_ended_too(tmp_path: Path) -> None:
    body = """
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
open(folder + "/pid" + str(rank), "w").write(str(child.pid))
"""
    assert launch(tmp_path, body) == 0
    time.sleep(0.2)
    assert not any(is_running(int((tmp_path / f"pid{rank}").read_text())) for rank in range(2))


def test_a_killed_rank_is_69_and_hides_the_others_complaints(tmp_path: Path) -> None:
    body = """
if rank == 1:
    leave_mark()
    os.kill(os.getpid(), signal.SIGKILL)
wait_for_mark()
time.sleep(0.3)
status("failed", 70, cause="connection closed by peer")
sys.exit(70)
"""
    assert launch(tmp_path, body) == 69
    status = RunFolder(tmp_path).read_status()
    assert status is not None
    assert (status["state"], status["cause"], status["rank"]) == ("failed", "rank 1 was killed by SIGKILL", 1)
    assert status["host"]


@pytest.mark.parametrize(("state", "code"), [("stopped", 75), ("failed", 17)])
def test_a_status_of_this_attempt_decides(tmp_path: Path, state: str, code: int) -> None:
    body = f"""
if rank == 0:
    status({state!r}, {code}, cause="because")
sys.exit({code})
"""
    assert launch(tmp_path, body) == code
    status = RunFolder(tmp_path).read_status()
    assert status is not None
    assert status["cause"] == "because"


def test_a_run_that_is_done_stays_done_if_a_rank_falls_over_at_exit(tmp_path: Path) -> None:
    body = """
if rank == 0:
    status("done", 0)
    leave_mark()
else:
    wait_for_mark()
    os.abort()
"""
    assert launch(tmp_path, body) == 0


def test_an_old_status_does_not_decide(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_status("stopped", step=4, last_durable_step=4, exit_code=75)
    assert launch(tmp_path, "sys.exit(3)") == 3
    assert launch(tmp_path, "") == 0


def test_a_command_without_status_leaves_it_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_status("done", exit_code=0)
    before = (tmp_path / "status.json").read_bytes()
    assert launch(tmp_path, "sys.exit(74)", uses_status=False) == 74
    assert (tmp_path / "status.json").read_bytes() == before


def test_an_export_that_fails_leaves_the_status_of_the_training_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_status("done", exit_code=0)
    before = (tmp_path / "status.json").read_bytes()
    command = [sys.executable, "-m", "moe_recipes.train.export_run", str(tmp_path), "--recipe-json", "{}", "--cpu"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 64
    assert (tmp_path / "status.json").read_bytes() == before


def start_in_background(folder: Path, body: str) -> subprocess.Popen[bytes]:
    (folder / "child.py").write_text(HEADER + body)
    code = f"""
import sys
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.local import run_ranks
folder = {str(folder)!r}
command = [sys.executable, folder + "/child.py", folder]
sys.exit(run_ranks(command, num_ranks=2, folder=RunFolder(folder), grace_s=5, term_s=1).exit_code)
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: all((folder / f"ready{rank}").exists() for rank in range(2)))
    return process


def wait_for(condition: object, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


STOPS_WELL = """
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: got.append(number))
open(f"{folder}/ready{rank}", "w").write(str(os.getpid()))
while not got:
    time.sleep(0.05)
time.sleep(0.3)
print("got", got, flush=True)
if rank == 0:
    status("stopped", 75, cause="signal")
sys.exit(75)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, signum: int) -> None:
    process = start_in_background(tmp_path, STOPS_WELL)
    process.send_signal(signum)
    time.sleep(0.15)
    if signum != signal.SIGINT:
        process.send_signal(signum)  # a second one of the same kind is not passed on
    assert process.wait(timeout=20) == 75
    got = signal.SIGTERM if signum == signal.SIGINT else signum
    assert log(tmp_path, 0) == log(tmp_path, 1) == f"got [{int(got)}]\n"


NEVER_STOPS = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
open(f"{folder}/ready{rank}", "w").write(str(os.getpid()))
time.sleep(60)
"""


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    process = start_in_background(tmp_path, NEVER_STOPS)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 75
    status = RunFolder(tmp_path).read_status()
    assert status is not None
    assert (status["state"], status["exit_code"]) == ("stopped", 75)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_handlers_are_there_asks_for_another_start(tmp_path: Path, signum: int) -> None:
    body = 'open(f"{folder}/ready{rank}", "w").write("")\ntime.sleep(60)\n'
    process = start_in_background(tmp_path, body)
    process.send_signal(signum)
    assert process.wait(timeout=10) == 75
    status = RunFolder(tmp_path).read_status()
    assert status is not None
    assert status["state"] == "stopped"
    assert "SIGTERM ended rank" in status["cause"]
    assert log(tmp_path, 0) == log(tmp_path, 1) == ""


def test_a_disk_that_is_full_for_the_log_does_not_stop_the_ranks(tmp_path: Path) -> None:
    body = """
for _ in range(3000):
    print("x" * 99)
open(f"{folder}/end{rank}", "w").close()
"""
    (tmp_path / "child.py").write_text(HEADER + body)
    code = f"""
import resource, sys
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.local import run_ranks
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
folder = {str(tmp_path)!r}
sys.exit(run_ranks([sys.executable, folder + "/child.py", folder], num_ranks=1, folder=RunFolder(folder)).exit_code)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, timeout=30, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"x" * 99) == 3000
    assert (tmp_path / "end0").exists()
    assert (tmp_path / "attempts" / "1" / "rank-00000.log").stat().st_size == 65536


def test_killing_the_launcher_kills_the_ranks(tmp_path: Path) -> None:
    process = start_in_background(tmp_path, NEVER_STOPS)
    pids = [int((tmp_path / f"ready{rank}").read_text()) for rank in range(2)]
    assert all(is_running(pid) for pid in pids)
    process.kill()
    process.wait(timeout=10)
    wait_for(lambda: not any(is_running(pid) for pid in pids), limit_s=5)
