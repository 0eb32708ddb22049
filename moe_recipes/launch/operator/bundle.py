"""The verb ``bundle``: what support needs of a run in one small archive, with every secret masked."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from moe_recipes.config.errors import EXIT_OK, CannotWriteError, MoeRecipesError, SecretsError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.operator.facts import RunFacts
from moe_recipes.launch.operator.find import Found, add_target, find_run
from moe_recipes.launch.operator.job_spec import newest_spec
from moe_recipes.launch.operator.redact import Redactor, secrets_at_hand
from moe_recipes.launch.operator.slurm import ask
from moe_recipes.launch.operator.status import lines_of, status_of
from moe_recipes.launch.operator.why import explain, lines_of_cause
from moe_recipes.launch.secrets import read_secrets

WHOLE = ("manifest.json", "status.json", "recipe.json", "events.jsonl", "slurm/ledger.jsonl", "preflight.json")
LONGEST_BYTES = 1 << 20
"""Of a file that is packed whole; of a longer one the end."""

LOG_TAIL_BYTES = 1 << 16
METRICS_LINES = 200
NEWEST_ATTEMPTS = 3
SACCT_COLUMNS = "JobID,State,ExitCode,DerivedExitCode,Reason,NodeList,Submit,Start,End,Elapsed,MaxRSS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="the archive; NAME-bundle-TIME.tar.gz here if not given")


def run(options: argparse.Namespace) -> int:
    found = find_run(options.run, options.runs)
    facts = RunFacts(found.folder)
    secrets, note = known_secrets(found.folder)
    redact = Redactor(secrets, keep=commits_of(facts))
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    name = f"{found.folder.path.resolve().name}-bundle-{stamp}"
    output = Path(options.output or f"{name}.tar.gz")
    files = {redact(path): redact(text) for path, text in collect(found, facts)}
    masked = {kind: count for kind, count in sorted(redact.masked.items()) if count}
    files["README.txt"] = readme(found.folder, masked, note)
    write_archive(output, name, files)
    answer = {"file": str(output), "num_files": len(files), "num_bytes": output.stat().st_size, "masked": masked}
    if options.json:
        print(json.dumps({**answer, "note": note}, indent=2))
    else:
        said = ", ".join(f"{count} x {kind}" for kind, count in masked.items()) or "nothing looked like a secret"
        print(f"{output}: {len(files)} files, {answer['num_bytes']:,} bytes; masked: {said}")
        if note:
            print(f"note: {note}")
        print("look through it before you send it: it holds paths, host names and the text of logs")
    return EXIT_OK


def known_secrets(folder: RunFolder) -> tuple[dict[str, str], str | None]:
    """Tokens by name that may be in the run's files, and a note where the run's own could not be read."""
    spec = newest_spec(folder)
    place = spec.cluster.paths.secrets if spec else None
    if place is None:
        return secrets_at_hand(), None
    try:
        return {**secrets_at_hand(), **read_secrets(place)}, None
    except SecretsError as error:
        return secrets_at_hand(), f"keys were masked by their look alone: {error}"


def commits_of(facts: RunFacts) -> list[str]:
    """Words of 40 hex digits that are known to be no keys: the commit of the code and the recipe's pins."""
    recipe = facts.recipe
    git = facts.manifest.get("git") or {}
    pins = (git.get("commit"), recipe["model"]["revision"], recipe["data"]["revision"])
    return [str(pin) for pin in pins if pin]


