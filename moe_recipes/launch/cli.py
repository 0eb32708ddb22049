"""The command ``moe-recipes``: a table of verbs. Imports no torch; what needs torch is started as a new process.

A verb is a module with ``add_arguments(parser)`` and ``run(options) -> exit code``. Only the chosen one is imported: an
operator's command answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import moe_recipes
from moe_recipes.config.errors import EXIT_CANNOT_WRITE, EXIT_OK, MoeRecipesError, RecipeError, exit_code_of
from moe_recipes.launch.words import ERROR_PREFIX

EXIT_INTERRUPTED = 130


class Verb(NamedTuple):
    module: str
    help: str


VERBS = {
    "show": Verb("moe_recipes.launch.show", "print the resolved recipe and what follows from it"),
    "train": Verb("moe_recipes.launch.train", "train a recipe on this host, or go on with its run"),
    "export": Verb("moe_recipes.launch.export", "write RUN/export from the run's newest checkpoint"),
    "ckpt": Verb("moe_recipes.launch.ckpt", "list, verify, pin, prune, compare and export checkpoints"),
    "bench": Verb("moe_recipes.launch.bench", "compare with Transformers on this host's GPUs"),
    "launch": Verb("moe_recipes.launch.slurm.submit", "submit a recipe to Slurm"),
    "cluster": Verb("moe_recipes.launch.slurm.init", "write a cluster file from what Slurm says"),
    "image": Verb("moe_recipes.launch.image", "import or verify a container image"),
    "preflight": Verb("moe_recipes.launch.preflight.verb", "check nodes, container and files before a run"),
    "status": Verb("moe_recipes.launch.operator.status", "where a job or run stands"),
    "why": Verb("moe_recipes.launch.operator.why", "the first cause of a job's or run's end"),
    "logs": Verb("moe_recipes.launch.operator.logs", "print or follow the log of a rank"),
    "stop": Verb("moe_recipes.launch.operator.switches", "ask a run to save and stop at the next step"),
    "save": Verb("moe_recipes.launch.operator.switches", "ask a run for a checkpoint at the next step"),
    "prefetch": Verb("moe_recipes.launch.operator.prefetch", "fetch and check model and data of a recipe"),
    "wandb-sync": Verb("moe_recipes.launch.operator.wandb_sync", "send a run's offline W&B folder to the server"),
    "prove": Verb("moe_recipes.launch.prove", "hold the recipe, cut small, against one process of Transformers"),
    "rehearse": Verb("moe_recipes.launch.rehearse", "lay the true model out for all ranks, without weights or GPUs"),
    "bundle": Verb("moe_recipes.launch.operator.bundle", "pack what support needs of a job, without secrets"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are ours: one line, and the exit code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ")
        if words != message and "=" in words and not words.startswith("-"):
            raise RecipeError(f"{message}; write --set {words.split()[0]}")  # the form of sbatch slurm/x.sh
        raise RecipeError(f"{message}; see `{self.prog} --help`")


def make_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser with every verb's name, and the arguments of the chosen one."""
    parser = _Parser(prog="moe-recipes", description="Fine-tune mixture-of-experts models with expert parallelism.")
    parser.add_argument("--version", action="version", version=f"moe-recipes {moe_recipes.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        added = verbs.add_parser(name, help=verb.help.replace("%", "%%"), description=verb.help)
        if name == chosen:
            importlib.import_module(verb.module).add_arguments(added)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; a user's error is one line on stderr, or JSON on stdout."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(words), as_json="--json" in words)


def _run(words: list[str]) -> int:
    # Only --version and --help stand before a verb, and both end the command.
    chosen = words[0] if words and words[0] in VERBS else None
    options = make_parser(chosen).parse_args(words)
    if getattr(options, "cpu", False):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Transformers lays ranks out over any GPU that they can see
    code: int = importlib.import_module(VERBS[options.verb].module).run(options)
    return code


def guarded(command: Callable[[], int], *, as_json: bool) -> int:
    """The exit code of a command, whose user's error is printed. A process that a verb starts ends by this too."""
    try:
        code = command()
        sys.stdout.flush()  # a full disk behind `> FILE` shows here, and not when Python has left
        return code
    except MoeRecipesError as error:
        if as_json:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        else:
            print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`). Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        if exit_code_of(error) != EXIT_CANNOT_WRITE:
            raise
        print(f"{ERROR_PREFIX}{error.filename or 'stdout'}: cannot be written: {error.strerror}", file=sys.stderr)
        if error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CANNOT_WRITE


if __name__ == "__main__":
    sys.exit(main())
