"""Multi-token prediction written out slowly from its published description, for one document at a time.

Raw tensors under the checkpoint's own names, loops over tokens' experts, no mask but an explicit triangle, nothing of
the package and no layer class of Transformers. The model's own last hidden state comes from eager Transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[heads, n, d]`` each: softmax over the tokens up to each one."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    allowed = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~allowed, -math.inf), dim=-1) @ v


def routed(x: Tensor, w: Weights, at: str, *, groups: int, kept_groups: int, scaling: float) -> list[list]:
    """For each token its (expert, weight) pairs, top 2: sigmoid scores, chosen with the bias, weighted without."""
    scores = torch.sigmoid(x @ w[f"{at}gate.weight"].T)
    picked = []
    for row in scores:
        choice = row.detach() + w[f"{at}gate.e_score_correction_bias"]
        size = len(choice) // groups
        best = [float(choice[g * size : (g + 1) * size].topk(2).values.sum()) for g in range(groups)]
        open_groups = sorted(range(groups), key=lambda g, best=best: -best[g])[:kept_groups]
        candidates = [e for e in range(len(choice)) if e // size in open_groups]
        chosen = sorted(candidates, key=lambda e, choice=choice: -float(choice[e]))[:2]
        total = sum(row[e] for e in chosen)
        picked.append([(e, scaling * row[e] / total) for e in chosen])
    return picked


def deepseek_block(x: Tensor, w: Weights, at: str) -> Tensor:
    """A decoder layer of DeepSeek-V3 (arXiv:2412.19437, section 2.1) in the sizes of the tiny twin: ``[n, D]``."""
    eps, heads, nope, rope, n = 1e-6, 4, 16, 16, len(x)
    normed, a = rms_norm(x, w[f"{at}input_layernorm.weight"], eps), f"{at}self_attn."
    q = rms_norm(normed @ w[f"{a}q_a_proj.weight"].T, w[f"{a}q_a_layernorm.weight"], eps) @ w[f"{a}q_b_proj.weight"].T
    q = q.view(n, heads, nope + rope).transpose(0, 1)
    latent, k_rope = (normed @ w[f"{a}kv_a_proj_with_mqa.weight"].T).split([32, rope], dim=-1)
    kv = rms_norm(latent, w[f"{a}kv_a_layernorm.weight"], eps) @ w[f"{a}kv_b_proj.weight"].T
    k_nope, v = kv.view(n, heads, nope + 16).transpose(0, 1).split([nope, 16], dim=-1)
    angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, rope, 2) / rope)

    def rotated(z: Tensor) -> Tensor:
        even, odd = z[..., 0::2], z[..., 1::2]
        return torch.cat([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=-1)

    q = torch.cat([q[..., :nope], rotated(q[..., nope:])], dim=-1)
    k = torch.cat([k_nope, rotated(k_rope)[None].expand(heads, n, rope)], dim=-1)
    x = x + causal_attention(q, k, v).transpose(0, 1).reshape(n, -1) @ w[f"{a}o_proj.weight"].T
    normed, m = rms_norm(x, w[f"{at}post_attention_layernorm.weight"], eps), f"{at}mlp."

    def mlp(z: Tensor, name: str) -> Tensor:
        gate, up = z @ w[f"{name}gate_proj.weight"].T, z @ w[f"{name}up_proj.weight"].T
        return (F.silu(gate) * up) @ w[f"{name}down_proj.weight"].T

    rows = []
    for token, pairs in zip(normed, routed(normed, w, m, groups=4, kept_groups=2, scaling=2.5), strict=True):
        rows.append(sum(weight * mlp(token, f"{m}experts.{e}.") for e, weight in pairs))
    return x + torch.stack(rows) + mlp(normed, f"{m}shared_experts.")


def nemotron_block(x: Tensor, w: Weights) -> Tensor:
    """An attention layer without positions, then a layer of latent squared-ReLU experts: ``[n, D]``."""
    eps, n = 1e-5, len(x)
    normed, a = rms_norm(x, w["mtp.layers.0.norm.weight"], eps), "mtp.layers.0.mixer."
    q = (normed @ w[f"{a}q_proj.weight"].T).view(n, 4, 16).transpose(0, 1)
    k, v = ((normed @ w[f"{a}{p}_proj.weight"].T).view(n, 2, 16).transpose(0, 1) for p in "kv")
    k, v = k.repeat_interleave(2, dim=0), v.repeat_interleave(2, dim=0)
    x = x + causal_attention(q, k, v).transpose(0, 1).reshape(n, -1) @ w[f"{a}o_proj.weight"].T
    normed, m = rms_norm(x, w["mtp.layers.1.norm.weight"], eps), "mtp.layers.1.mixer."

    def mlp(z: Tensor, name: str) -> Tensor:
        return torch.relu(z @ w[f"{name}up_proj.weight"].T).square() @ w[f"{name}down_proj.weight"].T

    latents, rows = normed @ w[f"{m}fc1_latent_proj.weight"].T, []
    for latent, pairs in zip(latents, routed(normed, w, m, groups=1, kept_groups=1, scaling=2.5), strict=True):
        rows.append(sum(weight * mlp(latent, f"{m}experts.{e}.") for e, weight in pairs))
    return x + torch.stack(rows) @ w[f"{m}fc2_latent_proj.weight"].T + mlp(normed, f"{m}shared_experts.")


def mtp_loss(
    family: str, w: Weights, embed: Tensor, head: Tensor, hidden: Tensor, ids: Tensor, learned: Tensor
) -> Tensor:
    """Summed cross-entropy over one document, mean over the depths.

    Args:
        hidden: the model's last hidden state of this document ``[n, D]``, after its final norm.
        ids, learned: its tokens, and which of them carry loss.
    """
    depths = 1 if family == "deepseek_v3_mtp" else 2
    at, eps = ("model.layers.3.", 1e-6) if depths == 1 else ("mtp.layers.0.", 1e-5)
    total = hidden.new_zeros(())
    for depth in range(1, depths + 1):
        n = len(ids) - depth - 1  # positions that have a token depth + 1 ahead
        if n <= 0:
            break
        ahead = rms_norm(embed[ids[depth : depth + n]], w[f"{at}enorm.weight"], eps)
        own = rms_norm(hidden[:n], w[f"{at}hnorm.weight"], eps)
        x = torch.cat([ahead, own], dim=-1) @ w[f"{at}eh_proj.weight"].T
        if depths == 1:
            hidden = deepseek_block(x, w, at)
            out = rms_norm(hidden, w[f"{at}shared_head.norm.weight"], eps)
        else:
            hidden = out = rms_norm(nemotron_block(x, w), w["mtp.layers.1.final_layernorm.weight"], eps)
        wanted = ids[depth + 1 : depth + 1 + n]
        each = F.cross_entropy(out @ head.T, wanted, reduction="none")
        total = total + (each * learned[depth + 1 : depth + 1 + n]).sum() / depths
    return total
