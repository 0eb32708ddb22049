"""The first cause, from the files that ranks, tasks and srun really leave. srun's words are those of Slurm 22.05."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.config.run_folder import RunFolder, write_json
from moe_recipes.launch.slurm.causes import find_cause

KILLED_BY_SRUN = """\
srun: error: node2: task 1: Exited with exit code 137
srun: launch/slurm: _step_signal: Terminating StepId=1.0
slurmstepd-node1: error: *** STEP 1.0 ON node1 CANCELLED AT 2026-11-24T23:29:13 ***
srun: error: node1: task 0: Terminated
"""
NODE_FAILED = """\
srun: error: Node failure on node3
slurmstepd-node1: error: *** STEP 10.0 ON node1 CANCELLED AT 2026-11-24T23:32:15 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***
srun: Job step aborted: Waiting up to 12 seconds for job step to finish.
"""  # noqa: E501
NO_YAML = """\
  File "/code/moe_recipes/config/yaml_tree.py", line 15, in <module>
    import yaml
ModuleNotFoundError: No module named 'yaml'
srun: error: node1: task 1: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=1520.0
srun: error: node1: task 0: Terminated
"""
TIME_LIMIT = "slurmstepd-node1: error: *** STEP 4.0 ON node1 CANCELLED AT 2026-11-24T23:30:29 DUE TO TIME LIMIT ***\n"


class Attempt:
    """The files of one attempt, written as the trainer and the tasks write them."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.path = self.folder.new_attempt()
        self.folder.write_status("starting")

    def log(self, rank: int, text: str) -> Attempt:
        (self.path / f"rank-{rank:05d}.log").write_text(text)
        return self

    def end(self, rank: int, code: int | None, at: float = 0.0, signum: str | None = None, **more: Any) -> Attempt:
        time = f"2026-01-01T00:00:{at:06.3f}Z"
        ending = {"rank": rank, "host": f"node{rank + 1}", "exit_code": code, "signal": signum, "time": time, **more}
        write_json(self.path / f"rank-{rank:05d}.exit.json", ending)
        return self

    def srun(self, text: str) -> Attempt:
        (self.path / "srun.log").write_text(text)
        return self

    def status(self, state: Any, **fields: Any) -> Attempt:
        self.folder.write_status(state, **fields)
        return self

    def cause(self, code: int | None = 1, **known: Any) -> Any:
        return find_cause(self.folder, self.path, code, **known)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path)


def test_a_run_that_is_done_is_done_even_if_a_rank_falls_over_at_exit(attempt: Attempt) -> None:
    attempt.status("done", exit_code=0).end(0, 0).end(1, None, signum="SIGABRT")
    assert (attempt.cause(134).kind, attempt.cause(134).exit_code) == ("done", 0)


def test_an_image_without_a_package_of_the_task_is_the_environment_and_no_bug(attempt: Attempt) -> None:
    """The task dies in its imports, before it can make a log: it must not be started again."""
    cause = attempt.srun(NO_YAML).cause(1)
    assert (cause.kind, cause.exit_code, cause.rank, cause.node) == ("environment", 78, 1, "node1")
    assert cause.message == "rank 1: ModuleNotFoundError: No module named 'yaml'"


def test_a_stop_file_is_done_too(attempt: Attempt) -> None:
    cause = attempt.status("stopped", step=4, exit_code=0).end(0, 0).cause(0)
    assert (cause.kind, cause.message) == ("done", "stopped as asked by the file STOP; saved")


