"""The test cluster itself, and the contract of the container flags: what the other tests of this folder stand on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.images import mount_of_packages
from tests.slurm.lab import ENDED, Lab, LabError, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ROOT = Path(__file__).resolve().parents[2]
NAMES = "OMP_NUM_THREADS SET_BY_IMAGE ONLY_JOB LANG RANK SLURM_PROCID MASTER_ADDR".split()


def processes_of(folder: str) -> list[str]:
    """Command lines of live processes that name a folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()):
            try:
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (process / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if folder in words or folder in environment:
                found.append(words)
    return found


def test_a_killed_session_leaves_no_process(slurm_folder: Path) -> None:
    session = subprocess.Popen(
        [sys.executable, "-m", "tests.slurm.lab", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert session.stdout is not None
        folder = str(Path(session.stdout.readline().strip().partition("=")[2]).parent)
        lab = Lab(Path(folder), 2)  # another handle on the running cluster
        job = lab.sbatch("--wrap", "srun sleep 600")
        lab.wait_for_state(job, "RUNNING")
        wait_until(lambda: len([w for w in processes_of(folder) if "sleep 600" in w]) >= 2, 20, lambda: "no step")
        assert len(processes_of(folder)) > 8
    finally:
        session.send_signal(signal.SIGKILL)
        session.wait()
    wait_until(lambda: not processes_of(folder), 20, lambda: "\n".join(processes_of(folder)))
    shutil.rmtree(folder)  # what a killed session cannot do itself


def test_power_loss_ends_all_processes_of_one_node_and_the_job_starts_again(lab: Lab) -> None:
    job = lab.sbatch("--nodes=2", "--wrap", "srun bash -c 'hostname; sleep 600'")
    lab.wait_for_state(job, "RUNNING")
    lab.wait_for(lambda: len(lab.output_of(job).split()) == 2, 20, job)
    lost = lab.output_of(job).split()[0]
    lab.power_off(lost)
    lab.wait_for(lambda: len(lab.job_records(job)) == 2, 60, job)
    lab.wait_for_state(job, "RUNNING")
    first, second = lab.job_records(job)
    assert first.state == "NODE_FAIL"
    assert lost in first.nodes.replace("[1-2]", "1,node2")
    assert lost not in lab.run("scontrol", "show", "hostnames", second.nodes).stdout.split()
    lab.power_on(lost)


def test_a_job_that_ends_otherwise_fails_the_wait_with_its_story(lab: Lab) -> None:
    job = lab.sbatch("--wrap", "echo said before the end; exit 3")
    with pytest.raises(LabError, match=r"job \d+ is FAILED(.|\n)*said before the end"):
        lab.wait_for_state(job, "COMPLETED")
    assert lab.wait_for_end(job).exit_code == "3:0"
    assert lab.state_of(job) in ENDED


def test_image_environment_beats_the_jobs_unless_named(lab: Lab, image: Path, records: Path) -> None:
    flags = [f"--container-image={image}", "--container-env=OMP_NUM_THREADS"]
    job = {"OMP_NUM_THREADS": "1", "SET_BY_IMAGE": "job", "ONLY_JOB": "job", "LANG": "C.UTF-8"}
    code = f"import os, json; print(json.dumps({{name: os.environ.get(name) for name in {NAMES}}}))"
    done = lab.run("srun", "--ntasks=2", *flags, "python3", "-c", code, env=job)
    for line in done.stdout.splitlines():
        inside = json.loads(line)
        assert inside["OMP_NUM_THREADS"] == "1"
        assert inside["SET_BY_IMAGE"] == "image"
        assert inside["ONLY_JOB"] == "job"
        assert inside["LANG"] is None
        # enroot's hook sets these in an image of PyTorch, whatever the job says.
        assert inside["RANK"] == inside["SLURM_PROCID"]
        assert inside["MASTER_ADDR"] == "set-by-the-hook.invalid"
    assert len(done.stdout.splitlines()) == 2
    newest = max(records.glob("*.0.1"), key=lambda path: int(path.name.split(".")[0]))
    assert f"container-image={image}\ncontainer-env=OMP_NUM_THREADS\n" in newest.read_text()


def test_container_file_system(lab: Lab, image: Path, tmp_path: Path) -> None:
    flags = [f"--container-image={image}", f"--container-mounts={mount_of_packages()},{tmp_path}:/data:ro"]
    script = (
        "touch /written; touch /data/written; touch /tmp/from-$SLURM_PROCID; ls /root; "
        "pwd; sleep 0.5; ls /tmp; command -v scontrol; true"
    )
    in_image = ["srun", "--nodes=1", "--ntasks=2", *flags, "--container-workdir=/usr", "bash", "-c"]
    done = lab.run(*in_image, script, cwd=Path("/"))
    assert sorted(set(done.stdout.split())) == ["/usr", "from-0", "from-1"]
    assert done.stderr.count("cannot touch '/written': Read-only file system") == 2
    assert done.stderr.count("cannot touch '/data/written': Read-only file system") == 2
    writable = lab.run("srun", *flags, "--container-writable", "bash", "-c", "touch /written && ls /written")
    assert writable.stdout == "/written\n"
    assert lab.run(*in_image, "ls /written", check=False).returncode != 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image": "/no/such.sqsh"}, "No such file or directory: /no/such.sqsh (container image)"),
        ({"image": "/etc/passwd"}, "not a squashfs image: /etc/passwd"),
        ({"mounts": "/no/such:/x:ro"}, "No such file or directory: /no/such (mount source)"),
        ({"name": "kept"}, "--container-name is refused"),
        ({"workdir": "/no/such"}, "/no/such: No such file or directory (working folder)"),
    ],
)
def test_wrong_container_flags_end_the_step_with_one_line(
    lab: Lab, image: Path, flags: dict[str, str], message: str
) -> None:
    words = [f"--container-{name}={value}" for name, value in ({"image": str(image)} | flags).items()]
    done = lab.run("srun", *words, "true", check=False)
    assert done.returncode != 0
    assert message in done.stderr
