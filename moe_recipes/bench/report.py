"""The committed measurements as Markdown: ``python -m moe_recipes.bench.report [--write]``.

Reads every ``benchmarks/*.json``. With ``--write`` it replaces the text between ``<!-- measured: begin -->`` and
``<!-- measured: end -->`` in the README and in docs/performance.md; a test holds both equal to the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
PAGES = ("README.md", "docs/performance.md")
HEAD = (
    "| recipe | GPUs | EP | router | tok/s/GPU | Transformers | ratio | without optimizer"
    " | peak GiB allocated (reserved) |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def rows_of(path: Path) -> list[str]:
    """One table row for each pair of arms of a file."""
    card = json.loads(path.read_text())
    recipe = card["manifest"]["recipe"]["name"]
    num_ranks = card["manifest"]["recipe"]["parallel"]["fsdp_size"]
    gpu = card["gpus"][0].split(",")[0].removeprefix("NVIDIA ")
    pairs: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for result in card["results"]:
        pairs.setdefault((result["ep_size"], result["gate"]), {})[result["arm"]] = result
    return [
        _row(recipe, f"{num_ranks} x {gpu}", ep_size, gate, arms["ours"], arms["transformers"])
        for (ep_size, gate), arms in pairs.items()
    ]


def _row(recipe: str, gpus: str, ep_size: int, gate: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    def memory(arm: dict[str, Any]) -> str:
        return f"{arm['peak_allocated_gib']:.1f} ({arm['peak_reserved_gib']:.1f})"

    speed, other = ours["tokens_per_s_per_gpu"], theirs["tokens_per_s_per_gpu"]
    bare, other_bare = (arm["tokens_per_s_per_gpu_without_optimizer"] for arm in (ours, theirs))
    cells = [
        f"`{recipe}`",
        gpus,
        str(ep_size),
        gate,
        f"**{speed:,.0f}**",
        f"{other:,.0f}",
        f"{speed / other:.2f}",
        f"{bare:,.0f} / {other_bare:,.0f}",
        f"{memory(ours)} / {memory(theirs)}",
    ]
    return f"| {' | '.join(cells)} |"


def table(folder: Path) -> str:
    """Every file of the folder, ending in a line that says what ran."""
    files = sorted(folder.glob("*.json"))
    lines = [*HEAD, *(row for path in files for row in rows_of(path))]
    packages = json.loads(files[0].read_text())["manifest"]["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "triton", "flashoptim"))
    lines += ["", f"Optimizer step included unless said. Pairs are ours / Transformers. Versions: {versions}."]
    return "\n".join(lines) + "\n"


def replaced(page: str, text: str) -> str:
    """The page with the text between its markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{text}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.bench.report")
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    text = table(Path("benchmarks"))
    sys.stdout.write(text)
    if write:
        for name in PAGES:
            page = Path(name)
            page.write_text(replaced(page.read_text(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
