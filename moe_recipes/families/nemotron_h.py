"""Nemotron-H (Nemotron 3): Mamba, attention without rope, and experts, one of them a layer.

Super and Ultra compute their experts in a latent of a quarter of the width, so that dispatch moves a quarter of the
bytes. Nano has no latent and no layers that predict further tokens.
"""

from __future__ import annotations

from moe_recipes.families.family import Experts, Family, Mtp, Published, Router

NEMOTRON_H = Family(
    name="nemotron_h",
    title="Nemotron-H",
    model_types=("nemotron_h",),
    experts=Experts(count_key="n_routed_experts", gated=False, activation="relu2"),
    router=Router(logits="float32", scores="sigmoid", groups=True, correction_bias=True),
    float32=("A_log", "D", "dt_bias"),
    documents="replaced",
    mtp=Mtp(
        prefix="mtp.layers.",
        after_layers=False,
        block_keys=("mtp_layers_block_type", "mtp_hybrid_override_pattern"),
        block=("*", "E"),
        reused_depth=2,
    ),
    published=(
        Published(
            name="Nemotron 3 Nano 30B-A3B",
            source="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            revision="cbd3fa9f933d55ef16a84236559f4ee2a0526848",
            packaged="nemotron_3_nano_30b",
            recipe="nemotron_nano_30b",
            total=31.58,
            active=3.58,
            routed=29.37,
        ),
        Published(
            name="Nemotron 3 Super 120B-A12B",
            source="nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
            revision="d51eab0d1f979ebc26b546e634a04f450d99158e",
            packaged="nemotron_3_super_120b",
            recipe="nemotron_super_120b",
            total=120.67,
            active=12.77,
            routed=112.74,
            mtp=2.94,
        ),
        Published(
            name="Nemotron 3 Ultra 550B-A55B",
            source="nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
            revision="77df655d5e9f8362164ed14dd8b48f8bce657498",
            packaged="nemotron_3_ultra_550b",
            recipe="nemotron_ultra_550b",
            total=549.31,
            active=56.06,
            routed=515.40,
            mtp=11.22,
            file_bytes=1_121_049_257_984,
        ),
    ),
)
