"""Single layers at true size, as one rank of an expert-parallel group sees them, on one device.

    python -m moe_recipes.bench.layers nemotron_ultra_550b --ep-size 64 --batches 1,2

One layer of each kind of the recipe's model (Mamba, attention, experts) is built with random weights and runs forward
and backward on random hidden states. The layer of experts has the whole router, the rank's share of the experts and all
that is dense. Each token chooses among all experts; then rows go out and come back as over ``ep_size`` ranks, one for
each (token, rank), but in a loop: this rank computes the rows that it would send. Under a router at its random
initialisation it would receive as many, so every expert has ``batch x seq_len x ep_size x K / E`` rows.

Included: norm, mixer, residual sum; router, packing and unpacking of rows, latent projections, shared expert.
Not included: the all-to-all itself, FSDP's gathers and reductions, recomputation, optimizer, embedding and head.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from moe_recipes.bench.__main__ import check_clock, gpus, whole_numbers
from moe_recipes.bench.report import LAYERS_HEAD, layer_row
from moe_recipes.config.errors import InfrastructureError, MoeRecipesError, RecipeError, did_you_mean
from moe_recipes.config.manifest import make_manifest
from moe_recipes.config.model_config import PACKAGED_NAMES, override_config
from moe_recipes.config.recipe import Model, Recipe
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import write_json
from moe_recipes.kernels.rows import make_row_map, sum_rows, take_rows
from moe_recipes.models.auto import AutoModelForCausalLM
from moe_recipes.models.blocks import MoeBlock, moe_blocks
from moe_recipes.models.build import Source, load_config, read_source
from moe_recipes.moe.experts import routed_experts
from moe_recipes.plan.flops import nemotron_h_forward_flops, peak_flops
from moe_recipes.plan.small_model import few_layers

BANDWIDTH = {"H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}
"""Memory bandwidth by the vendor's datasheets, bytes/s; the other axis of the roofline."""

KINDS = {"moe": "experts", "full_attention": "attention", "mlp": "dense MLP", "linear_attention": "mamba"}
"""Names of the kinds of layers, in the order in which they are measured: the Mamba kernels take longest to compile."""

VOCAB_SIZE = 128
"""Of the model that is built: embedding and head are not measured."""