def test_a_work_without_status_is_judged_by_its_ranks(attempt: Attempt) -> None:
    attempt.status("failed", exit_code=17, cause="of the training before")
    assert attempt.end(0, 0).end(1, 0).cause(0, uses_status=False).kind == "done"
    attempt.log(1, "moe-recipes: ckpt: no complete checkpoint to export; train the run first\n").end(1, 66)
    cause = attempt.cause(66, uses_status=False)
    assert (cause.kind, cause.exit_code, cause.rank, cause.node, cause.line) == ("user_error", 66, 1, "node2", 1)
    assert cause.message == "rank 1: ckpt: no complete checkpoint to export; train the run first"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (17, "not_finite"),
        (20, "out_of_memory"),
        (64, "user_error"),
        (65, "user_error"),
        (66, "user_error"),
        (73, "cannot_write"),
        (74, "corrupt"),
        (77, "user_error"),
        (78, "environment"),
    ],
)
def test_what_a_rank_says_of_itself_beats_every_echo(attempt: Attempt, code: int, kind: str) -> None:
    attempt.log(2, "start\nmoe-recipes: because\nconnection closed by peer\n").log(
        0, "RuntimeError: connection reset\n"
    )
    attempt.end(0, 70, 1.0).end(1, None, 1.5, "SIGTERM").end(2, code, 2.0).srun(KILLED_BY_SRUN)
    by_end = attempt.cause(code)
    assert (by_end.kind, by_end.exit_code, by_end.rank, by_end.line) == (kind, code, 2, 2)
    assert by_end.message == "rank 2: because"
    attempt.status("failed", exit_code=code, cause="the whole story", rank=2, host="node9")
    by_status = attempt.cause(code)
    assert (by_status.kind, by_status.exit_code, by_status.rank) == (kind, code, 2)
    assert (by_status.message, by_status.node) == ("the whole story", "node3")
    assert attempt.cause(code, slurm_state="CANCELLED").kind == kind


def test_a_killed_rank_hides_the_complaints_of_the_others(attempt: Attempt) -> None:
    attempt.status("failed", exit_code=70, rank=0, cause="[gloo] Connection closed by peer")
    attempt.log(0, "RuntimeError: Connection closed by peer\n").log(1, "step 1\n")
    attempt.end(0, 70, 10.0).end(1, None, 12.0, "SIGKILL")  # its node's clock is 2 s late
    cause = attempt.cause(137)
    assert (cause.kind, cause.exit_code, cause.rank, cause.node) == ("infrastructure", 69, 1, "node2")
    assert cause.message == "rank 1 on node2 was killed by SIGKILL"


def test_ranks_that_srun_ended_afterwards_are_not_the_cause(attempt: Attempt) -> None:
    attempt.log(0, "Traceback (most recent call last):\nKeyError: 'x'\n").log(1, "step 1\n")
    attempt.end(0, 70, 10.0).end(1, None, 40.0, "SIGKILL")
    cause = attempt.cause(137)
    assert (cause.kind, cause.exit_code, cause.rank, cause.line) == ("internal", 70, 0, 2)
    assert cause.message == "rank 0: KeyError: 'x'"


def test_srun_s_words_stand_in_for_a_task_that_was_killed_too(attempt: Attempt) -> None:
    attempt.log(0, "step 1\n").log(1, "step 1\n").srun(KILLED_BY_SRUN)
    cause = attempt.cause(137)
    assert (cause.kind, cause.rank, cause.node) == ("infrastructure", 1, "node2")


def test_a_rank_without_a_word_is_blamed_where_the_others_only_miss_it(attempt: Attempt) -> None:
    for rank in range(3):
        attempt.log(rank, "RuntimeError: Connection reset by peer\n")
    attempt.end(0, 1, 1.0).end(2, 1, 2.0)
    cause = attempt.cause(1)
    assert (cause.kind, cause.exit_code, cause.rank) == ("infrastructure", 69, 1)
    assert (
        cause.message == "rank 1 ended without a word; the others say: rank 0: RuntimeError: Connection reset by peer"
    )


def test_a_network_error_of_all_blames_no_node(attempt: Attempt) -> None:
    for rank in range(2):
        attempt.log(rank, "torch.distributed.DistBackendError: NCCL error\n").end(rank, 70, rank)
    cause = attempt.cause(70)
    assert (cause.kind, cause.exit_code, cause.rank, cause.node) == ("infrastructure", 69, 0, None)


