"""The recipe: what to train and how, as frozen data. No torch, standard library only.

A recipe file is YAML with one mapping a section (``model``, ``parallel``, ``data``, ``optim``, ``train``,
``checkpoint``, ``log``, ``kernels``). ``resolve.py`` reads it; rules that span several sections live in ``checks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and where its weights and tokenizer come from."""

    source: str
    """A folder, a Hugging Face id, or ``package:NAME`` for a config.json that is in ``moe_recipes/models/configs``."""

    revision: str | None = None
    """Commit of a Hugging Face id."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """``random`` needs only a config.json; values depend on ``train.seed`` and not on the layout."""

    config_overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json to replace (``num_hidden_layers: 16``). Only with ``weights: random``."""

    tokenizer: str | None = None
    """Folder or Hugging Face id of the tokenizer; the model's source if not given."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage and compute dtype of the weights. What a family keeps in float32 stays float32."""

    attn_implementation: str = "sdpa"
    """Attention backend by Transformers' name; or ``moe_recipes``, fused also for packed documents, windows and sinks.
    GPT-OSS, which has no ``sdpa``, gets that one for it."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the ranks are laid out. Names and meaning are those of ``transformers.distributed.DistributedConfig``."""

    fsdp_size: int = 1
    """Ranks that shard the dense parameters."""

    ep_size: int = 1
    """Ranks that hold distinct experts. Borrowed from ``fsdp_size``, so it adds no ranks."""

    dp_replicate_size: int = 1
    """Replicas of the sharded model (HSDP)."""

    ep_implementation: str = "moe_recipes_all_to_all"
    """The dispatcher, by its name in Transformers' ``EPImplementationInterface``."""

    expert_capacity_factor: float = 1.15
    """Only for ``moe_recipes_symmetric``: room for routed rows, over what the layer had on the rank in its fullest of
    the last 16 steps. A step that needs more is computed again by all-to-all, with the same result."""

    reduce_dtype: Literal["model", "float32"] = "float32"
    """Dtype of the gradient reduction. ``model`` halves its traffic and rounds every partial sum."""

    @property
    def num_ranks(self) -> int:
        return self.fsdp_size * self.dp_replicate_size

    @property
    def efsdp_size(self) -> int:
        """Ranks that hold the same experts and shard them. Derived, never set."""
        return self.fsdp_size // self.ep_size


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learned from, and how rows become batches."""

    train: tuple[str, ...] = ()
    """Files (JSONL, Parquet), folders of them, globs, or ``hf:ID`` / ``hf:ID:SPLIT`` for a Hugging Face data set."""

    validation: tuple[str, ...] = ()
    """The held-out rows, in the same forms. Excludes ``validation_fraction``."""

    validation_fraction: float = 0.0
    """Share of the training rows that is held out, chosen by a hash of the row."""

    revision: str | None = None
    """Commit of the Hugging Face data sets."""

    format: Literal["auto", "messages", "prompt_completion", "text", "squad", "random_tokens"] = "auto"
    """Shape of a row. ``squad``, never found by ``auto``: a passage, a question and the first of its answers.
    ``random_tokens`` needs no files: uniform tokens, for benchmarks and smoke tests."""

    seq_len: int
    """Tokens a packed row holds."""

    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that carry loss: assistant turns (or completions) only, or every token."""

    long_rows: Literal["error", "split", "truncate", "skip"] = "error"
    """What to do with a row of more than ``seq_len`` tokens. Anything but ``error`` is counted and logged."""

    packing: bool = True
    """Fill each row of ``seq_len`` tokens with several documents that never see each other."""

    shuffle: bool = True
    """Visit the packed rows in an order drawn from ``train.seed`` and the epoch."""

    cache_dir: str | None = None
    """Where token caches live; ``RUN/cache`` if not given."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimizer and schedule."""

    name: Literal["auto", "adamw", "lean_adamw", "flash_adamw"] = "auto"
    """``auto``: the one that moves weights of ``model.dtype``, ``lean_adamw`` for bfloat16 and ``adamw`` for float32.
    ``adamw``: torch's, states in the weights' dtype, so use float32 weights. ``lean_adamw``: bfloat16 weights with an
    exact float32 master (16-bit remainder) and 8-bit moments, 8.1 bytes a parameter with the gradient.
    ``flash_adamw``: flashoptim's of the same kind, CUDA only; resumes on the layout that saved alone."""

    lr: float
    """Peak learning rate."""

    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; not applied to norms and biases."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    """Learning rate at the last step over the peak."""

    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 leaves gradients alone."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop."""

    steps: int
    """Optimizer steps in the whole run."""

    micro_batch_size: int = 1
    """Rows of ``data.seq_len`` tokens a rank computes at once."""

    grad_accum_steps: int = 1
    """Microbatches a rank computes for one optimizer step."""

    activation_checkpointing: Literal["none", "full"] = "full"
    """``full``: keep each layer's input and recompute the layer in the backward pass, never routing again."""

    seed: int = 0
    deterministic: bool = False
    """Ask torch for deterministic algorithms; slower."""

    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss, as Transformers defines it, of each rank's own tokens. 0: no such loss."""

    router_z_loss_coef: float = 0.0
    """Weight of the router z-loss, the mean over tokens of `logsumexp(router logits)^2`, summed over the decoder
    layers. 0: no such loss."""

    router_bias_update_rate: float = 0.0
    """Step of the routers' correction biases (DeepSeek-V3, Nemotron-H): after each optimizer step up by this for
    experts with less than their layer's mean load over all ranks and microbatches, down for those with more. 0: frozen.
    """

    mtp_loss_coef: float | None = None
    """Weight of the multi-token-prediction loss, mean over the depths, each over the number of label tokens. `null`:
    0.1 where the checkpoint has such layers (DeepSeek-V3, Nemotron-H). 0: they are kept and exported as they were."""

    validate_every_steps: int = 0
    """0: never."""

    validation_batches: int = 8
    """Global microbatches of held-out data a validation reads."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Resumable state, and the Hugging Face export."""

    every_steps: int = 0
    """0: only at the end and when asked to stop."""

    keep_last: int = 2
    """Complete checkpoints that stay; older ones are removed, unless they are pinned, or the run resumed from them."""

    keep_best: int = 0
    """As many checkpoints of least validation loss stay as well, of those at whose step it was measured."""

    fall_back: bool = True
    """Resume from the checkpoint before where the newest is damaged, and say so. ``false``: end with 74 instead."""

    asynchronous: bool = False
    """Write periodic checkpoints while training goes on: training stops only to copy its state into host memory.
    Where that is too short the run says so and saves synchronously."""

    mtbf_hours: float | None = None
    """Mean hours between failures of all nodes of the run; from it and the measured saves follows how often to save.
    """

    save_last: bool = True
    """Save after the last step."""

    export: bool = True
    """Write ``RUN/export`` after the last step."""

    reload_export: bool = True
    """Load the export in plain Transformers, and in installed serving engines, before it takes its place."""


