"""The shakedown of a recipe: its own nodes, mesh, container and code, with few layers and random weights.

Three steps, in one job: train two and save, one rank is killed with SIGKILL, the job is requeued, the second start
resumes the saved step, trains the third, saves and exports. ``RUN-shakedown/shakedown.json`` has the verdict. What
breaks on a cluster (a mount, a port, a network interface, a file system, requeue itself) breaks here, in minutes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_recipes.config.checks import PACKAGE_PREFIX, check_model_config, check_recipe
from moe_recipes.config.errors import CannotWriteError, MissingInputError, RecipeError
from moe_recipes.config.model_config import PACKAGED_NAMES, read_model_config
from moe_recipes.config.recipe import Model, Parallel, Recipe
from moe_recipes.config.run_folder import RunFolder, now, write_json
from moe_recipes.plan.small_model import few_layers, narrow_widths

SUFFIX = "-shakedown"
STEPS = 3
SAVED_STEP = 2
"""The step after which the run is saved and a rank is killed."""

NARROW_SEQ_LEN = 32
KILL_VARIABLE = "MOE_SHAKEDOWN_KILL"
"""``RANK:STEP``: the trainer of that rank kills itself once that step or a later one is durable."""

KILL_EVENT = "shakedown kill"
VERDICT_SCHEMA_VERSION = 1

MTP_KEY = "num_nextn_predict_layers"
Mode = Literal["off", "full", "narrow"]


def shakedown_mode(environ: Mapping[str, str]) -> Mode:
    """What ``MOE_SHAKEDOWN`` asks for: ``1`` is a shakedown, ``narrow`` one that hosts without CUDA can train.

    Raises:
        RecipeError: another value.
    """
    value = environ.get("MOE_SHAKEDOWN", "")
    if value in ("", "0"):
        return "off"
    if value == "1":
        return "full"
    if value == "narrow":
        return "narrow"
    raise RecipeError(f"MOE_SHAKEDOWN={value!r} must be 1, or narrow for hosts without GPUs; unset it for a real run")


def shakedown_recipe(recipe: Recipe, *, narrow: bool = False, num_ranks: int | None = None) -> Recipe:
    """The recipe with one layer of each kind, random weights and tokens, three steps, and a run folder of its own.

    Layout, microbatch, sequence length, recomputation, dispatcher, kernels and dtype stay the recipe's, so that a step
    has the shapes of the real one. The model's config.json is read; where the model is not here, the package's copy.

    Args:
        narrow: small widths, float32 and short rows, for hosts without CUDA.
        num_ranks: how many ranks there are, if not the recipe's number; only with ``narrow``. The layout is scaled.
    Raises:
        RecipeError: another number of ranks without ``narrow``, or one over which the layout cannot be scaled.
        MissingInputError: no config.json to cut.
    """
    parallel = recipe.parallel
    if num_ranks is not None and num_ranks != parallel.num_ranks:
        if not narrow:
            raise RecipeError(
                f"a shakedown runs on the recipe's own {parallel.num_ranks} ranks, not on {num_ranks}; with"
                " MOE_SHAKEDOWN=narrow the layout is scaled, for hosts without GPUs"
            )
        parallel = scaled_layout(parallel, num_ranks)
    model, config = _small_model(recipe.model, narrow=narrow, ep_size=parallel.ep_size)
    small = replace(
        recipe,
        name=f"{recipe.name}{SUFFIX}",
        run_dir=None if recipe.run_dir is None else f"{Path(recipe.run_dir)}{SUFFIX}",
        model=model,
        parallel=parallel,
        data=replace(
            recipe.data,
            train=(),
            validation=(),
            validation_fraction=0.0,
            revision=None,
            format="random_tokens",
            cache_dir=None,
        ),
        optim=replace(recipe.optim, warmup_steps=0),
        train=replace(
            recipe.train,
            steps=STEPS,
            grad_accum_steps=1,
            validate_every_steps=0,
            mtp_loss_coef=recipe.train.mtp_loss_coef if config.get(MTP_KEY) else None,  # the package's copy has none
        ),
        checkpoint=replace(recipe.checkpoint, every_steps=SAVED_STEP, save_last=True, export=True),
        log=replace(recipe.log, every_steps=1, wandb="off"),
    )
    if narrow:
        small = replace(
            small,
            data=replace(small.data, seq_len=min(recipe.data.seq_len, NARROW_SEQ_LEN)),
            optim=replace(small.optim, name="adamw"),
            train=replace(small.train, micro_batch_size=1),
        )
    check_recipe(small)
    check_model_config(small, config)
    return small


def scaled_layout(parallel: Parallel, num_ranks: int) -> Parallel:
    """The layout over another number of ranks: as many replicas, and as many ranks that share an expert.

    Raises:
        RecipeError: the number of ranks is not a multiple of the replicas.
    """
    replicas = parallel.dp_replicate_size
    if num_ranks < 1 or num_ranks % replicas:
        raise RecipeError(
            f"{num_ranks} ranks cannot hold parallel.dp_replicate_size={replicas} replicas; start a multiple of that"
        )
    fsdp_size = num_ranks // replicas
    ep_size = fsdp_size // math.gcd(fsdp_size, parallel.efsdp_size)
    return replace(parallel, fsdp_size=fsdp_size, ep_size=math.gcd(ep_size, parallel.ep_size))


def _small_model(model: Model, *, narrow: bool, ep_size: int) -> tuple[Model, dict[str, Any]]:
    """The model section with the cuts in its overrides, and the config.json that comes of it."""
    random = replace(model, weights="random", tokenizer=None)
    try:
        config, _, _ = read_model_config(random)
    except MissingInputError:
        if model.source not in PACKAGED_NAMES:
            raise
        random = replace(random, source=f"{PACKAGE_PREFIX}{PACKAGED_NAMES[model.source]}", revision=None)
        config, _, _ = read_model_config(random)
    cuts = few_layers(config) | ({MTP_KEY: 1} if config.get(MTP_KEY) else {})
    if narrow:
        cuts |= narrow_widths(config, ep_size=ep_size)
        random = replace(random, dtype="float32")
    random = replace(random, config_overrides={**random.config_overrides, **cuts})
    return random, read_model_config(random)[0]


def kill_environment(folder: RunFolder, *, num_ranks: int, job_id: int) -> dict[str, str]:
    """What the trainers of this start are told, so that one rank dies once in a shakedown and then never again.

    Args:
        folder: the shakedown's.
        job_id: chooses the rank; another job kills another one.
    """
    if _events(folder, KILL_EVENT):
        return {}
    rank = (job_id * 2654435761 >> 8) % num_ranks
    return {KILL_VARIABLE: f"{rank}:{SAVED_STEP}"}


def start_afresh(folder: RunFolder) -> None:
    """Remove what an earlier shakedown left in its folder, so that this one trains and saves by itself.

    The host calls it once for a new job, not when a requeued job starts again. ``slurm/``, where the host keeps its
    own records, stays.

    Raises:
        RecipeError: the folder is not one of a shakedown.
        CannotWriteError: something in it cannot be removed.
    """
    if not folder.path.name.endswith(SUFFIX):
        raise RecipeError(f"{folder.path}: a shakedown's folder ends with {SUFFIX}; nothing was removed")
    try:
        for item in folder.path.iterdir() if folder.path.is_dir() else ():
            if item.name == "slurm":
                continue
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
    except OSError as error:
        raise CannotWriteError(
            f"{error.filename or folder.path}: cannot be removed: {error.strerror}; remove the folder by hand"
        ) from error


class Check(NamedTuple):
    """One thing that a shakedown must have shown."""

    name: str
    passed: bool
    found: str


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON objects of a file of lines; none if it is not there."""
    found = []
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _events(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    return [record for record in _lines(folder.events) if record.get("event") == name]


def checks(folder: RunFolder) -> list[Check]:
    """What the run folder of a shakedown shows, in the order in which it must have happened."""
    status = folder.read_status() or {}
    kills, resumes = _events(folder, KILL_EVENT), _events(folder, "resume")
    losses = {int(record["step"]): record.get("loss") for record in _lines(folder.metrics) if "step" in record}
    finite = all(isinstance(loss, int | float) and math.isfinite(loss) for loss in losses.values())
    attempts = [item for item in folder.attempts.glob("*") if item.name.isdigit()]
    saved = [record.get("step") for record in _events(folder, "checkpoint")]
    resumed = [int(r["step"]) for r in resumes if kills and str(r["time"]) > str(kills[0]["time"])]
    exported = bool(_events(folder, "export")) and _is_whole(folder.export)
    return [
        Check("trained", finite and set(losses) == {*range(1, STEPS + 1)}, f"losses of steps {sorted(losses)}"),
        Check("saved", {SAVED_STEP, STEPS} <= {*saved}, f"checkpoints of steps {saved}"),
        Check("killed", bool(kills), f"rank {kills[0].get('rank')}" if kills else "no rank was killed"),
        Check("requeued", len(attempts) >= 2, f"{len(attempts)} starts"),
        Check("resumed", bool(resumed) and resumed[0] >= SAVED_STEP, f"after the kill from steps {resumed}"),
        Check("exported", exported, str(folder.export)),
        Check("done", status.get("state") == "done", f"state {status.get('state')}, step {status.get('step')}"),
    ]


def _is_whole(export: Path) -> bool:
    """A config.json, and every weight file that the index names."""
    index = export / "model.safetensors.index.json"
    try:
        names = {*json.loads(index.read_bytes())["weight_map"].values()} if index.exists() else {"model.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    files = [export / "config.json", *(export / str(name) for name in names)]
    return all(path.is_file() and path.stat().st_size > 0 for path in files)


def write_verdict(folder: RunFolder) -> bool:
    """Write ``shakedown.json`` into the shakedown's run folder; the supervisor calls it when the job has ended.

    Returns:
        True if every check passed.
    Raises:
        CannotWriteError: the folder cannot be written.
    """
    found = checks(folder)
    passed = all(check.passed for check in found)
    first = (_lines(folder.events) or [{}])[0]
    write_json(
        folder.path / "shakedown.json",
        {
            "schema_version": VERDICT_SCHEMA_VERSION,
            "verdict": "PASS" if passed else "FAIL",
            "checks": [check._asdict() for check in found],
            "first_event": first.get("time"),
            "time": now(),
        },
    )
    return passed
