"""Multi-token prediction for the proof's reference: blocks read from the files, computed one document at a time.

Written from the published description with the decoder layers of eager Transformers; the package's own blocks, its
masks and its shift take no part. A position of a document of n tokens runs at depth k only if it has k tokens after it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from moe_recipes.families import Mtp, family_of
from moe_recipes.prove.examples import Document

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_OWN_PARTS = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "final_layernorm.weight")
"""What a block has besides its decoder layers."""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def block_keys(config: Mapping[str, Any], keys: Any) -> dict[str, tuple[int, str]]:
    """Of a checkpoint's keys those of its blocks: key -> number of the layer, and the name inside of it."""
    family = family_of(config)
    if family is None or family.mtp is None:
        return {}
    first = int(config["num_hidden_layers"]) if family.mtp.after_layers else 0
    found = {key: re.fullmatch(re.escape(family.mtp.prefix) + r"(\d+)\.(.*)", key) for key in keys}
    return {key: (int(m[1]), m[2]) for key, m in found.items() if m is not None and int(m[1]) >= first}


def block_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The blocks' own tensors, a layer's experts together as the model has them, and copies -> the tensors they repeat.

    Args:
        tensors: those of a checkpoint, under its names.
    """
    family, keys = family_of(config), block_keys(config, tensors)
    repeated = dict(family.mtp.copies) if family is not None and family.mtp is not None else {}
    copies = {key: repeated[name] for key, (_, name) in keys.items() if name in repeated}
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for key in keys.keys() - copies.keys():
        if (m := _EXPERT.fullmatch(key)) is None:
            found[key] = tensors[key]
        else:
            parts.setdefault(m[1], {}).setdefault(m[3], {})[int(m[2])] = tensors[key]
    for at, experts in parts.items():
        stacked = {part: torch.stack([rows[e] for e in sorted(rows)]) for part, rows in experts.items()}
        found[f"{at}.down_proj"] = stacked["down"]
        gated = "gate" in stacked
        up = torch.cat([stacked["gate"], stacked["up"]], dim=1) if gated else stacked["up"]
        found[f"{at}.{'gate_up_proj' if gated else 'up_proj'}"] = up
    return found, copies


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


class ReferenceMtp:
    """The blocks of a plain model's folder, with gradients of their own.

    Attributes:
        layers: decoder layers of Transformers, in order.
        weights: parameters under the names that they have in the package's model; ``buffers`` likewise.
    """

    def __init__(self, model: Any, config: Mapping[str, Any], tensors: dict[str, Tensor], declared: Mtp) -> None:
        self.model, self.declared = model, declared
        self.eps = model.config.rms_norm_eps if declared.after_layers else model.config.layer_norm_epsilon
        numbers = sorted({int(key.removeprefix(declared.prefix).partition(".")[0]) for key in tensors})
        self.layers, self.parts = nn.ModuleList(), []
        self.weights: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        for number in numbers:
            at = f"{declared.prefix}{number}."
            inside = {key.removeprefix(at): tensor for key, tensor in tensors.items() if key.startswith(at)}
            own = {name: nn.Parameter(inside.pop(name)) for name in _OWN_PARTS if name in inside}
            layer = self._decoder_layer(number).train()
            layer.load_state_dict(inside)
            self.layers.append(layer)
            self.parts.append(own)
            self.weights |= {f"{at}{name}": p for name, p in [*layer.named_parameters(), *own.items()]}
            self.buffers |= {f"{at}{name}": buffer for name, buffer in layer.named_buffers()}
        length = len(declared.layers_of_block(config))
        blocks = [range(start, start + length) for start in range(0, len(numbers), length)]
        self.blocks = blocks * declared.reused_depth if len(blocks) == 1 else blocks

    def _decoder_layer(self, number: int) -> nn.Module:
        base = self.model.base_model
        if self.declared.after_layers:
            return type(base.layers[-1])(self.model.config, number)
        config = copy.copy(self.model.config)
        config.layers_block_type = list(config.mtp_layers_block_type)
        return type(base.layers[0])(config, number)

    def loss(self, document: Document, hidden_SD: Tensor) -> Tensor:
        """Cross-entropy summed over the document's learned tokens, mean over the depths.

        Args:
            hidden_SD: the model's last hidden state of this document alone, after its final norm.
        """
        ids, embed = document.input_ids, self.model.get_input_embeddings().weight
        total = hidden_SD.new_zeros(())
        for depth, block in enumerate(self.blocks, start=1):
            n = len(ids) - depth
            if n <= 0:
                break
            hidden_SD, out_SD = self._block(block, hidden_SD[:n], embed[ids[depth:]])
            labels = torch.where(document.learned, ids, -100)[depth + 1 :]
            logits = self.model.get_output_embeddings()(out_SD[: n - 1])
            total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / len(self.blocks)
        return total

    def _block(self, block: range, hidden_SD: Tensor, ahead_SD: Tensor) -> tuple[Tensor, Tensor]:
        first, last = self.parts[block[0]], self.parts[block[-1]]
        ahead = _rms_norm(ahead_SD, first["enorm.weight"], self.eps)
        x = torch.cat([ahead, _rms_norm(hidden_SD, first["hnorm.weight"], self.eps)], dim=-1)
        x = F.linear(x, first["eh_proj.weight"])[None]
        n = x.shape[1]
        positions = torch.arange(n)[None]
        mask = torch.full((n, n), torch.finfo(x.dtype).min).triu(1)[None, None]
        options: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
        if (rotary := getattr(self.model.base_model, "rotary_emb", None)) is not None:
            options["position_embeddings"] = rotary(x, positions)
        for index in block:
            x = self.layers[index](x, **options)
        if (weight := last.get("final_layernorm.weight")) is not None:
            normed = _rms_norm(x[0], weight, self.eps)
            return normed, normed
        return x[0], _rms_norm(x[0], last["shared_head.norm.weight"], self.eps)


def load_blocks(model: Any, folder: Path) -> ReferenceMtp | None:
    """The blocks of multi-token prediction in a folder's files; None where it has none."""
    config = model.config.to_dict()
    tensors, _ = block_tensors(config, read_tensors(folder))
    family = family_of(config)
    if not tensors or family is None or family.mtp is None:
        return None
    return ReferenceMtp(model, config, tensors, family.mtp)
