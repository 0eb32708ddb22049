"""DeepSeek-V3: latent attention, three dense layers, then experts with a shared one, and a layer 61 that predicts the
token after the next."""

from __future__ import annotations

from moe_recipes.families.family import Experts, Family, Mtp, Published, Router

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    title="DeepSeek-V3",
    model_types=("deepseek_v3",),
    experts=Experts(count_key="n_routed_experts", gated=True, activation="silu"),
    router=Router(logits="float32", scores="sigmoid", groups=True, correction_bias=True),
    mtp=Mtp(
        prefix="model.layers.",
        after_layers=True,
        copies=(("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")),
    ),
    published=(
        Published(
            name="DeepSeek-V3 671B",
            source="deepseek-ai/DeepSeek-V3",
            revision="e815299b0bcbac849fa540c768ef21845365c9eb",
            packaged="deepseek_v3",
            recipe="deepseek_v3_671b",
            total=671.03,
            active=37.55,
            routed=653.91,
            mtp=11.61,
            format="fp8",
        ),
    ),
)
