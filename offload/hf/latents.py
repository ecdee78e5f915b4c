"""Which models cache latents (MLA), from their modules alone."""

from __future__ import annotations

from typing import Any

from torch import nn

_WIDTHS = ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def expands_latents(module: Any) -> bool:
    """Whether a module is an attention that makes keys and values out of cached latents by its `expand_kv`."""
    widths = [getattr(module, name, None) for name in _WIDTHS]
    return callable(getattr(module, "expand_kv", None)) and all(isinstance(width, int) for width in widths)


def latent_width(model: nn.Module) -> int:
    """Channels of the latents that a model caches, where blocks can hold them with what goes with them; else 0."""
    modules: list[Any] = list(model.modules())
    widths = {module.kv_lora_rank for module in modules if expands_latents(module)}
    width = widths.pop() if len(widths) == 1 else 0
    return width if width % 32 == 0 or width == 16 else 0
