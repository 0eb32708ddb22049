"""The Dockerfile, its locks and `moe-recipes image`, without building anything: tests/slurm/test_image.py builds it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from moe_recipes.config.errors import CannotWriteError, EnvironmentMismatchError, MissingInputError, RecipeError
from moe_recipes.launch.cli import main
from moe_recipes.launch.image import import_image, read_record, record_path, verify_image

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "docker").glob("*.lock"))
FROM_THE_BASE = re.compile(r"^(torch|torchvision|torchaudio|triton|pytorch-triton|cuda-.*|nvidia-(?!ml-py).*)$")
DIGEST = "sha256:" + "a" * 64
ENROOT = """\
#!/bin/sh
echo "$@" >>"$CALLS"
case $1 in
  version) echo 4.1.2 ;;
  digest) echo "$DIGEST" ;;
  import) [ -z "$FAILS" ] || { echo "[ERROR] no such image" >&2; exit 1; }; printf 'hsqs of %s' "$4" >"$3" ;;
esac
"""


def need(program: str) -> str:
    """The path of a program; without it the test is skipped, and fails in CI."""
    path = shutil.which(program, path=sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", ""))
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is not installed")
    return path


def locked(path: Path) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Requirements of a lock with their hashes, by name."""
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in path.read_text().replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            words, *hashes = line.split("--hash=sha256:")
            requirement = Requirement(words)
            found.setdefault(requirement.name, []).append((requirement, [one.strip() for one in hashes]))
    return found


def rootfs(folder: Path) -> Path:
    (folder / "etc").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "etc" / "issue").write_text("a small system\n")
    return folder


