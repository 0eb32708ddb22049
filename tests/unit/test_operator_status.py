"""``status``: every line of it, on a real run and on folders whose times are known; how a run is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.operator.facts import RunFacts, read_steps
from moe_recipes.launch.operator.find import find_run
from moe_recipes.launch.operator.status import duration, lines_of, status_of
from tests.unit.operator_runs import (
    STEPS,
    answered,
    call,
    real_run,
    refused,
    slurm_run,
    without_ages,
    write_event,
    write_status,
    write_steps,
    written_run,
)


def test_a_real_run_of_two_attempts(tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = real_run(tmp_path_factory.getbasetemp())
    report = json.loads(answered("status", str(run_dir), "--json"))
    last = json.loads(RunFolder(run_dir).metrics.read_text().splitlines()[-1])
    assert (report["state"], report["step"], report["steps"], report["durable_step"]) == ("done", STEPS, STEPS, STEPS)
    assert report["loss"] == last["loss"]
    assert (report["attempt"], report["restarts"], report["eta_s"], report["job"]) == (2, 1, None, None)
    steps = [json.loads(line)["step_s"] for line in RunFolder(run_dir).metrics.read_text().splitlines()]
    assert report["counted_s"] == pytest.approx(sum(steps))
    events = RunFacts(RunFolder(run_dir)).events
    assert [event["event"] for event in events if event["event"] in ("start", "end")] == ["start", "end"] * 2
    assert 0 < report["goodput"] < 1
    assert report["goodput"] == pytest.approx(report["counted_s"] / report["wall_s"])
    assert (report["verdict"]["attempt"], report["verdict"]["kind"], report["verdict"]["exit_code"]) == (2, "done", 0)
    people = answered("status", str(run_dir)).splitlines()
    assert f"step      {STEPS} of {STEPS}, 100.0%" in people
    assert "verdict   attempt 2: done, exit 0" in people


def test_every_line_of_a_running_job(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    said = without_ages(answered("status", "4242", cwd=tmp_path, PATH="/nonexistent"))
    wall = said.split(", of ")[1].split(" since")[0]
    goodput = said.split("goodput   ")[1].split("%")[0]
    assert said == (
        "run       runs/big\n".replace("runs/big", str(folder.path))
        + "state     running, AGE ago, job 4242 is not in squeue\n"
        "attempt   2 on node1,node3\n"
        "step      30 of 100, 30.0%\n"
        "loss      1.0333\n"
        "left      0:02:41 of training, 2.00 s a step\n"
        "durable   step 20, AGE ago\n"
        "restarts  1\n"
        f"goodput   {goodput}%: 0:01:00 in steps that count, of {wall} since the first start\n"
        "verdict   attempt 1: node_failure, exit 69: node2 went away; then requeue\n"
    )


def test_steps_that_no_checkpoint_holds_do_not_count_once_the_run_has_ended(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "x")
    write_event(folder, "2026-01-01T00:10:00.000Z", "start", attempt=1)
    write_steps(folder, 30)
    write_event(folder, "2026-01-01T00:10:45.000Z", "checkpoint", step=20, seconds=3.0)
    write_event(folder, "2026-01-01T00:11:40.000Z", "end", attempt=1, exit_code=17)
    write_status(
        folder, "2026-01-01T00:11:40.000Z", state="failed", step=30, last_durable_step=20, cause="NaN", exit_code=17
    )
    folder.update_manifest(time="2026-01-01T00:10:00Z")
    report = status_of(find_run(str(folder.path)))
    assert report["counted_s"] == 40.0, "20 steps of 2 s; 10 more were lost"
    assert report["wall_s"] == 100.0, "to the end of the run, not to now"
    assert report["goodput"] == pytest.approx(0.4)
    assert report["verdict"]["kind"] == "not_finite"
    assert report["verdict"]["cause"] == "NaN"
    assert report["eta_s"] == pytest.approx(70 * 2.0 + 7 * 3.0), "70 steps and 7 saves are left"


def test_how_long_saves_take_and_how_often_to_save(tmp_path: Path) -> None:
    """220 s that training stands and 63 h between failures: 167 minutes, as the tables of Young's rule have it."""
    folder = written_run(tmp_path / "x", checkpoint={"every_steps": 10, "mtbf_hours": 63.0})
    write_event(folder, "2026-01-01T00:10:00.000Z", "start", attempt=1)
    write_event(folder, "2026-01-01T00:10:01.000Z", "resume", step=10, seconds=50.0, bytes=5 * 10**11)
    write_steps(folder, 30)
    for step, seconds in ((20, 300.0), (30, 340.0)):
        write_event(
            folder,
            "2026-01-01T00:11:00Z",
            "checkpoint",
            step=step,
            seconds=seconds,
            blocking_s=220.0,
            bytes=34 * 10**11,
        )
    write_status(folder, "2026-01-01T00:11:40.000Z", state="running", step=30, last_durable_step=30)
    report = status_of(find_run(str(folder.path)))
    assert (report["save_s"], report["blocking_s"], report["load_gb_per_s"]) == (320.0, 220.0, 10.0)
    assert report["save_gb_per_s"] == pytest.approx((3400 / 300 + 3400 / 340) / 2)
    assert report["save_every_s"] / 60 == pytest.approx(167, abs=0.6)
    assert report["eta_s"] == pytest.approx(70 * 2.0 + 7 * 220.0), "a save stops training only to copy"
    (line,) = [line for line in lines_of(report) if line.startswith("saves")]
    assert line == (
        "saves     320.0 s at 10.67 GB/s, training stands 220.0 s, loads 10.00 GB/s, save every 2:46:30 to lose least"
    )


