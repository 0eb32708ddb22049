"""Cluster files: read strictly, checked, documented, and written from what Slurm says."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import typing
from pathlib import Path

import pytest
import yaml

from moe_recipes.config.cluster import (
    Cluster,
    cluster_from_dict,
    cluster_to_dict,
    load_cluster,
    parse_time,
)
from moe_recipes.config.errors import MissingInputError, RecipeError
from moe_recipes.launch.cli import main
from moe_recipes.launch.slurm.init import cluster_text

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "clusters" / "example.yaml"
SMALL = """\
slurm:
  partition: batch
  gpus_per_node: 8
  time: "01:00:00"
container:
  runtime: none
paths:
  runs: /runs
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(SMALL)
    return path


def refused(path: Path, old: str, new: str) -> str:
    """What is said of the small file with ``old`` replaced; the file name is cut off."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_cluster(path)
    path.write_text(text)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"{path}:")
    return said.removeprefix(f"{path}:")


def keys_of(kind: type, prefix: str = "") -> dict[str, dataclasses.Field[typing.Any]]:
    hints, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= keys_of(hints[field.name], f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = field
    return found


def test_a_small_file_has_the_defaults(small: Path) -> None:
    cluster = load_cluster(small)
    assert cluster.name == "site"
    assert cluster.time_limit_s == 3600
    assert cluster.slurm.exclusive
    assert cluster.container.python == "python3"
    assert cluster.limits.max_restarts_without_progress == 3
    assert cluster.excluded_nodes == Path("/runs/excluded_nodes.json")


def test_plain_data_reads_back_to_the_same_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "someone")
    cluster = load_cluster(EXAMPLE)
    assert cluster_from_dict(json.loads(json.dumps(cluster_to_dict(cluster))), "spec.json") == cluster
    assert cluster.paths.runs == "/shared/someone/runs"


def test_the_example_and_the_docs_name_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "someone")
    load_cluster(EXAMPLE)
    plain = yaml.safe_load(EXAMPLE.read_text())
    written = {"name"} | {
        f"{section}.{key}" if section != "env" else "env"
        for section, keys in plain.items()
        if isinstance(keys, dict)
        for key in keys
    }
    documented = {}
    for line in (ROOT / "docs" / "clusters.md").read_text().splitlines():
        if match := re.match(r"\| `([\w.]+)` \| (?:`(.*?)`|([^|]*)) \| .+ \|$", line):
            documented[match[1]] = match[2] if match[2] is not None else match[3]
    defaults = {}
    for key, field in keys_of(Cluster).items():
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        defaults[key] = "required" if default is dataclasses.MISSING else json.dumps(default)
    assert len(defaults) > 30
    assert documented == {**defaults, "name": "the file's stem"}
    assert written == set(defaults)


def test_a_missing_file_is_a_missing_input(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no such cluster file; write it with `moe-recipes cluster init`"):
        load_cluster(tmp_path / "local.yaml")


def test_wrong_keys_and_values_are_named_with_their_line(small: Path) -> None:
    assert refused(small, "  partition: batch", "  partitoin: batch").startswith(
        "2: unknown key 'slurm.partitoin'; did you mean 'partition'?"
    )
    assert refused(small, "gpus_per_node: 8", "gpus_per_node: eight").startswith("3: 'slurm.gpus_per_node' must be")
    assert "3: slurm.gpus_per_node = -1 must be at least 0" in refused(small, ": 8", ": -1")
    assert "missing key 'slurm.partition'" in refused(small, "  partition: batch\n", "")
    assert refused(small, '"01:00:00"', "90").startswith("4: 'slurm.time' must be text")
    assert refused(small, '"01:00:00"', '"90 minutes"').startswith("4: slurm.time = '90 minutes' must be D-HH:MM:SS")
    assert refused(small, '"01:00:00"', '"00:00:00"').startswith("4: slurm.time")
    assert refused(small, '"01:00:00"', '"00:61:00"').startswith("4: slurm.time")
    assert refused(small, "/runs", "runs").startswith("8: paths.runs = 'runs' must be an absolute path")
    assert "$NO_SUCH_FOLDER" in refused(small, "/runs", "/$NO_SUCH_FOLDER/runs")
    assert "has no meaning with container.runtime: none" in refused(small, "none", "none\n  image: /x.sqsh")
    assert "a cluster file is a mapping" in refused(small, SMALL, "- a list")


def test_containers_need_an_absolute_image_and_whole_mounts(small: Path) -> None:
    assert "container.image is missing" in refused(small, "none", "pyxis")
    assert "container.image" in refused(small, "none", "pyxis\n  image: images/x.sqsh")
    assert "container.image" in refused(small, "none", "apptainer\n  image: nvcr.io#nvidia/pytorch:1")
    assert "7: container.mounts has '/data'" in refused(small, "none", "pyxis\n  mounts: [/data]\n  image: /x.sqsh")
    assert "no comma" in refused(small, "none", 'pyxis\n  image: /x.sqsh\n  mounts: ["/a,b:/a"]')
    assert "container.command" in refused(small, "none", "pyxis\n  image: /x.sqsh\n  command: [x]")
    assert "container.workdir" in refused(small, "none", "pyxis\n  image: /x.sqsh\n  workdir: code")
    for image in ("/x.sqsh", "nvcr.io#nvidia/pytorch:26.01-py3"):
        small.write_text(SMALL.replace("none", f"pyxis\n  image: {image}"))
        assert load_cluster(small).container.image == image


def test_keys_do_not_belong_into_the_environment(small: Path) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        said = refused(small, "paths:", f"env:\n  {name}: hf_x\npaths:")
        assert said.startswith(f"8: env.{name} names {name}; keys belong into the file of paths.secrets")
        assert "hf_x" not in said
    assert "Slurm sets its own" in refused(small, "paths:", "env:\n  SLURM_NTASKS: '3'\npaths:")
    assert "no variable name" in refused(small, "paths:", "env:\n  NCCL-IB: x\npaths:")
    assert "'env.A' must be text" in refused(small, "paths:", "env:\n  A: 1\npaths:")
    small.write_text(f"{SMALL}env:\n  TOKENIZERS_PARALLELISM: 'false'\n")
    assert load_cluster(small).env == {"TOKENIZERS_PARALLELISM": "false"}


def test_words_of_the_batch_script_are_words(small: Path) -> None:
    """A line's end in one of them would begin a line of its own in the script that submitit writes."""
    for bad in ('""', '"ma in"', '"main\\ntouch /tmp/x"', '"main\\x07"', "main;id", "$(id)"):
        assert "slurm.partition = " in refused(small, "partition: batch", f"partition: {bad}"), bad
    for key in ("account", "qos", "reservation", "gpu_type", "mem"):
        assert f"slurm.{key} = '' must be one word" in refused(small, "slurm:", f"slurm:\n  {key}: ''")
    assert "without control characters" in refused(small, "runs: /runs", 'runs: "/ru\\tns"')
    assert "must name a program" in refused(small, "runtime: none", "runtime: none\n  python: ''")
    assert "slurm.time" in refused(small, '"01:00:00"', '"99999999999-00:00:00"'), "Slurm would wrap it around"