def tarred(path: str, entries: Sequence[tuple[str, bytes]]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(path, "w", fileobj=raw) as tar:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return raw.getvalue()


def archive(path: Path, config: dict[str, Any], *layers: Sequence[tuple[str, bytes]] | bytes) -> Path:
    """What `docker save` writes: a manifest, the configuration named by its hash, and the layers."""
    text = json.dumps({"config": config}).encode()
    name = f"{hashlib.sha256(text).hexdigest()}.json"
    packed = [layer if isinstance(layer, bytes) else tarred("layer", layer) for layer in layers]
    parts = [(f"{number}.tar", layer) for number, layer in enumerate(packed)]
    manifest = [{"Config": name, "Layers": [part[0] for part in parts]}]
    path.write_bytes(tarred("archive", [(name, text), *parts, ("manifest.json", json.dumps(manifest).encode())]))
    return path


def test_dockerfile_and_script_are_lint_clean() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "<<" not in text
    assert "syntax=" not in text
    assert "hadolint ignore" not in text
    done = subprocess.run([need("hadolint"), "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""
    script = ROOT / "docker" / "extensions.sh"
    done = subprocess.run([need("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_version_is_an_argument_and_the_base_has_a_digest() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    arguments = dict(re.findall(r'^ARG (\w+)="?([^"\n]+)"?$', text, re.MULTILINE))
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", arguments["BASE_TAG"])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", arguments["BASE_DIGEST"])
    assert arguments["BASE"] == "${BASE_TAG}@${BASE_DIGEST}"
    for name in ("TRANSFORMER_ENGINE_COMMIT", "DEEP_EP_COMMIT"):
        assert re.fullmatch(r"[0-9a-f]{40}", arguments[name]), name
    for name in ("NVSHMEM_SHA256", "CAUSAL_CONV1D_SHA256", "MAMBA_SSM_SHA256"):
        assert all(re.fullmatch(r"[0-9a-f]{64}", one) for one in arguments[name].split()), name
        assert re.fullmatch(r"\d+\.\d+\.\d+", arguments[name.replace("SHA256", "VERSION")])
    script = (ROOT / "docker" / "extensions.sh").read_text()
    asked = set(re.findall(r"\$\{?([A-Z]\w+_(?:COMMIT|VERSION|SHA256))\b", script))
    assert asked == {name for name in arguments if name.endswith(("_COMMIT", "_VERSION", "_SHA256"))}
    assert not re.search(r"\b\d+\.\d+\.\d+\b", script)
    assert set(re.findall(r"FROM (\S+)", text)) == {"${BASE}"}
    assert text.count("--require-hashes") == len(LOCKS) == 3


def test_locks_have_hashes_no_index_and_no_torch() -> None:
    for path in LOCKS:
        entries = locked(path)
        assert len(entries) > 5
        assert [name for name in entries if FROM_THE_BASE.match(name)] == [], path.name
        for requirement, hashes in (one for ones in entries.values() for one in ones):
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
            assert hashes
            assert all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes), requirement
        assert "://" not in path.read_text()
        assert "index" not in path.read_text()


def test_locks_hold_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"]]
    wanted += [one for extra in ("train", "cuda") for one in project["project"]["optional-dependencies"][extra]]
    sources = {"requirements.lock": wanted, "build.lock": project["build-system"]["requires"]}
    for name in ("cuda", "build"):
        lines = (ROOT / "docker" / f"{name}.in").read_text().splitlines()
        sources[f"{name}.lock"] = sources.get(f"{name}.lock", []) + [one for one in lines if one[:1] not in ("", "#")]
    assert set(sources) == {path.name for path in LOCKS}
    for name, requirements in sources.items():
        entries = locked(ROOT / "docker" / name)
        for requirement in map(Requirement, requirements):
            if FROM_THE_BASE.match(requirement.name):
                continue
            versions = [next(iter(one.specifier)).version for one, _ in entries.get(requirement.name, [])]
            assert versions, f"{requirement} is not in {name}: run docker/lock.py"
            assert all(requirement.specifier.contains(one) for one in versions), f"{requirement}: {versions} in {name}"


def test_sbom_has_the_packages_of_dpkg(tmp_path: Path) -> None:
    listed = subprocess.check_output(
        [need("dpkg-query"), "-W", "-f", "${db:Status-Status} ${Package} ${Version} ${Architecture}\n"], text=True
    )
    words = [str(tmp_path / "sbom.json"), "--name", "moe-recipes", "--base", "none"]
    subprocess.run([sys.executable, str(ROOT / "docker" / "sbom.py"), *words], check=True)
    parts = json.loads((tmp_path / "sbom.json").read_text())["components"]
    debian = [part for part in parts if part["purl"].startswith("pkg:deb/")]
    found = {(part["name"], part["version"], part["purl"].rpartition("=")[2]) for part in debian}
    installed = [line.split()[1:] for line in listed.splitlines() if line.startswith("installed ")]
    assert found == {tuple(one) for one in installed}
    assert len(debian) == len(installed)


def test_folder_is_imported_once_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("mksquashfs")
    source, image = rootfs(tmp_path / "system"), tmp_path / "x.sqsh"
    assert main(["image", "import", str(source), str(image)]) == 0
    assert "no digest" in capsys.readouterr().err
    record = read_record(image)
    assert record.sha256 == hashlib.sha256(image.read_bytes()).hexdigest()
    assert (record.size_bytes, record.source, record.digest) == (image.stat().st_size, str(source), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["system", "x.sqsh", "x.sqsh.json"]
    assert main(["image", "verify", str(image), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == record.sha256
    before = image.read_bytes()
    with pytest.raises(CannotWriteError, match="choose another name"):
        import_image(str(source), image)
    assert image.read_bytes() == before


def test_one_flipped_bit_and_a_cut_file_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("mksquashfs")
    image = tmp_path / "x.sqsh"
    import_image(str(rootfs(tmp_path / "system")), image)
    whole = image.read_bytes()
    image.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert main(["image", "verify", str(image)]) == 78
    said = capsys.readouterr().err
    assert "hashes to" in said
    assert said.count("\n") == 1
    image.write_bytes(whole[:-1])
    with pytest.raises(EnvironmentMismatchError, match=rf"{len(whole) - 1} bytes and its record says {len(whole)}"):
        verify_image(image)
    image.write_bytes(whole)
    record_path(image).unlink()
    with pytest.raises(MissingInputError, match="has no record"):
        verify_image(image)
    with pytest.raises(MissingInputError, match=r"did you mean 'x\.sqsh'"):
        verify_image(tmp_path / "y.sqsh")


def test_the_same_archive_again_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    need("mksquashfs")
    one = archive(tmp_path / "one.tar", {"Labels": {"a": "1"}}, [("etc/issue", b"one")])
    other = archive(tmp_path / "other.tar", {"Labels": {"a": "2"}}, [("etc/issue", b"two")])
    image = tmp_path / "x.sqsh"
    record, written = import_image(str(one), image)
    assert written
    assert record.labels == {"a": "1"}
    times = image.stat().st_mtime_ns, record_path(image).stat().st_mtime_ns
    assert import_image(str(one), image) == (record, False)
    with pytest.raises(CannotWriteError, match="running jobs may use it"):
        import_image(str(other), image)
    assert (image.stat().st_mtime_ns, record_path(image).stat().st_mtime_ns) == times
    image.write_bytes(b"hsqs")
    with pytest.raises(EnvironmentMismatchError):
        import_image(str(one), image)


def test_a_path_in_a_layer_stays_inside(tmp_path: Path) -> None:
    """Layers are never unpacked, so a link that leads out, and a file through it, touch nothing of this machine."""
    need("mksquashfs")
    link = tarfile.TarInfo("way")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        tar.addfile(link)
    path = archive(tmp_path / "a.tar", {}, raw.getvalue(), [("way/out", b"good")])
    import_image(str(path), tmp_path / "x.sqsh")
    assert not any((tmp_path / "elsewhere").iterdir())
    shown = subprocess.check_output([need("unsquashfs"), "-cat", str(tmp_path / "x.sqsh"), "way/out"])
    assert shown == b"good"
    path = archive(tmp_path / "b.tar", {}, [("etc/issue", b"x")], [("a/../../up", b"bad")])
    with pytest.raises(MissingInputError, match="leads out of the image"):
        import_image(str(path), tmp_path / "y.sqsh")
    assert sorted(one.name for one in tmp_path.iterdir()) == "a.tar b.tar elsewhere x.sqsh x.sqsh.json".split()


def test_enroot_is_asked_for_the_digest_and_no_user_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enroot = tmp_path / "bin" / "enroot"
    enroot.parent.mkdir()
    enroot.write_text(ENROOT)
    enroot.chmod(0o755)
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", str(enroot.parent), prepend=os.pathsep)
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("DIGEST", DIGEST)
    monkeypatch.setenv("FAILS", "")
    pinned, tagged = f"docker://me@nvcr.io#a/b:1@{DIGEST}", "docker://nvcr.io#a/b:1"
    record, _ = import_image(pinned, tmp_path / "x.sqsh")
    assert (record.digest, record.source, record.tool) == (DIGEST, f"docker://nvcr.io#a/b:1@{DIGEST}", "enroot 4.1.2")
    assert calls.read_text().splitlines()[0].endswith(f" docker://me@nvcr.io#a/b@{DIGEST}")
    assert import_image(tagged, tmp_path / "x.sqsh") == (record, False)
    monkeypatch.setenv("FAILS", "yes")
    with pytest.raises(EnvironmentMismatchError, match="ended with 1"):
        import_image(tagged, tmp_path / "y.sqsh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "calls", "x.sqsh", "x.sqsh.json"]


@pytest.mark.parametrize(
    ("source", "name", "code", "says"),
    [
        ("docker://nvcr.io#a/b:1", "x.sqsh", 78, "enroot is not installed on this host"),
        ("dokcer://a", "x.sqsh", 64, "did you mean 'docker'"),
        ("nvcr.io/a/b:1", "x.sqsh", 66, "a registry's image is written docker://nvcr.io#a/b:1"),
        ("empty", "x.sqsh", 66, "is not a root file system"),
        ("text", "x.sqsh", 66, "as `docker save`"),
        ("ready.sqsh", "x.sqsh", 64, "is a .sqsh already"),
        ("system", "x.img", 64, "ends in .sqsh"),
        ("system", "none/x.sqsh", 66, "make it first"),
        ("system", "busy.sqsh", 73, "another import is running"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    name: str,
    code: int,
    says: str,
) -> None:
    rootfs(tmp_path / "system")
    for folder in ("empty", "busy.sqsh.part"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text").write_text("nothing")
    (tmp_path / "ready.sqsh").write_bytes(b"hsqs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    before = sorted(tmp_path.rglob("*"))
    assert main(["image", "import", source, name]) == code
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    need("mksquashfs")
    path = archive(tmp_path / "a.tar", {"Env": ["A=1"]}, [("etc/issue", b"x" * 9000)])
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"A=1"', b'"A=2"'))
    with pytest.raises(MissingInputError, match="another hash than its name"):
        import_image(str(path), tmp_path / "x.sqsh")
    path.write_bytes(raw[:6000])
    with pytest.raises(MissingInputError, match=r"a\.tar is not an archive"):
        import_image(str(path), tmp_path / "x.sqsh")
    archive(path, {}, tarred("layer", [("etc/issue", b"x" * 9000)])[:5000])
    with pytest.raises(MissingInputError, match=r"a\.tar: a layer cannot be read"):
        import_image(str(path), tmp_path / "x.sqsh")
    archive(path, {"Env": ["A=1\n2"]}, [("etc/issue", b"x")])
    with pytest.raises(MissingInputError, match="the image's A has several lines"):
        import_image(str(path), tmp_path / "x.sqsh")
    assert [one.name for one in tmp_path.iterdir()] == ["a.tar"]
    with pytest.raises(RecipeError):
        import_image("ftp://x", tmp_path / "x.sqsh")
