"""Prepare Hugging Face data sets as a training opens them: ``python -m moe_recipes.data.fetch_hub REVISION ENTRY...``.

Run where there is a network, before jobs on nodes without one: the prepared tables stay in the cache of ``datasets``.
"""

from __future__ import annotations

import sys

from moe_recipes.config.errors import MoeRecipesError
from moe_recipes.data.rows import find_sources
from moe_recipes.launch.words import ERROR_PREFIX


def main(revision: str, *entries: str) -> int:
    """Open every ``hf:ID:SPLIT`` at the revision. Returns the exit code; an error is one line on stderr."""
    try:
        for source in find_sources(entries, key="data", revision=revision):
            print(f"{source.name}: {len(source.dataset):,} rows")
    except MoeRecipesError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