def test_a_run_that_has_not_reached_a_step_and_one_that_never_started(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "x")
    said = answered("status", str(folder.path), PATH="/nonexistent")
    assert "state     not started\n" in said
    assert "attempt   none yet on login\n" in said
    assert "step      0 of 100, 0.0%\n" in said
    assert "loss      none yet\n" in said
    assert "left      unknown before the first step\n" in said
    assert "durable   no checkpoint yet\n" in said
    assert "verdict   no attempt has ended\n" in said
    folder.write_status("starting")
    assert "state     starting, 0:00:0" in answered("status", str(folder.path), PATH="/nonexistent")


def test_lines_that_are_being_written_or_were_cut_are_left_out(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "x")
    write_steps(folder, 3)
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "loss": 1.5, "step_s": 2.0')
    steps = read_steps(folder.metrics)
    assert sorted(steps.seconds) == [1, 2, 3]
    assert steps.last["step"] == 3
    folder.events.write_text('{"time": "2026-01-01T00:00:00Z", "event": "start", "attempt": 1}\n{"time": "20')
    assert RunFacts(folder).attempts == [1]


def test_a_run_is_found_by_folder_by_name_and_by_job(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    for word in (str(folder.path), "big", "4242", "4242_7", "4242.0"):
        report = json.loads(answered("status", word, "--json", cwd=tmp_path))
        assert (tmp_path / report["run"]).resolve() == folder.path, word
        assert report["job"] == "4242"
    (tmp_path / "runs" / ".jobs" / "4242").unlink()
    assert json.loads(answered("status", "4242", "--json", cwd=tmp_path))["step"] == 30, "by its folder in the run"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert (
        json.loads(answered("status", "big", "--runs", str(tmp_path / "runs"), "--json", cwd=elsewhere))["step"] == 30
    )


def test_the_cluster_file_says_where_runs_are(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "scratch" / "big")
    (tmp_path / "clusters").mkdir()
    text = "slurm: {partition: main, gpus_per_node: 8, time: '01:00:00'}\ncontainer: {runtime: none}\n"
    (tmp_path / "clusters" / "local.yaml").write_text(text + f"paths: {{runs: {folder.path.parent}}}\n")
    assert json.loads(answered("status", "4242", "--json", cwd=tmp_path))["step"] == 30
    (tmp_path / "clusters" / "local.yaml").write_text("broken: [")
    assert "no job 4242 in runs" in refused(66, "status", "4242", cwd=tmp_path), "no crash"


def test_what_is_unknown_is_one_line_and_66(tmp_path: Path) -> None:
    assert refused(66, "status", "31337", cwd=tmp_path) == (
        "no job 31337 in runs; give the folder of the run, or --runs DIR"
    )
    assert refused(66, "status", "nope", cwd=tmp_path) == (
        "no run 'nope', neither as a folder nor in runs; give the folder of the run, or --runs DIR"
    )
    slurm_run(tmp_path / "runs" / "tiny_slurm")
    assert refused(66, "status", "tiny_slrm", cwd=tmp_path).endswith("; did you mean 'tiny_slurm'?")
    assert "JOB|RUN is empty" in refused(66, "status", "", cwd=tmp_path)
    (tmp_path / "docs").mkdir()
    assert refused(66, "status", "docs", cwd=tmp_path) == "docs is not the folder of a run: it has no recipe.json"
    for verb in ("why", "logs", "stop", "save", "wandb-sync", "bundle"):
        assert "no job 31337" in refused(66, verb, "31337", cwd=tmp_path)
    assert "--frob" in refused(64, "status", "x", "--frob")


VERBS = ("status", "why", "logs", "stop", "save", "prefetch", "wandb-sync", "bundle")


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_imports_torch(verb: str, tmp_path: Path) -> None:
    """That they answer within a second rests on this: an import of torch alone takes longer."""
    folder = slurm_run(tmp_path / "runs" / "big")
    words = [verb, "tiny_cpu" if verb == "prefetch" else str(folder.path)]
    code = (
        "import sys; from moe_recipes.launch.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'wandb', 'datasets', 'numpy', 'pydantic'} & set(sys.modules);"
        "print('HEAVY', sorted(heavy), file=sys.stderr)"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert "HEAVY []" in done.stderr, done


def test_times_are_hours_minutes_seconds() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 100 * 3600 + 61)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "100:01:01",
    ]


def test_help_of_every_verb() -> None:
    for verb in VERBS:
        assert "--json" in call(verb, "--help").stdout