def test_a_file_may_extend_another(small: Path) -> None:
    other = small.with_name("other.yaml")
    other.write_text("extends: site.yaml\nslurm:\n  partition: debug\n")
    cluster = load_cluster(other)
    assert (cluster.name, cluster.slurm.partition, cluster.slurm.gpus_per_node) == ("other", "debug", 8)


def test_times_are_those_of_slurm() -> None:
    assert parse_time("1-02:03:04") == 93784
    assert parse_time("00:30:00") == 1800
    with pytest.raises(RecipeError):
        parse_time("30")


def test_check_prints_the_whole_file(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "check", str(small)]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == cluster_to_dict(load_cluster(small))
    assert main(["cluster", "check", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == cluster_to_dict(load_cluster(small))
    assert main(["cluster", "check", str(small.with_name("none.yaml"))]) == 66


def test_git_ignores_the_local_file() -> None:
    done = subprocess.run(["git", "check-ignore", "clusters/local.yaml", ".host/x"], cwd=ROOT, capture_output=True)
    if done.returncode == 128:
        pytest.skip("not a git clone")
    assert done.returncode == 0
    assert done.stdout.split() == [b"clusters/local.yaml", b".host/x"]


SINFO = """\
#!/bin/bash
case "$*" in
  *%P*) printf 'debug\\nbatch*\\n' ;;
  *-p\\ batch*) for n in 1 2 3; do echo "gpu0$n|idle|192|2000000|gpu:h100:8(S:0-1)|none"; done
     echo "cpu01|mixed*|64|500000|(null)|none" ;;
esac
"""
SCONTROL = "#!/bin/bash\necho '   DefaultTime=NONE MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0'\n"
SRUN = "#!/bin/bash\necho '      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH'\n"
SACCTMGR = "#!/bin/bash\necho physics\n"


def test_init_writes_what_slurm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {"sinfo": SINFO, "scontrol": SCONTROL, "srun": SRUN, "sacctmgr": SACCTMGR}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    output = tmp_path / "clusters" / "local.yaml"
    words = ["cluster", "init", "--output", str(output)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "export SBATCH_PARTITION=batch" in said
    assert "export SBATCH_ACCOUNT=physics" in said
    assert "container.image has no value yet" in said
    cluster = load_cluster(output)
    assert cluster.name == "local"
    slurm = cluster.slurm
    assert (slurm.partition, slurm.account, slurm.time) == ("batch", "physics", "2-00:00:00")
    assert (slurm.gpus_per_node, slurm.gpu_type, slurm.cpus_per_task) == (8, "h100", 24)
    assert cluster.container.runtime == "pyxis"
    assert cluster.paths.hf_home == "/shared/hf"
    output.write_text("mine")
    assert main(words) == 64
    assert "edit it, or replace it with --force" in capsys.readouterr().err
    assert output.read_text() == "mine"
    capsys.readouterr()
    assert main([*words, "--force", "--image", "/images/a.sqsh", "--runs", "/runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"]["name"] == "local"
    assert load_cluster(output).container.image == "/images/a.sqsh"
    assert "gpus_per_node: 8" in cluster_text("batch", image=None, runs=None)


def test_init_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["cluster", "init", "--output", str(tmp_path / "local.yaml")]) == 78
