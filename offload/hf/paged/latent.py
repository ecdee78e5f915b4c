"""Latent attention (MLA) over a paged cache: what is cached is one latent for all heads, and it is attended as such.

A module's `expand_kv` makes keys and values of every head out of latents. For a few new tokens it is not called: its
matrices are applied to the query and to the result instead ("absorbed", DeepSeek-V2, 2024, section 2.1.2). For many,
latents are expanded one segment at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from offload.hf.latents import expands_latents, latent_width
from offload.hf.paged.layer import Step
from offload.hf.paged.states import CachedStates, cached_states
from offload.kv.paging import Paging

_BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class ExpandedStep:
    """A step of a layer of latents, as attention sees it: keys and values of every head, that nobody has computed.

    Attributes:
        table: the layer's latents, the new ones among them.
        past: tokens before them.
        paging: the layer's.
        keys: of the new tokens, [B, H, T, nope + rope].
        values: of the new tokens, [B, H, T, V].
    """

    def __init__(self, module: Any, step: Step, expand: Expand) -> None:
        self.table, self.past, self.paging = step.table, step.past, step.paging
        self.keys, self.values = expand(step.keys, step.values)
        self._module = module
        self._step = step
        self._expand = expand
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None

    def gather(
        self, side: int, reason: str = "a model computes with its cached keys and values itself"
    ) -> torch.Tensor:
        """All keys (0) or values (1) as an ordinary tensor; the reason is counted."""
        if self._gathered is None:
            self._gathered = self._expand(self._step.gather(0, reason), self._step.gather(1, reason))
        return self._gathered[side]

    def expand(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, H, n, D], fp32, of what blocks hold, fp32."""
        if self.table.layouts.plain.value_from_key:
            width = self._module.kv_lora_rank
            keys, values = keys[..., :width], keys[..., width:]
        dtype = self.keys.dtype
        keys, values = self._expand(keys.to(dtype), values.to(dtype))
        return keys.float(), values.float()

    @property
    def absorbs(self) -> bool:
        """Whether attention can be computed on latents."""
        return self.table.layouts.plain.value_from_key > 0 and _absorbs(self._module)

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """The query [B, H, T, nope + rope] for latents, [B, H, T, latent + rope]."""
        nope = self._module.qk_nope_head_dim
        up = _matrices(self._module)[:, :nope]
        return torch.cat([query[..., :nope] @ up, query[..., nope:]], -1)

    def release(self, out: torch.Tensor) -> torch.Tensor:
        """Values [B, H, T, V] of a sum of latents, fp32 [B, H, T, latent]."""
        up = _matrices(self._module)[:, self._module.qk_nope_head_dim :]
        return (out.to(up.dtype) @ up.mT).float()


def page_latents(model: PreTrainedModel, paging: Paging) -> int:
    """Let modules that expand latents leave cached ones as they are; returns how many there are."""
    modules: list[Any] = [module for module in model.modules() if expands_latents(module)]
    for module in modules:
        module.expand_kv = functools.partial(_expand_kv, module, module.expand_kv)
    paging.latent_width = latent_width(model)
    return len(modules)


def _expand_kv(
    module: Any, expand: Expand, latents: torch.Tensor, rotated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if type(latents) is not CachedStates or type(rotated) is not CachedStates or latents.step is not rotated.step:
        return expand(latents, rotated)
    step = ExpandedStep(module, latents.step, expand)
    keys, values = (
        cached_states(
            (*new.shape[:2], step.table.length, new.shape[3]), new, step, functools.partial(step.gather, side)
        )
        for side, new in enumerate((step.keys, step.values))
    )
    return keys, values


def _matrices(module: Any) -> torch.Tensor:
    """[H, nope + V, latent]."""
    weight: torch.Tensor = module.kv_b_proj.weight
    return weight.view(module.num_heads, -1, module.kv_lora_rank)


def _absorbs(module: Any) -> bool:
    """Whether a module's `expand_kv` is its matrix applied to latents, which is tried once."""
    known = module.__dict__.get("_absorbs_latents")
    if known is None:
        known = module.__dict__["_absorbs_latents"] = _tried(module)
    return bool(known)


def _tried(module: Any) -> bool:
    weight = getattr(module.kv_b_proj, "weight", None)
    rows = module.num_heads * (module.qk_nope_head_dim + module.v_head_dim)
    if (
        not isinstance(weight, torch.Tensor)
        or weight.shape != (rows, module.kv_lora_rank)
        or weight.dtype not in _BOUND
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    latents, rotated = (
        torch.randn(1, 1, 3, width, generator=generator).to(weight)
        for width in (module.kv_lora_rank, module.qk_rope_head_dim)
    )
    with torch.no_grad():
        keys, values = module.expand_kv(latents, rotated)
    nope = module.qk_nope_head_dim
    expected = (latents.float() @ _matrices(module).float().mT)[0]
    bound = _BOUND[weight.dtype] * (1 + float(expected.abs().max()))
    return (
        keys.shape[1:] == (module.num_heads, 3, nope + module.qk_rope_head_dim)
        and bool((keys[0, ..., :nope].float() - expected[..., :nope]).abs().max() < bound)
        and bool((keys[0, ..., nope:] == rotated[0]).all())
        and bool((values[0].float() - expected[..., nope:]).abs().max() < bound)
    )
