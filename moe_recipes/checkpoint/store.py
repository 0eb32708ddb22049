"""The checkpoint room's public names: save, load, find, verify, prune. No pickle anywhere."""

from moe_recipes.checkpoint.entry import Entry
from moe_recipes.checkpoint.folder import find_whole, latest_checkpoint, prune_checkpoints, step_of
from moe_recipes.checkpoint.load import load_checkpoint
from moe_recipes.checkpoint.save import save_checkpoint
from moe_recipes.checkpoint.verify import verify_checkpoint

__all__ = [
    "Entry",
    "find_whole",
    "latest_checkpoint",
    "load_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
    "step_of",
    "verify_checkpoint",
]
