"""The committed measurements as Markdown: ``python -m moe_recipes.bench.report [--write]``.

Reads every ``benchmarks/*.json``. With ``--write`` it replaces the text between ``<!-- measured: begin -->`` and
``<!-- measured: end -->`` in the README and in docs/performance.md, and that between the like ``parts`` markers in the
latter; likewise ``layers``, from ``benchmarks/layers/*.json``. A test holds the pages equal to the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->"
_PERFORMANCE = "docs/performance.md"
PAGES = {"measured": ("README.md", _PERFORMANCE), "parts": (_PERFORMANCE,), "layers": (_PERFORMANCE,)}
PRODUCTS = ("grouped GEMM", "GEMM", "attention")
DISPATCHER = "moe_recipes_all_to_all"
REST = ("communication", "row moves", "elementwise", "copies", "optimizer", "idle")
HEAD = (
    "| recipe | GPUs | EP | rows | router | tok/s/GPU | Transformers | ratio | without optimizer"
    " | peak GiB allocated (reserved) | recompute |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)

LAYERS_HEAD = (
    "| model | GPU | EP | layer | rows x tokens | rows an expert | forward ms | forward + backward ms | TFLOP/s"
    " | share of the roofline | peak GiB |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def recipe_of(card: dict[str, Any]) -> str:
    """The recipe's name, and its dispatcher where that is not the default one."""
    recipe = card["manifest"]["recipe"]
    dispatcher = recipe["parallel"].get("ep_implementation", DISPATCHER)
    return f"`{recipe['name']}`" + ("" if dispatcher == DISPATCHER else f", {dispatcher.removeprefix('moe_recipes_')}")


def rows_of(path: Path) -> list[str]:
    """One table row for each pair of arms of a file."""
    card = json.loads(path.read_text())
    recipe = recipe_of(card)
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
        recipe,
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


def parts_table(folder: Path) -> str:
    """Where a step's time goes, by kind of kernel, of every result that was profiled, and the speed of the matrix
    products and attention alone: the bound that is left when nothing else takes time."""
    heads = ["recipe", "arm", "EP", "rows", "tok/s/GPU", "products alone", *PRODUCTS, *REST]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for path in sorted(folder.glob("*.json")):
        card = json.loads(path.read_text())
        for result in card["results"]:
            if not (parts := result.get("parts_ms")):
                continue
            tokens = result["tokens_per_s_per_gpu"] * result["step_s"]
            bound = tokens / sum(parts[name] for name in PRODUCTS) * 1000
            cells = [recipe_of(card), result["arm"], result["ep_size"]]
            cells += [result["micro_batch_size"], f"{result['tokens_per_s_per_gpu']:,.0f}", f"{bound:,.0f}"]
            cells += [f"{parts[name]:.0f}" for name in (*PRODUCTS, *REST)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", "Milliseconds of one profiled step; kernels of several streams overlap."]) + "\n"


def layer_row(card: dict[str, Any], found: dict[str, Any]) -> str:
    """One figure of a card of ``bench.layers`` as a row of a table."""
    share, routed = found["roofline_share"], found["rows_per_expert"]
    gpu = card["gpus"][0].split(",")[0].removeprefix("NVIDIA ") if card["gpus"] else "none"
    cells = [
        f"`{card['manifest']['recipe']['name']}`", gpu, str(card["ep_size"]), found["layer"],
        f"{found['batch']} x {found['seq_len']}", f"{routed:,.0f}" if routed else "-", f"{found['forward_ms']:.2f}",
        f"**{found['forward_backward_ms']:.2f}**", f"{found['tflops_per_s']:.0f}", f"{share:.0%}" if share else "-",
        f"{found['peak_gib']:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def layers_table(folder: Path) -> str:
    """Single layers, of every file below ``layers``."""
    cards = [json.loads(path.read_text()) for path in sorted((folder / "layers").glob("*.json"))]
    rows = [layer_row(card, found) for card in cards for found in card["results"]]
    return "\n".join([*LAYERS_HEAD, *rows]) + "\n"


TABLES = {"measured": table, "parts": parts_table, "layers": layers_table}


def replaced(page: str, text: str, name: str = "measured") -> str:
    """The page with the text between the markers of that name replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{text}{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.bench.report")
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    for name, pages in PAGES.items():
        text = TABLES[name](Path("benchmarks"))
        sys.stdout.write(text)
        for page in map(Path, pages if write else ()):
            page.write_text(replaced(page.read_text(), text, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
