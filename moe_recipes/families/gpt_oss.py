"""GPT-OSS: attention with a learned sink for each head, a window in every second layer, and experts with biases."""

from __future__ import annotations

from moe_recipes.families.family import Experts, Family, Published, Router

GPT_OSS = Family(
    name="gpt_oss",
    title="GPT-OSS",
    model_types=("gpt_oss",),
    experts=Experts(
        count_key="num_local_experts",
        gated=True,
        activation="clamped swiglu",
        bias=True,
        transposed=True,
        interleaved=True,
        fused_on_disk=True,
    ),
    router=Router(logits="model", scores="softmax of the chosen", aux_loss=True),
    sdpa=False,  # a sink is one more column of the softmax
    documents="replaced",
    published=(
        Published(
            name="GPT-OSS-20B",
            source="openai/gpt-oss-20b",
            revision="6cee5e81ee83917806bbde320786a8fb61efebee",
            packaged="gpt_oss_20b",
            recipe="gpt_oss_20b",
            total=20.91,
            active=4.19,
            routed=19.12,
            format="mxfp4",
        ),
        Published(
            name="GPT-OSS-120B",
            source="openai/gpt-oss-120b",
            revision="b5c939de8f754692c1647ca79fbf85e8c1e70f8a",
            packaged="gpt_oss_120b",
            recipe="gpt_oss_120b",
            total=116.83,
            active=5.71,
            routed=114.70,
            format="mxfp4",
        ),
    ),
)
