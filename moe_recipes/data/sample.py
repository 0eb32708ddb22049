"""Read the first rows of every data source: ``python -m moe_recipes.data.sample --recipe-json JSON``.

Prints one line of JSON: ``{"rows", "sources"}``, or ``{"error", "exit_code"}``. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice

from moe_recipes.config.errors import EXIT_OK, DataError, MoeRecipesError
from moe_recipes.config.recipe import Data
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.data.rows import find_sources, read_rows
from moe_recipes.data.shapes import RowProblem, parse_row, shape_of

ROWS_A_SOURCE = 16


def read_sample(data: Data) -> tuple[int, int]:
    """``(rows, sources)`` that were read and parsed: at most ``ROWS_A_SOURCE`` rows of each source.

    Raises:
        DataError: a row cannot be learned from, or a source has none.
        MissingInputError, EnvironmentMismatchError: as ``find_sources`` and ``read_rows``.
    """
    rows = 0
    sources = []
    for key, entries in (("data.train", data.train), ("data.validation", data.validation)):
        sources += find_sources(entries, key=key, revision=data.revision)
    for source in sources:
        line = 0
        for line, row in islice(read_rows(source), ROWS_A_SOURCE):
            try:
                if isinstance(row, RowProblem):
                    raise row
                parse_row(row, shape=shape_of(row, shape=data.format))
            except RowProblem as problem:
                raise DataError(f"{source.where(line)}: {problem}") from problem
            rows += 1
        if line == 0:
            raise DataError(f"{source.name}: holds no row; remove it from the recipe, or copy it again")
    return rows, len(sources)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe-json", required=True)
    recipe = recipe_from_dict(json.loads(parser.parse_args().recipe_json))
    try:
        rows, sources = read_sample(recipe.data)
    except MoeRecipesError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    print(json.dumps({"rows": rows, "sources": sources}))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