def collect(found: Found, facts: RunFacts) -> Iterator[tuple[str, str]]:
    """``(path in the archive, text)``, before masking. What is not there is left out; a link is never followed."""
    folder = found.folder
    for name in WHOLE:
        yield from _file(folder.path / name, name, LONGEST_BYTES)
    yield "metrics-tail.jsonl", metrics_tail(folder.metrics)
    attempts = sorted((p for p in folder.attempts.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    for attempt in attempts[-NEWEST_ATTEMPTS:]:
        for path in sorted(attempt.glob("*")):
            size = LOG_TAIL_BYTES if path.suffix == ".log" else LONGEST_BYTES
            yield from _file(path, f"attempts/{attempt.name}/{path.name}", size)
    for path in sorted((folder.path / "slurm").glob("[0-9]*/*")):
        if path.suffix in (".json", ".sh", ".out", ".err"):
            yield from _file(path, f"slurm/{path.parent.name}/{path.name}", LOG_TAIL_BYTES)
    yield "files.txt", listing(folder.path)
    yield "environment-names.txt", "".join(f"{name}\n" for name in sorted(os.environ))
    yield "status.txt", _said(lambda: lines_of(status_of(found)))
    yield "why.txt", _said(lambda: lines_of_cause(explain(found)))
    if job := found.job or facts.job:
        shown = ask(["scontrol", "show", "job", "-dd", job])[1]
        yield "scontrol-show-job.txt", shown
        if output := re.search(r"^ *StdOut=(/.+)$", shown, re.MULTILINE):
            yield from _file(Path(output[1]), "job-output.txt", LOG_TAIL_BYTES)
        yield "sacct.txt", ask(["sacct", "-D", "-P", "-j", job, "-o", SACCT_COLUMNS])[1]
        yield "sinfo-reasons.txt", ask(["sinfo", "-R"])[1]


def _said(lines: Callable[[], Iterable[str]]) -> str:
    """The lines of another verb, or why it had none: a bundle is asked for when things are broken."""
    try:
        return "".join(f"{line}\n" for line in lines())
    except MoeRecipesError as error:
        return f"{error}\n"


def _file(path: Path, name: str, longest_bytes: int) -> Iterator[tuple[str, str]]:
    if path.is_symlink() or not path.is_file():
        return
    try:
        yield name, tail(path, longest_bytes)
    except OSError as error:
        yield f"{name}.unreadable", f"{error.strerror}\n"


def tail(path: Path, longest_bytes: int) -> str:
    """The end of a file, from the begin of a line: half a line could hide half a key."""
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - longest_bytes)
        file.seek(start)
        data = file.read()
    if start:
        data = f"[{start:,} bytes before]\n".encode() + data.partition(b"\n")[2]
    return data.decode(errors="replace")


def metrics_tail(path: Path) -> str:
    """The newest steps, without the tokens of every expert: those can be 100 kB a line."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        newest = deque(file, maxlen=METRICS_LINES)
    lines = []
    for line in newest:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        record.pop("expert_load", None)
        lines.append(json.dumps(record))
    return "".join(f"{line}\n" for line in lines)


def listing(root: Path) -> str:
    """Size, time and path of every file of the run, W&B's and token caches by folder only."""
    lines = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in ("wandb", "cache"))
        for name in sorted(files):
            path = Path(folder) / name
            facts = path.lstat()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(facts.st_mtime))
            lines.append(f"{facts.st_size:>15} {stamp} {path.relative_to(root)}\n")
    return "".join(lines)


def readme(folder: RunFolder, masked: dict[str, int], note: str | None) -> str:
    kinds = "".join(f"  {count} x {kind}\n" for kind, count in masked.items()) or "  nothing\n"
    extra = f"Note: {note}\n" if note else ""
    return (
        f"Support archive of {folder.path.resolve().name}. Ends of logs, the newest {NEWEST_ATTEMPTS} attempts, no"
        f" weights, no data.\nNames of environment variables only, never their values.\n"
        f"Replaced by <what it was>:\n{kinds}{extra}"
    )


def write_archive(output: Path, name: str, files: dict[str, str]) -> None:
    """Write the archive, for its owner's eyes only (mode 0600), whole or not at all.

    Raises:
        CannotWriteError: with the file and the system's reason.
    """
    temporary = output.with_name(f".{output.name}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for path, text in sorted(files.items()):
                data = text.encode()
                entry = tarfile.TarInfo(f"{name}/{path}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(data))
        temporary.replace(output)
    except OSError as error:
        with suppress(OSError):  # a read-only file system refuses this too
            temporary.unlink()
        raise CannotWriteError(f"{output}: cannot be written: {error.strerror}; name another place with -o") from error
