"""The verb ``bench``: compare this package with Transformers on a recipe, on this host's GPUs."""

from __future__ import annotations

import argparse
import os
import sys

from moe_recipes.launch.train import check_packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="RECIPE ...", help="`RECIPE --help` shows what may follow it"
    )


def run(options: argparse.Namespace) -> int:
    check_packages()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "moe_recipes.bench", *options.words])