@dataclass(frozen=True, kw_only=True)
class Log:
    every_steps: int = 1
    expert_load_every_steps: int = 10
    """How often the tokens of every expert of every layer are written to metrics.jsonl; 0: never."""

    wandb: Literal["auto", "offline", "off"] = "auto"
    """``auto``: online with a key, offline without one, off where wandb is not installed."""

    wandb_project: str = "moe-recipes"


@dataclass(frozen=True, kw_only=True)
class Kernels:
    experts: str = "moe_recipes"
    """Expert computation by its name in Transformers' ``ALL_EXPERTS_FUNCTIONS``, or ``eager``."""

    loss: Literal["fused", "logits"] = "fused"
    """``fused``: cross-entropy in chunks, the logits never exist whole. ``logits``: Transformers' way."""

    loss_chunk_tokens: int = 2048
    """Tokens a chunk of the fused loss holds; its memory is this times the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    run_dir: str | None = None
    """Where the run lives; ``runs/NAME`` if not given."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    data: Data
    optim: Optim
    train: Train
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    kernels: Kernels = field(default_factory=Kernels)

    def __post_init__(self) -> None:
        if self.optim.name == "auto":
            chosen = replace(self.optim, name="lean_adamw" if self.model.dtype == "bfloat16" else "adamw")
            object.__setattr__(self, "optim", chosen)

    @property
    def rows_per_step(self) -> int:
        """Packed rows that one optimizer step reads, over all ranks."""
        return self.parallel.num_ranks * self.train.micro_batch_size * self.train.grad_accum_steps

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.data.seq_len
