"""What a model family is, as frozen data. Standard library only; nothing of this package is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

CORRECTION_BIAS = "e_score_correction_bias"
"""Router buffer that is added to the scores for the choice of experts, and not to their weights; always float32."""

EXPERT_COUNT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""Keys of config.json that may hold the number of experts, also of families that are not declared here."""

PROOF_TOLERANCE = 1e-5
"""Relative error in float32 that a proof allows, of every family alike: sums in another order differ by a few 1e-6 at
most."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """How routed experts lie in memory and on disk, and what they compute."""

    count_key: str
    """Key of config.json with their number."""

    gated: bool
    activation: str
    bias: bool = False
    transposed: bool = False
    """Weights are ``[E, in, out]`` and not ``[E, out, in]``."""

    interleaved: bool = False
    """Rows of gate and up take turns; otherwise all of gate, then all of up."""

    fused_on_disk: bool = False
    """One tensor a layer holds all experts; otherwise one tensor an expert and matrix."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """The numbers of a router, as Transformers computes them."""

    logits: Literal["model", "float32"]
    """Dtype of the product with the router's weight."""

    scores: Literal["softmax", "sigmoid", "softmax of the chosen"]
    groups: bool = False
    """Experts are chosen within the best groups of them."""

    correction_bias: bool = False
    """There is a buffer ``CORRECTION_BIAS``, frozen unless the recipe moves it."""

    aux_loss: bool = False
    """Transformers defines a load-balancing loss for the family."""


@dataclass(frozen=True, kw_only=True)
class Mtp:
    """Where a checkpoint keeps the layers that predict further tokens (multi-token prediction)."""

    prefix: str
    """Their tensors are called ``prefix + NUMBER + "."``."""

    after_layers: bool
    """Numbers go on after the model's own layers; otherwise they start at 0."""

    block_keys: tuple[str, ...] = ()
    """Keys of config.json that list the layers of one block, the first that is set; without one a block is a layer."""

    block: tuple[str, ...] = ("layer",)
    """The layers of one block where no key lists them."""

    reused_depth: int = 1
    """Depths for which a single block of a checkpoint was trained."""

    loss_coef: float = 0.1
    """Weight of their loss where the recipe leaves it open."""

    copies: tuple[tuple[str, str], ...] = ()
    """Tensors of a block that repeat one of the model, and which. Written again from the model on export."""

    def layers_of_block(self, config: Mapping[str, Any]) -> list[str]:
        """The kinds of layers of one block, as config.json spells them."""
        return list(next((config[key] for key in self.block_keys if config.get(key)), self.block))

    def number_of(self, tensor: str, config: Mapping[str, Any]) -> int | None:
        """The number of the layer that a checkpoint's tensor belongs to; None for a tensor of the model's own."""
        rest = tensor.removeprefix(self.prefix)
        number = rest.partition(".")[0]
        if rest == tensor or not number.isdecimal():
            return None
        return int(number) if not self.after_layers or int(number) >= int(config["num_hidden_layers"]) else None

    def num_blocks(self, config: Mapping[str, Any]) -> int:
        """Blocks that the config speaks of; a block that is reused is there once."""
        said = int(config.get("num_nextn_predict_layers") or 0)
        return min(1, said) if self.reused_depth > 1 else said


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model of a family. Counts are in billions of parameters, to two decimals."""

    name: str
    source: str
    """Hugging Face id."""

    revision: str
    """Commit of the repository that its recipe reads."""

    packaged: str
    """Name of its config in ``moe_recipes/models/configs``."""

    recipe: str
    """Stem of the recipe that fine-tunes it."""

    total: float
    """Without the layers that predict further tokens."""

    active: float
    """Of ``total``, what one token uses; the embedding counts whole."""

    routed: float
    """Of ``total``, what lies in routed experts."""

    mtp: float = 0.0
    """Layers that predict further tokens, copies of other tensors left out."""

    file_bytes: int | None = None
    """``metadata.total_size`` of the published index, where it is known."""

    format: Literal["bf16", "fp8", "mxfp4"] = "bf16"
    """What the published files hold: brain floats, 8-bit floats with a scale for 128 x 128 (the experts and most other
    matrices), or 4-bit floats with a scale for 32 (the experts alone)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between model families."""

    name: str
    title: str
    model_types: tuple[str, ...]
    """``model_type`` of config.json."""

    experts: Experts
    router: Router
    published: tuple[Published, ...]
    sdpa: bool = True
    """Transformers computes the family's attention by ``sdpa``."""

    float32: tuple[str, ...] = ()
    """Parameters of a layer's mixer that stay float32 and whole on every rank, whatever ``model.dtype``."""

    documents: Literal["transformers", "replaced"] = "transformers"
    """Who keeps documents of a packed row apart: Transformers' base model as it is, or the class that
    ``models/documents.py`` puts in its place."""

    mtp: Mtp | None = None
