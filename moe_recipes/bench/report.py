"""The committed measurements as Markdown: ``python -m moe_recipes.bench.report [--write]``.

Reads every ``benchmarks/*.json``. With ``--write`` it replaces the text between ``<!-- measured: begin -->`` and
``<!-- measured: end -->`` in the README and in docs/performance.md; a test holds both equal to the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
PAGES = ("README.md", "docs/performance.md")
HEAD = (
    "| recipe | GPUs | EP | rows | router | tok/s/GPU | Transformers | ratio | without optimizer"
    " | peak GiB allocated (reserved) | recompute |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def rows_of(path: Path) -> list[str]:
    """One table row for each pair of arms of a file."""
    card = json.loads(path.read_text())
    recipe = card["manifest"]["recipe"]["name"]
    num_ranks = card["manifest"]["recipe"]["parallel"]["fsdp_size"]
    gpu = card["gpus"][0].split(",")[0].removeprefix("NVIDIA ")
    pairs: dict[tuple[int, int, str], dict[str, dict[str, Any]]] = {}
    for result in card["results"]:
        key = result["ep_size"], result["micro_batch_size"], result["gate"]
        pairs.setdefault(key, {})[result["arm"]] = result
    gpus = f"{num_ranks} x {gpu}"
    return [_row(recipe, gpus, *key, arms.get("ours", {}), arms.get("transformers", {})) for key, arms in pairs.items()]


def _row(
    recipe: str, gpus: str, ep_size: int, rows: int, gate: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> str:
    def each(text: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(text(arm) if "tokens_per_s_per_gpu" in arm else "-" for arm in (ours, theirs))

    speed, other = ours.get("tokens_per_s_per_gpu"), theirs.get("tokens_per_s_per_gpu")
    cells = [
        f"`{recipe}`",
        gpus,
        str(ep_size),
        str(rows),
        gate,
        f"**{speed:,.0f}**" if speed else ours.get("failed", "missing"),
        f"{other:,.0f}" if other else theirs.get("failed", "missing"),
        f"{speed / other:.2f}" if speed and other else "-",
        each(lambda arm: f"{arm['tokens_per_s_per_gpu_without_optimizer']:,.0f}"),
        each(lambda arm: f"{arm['peak_allocated_gib']:.1f} ({arm['peak_reserved_gib']:.1f})"),
        each(lambda arm: arm["activation_checkpointing"]),
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
