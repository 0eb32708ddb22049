"""The file of bad nodes: entries expire, are renewed, and survive several writers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_recipes.config.errors import CannotWriteError, CorruptCheckpointError
from moe_recipes.launch.slurm import excluded

NOW = 1_800_000_000.0


def test_an_entry_says_why_and_expires(tmp_path: Path) -> None:
    path = tmp_path / "new" / "excluded_nodes.json"
    assert excluded.read(path) == []
    excluded.add(path, "node7", reason="rank 3 was killed", job="12", hours=24, at=NOW)
    (entry,) = excluded.read(path, at=NOW + 24 * 3600 - 1)
    assert (entry.node, entry.reason, entry.job) == ("node7", "rank 3 was killed", "12")
    assert (entry.time, entry.expires) == ("2027-01-15T08:00:00Z", "2027-01-16T08:00:00Z")
    assert excluded.read(path, at=NOW + 24 * 3600) == []


def test_a_node_that_fails_again_is_renewed_and_expired_ones_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "excluded_nodes.json"
    excluded.add(path, "node1", reason="old", job="1", hours=1, at=NOW)
    excluded.add(path, "node2", reason="first", job="2", hours=10, at=NOW)
    excluded.add(path, "node2", reason="second", job="3", hours=10, at=NOW + 7200)
    stored = json.loads(path.read_text())["nodes"]
    assert [(one["node"], one["reason"]) for one in stored] == [("node2", "second")]
    assert [one.node for one in excluded.read(path, at=NOW + 11 * 3600)] == ["node2"]


@pytest.mark.parametrize("text", ["{", "[]", '{"nodes": [{"node": "a"}]}', '{"nodes": 3}', '{"nodes": ["a"]}'])
def test_a_damaged_file_is_told_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "excluded_nodes.json"
    path.write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"excluded_nodes.json.*remove it to use all nodes again"):
        excluded.read(path)
    with pytest.raises(CorruptCheckpointError):
        excluded.add(path, "node1", reason="x", job="1", hours=1)
    assert path.read_text() == text


def test_a_place_that_cannot_be_written_is_73(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="cannot be written"):
        excluded.add(tmp_path / "file" / "excluded_nodes.json", "node1", reason="x", job="1", hours=1)


def test_no_entry_of_several_writers_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "excluded_nodes.json"
    code = f"""
import sys
from moe_recipes.launch.slurm import excluded
for n in range(10):
    excluded.add({str(path)!r}, f"node{{sys.argv[1]}}-{{n}}", reason="x", job="1", hours=1)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    assert len(excluded.read(path)) == 40