def test_a_missing_package_is_the_environment(attempt: Attempt) -> None:
    attempt.log(0, "Traceback:\nModuleNotFoundError: No module named 'torch'\n").end(0, 1)
    assert (attempt.cause().kind, attempt.cause().exit_code) == ("environment", 78)


def test_a_failed_node_is_named_by_srun(attempt: Attempt) -> None:
    attempt.srun(NODE_FAILED).status("stopped", exit_code=75, cause="a signal").end(0, 75)
    for state in (None, "NODE_FAIL"):
        cause = attempt.cause(75, slurm_state=state)
        assert (cause.kind, cause.exit_code, cause.node) == ("node_failure", 69, "node3")


@pytest.mark.parametrize(
    ("known", "kind"),
    [
        ({}, "preempted"),
        ({"asked": "signal"}, "preempted"),
        ({"asked": "time_limit"}, "time_limit"),
        ({"slurm_state": "TIMEOUT"}, "time_limit"),
        ({"slurm_state": "PREEMPTED"}, "preempted"),
        ({"slurm_state": "REQUEUED", "asked": "signal"}, "preempted"),
        ({"slurm_state": "CANCELLED"}, "stopped_by_operator"),
        ({"slurm_state": "CANCELLED", "asked": "signal"}, "stopped_by_operator"),
    ],
)
def test_who_asked_for_a_save(attempt: Attempt, known: dict[str, str], kind: str) -> None:
    attempt.status("stopped", last_durable_step=4, exit_code=75, cause="stopped by a signal after step 4; saved")
    cause = attempt.end(0, 75).end(1, 75).cause(75, **known)
    assert (cause.kind, cause.exit_code) == (kind, 75)
    assert "saved" in cause.message


@pytest.mark.parametrize(
    ("srun", "known", "kind"),
    [
        ("", {"asked": "signal"}, "preempted"),
        ("", {"asked": "time_limit"}, "time_limit"),
        (TIME_LIMIT, {}, "time_limit"),
        ("", {"slurm_state": "REQUEUED"}, "preempted"),
        ("", {}, "preempted"),
    ],
)
def test_ranks_that_could_not_save_in_time(attempt: Attempt, srun: str, known: dict[str, str], kind: str) -> None:
    attempt.srun(srun).log(0, "").end(0, None, 1.0, "SIGTERM").end(1, None, 1.0, "SIGUSR2")
    cause = attempt.cause(143, **known)
    assert (cause.kind, cause.exit_code) == (kind, 75)
    assert "before" in cause.message


def test_a_bug_that_shows_while_a_run_is_being_stopped_is_not_hidden(attempt: Attempt) -> None:
    attempt.log(0, "Traceback:\nKeyError: 'optim'\n").end(0, 70)
    assert attempt.cause(70, asked="signal").kind == "internal"
    attempt.log(0, "RuntimeError: Connection closed by peer\n")
    assert attempt.cause(70, asked="signal").kind == "preempted"


@pytest.mark.parametrize(
    ("srun", "state"),
    [
        ("slurmstepd-node2: error: Detected 1 oom-kill event(s) in StepId=5.0. Some of your processes may\n", None),
        ("slurmstepd-node2: error: Detected 1 oom_kill event in StepId=5.0.\n", None),
        ("", "OUT_OF_MEMORY"),
    ],
)
def test_memory_of_the_host_is_told_by_slurm(attempt: Attempt, srun: str, state: str | None) -> None:
    attempt.srun(srun).log(1, "step 1\n").end(1, None, 1.0, "SIGKILL").end(0, 70, 1.1)
    cause = attempt.cause(137, slurm_state=state)
    assert (cause.kind, cause.exit_code, cause.rank, cause.node) == ("out_of_memory", 20, 1, "node2")


