"""Arguments that several verbs share, so that they are spelled and explained alike."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

CODE_DIR = Path(__file__).resolve().parents[2]
"""The clone that this package is used from."""

DEFAULT_CLUSTER = "clusters/local.yaml"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/")


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run")


def add_cpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even where there are GPUs")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="replace one key"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="answer on stdout in JSON")


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """``--cluster``, with the file that the scripts in slurm/ would take as its default."""
    parser.add_argument(
        "--cluster",
        default=os.environ.get("MOE_CLUSTER") or str(CODE_DIR / DEFAULT_CLUSTER),
        metavar="FILE",
        help=f"the cluster file; $MOE_CLUSTER or {DEFAULT_CLUSTER} if not given",
    )
