"""The scripts of slurm/ and what `launch` submits: golden text, shells' own checks, refusals in one line.

Rewrite the golden files with: MOE_WRITE_GOLDEN=1 python -m pytest tests/unit/test_slurm_scripts.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_recipes.config.cluster import load_cluster
from moe_recipes.config.errors import RecipeError
from moe_recipes.config.resolve import load_recipe
from moe_recipes.config.run_folder import RunFolder, prepare_run
from moe_recipes.launch.cli import main
from moe_recipes.launch.slurm import inside
from moe_recipes.launch.slurm.commands import JobFacts, clean_environment, hostnames, slurm_said
from moe_recipes.launch.slurm.inside import _options, all_cpus, allocation, fit_cpus
from moe_recipes.launch.slurm.job import BACKSTOP_S, EXPORTED, make_spec, run_job
from moe_recipes.launch.slurm.spec import JobSpec, read_spec, write_spec
from moe_recipes.launch.slurm.srun import srun_command, srun_environment
from moe_recipes.launch.slurm.submit import submit_environment

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")
SERVING = [ROOT / "slurm" / "eval.sh", ROOT / "slurm" / "serve.sh"]
"""These start other programs than this package's, whole in themselves."""

SCRIPTS = sorted(set((ROOT / "slurm").glob("*.sh")) - set(SERVING))
INSIDE = ROOT / "moe_recipes" / "launch" / "slurm" / "inside.sh"
SAME_NAME = (
    "deepseek_v3_671b", "gpt_oss_120b", "gpt_oss_20b", "nemotron_nano_30b", "nemotron_super_120b", "qwen3_235b",
    "qwen3_30b",
)  # fmt: skip
RECIPES = {**{name: name for name in SAME_NAME}, "tiny": "tiny_slurm", "ultra_550b": "nemotron_ultra_550b"}
BENCHES = {f"bench_{name}": f"{name}_8gpu" for name in ("nemotron_nano_30b", "qwen3_30b")}
SITE = """\
name: golden
slurm:
  partition: batch
  account: physics
  gpus_per_node: 8
  gpu_type: h100
  cpus_per_task: 12
  mem: "0"
  time: "2-00:00:00"
  extra: ["--constraint=ib", "--spread-job"]
container:
  {container}
paths:
  runs: /shared/runs
  hf_home: /shared/hf
env:
  NCCL_IB_HCA: mlx5_0,mlx5_1
"""
CONTAINERS = {
    "pyxis": "runtime: pyxis\n  image: /images/a.sqsh\n  mounts: [/data:/data:ro]\n  env: [LD_LIBRARY_PATH]",
    "apptainer": "runtime: apptainer\n  image: /images/a.sif\n  mounts: [/data:/data:ro]\n  workdir: /opt/code",
    "none": "runtime: none\n  python: /shared/venv/bin/python",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster file with pyxis, and an environment without another job's variables."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SBATCH_", "MOE_")) and name != "MOE_WRITE_GOLDEN":
            monkeypatch.delenv(name)
    path = tmp_path / "golden.yaml"
    path.write_text(SITE.format(container=CONTAINERS["pyxis"]))
    return path


def directives(path: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", path.read_text(), re.MULTILINE)
    assert len(found) == len(dict(found)), path
    return dict(found)


def facts(**changes: object) -> JobFacts:
    plain: dict[str, object] = dict.fromkeys(JobFacts.__dataclass_fields__)
    plain |= {"job_id": "12345", "nodes": ("node3", "node4"), "restart_count": 2, "state": "RUNNING", **changes}
    return JobFacts(**plain)  # type: ignore[arg-type]


def spec_of(site: Path, recipe: str = "tiny_slurm", *overrides: str, **options: object) -> JobSpec:
    given = {"work": "train", "shakedown": "off", **options}
    return make_spec(recipe, overrides, load_cluster(site), **given)  # type: ignore[arg-type]


def refused(code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == code
    out, said = capsys.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert said.startswith("moe-recipes: error: ")
    return said


def test_every_script_is_short_valid_and_ends_in_one_call_into_the_package() -> None:
    assert [path.stem for path in SCRIPTS] == sorted([*RECIPES, *BENCHES, "preflight", "export"])
    shellcheck = shutil.which("shellcheck")
    for path in [*SCRIPTS, *SERVING, INSIDE]:
        assert os.access(path, os.X_OK), path
        assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0, path
        assert max(map(len, path.read_text().splitlines())) <= 120, path
        if shellcheck is not None:
            done = subprocess.run([shellcheck, path], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
        else:
            assert "CI" not in os.environ, "CI must have shellcheck"
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        assert len(lines) <= 25, path
        code = [line for line in lines if line and not line.startswith("#")]
        assert len(code) == 4, path
        assert code[-2].startswith('exec "$inside" ')
        assert '--cluster "${MOE_CLUSTER:-$SLURM_SUBMIT_DIR/clusters/local.yaml}"' in code[-2]


def test_scripts_ask_for_the_ranks_of_their_recipe() -> None:
    for name, recipe in RECIPES.items():
        path = ROOT / "slurm" / f"{name}.sh"
        asked = directives(path)
        ranks = load_recipe(str(ROOT / "recipes" / f"{recipe}.yaml")).parallel.num_ranks
        assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == ranks, name
        assert path.read_text().endswith(f'  recipes/{recipe}.yaml "$@"\n')
    assert directives(ROOT / "slurm" / "ultra_550b.sh")["nodes"] == "16"


def test_scripts_of_recipes_differ_in_names_nodes_and_time_alone() -> None:
    """One golden text: what a script of a recipe says, with its own name, recipe, title and allocation taken out."""
    texts = set()
    for name, recipe in RECIPES.items():
        lines = (ROOT / "slurm" / f"{name}.sh").read_text().splitlines()
        assert lines[1].endswith((" of 8 H100.", "shows in minutes that a cluster works.")), name
        assert f"#SBATCH --job-name={name}" in lines
        own = ("#SBATCH --nodes=", "#SBATCH --ntasks", "#SBATCH --gpus", "#SBATCH --exclusive", "#SBATCH --time=")
        rest = [line for line in [lines[0], *lines[2:]] if not line.startswith(own)]
        text = "\n".join(rest).replace(f"slurm/{name}.sh", "slurm/NAME.sh").replace(f"={name}", "=NAME")
        text = text.replace(f"recipes/{recipe}.yaml", "recipes/RECIPE.yaml").replace(
            f"launch {recipe}", "launch RECIPE"
        )
        texts.add(re.sub(r" {2,}", "  ", text) + "\n")
    golden = GOLDEN / "script.txt"
    if os.environ.get("MOE_WRITE_GOLDEN"):
        golden.write_text("".join(sorted(texts)))
    assert texts == {golden.read_text()}


def test_scripts_hold_no_facts_of_a_site_and_agree_with_launch() -> None:
    for path in SCRIPTS:
        asked = directives(path)
        assert not {"partition", "account", "qos", "reservation", "chdir"} & set(asked), path
        tasks = "1" if path.stem in BENCHES else asked["gpus-per-node"]  # a benchmark starts the ranks of its arms
        assert asked["ntasks-per-node"] == tasks, path
        assert asked["export"].split(",") == list(EXPORTED), path
        assert asked["signal"] == f"B:USR2@{BACKSTOP_S}", path
        assert asked["open-mode"] == "append", path
        assert "requeue" in asked, path


def test_scripts_refuse_a_folder_that_is_no_clone(tmp_path: Path) -> None:
    for path in SCRIPTS:
        environ = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
        done = subprocess.run(["bash", path], env=environ, capture_output=True, text=True)
        said = f"moe-recipes: error: {tmp_path} is no clone of moe-recipes\n"
        assert (done.returncode, done.stdout, done.stderr) == (66, "", said)


def test_an_old_python_is_one_line_that_says_how(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.6.8 || exit 1\n')
    old.chmod(0o755)
    for python, version in ((str(old), "Python 3.6.8"), (str(tmp_path / "none"), "not found")):
        environ = {"PATH": os.environ["PATH"], "MOE_PYTHON": python}
        done = subprocess.run([INSIDE, "--cluster", "x", "y"], env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1)
        assert done.stderr.startswith(f"moe-recipes: error: {python} on ")
        assert f"({version}" in done.stderr or python.endswith("none")
        assert "make host" in done.stderr
        assert "MOE_PYTHON" in done.stderr


def test_a_python_without_the_host_sides_packages_is_one_line_that_says_how(tmp_path: Path) -> None:
    """Where nobody ran `make host`, a new enough python3 is found, and has neither submitit nor PyYAML."""
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    environ = {"PATH": os.environ["PATH"], "MOE_PYTHON": str(bare), "SLURM_JOB_ID": "7"}
    done = subprocess.run([INSIDE, "--cluster", "x", "y"], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1)
    assert " has no submitit or no PyYAML: run `make host` in " in done.stderr


def test_a_script_outside_a_batch_job_says_so() -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environ |= {"SLURM_SUBMIT_DIR": str(ROOT), "MOE_PYTHON": sys.executable}
    done = subprocess.run(["bash", ROOT / "slurm" / "tiny.sh"], env=environ, capture_output=True, text=True)
    said = "moe-recipes: error: this is no batch job; submit the script: sbatch slurm/NAME.sh\n"
    assert (done.returncode, done.stdout, done.stderr) == (64, "", said)


@pytest.mark.parametrize("runtime", sorted(CONTAINERS))
def test_what_launch_would_submit(
    runtime: str, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write_text(SITE.format(container=CONTAINERS[runtime]))
    bad = {"node": "node7", "reason": "x", "job": "1", "time": "2026-01-01T00:00:00Z", "expires": "9"}
    excluded = site.with_name("bad.json")
    excluded.write_text(json.dumps({"nodes": [bad]}))
    with site.open("a") as file:
        file.write("limits:\n  exclude_hours: 1\n")
    site.write_text(site.read_text().replace("  hf_home", f"  excluded_nodes: {excluded}\n  hf_home"))
    monkeypatch.setenv("MOE_PYTHON", "/shared/repo/.host/bin/python")
    monkeypatch.setenv("SECRET_OF_THE_SHELL", "canary")
    words = ["launch", "tiny_slurm", "--cluster", str(site), "--nodes=2", "--dry-run", "--dependency=afterok:7"]
    assert main(words) == 0
    said = capsys.readouterr().out.replace(str(ROOT), "/shared/repo")
    golden = GOLDEN / f"launch_{runtime}.txt"
    if os.environ.get("MOE_WRITE_GOLDEN"):
        golden.write_text(said)
    assert said == golden.read_text()
    script = said.partition("\n# The job starts this")[0]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "canary" not in said


def test_secrets_are_masked_in_a_dry_run(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secrets = site.with_name("secrets")
    secrets.write_text("HF_TOKEN=hf_canary_of_this_test\n")
    secrets.chmod(0o600)
    text = site.read_text().replace("  hf_home", f"  secrets: {secrets}\n  hf_home")
    site.write_text(text.replace("mlx5_0,mlx5_1", "hf_canary_of_this_test"))
    words = ["launch", "tiny_slurm", "--cluster", str(site), "--nodes=2", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "canary" not in said
    assert "<HF_TOKEN>" in said
    assert f"{secrets}:{secrets}:ro" in said
    secrets.chmod(0o644)
    assert main(words) == 77


def test_launch_refuses_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = ["launch", "tiny_slurm", "--dry-run", "--cluster"]
    assert "no such cluster file" in refused(66, [*launch, str(site.with_name("none.yaml"))], capsys)
    launch.append(str(site))
    assert "--nodes=0 must be at least 1" in refused(64, [*launch, "--nodes=0"], capsys)
    assert "do not go evenly on 3 nodes" in refused(64, [*launch, "--nodes=3"], capsys)
    assert "is no time" in refused(64, [*launch, "--time=90"], capsys)
    twelve = ["--set", "parallel.fsdp_size=12", "--set", "parallel.ep_size=4", "--nodes=1"]
    assert "slurm.gpus_per_node: 8; take more nodes" in refused(64, [*launch, *twelve], capsys)
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    said = refused(64, launch, capsys)
    assert "SBATCH_PARTITION=debug, but cluster 'golden' says slurm.partition: batch; unset the variable" in said
    monkeypatch.setenv("SBATCH_PARTITION", "batch")
    monkeypatch.setenv("MOE_WORK", "tain")
    assert "MOE_WORK='tain' must be one of train, export" in refused(64, launch, capsys)
    monkeypatch.delenv("MOE_WORK")
    site.write_text(site.read_text().replace("--spread-job", "--nodes=3"))
    assert "--nodes has another key" in refused(64, launch, capsys)


def test_a_scheduler_that_is_away_is_69_and_not_the_users_fault(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    words = ["launch", "tiny_slurm", "--cluster", str(site), "--set", f"run_dir={tmp_path / 'run'}"]
    for asked in ([], ["--test-only"]):
        assert main([*words, *asked]) == 69
        assert "the scheduler does not answer now" in capsys.readouterr().err


def test_an_override_in_the_form_of_the_scripts_says_how(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "tiny_slurm", "--cluster", str(site), "train.steps=3", "--dry-run"]) == 64
    assert "write --set train.steps=3" in capsys.readouterr().err
    assert main(["launch", "tiny_slurm", "--cluster", str(site), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"].startswith("#!/bin/bash")


def test_launch_without_slurm_says_so(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "tiny_slurm", "--cluster", str(site), "--nodes=2"]) == 78


def test_as_few_nodes_as_hold_the_ranks(site: Path) -> None:
    ultra = spec_of(site, "nemotron_ultra_550b")
    assert (ultra.num_nodes, ultra.tasks_per_node, ultra.run_dir) == (16, 8, "/shared/runs/nemotron_ultra_550b")
    tiny = spec_of(site)
    assert (tiny.num_nodes, tiny.tasks_per_node, tiny.time_limit_s) == (1, 4, 172800)
    assert spec_of(site, "tiny_slurm", "run_dir=runs/here").run_dir == str(ROOT / "runs" / "here")


def test_the_allocation_must_be_the_recipes(site: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        spec_of(site, num_nodes=2, tasks_per_node=4)
    assert "the job has 2 nodes x 4 tasks = 8, but the recipe has" in str(caught.value)
    looked_at = spec_of(site, num_nodes=2, tasks_per_node=8, work="preflight")
    assert looked_at.num_ranks == 16
    assert allocation({"SLURM_TASKS_PER_NODE": "8(x15),8", "SLURM_JOB_NUM_NODES": "16"}) == (16, 8)
    for uneven in ("8(x15),4", "8(x15)", ""):
        with pytest.raises(RecipeError, match="every node needs as many"):
            allocation({"SLURM_TASKS_PER_NODE": uneven, "SLURM_JOB_NUM_NODES": "16"})


def test_no_more_cpus_a_task_than_the_allocation_has(site: Path) -> None:
    cluster = load_cluster(site)
    assert fit_cpus(cluster, {"SLURM_JOB_CPUS_PER_NODE": "96(x2),192"}, 8).slurm.cpus_per_task == 12
    assert fit_cpus(cluster, {"SLURM_JOB_CPUS_PER_NODE": "96,16"}, 8).slurm.cpus_per_task == 2


def test_a_shakedown_has_a_run_folder_of_its_own(site: Path) -> None:
    spec = spec_of(site, "tiny_slurm", shakedown="full")
    assert spec.shakedown
    assert spec.run_dir == "/shared/runs/tiny_slurm-shakedown"
    assert spec.num_ranks == 4


def test_a_spec_reads_back(site: Path, tmp_path: Path) -> None:
    spec, path = spec_of(site, "tiny_slurm", "train.steps=3"), tmp_path / "spec.json"
    write_spec(path, spec)
    assert read_spec(path) == spec
    assert path.stat().st_mode & 0o777 == 0o600
    assert spec.read_recipe().train.steps == 3
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 0'))
    with pytest.raises(Exception, match="made by another version"):
        read_spec(path)


def test_tasks_are_told_where_rank_0_is_and_nothing_of_the_host(site: Path) -> None:
    spec = spec_of(site, num_nodes=2, tasks_per_node=2)
    host = {"PATH": "/bin", "SLURM_CONF": "/etc/s.conf", "SLURM_MEM_PER_NODE": "1000", "SBATCH_ACCOUNT": "x"}
    environ = srun_environment(spec, facts(), host)
    assert environ["MOE_MASTER_ADDR"] == "node3"
    assert environ["MOE_MASTER_PORT"] == "20345"
    assert environ["MOE_RESTART_COUNT"] == "2"
    assert environ["SLURM_CONF"] == "/etc/s.conf"
    assert not {"SLURM_MEM_PER_NODE", "SBATCH_ACCOUNT"} & set(environ)
    words = srun_command(spec, facts(), attempt=Path("/shared/runs/tiny_slurm/attempts/3"))
    exported = next(word for word in words if word.startswith("--export=")).partition("=")[2].split(",")
    assert not set(exported) & {"ALL", "NONE"}
    named = next(word for word in words if word.startswith("--container-env=")).partition("=")[2].split(",")
    assert set(environ) - set(host) <= set(named) & set(exported)
    assert "LD_LIBRARY_PATH" in named
    assert "NCCL_IB_HCA" in named
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=12", "--gres=gpu:h100:2"} <= set(words)
    assert not [word for word in words if word.startswith(("--container-name", "--gpus-per-task"))]


def test_mounts_hold_what_the_job_needs_once(site: Path) -> None:
    words = srun_command(spec_of(site, num_nodes=2, tasks_per_node=2), facts(), attempt=Path("/a"))
    mounts = next(word for word in words if word.startswith("--container-mounts=")).partition("=")[2].split(",")
    own = [f"{path}:{path}" for path in ("/shared/runs", "/shared/hf", str(ROOT))]
    assert mounts == [*own, "/data:/data:ro"]
    elsewhere = spec_of(site, "tiny_slurm", "run_dir=/scratch/run", num_nodes=2, tasks_per_node=2)
    assert "/scratch/run:/scratch/run" in " ".join(srun_command(elsewhere, facts(), attempt=Path("/a")))


def test_a_clean_environment_keeps_where_the_cluster_is() -> None:
    environ = {"SLURM_CONF": "c", "SLURM_CLUSTERS": "x", "SLURM_NTASKS": "3", "SUBMITIT_FOLDER": "f", "HOME": "h"}
    assert clean_environment(environ) == {"SLURM_CONF": "c", "SLURM_CLUSTERS": "x", "HOME": "h"}


def test_what_slurm_says_is_one_line() -> None:
    said = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid name\n"
    assert slurm_said(said) == "invalid partition specified: x; Batch job submission failed: Invalid name"
    assert hostnames("node1,node2") == ("node1", "node2")
    assert hostnames("(null)") == ()


def test_keys_of_the_shell_end_before_the_host_side_starts(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nenv >"$MOE_NOTES"\nprintf "%s\\n" "$@" >>"$MOE_NOTES"\n')
    python.chmod(0o755)
    notes = tmp_path / "notes"
    environ = {"PATH": os.environ["PATH"], "WANDB_API_KEY": "canary", "SLURM_JOB_ID": "7", "MOE_PYTHON": str(python)}
    words = ["--cluster", "a b.yaml", "recipes/tiny_slurm.yaml", "optim.lr=1e-3"]
    done = subprocess.run([INSIDE, *words], env={**environ, "MOE_NOTES": str(notes)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = notes.read_text()
    assert "SLURM_JOB_ID=7\n" in said
    assert "canary" not in said
    assert said.endswith("\n".join(["-u", "-m", "moe_recipes.launch.slurm.inside", *words, ""]))


def test_sbatch_is_started_without_keys_and_without_another_jobs_variables() -> None:
    environ = {"PATH": "/bin", "WANDB_API_KEY": "canary", "SLURM_CONF": "c", "SLURM_NTASKS": "3", "MOE_PYTHON": "p"}
    assert submit_environment(environ) == {"PATH": "/bin", "SLURM_CONF": "c", "MOE_PYTHON": "p"}


def test_an_export_is_the_runs_own_recipe_in_its_own_folder(site: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    prepare_run(load_recipe("tiny_slurm", ["run_dir=/elsewhere/run"]), folder)
    spec = spec_of(site, str(folder.path), work="export")
    assert (spec.work, spec.run_dir, spec.num_ranks) == ("export", str(folder.path), 4)


def test_a_benchmark_is_one_task_with_the_gpus_and_cpus_of_its_node(site: Path) -> None:
    words = ("--gates", "real", "--set", "parallel.fsdp_size=4", "--set=parallel.ep_size=4")
    options = _options(["--work", "bench", "--cluster", str(site), "qwen3_30b_8gpu", *words])
    assert (options.recipe, tuple(options.bench_words)) == ("qwen3_30b_8gpu", words)
    cluster = all_cpus(load_cluster(site), {"SLURM_JOB_CPUS_PER_NODE": "96"})
    given = {"work": "bench", "shakedown": "off", "bench_words": words, "num_nodes": 1, "tasks_per_node": 1}
    spec = make_spec(options.recipe, options.overrides, cluster, **given)
    assert (spec.num_ranks, spec.gpus_per_node, spec.run_dir) == (1, 4, "/shared/runs/bench_qwen3_30b_8gpu")
    command = srun_command(spec, facts(nodes=("node3",)), attempt=Path("/shared/runs/x/attempts/1"))
    assert {"--ntasks=1", "--gres=gpu:h100:4", "--cpus-per-task=96"} <= set(command)
    assert srun_environment(spec, facts(nodes=("node3",)), {})["OMP_NUM_THREADS"] == "24"
    path = site.with_name("spec.json")
    write_spec(path, spec)
    assert read_spec(path) == spec


def test_benchmarks_that_cannot_run_are_refused(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = {"work": "bench", "num_nodes": 1, "tasks_per_node": 1}
    with pytest.raises(RecipeError, match="one task on one node, but the job has 2 nodes x 8 tasks"):
        spec_of(site, "qwen3_30b_8gpu", **{**bench, "num_nodes": 2, "tasks_per_node": 8})
    with pytest.raises(RecipeError, match=r"the recipe has 16 ranks, but cluster 'golden' has slurm\.gpus_per_node: 8"):
        spec_of(site, "qwen3_30b_8gpu", "parallel.fsdp_size=16", **bench)
    words = ["launch", "tiny_slurm", "--work", "bench", "--dry-run", "--cluster", str(site)]
    assert "a benchmark is submitted as a script: sbatch slurm/bench_qwen3_30b.sh" in refused(64, words, capsys)


def test_a_training_script_does_not_become_a_benchmark(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its overrides would be dropped: a benchmark reads its own words."""
    options = _options(["--cluster", str(site), "qwen3_30b_8gpu", "parallel.ep_size=4"])
    for name, value in {"MOE_WORK": "bench", "SLURM_TASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"MOE_WORK=bench: a benchmark has its own script: sbatch slurm/bench_"):
        inside._spec(options, load_cluster(site), facts(nodes=("node3",)))


def test_a_spec_that_cannot_be_written_is_73(site: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The folder of the job is a file here, as on a disk where it cannot be made."""
    (tmp_path / "7").write_text("")
    write_spec(tmp_path / "given.json", spec_of(site))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit) as ended:
        run_job(str(tmp_path / "given.json"))
    assert ended.value.code == 73
    assert "spec.json: cannot be written: " in capsys.readouterr().err


def test_benchmark_scripts_measure_the_article_and_the_real_router() -> None:
    for name, recipe in BENCHES.items():
        path = ROOT / "slurm" / f"{name}.sh"
        assert path.read_text().endswith(
            f'  recipes/{recipe}.yaml --arms ours,transformers,automodel --gates balanced,real --batches 1,4 "$@"\n'
        )
        loaded = load_recipe(str(ROOT / "recipes" / f"{recipe}.yaml"))
        asked = directives(path)
        assert int(asked["gpus-per-node"]) == loaded.parallel.num_ranks == loaded.parallel.ep_size == 8
        assert (loaded.data.seq_len, loaded.data.format, loaded.model.weights) == (4096, "random_tokens", "random")


def test_the_serving_scripts_hold_no_facts_of_a_site_and_no_keys() -> None:
    for path in SERVING:
        asked = directives(path)
        assert not {"partition", "account", "qos", "reservation", "chdir", "requeue"} & set(asked), path
        passed = asked["export"].split(",")
        assert passed[:6] == list(EXPORTED)[:6]
        assert {"MOE_SERVE_IMAGE", "MOE_SERVE_PYTHON", "HF_HOME"} <= set(passed)
        assert asked["signal"] == f"B:TERM@{BACKSTOP_S}"


@pytest.mark.parametrize(
    ("script", "words", "code", "said"),
    [
        ("serve", [], 64, "serve needs the folder of a run or of a checkpoint"),
        ("serve", ["{run}", "engine=tgi"], 64, "engine=tgi must be vllm or sglang"),
        ("serve", ["{run}", "nodes=2"], 64, "'nodes=2' must be engine=, gpus=, port=, wait_s= or mounts="),
        ("serve", ["{run}", "port=http"], 64, "port=http and wait_s=3600 must be numbers"),
        ("serve", ["{run}/nowhere"], 66, "no config.json, so no checkpoint; write one with slurm/export.sh"),
        ("eval", ["{run}"], 64, "eval needs tasks: tasks=mmlu,gsm8k"),
        ("eval", ["{run}", "num_fewshot=8"], 64, "lm-eval's own come after --"),
        ("eval", ["{run}/nowhere", "tasks=gsm8k"], 66, "no tokenizer_config.json, which lm-eval needs"),
        ("eval", ["{run}", "tasks=gsm8k"], 78, "has no lm-eval; set MOE_EVAL_PYTHON"),
    ],
)
def test_the_serving_scripts_refuse_in_one_line(
    tmp_path: Path, script: str, words: list[str], code: int, said: str
) -> None:
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json"):
        (export / name).write_text("{}")
    environ = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(ROOT), "MOE_EVAL_PYTHON": "/bin/false"}
    command = ["bash", ROOT / "slurm" / f"{script}.sh", *(word.format(run=tmp_path / "run") for word in words)]
    outside = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (outside.returncode, outside.stderr.count("\n")) == (64, 1)
    assert f"submit the script: sbatch slurm/{script}.sh" in outside.stderr
    done = subprocess.run(command, env=environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
    assert done.stderr.startswith("moe-recipes: error: ")
    assert said in done.stderr