def test_a_hang_that_the_supervisor_ended(attempt: Attempt) -> None:
    attempt.log(0, "x\n").log(1, "x\n").srun(KILLED_BY_SRUN).end(0, None, 1.0, "SIGKILL")
    assert (attempt.cause(137, asked="hang").kind, attempt.cause(137, asked="hang").exit_code) == ("hang", 70)


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        ("srun: error: task 0 launch failed: No such file or directory", "user_error", 66),
        ("slurmstepd-node1: error: standin: image /x.sqsh does not exist", "user_error", 66),
        ("srun: unrecognized option '--container-image=/x.sqsh'\nsrun: error: bad option", "environment", 78),
        ("srun: error: Unable to create step for job 1: Job/step already completing", "infrastructure", 69),
    ],
)
def test_a_step_that_never_started_is_told_in_srun_s_words(attempt: Attempt, words: str, kind: str, code: int) -> None:
    cause = attempt.srun(f"{words}\n").cause(1)
    assert (cause.kind, cause.exit_code) == (kind, code)
    assert cause.log is not None
    assert cause.log.endswith("srun.log")


def test_a_task_that_did_not_start_on_one_node_blames_that_node(attempt: Attempt) -> None:
    words = """\
slurmstepd: error: pyxis: couldn't start container: squashfs image: No such file or directory
srun: error: node2: task 1: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=14.0
srun: error: node1: task 0: Terminated
"""
    cause = attempt.log(0, "step 1\n").srun(words).cause(1)
    assert (cause.kind, cause.exit_code, cause.rank, cause.node) == ("infrastructure", 69, 1, "node2")
    assert "did not start on node2, others did: pyxis: couldn't start container" in cause.message


def test_a_program_that_is_not_there_is_told_though_tasks_ended(attempt: Attempt) -> None:
    words = """\
srun: error: node1: task 0: Exited with exit code 2
srun: launch/slurm: _step_signal: Terminating StepId=14.0
slurmstepd-node1: error: execve(): /nowhere/python: No such file or directory
"""
    cause = attempt.srun(words).cause(2)
    assert (cause.kind, cause.exit_code) == ("user_error", 66)
    assert cause.message == "srun: execve(): /nowhere/python: No such file or directory"


def test_nothing_at_all_is_the_infrastructure(attempt: Attempt) -> None:
    cause = attempt.cause(9)
    assert (cause.kind, cause.exit_code) == ("infrastructure", 69)
    assert cause.message == "the step ended with code 9, and no rank said why"


def test_the_status_of_a_later_attempt_does_not_count_for_an_earlier_one(attempt: Attempt) -> None:
    first = attempt.end(0, None, 1.0, "SIGKILL").path
    second = Attempt(attempt.folder.path).status("done", exit_code=0)
    assert find_cause(second.folder, first, 137).message == "rank 0 on node1 was killed by SIGKILL"
    assert second.cause(0).kind == "done"
    preflight = second.folder.new_attempt()  # beside a run that is alive
    assert find_cause(second.folder, second.path, 137, uses_status=True).kind == "done"
    assert find_cause(second.folder, preflight, 69, uses_status=False).kind == "infrastructure"


def test_damaged_files_hide_nothing_else(attempt: Attempt) -> None:
    for rank, text in enumerate(("", "{", "[]", '{"rank": "x"}', '{"rank": 4, "host": "n"}', "null")):
        (attempt.path / f"rank-{rank:05d}.exit.json").write_text(text)
    attempt.end(6, None, 1.0, "SIGKILL")
    attempt.folder.status.write_text("{")
    assert attempt.cause(137).rank == 6


def test_files_of_this_test_are_what_tasks_write(attempt: Attempt) -> None:
    attempt.end(0, None, 1.0, "SIGKILL")
    plain = json.loads((attempt.path / "rank-00000.exit.json").read_text())
    assert {*plain} == {"rank", "host", "exit_code", "signal", "time"}
