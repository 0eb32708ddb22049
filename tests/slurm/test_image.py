"""The real Dockerfile built on a stand-in base, and `moe-recipes image` on what comes out."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_recipes.launch.image import import_image, read_record, verify_image
from tests.slurm.build import BASE, IMAGE, ROOT, Buildah, Container
from tests.slurm.conftest import skip_or_fail
from tests.slurm.images import PACKAGES_IN_IMAGE
from tests.slurm.lab import Lab
from tests.slurm.site import JOB_S, Site

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
PREFIX = "/opt/moe-recipes"
CONSTRAINTS = "/etc/moe-recipes/constraints.txt"
LAYERS = """\
ARG BASE
FROM ${BASE}
RUN mkdir -p /d/kept /d/gone /d/opaque /d/turned && echo 1 >/d/kept/a && echo 2 >/d/gone/a && echo 3 >/d/opaque/a \
    && echo 4 >/d/turned/a && echo 5 >/d/first && ln /d/first /d/second && ln -s ../kept/a /d/opaque/link
RUN rm /d/first && rm -r /d/gone /d/opaque /d/turned && mkdir /d/opaque && echo 6 >/d/opaque/b && echo 7 >/d/turned \
    && chmod 4711 /d/kept/a && ln -s kept/a /d/link
RUN mkdir /d/gone && echo 8 >/d/gone/b && echo 9 >/d/kept/a
ENV SHOWN="one two"
WORKDIR /d/kept
ENTRYPOINT ["/bin/echo", "by way of"]
CMD ["a word"]
"""


@pytest.fixture(scope="module")
def buildah(slurm_folder: Path, base: Path) -> Iterator[Buildah]:
    if shutil.which("buildah") is None:
        skip_or_fail("the image is built with buildah")
    tool = Buildah(slurm_folder / "buildah")
    try:
        tool.make_base(base)
        yield tool
    finally:
        tool.unmount()


@pytest.fixture(scope="module")
def built(buildah: Buildah) -> str:
    """The image of the unmodified Dockerfile; what needs nvcc or a source host is left out by its ARG."""
    swapped = ("--build-arg", f"BASE={BASE}", "--build-arg", "BASE_DIGEST=none")
    buildah.build(ROOT / "Dockerfile", IMAGE, *swapped, "--build-arg", "WITH_CUDA_EXTENSIONS=0")
    return IMAGE


@pytest.fixture
def container(buildah: Buildah, built: str) -> Iterator[Container]:
    with buildah.container(built) as made:
        yield made


@pytest.fixture(scope="module")
def sqsh(buildah: Buildah, built: str, slurm_folder: Path) -> Path:
    """The built image as `moe-recipes image import` makes it."""
    archive = slurm_folder / "moe.tar"
    buildah("push", "--quiet", built, f"docker-archive:{archive}")
    path = slurm_folder / "moe.sqsh"
    import_image(str(archive), path)
    archive.unlink()
    return path


def fake_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_image_has_a_user_labels_and_nothing_of_the_build(buildah: Buildah, built: str, container: Container) -> None:
    facts = json.loads(buildah("inspect", "--type", "image", built).stdout)["OCIv1"]
    labels, environment = facts["config"]["Labels"], facts["config"]["Env"]
    assert facts["config"]["User"] == "10001:10001"
    assert container.run("id", "-un").stdout.strip() == "moe"
    assert labels["org.opencontainers.image.title"] == "moe-recipes"
    assert labels["org.opencontainers.image.base.name"] == BASE
    assert f"PIP_CONSTRAINT={CONSTRAINTS}" in environment
    assert any(line.startswith(f"PATH={PREFIX}/bin:") for line in environment)
    root = container.root()
    assert [name for name in ("src", "wheels", "opt/build-tools") if (root / name).exists()] == []
    assert (root / "etc/pip.conf").read_text() == ""
    assert not any((root / "etc/ssl/certs").iterdir())
    assert container.run("sh", "-c", f"touch {PREFIX}/x || touch /etc/x", check=False).returncode != 0


def test_sbom_lists_what_pip_sees(container: Container) -> None:
    sbom = json.loads((container.root() / "usr/share/moe-recipes/sbom.json").read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    listed = {(part["name"], part["version"]) for part in sbom["components"]}
    seen = json.loads(container.run("python", "-m", "pip", "inspect").stdout)["installed"]
    names = ((re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower(), one["metadata"]["version"]) for one in seen)
    assert listed == set(names)
    origin = {part["name"]: part["properties"][0]["value"] for part in sbom["components"]}
    assert (origin["torch"], origin["transformers"], origin["moe-recipes"]) == (
        "base image",
        "this image",
        "this image",
    )
    assert len({part["bom-ref"] for part in sbom["components"]}) == len(sbom["components"])


def test_pip_does_not_replace_torch(container: Container, tmp_path: Path) -> None:
    fake_wheel(tmp_path, "torch", "99.0")
    fake_wheel(tmp_path, "wants_torch", "1.0", "Requires-Dist: torch>=99\n")
    command = "python -m pip install --no-index --find-links /wheels-here --target /tmp/t wants_torch".split()
    options = ["--user", "0", "--volume", f"{tmp_path}:/wheels-here:ro"]
    refused = container.run(*command, options=options, check=False)
    assert refused.returncode != 0
    assert "(constraint) torch==" in refused.stdout
    assert not (container.root() / "tmp/t").exists()
    container.run(*command, options=[*options, "--env", "PIP_CONSTRAINT="])
    assert (container.root() / "tmp/t/torch-99.0.dist-info").exists(), "without the constraint pip replaces it"


def test_a_torch_of_its_own_fails_the_build(container: Container, tmp_path: Path) -> None:
    fake_wheel(tmp_path, "torch", "99.0")
    command = "python -m pip install --no-index --no-deps --ignore-installed /w/torch-99.0-py3-none-any.whl".split()
    verify = ("python3", "/usr/share/moe-recipes/torch_pin.py", "verify", CONSTRAINTS)
    assert container.run(*verify).returncode == 0
    options = ["--user", "0", "--volume", f"{tmp_path}:/w:ro", "--env", "PIP_CONSTRAINT="]
    container.run(*command, options=options)
    found = container.run(*verify, check=False)
    assert found.returncode != 0
    assert "torch==99.0" in found.stderr


def test_image_trains_as_its_user(container: Container, tmp_path: Path) -> None:
    where = "import torch, transformers, moe_recipes as m; print(torch.__file__, transformers.__file__, m.__file__)"
    torch, *ours = container.run("python", "-c", where).stdout.split()
    assert torch.startswith(PACKAGES_IN_IMAGE)
    assert all(path.startswith(f"{PREFIX}/lib") for path in ours)
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o777)
    layout = ("--set", "parallel.fsdp_size=2", "--set", "parallel.ep_size=2", "--set", "train.steps=2")
    words = ("moe-recipes", "train", "/recipes/tiny_slurm.yaml", "--cpu", "--set", "run_dir=/runs/tiny", *layout)
    mounts = ["--volume", f"{ROOT}/recipes:/recipes:ro", "--volume", f"{runs}:/runs"]
    container.run(*words, options=mounts)
    steps = [json.loads(line) for line in (runs / "tiny/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert json.loads((runs / "tiny/status.json").read_text())["state"] == "done"
    assert (runs / "tiny").stat().st_uid == 10001


def test_image_trains_on_the_cluster(lab: Lab, sqsh: Path, slurm_folder: Path) -> None:
    site = Site(lab, sqsh, slurm_folder / "trained-in-the-image")
    site.write_cluster(container={"workdir": "/", "python": f"{PREFIX}/bin/python3"})
    job = site.script("tiny", "train.steps=2", "run_dir=" + str(site.runs / "t"))
    assert lab.wait_for_end(job, JOB_S).state == "COMPLETED", lab.output_of(job)
    run = site.run("t")
    assert run.steps == [1, 2]
    assert run.status["state"] == "done"
    verify_image(sqsh)


def difference(left: Path, right: Path) -> list[str]:
    """Names of what two trees do not share in kind, mode, target or bytes; times and owners aside."""
    trees = [{str(p.relative_to(top)): p for p in top.rglob("*")} for top in (left, right)]
    wrong = sorted(set(trees[0]) ^ set(trees[1]))
    for name in sorted(set(trees[0]) & set(trees[1])):
        one, other = trees[0][name], trees[1][name]
        if one.lstat().st_mode != other.lstat().st_mode:
            wrong.append(name)
        elif one.is_symlink():
            wrong += [name] * (os.readlink(one) != os.readlink(other))
        elif stat.S_ISREG(one.lstat().st_mode):
            wrong += [name] * (not filecmp.cmp(one, other, shallow=False))
    return wrong


def test_layers_merge_as_an_engine_merges_them(buildah: Buildah, tmp_path: Path) -> None:
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(LAYERS)
    buildah.build(dockerfile, "localhost/layers:1", "--layers", "--build-arg", f"BASE={BASE}")
    archive, image, tree = tmp_path / "l.tar", tmp_path / "l.sqsh", tmp_path / "tree"
    buildah("push", "--quiet", "localhost/layers:1", f"docker-archive:{archive}")
    record, _ = import_image(str(archive), image)
    manifest = json.loads(subprocess.check_output(["tar", "-xOf", str(archive), "manifest.json"]))[0]
    assert len(manifest["Layers"]) >= 4
    assert record.digest == f"sha256:{manifest['Config'].removesuffix('.json')}"
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-d", str(tree), str(image)], check=True)
    with buildah.container("localhost/layers:1") as container:
        assert sorted(difference(tree, container.root())) == ["etc/environment", "etc/rc"]
        assert sorted(path.name for path in (tree / "d/opaque").iterdir()) == ["b"]
    assert "SHOWN=one two\n" in (tree / "etc/environment").read_text()
    mounts = [f"mount --bind /{name} {tree}/{name}" for name in ("dev", "proc")]
    for words, said in (("", "by way of a word"), ("another", "by way of another")):
        inside = " && ".join([*mounts, f"chroot {tree} /etc/rc {words}"])
        done = subprocess.run(["unshare", "--mount", "sh", "-c", inside], capture_output=True, text=True)
        assert done.stdout.strip() == said, done.stderr


def test_import_and_verify_know_the_image(buildah: Buildah, sqsh: Path, built: str, tmp_path: Path) -> None:
    record = read_record(sqsh)
    identity = buildah("images", "--quiet", "--no-trunc", built).stdout.strip()
    assert record.digest == identity
    assert record.labels["org.opencontainers.image.title"] == "moe-recipes"
    assert record.sha256 == subprocess.check_output(["sha256sum", str(sqsh)], text=True).split()[0]
