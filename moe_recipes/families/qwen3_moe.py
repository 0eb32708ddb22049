"""Qwen3-MoE: attention with normed queries and keys, and experts, in every layer; no shared expert."""

from __future__ import annotations

from moe_recipes.families.family import Experts, Family, Published, Router

QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    model_types=("qwen3_moe",),
    experts=Experts(count_key="num_experts", gated=True, activation="silu"),
    router=Router(logits="model", scores="softmax", aux_loss=True),
    published=(
        Published(
            name="Qwen3-30B-A3B",
            source="Qwen/Qwen3-30B-A3B",
            revision="ad44e777bcd18fa416d9da3bd8f70d33ebb85d39",
            packaged="qwen3_30b_a3b",
            recipe="qwen3_30b",
            total=30.53,
            active=3.35,
            routed=28.99,
            file_bytes=61_064_245_248,
        ),
        Published(
            name="Qwen3-235B-A22B",
            source="Qwen/Qwen3-235B-A22B",
            revision="8efa61729e24bd65b1d152b5ab5409052aa80e65",
            packaged="qwen3_235b_a22b",
            recipe="qwen3_235b",
            total=235.09,
            active=22.19,
            routed=227.10,
        ),
    ),
)