def one_layer_of_each(recipe: Recipe, ep_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model with one layer of each kind and this rank's share of the experts; and the whole model's config.

    Raises:
        RecipeError: another family than Nemotron-H, or ``ep_size`` does not divide the experts.
    """
    name = PACKAGED_NAMES.get(recipe.model.source)
    model = Model(source=f"package:{name}", weights="random") if name else recipe.model
    source = read_source(
        Recipe(name=recipe.name, model=model, data=recipe.data, optim=recipe.optim, train=recipe.train)
    )
    config = source.config
    if config.get("model_type") != "nemotron_h":
        raise RecipeError(f"bench.layers measures layers of nemotron_h, not of {config.get('model_type')!r}")
    if ep_size < 1 or config["n_routed_experts"] % ep_size:
        raise RecipeError(f"--ep-size {ep_size} does not divide the model's {config['n_routed_experts']} experts")
    few = override_config(config, few_layers(config) | {"vocab_size": VOCAB_SIZE})
    local = override_config(few, {"n_routed_experts": config["n_routed_experts"] // ep_size})
    # Ids beyond the small vocabulary would be refused.
    local |= {key: 0 for key in local if key.endswith("_token_id") and isinstance(local[key], int)}
    with torch.device(_device()):
        built = AutoModelForCausalLM.from_config(_config_of(source, local), dtype=getattr(torch, recipe.model.dtype))
        whole = _config_of(source, few)
        for block in moe_blocks(built):
            assert block.router is not None
            _give_router(built.get_submodule(block.name.rpartition(".")[0]), block, type(block.router)(whole))
    _spread(built)
    return built, config


def _config_of(source: Source, config: dict[str, Any]) -> Any:
    changed = Source(folder=source.folder, config=config, config_json=json.dumps(config).encode())
    with tempfile.TemporaryDirectory() as folder:
        return load_config(changed, Path(folder))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _give_router(mixer: nn.Module, block: MoeBlock, router: nn.Module) -> None:
    """A router over all experts, and experts that are reached through the loop."""
    name = next(name for name, child in mixer.named_children() if child is block.router)
    setattr(mixer, name, router)
    experts, num_ranks = block.experts, router.num_experts // block.experts.num_experts
    experts.forward = lambda x, index, weight: looped_experts(  # type: ignore[method-assign]
        experts, x, index, weight, num_ranks=num_ranks
    )


def _spread(model: nn.Module) -> None:
    """Router weights that spread tokens evenly: zeros, as Transformers leaves them, send all to the same experts."""
    generator = torch.Generator(_device()).manual_seed(0)
    for block in moe_blocks(model):
        assert block.router is not None
        with torch.no_grad():
            block.router.weight.normal_(std=0.02, generator=generator)


def looped_experts(experts: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, num_ranks: int) -> Tensor:
    """What one rank does for one layer of experts, with its own rows in place of those of other ranks: ``[T, D]``.

    Expert i of rank p is stood for by local expert i, so every routed row of this rank is computed here.
    """
    num_tokens, top_k = index_TK.shape
    rank_TK, local_TK = index_TK // experts.num_experts, index_TK % experts.num_experts
    goes_PT = (rank_TK == torch.arange(num_ranks, device=index_TK.device)[:, None, None]).any(dim=2)
    rank_S, token_S = goes_PT.nonzero(as_tuple=True)
    sent = make_row_map(token_S * num_ranks + rank_S, num_tokens=num_tokens, num_slots=num_ranks)
    expert_SK = torch.where(rank_TK[token_S] == rank_S[:, None], local_TK[token_S], experts.num_experts)
    y_SD = routed_experts(
        experts, take_rows(x_TD, sent), expert_SK, take_rows(weight_TK, sent), num_rows=num_tokens * top_k
    )
    return sum_rows(y_SD, sent)


def seconds(work: Callable[[], object], *, warmup: int, steps: int) -> float:
    """Median wall time of one call, the device's queue empty before and after."""
    durations = []
    for number in range(warmup + steps):
        _wait()
        start = time.perf_counter()
        work()
        _wait()
        if number >= warmup:
            durations.append(time.perf_counter() - start)
    return median(durations)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forward_flops(config: dict[str, Any], kind: str, *, seq_len: int) -> float:
    """Forward FLOPs a token of one layer of a kind; the head is left out."""
    one = {**config, "layers_block_type": [kind]}
    parts = nemotron_h_forward_flops(one, seq_len=seq_len)
    return sum(flops for part, flops in parts.items() if part != "head")


def roofline_s(flops: float, moved_bytes: float) -> float | None:
    """Seconds that the arithmetic at the dense peak or the traffic at full bandwidth takes, whichever is longer."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak, bandwidth = peak_flops(name), next((rate for key, rate in BANDWIDTH.items() if key in name), None)
    return max(flops / peak, moved_bytes / bandwidth) if peak and bandwidth else None


def measure(layer: nn.Module, *, shape: tuple[int, int, int], warmup: int, steps: int) -> dict[str, float]:
    """Milliseconds of a forward and of a forward with backward, and the peak of allocated memory while they run."""
    parameter = next(layer.parameters())
    hidden = torch.randn(shape, device=parameter.device, dtype=torch.bfloat16).to(parameter.dtype).requires_grad_()
    grad = torch.randn_like(hidden)

    def forward() -> Tensor:
        out = layer(hidden)
        return out[0] if isinstance(out, tuple) else out

    def both() -> None:
        forward().backward(grad)
        hidden.grad = None
        layer.zero_grad(set_to_none=True)

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    both_s = seconds(both, warmup=warmup, steps=steps)
    forward_s = seconds(forward, warmup=1, steps=steps)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "forward_ms": forward_s * 1e3,
        "forward_backward_ms": both_s * 1e3,
        "weights_gib": sum(p.numel() * p.element_size() for p in layer.parameters()) / 2**30,
        "peak_gib": peak / 2**30,
        "peak_above_weights_gib": (peak - held) / 2**30,
    }


def results(recipe: Recipe, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One measured row for each kind of layer and batch size."""
    model, config = one_layer_of_each(recipe, arguments.ep_size)
    model.train()
    seq_len, hidden = recipe.data.seq_len, config["hidden_size"]
    wanted = [kind for kind in KINDS if KINDS[kind] in arguments.layers.split(",")]
    layers = {layer.block_type: layer for layer in model.base_model.layers}
    for kind, layer in ((kind, layers[kind]) for kind in wanted if kind in layers):
        for rows in whole_numbers(arguments.batches, "--batches"):
            tokens = rows * seq_len
            found = measure(layer, shape=(rows, seq_len, hidden), warmup=arguments.warmup, steps=arguments.steps)
            flops = 3 * tokens * forward_flops(config, kind, seq_len=seq_len)
            element = next(layer.parameters()).element_size()
            # Weights are read twice and their gradients written; hidden states and gradients pass in and out.
            moved = 3 * found["weights_gib"] * 2**30 + 4 * tokens * hidden * element
            bound, taken = roofline_s(flops, moved), found["forward_backward_ms"] / 1e3
            routed = kind == "moe" and tokens * config["num_experts_per_tok"] * arguments.ep_size
            yield {
                "layer": KINDS[kind],
                "batch": rows,
                "seq_len": seq_len,
                "rows_per_expert": routed / config["n_routed_experts"] if routed else None,
                **found,
                "tflops_per_s": flops / taken / 1e12,
                "roofline_ms": bound and bound * 1e3,
                "roofline_share": bound and bound / taken,
            }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.bench.layers")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("--ep-size", type=int, help="ranks that hold distinct experts; the recipe's own if not given")
    parser.add_argument("--batches", default="1", help="comma-separated rows of data.seq_len tokens")
    parser.add_argument("--layers", default=",".join(KINDS.values()), help="comma-separated; all if not given")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, help="JSON file; RECIPE's name and .layers.json in this folder if not given"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="KEY=VALUE")
    arguments = parser.parse_args()
    out = arguments.out or Path(f"{Path(arguments.recipe).stem}.layers.json")
    try:
        if not out.parent.is_dir():
            raise InfrastructureError(f"--out {out}: the folder is not there")
        for name in arguments.layers.split(","):
            if name not in KINDS.values():
                raise RecipeError(f"--layers: no layer {name!r}{did_you_mean(name, KINDS.values())}")
        check_clock(steps=arguments.steps, warmup=arguments.warmup)
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.ep_size is None:
            arguments.ep_size = recipe.parallel.ep_size
        words = [out.name if word == str(arguments.out) else word for word in sys.argv[1:]]
        command = ["python", "-m", "moe_recipes.bench.layers", *words]
        card: dict[str, Any] = {"gpus": gpus(), "ep_size": arguments.ep_size, "results": []}
        card["manifest"] = {**make_manifest(recipe_to_dict(recipe)), "command": command}
        sys.stdout.write("\n".join(LAYERS_HEAD) + "\n")
        for found in results(recipe, arguments):
            card["results"].append(found)
            write_json(out, card)  # each time: a call that is cut short keeps what it measured
            sys.stdout.write(f"{layer_row(card, found)}\n")
            sys.stdout.flush()
    except MoeRecipesError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
