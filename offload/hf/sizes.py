"""What a model will take, measured on its skeleton."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offload.errors import UnsupportedModelError
from offload.hf.experts_interface import Step, attach_step, detach_step, experts_modules
from offload.hf.latents import latent_width
from offload.hf.layer_kinds import alike_layers, one_of_each_kind
from offload.kept_products import KEPT_NBYTES
from placement.kv import KvShape

_LOOKS_FOR_PADDING = "warn_if_padding_and_no_attention_mask"


@dataclass(frozen=True)
class RunSizes:
    """What a forward pass without weights shows.

    Attributes:
        kv_nbytes_per_token: bytes by which one sequence's cache grows with a token, all layers together.
        kv_fixed_nbytes: bytes of one sequence's cache that do not grow.
        top_k: experts per token, by path of the experts module.
        kv_nbytes_per_token_by_layer: growth of each layer of the cache.
        kv_shapes: keys and values of each layer of the cache, None where it does not keep all of them.
    """

    kv_nbytes_per_token: int
    kv_fixed_nbytes: int
    top_k: dict[str, int]
    kv_nbytes_per_token_by_layer: tuple[int, ...]
    kv_shapes: tuple[KvShape | None, ...]


def measure_on_meta(skeleton: PreTrainedModel) -> RunSizes:
    """Run the skeleton on the meta device for two lengths and read what its cache holds.

    Works for every family alike: grouped heads, latents, sliding windows (counted as if they grew), linear
    attention. The skeleton's experts must dispatch to the offload implementation. Of layers that are alike one runs:
    an operation on meta takes longer than many on weights.

    Raises:
        UnsupportedModelError: the model cannot run on meta.
    """
    top_k: dict[str, int] = {}
    for name, module in experts_modules(skeleton):
        attach_step(module, _recording_step(name, top_k))
    lengths = (2, 3)
    alike = alike_layers(skeleton)
    try:
        (short, shapes), (long, _) = (_measure_cache(skeleton, length, alike) for length in lengths)
    # Whatever a model's own code, or an operation without a meta kernel, raises.
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} cannot be measured without weights ({type(error).__name__}: {error})"
        ) from error
    finally:
        for _, module in experts_modules(skeleton):
            detach_step(module)
    for first, names in alike.items():
        found = {path.removeprefix(first): count for path, count in top_k.items() if path.startswith(f"{first}.")}
        top_k |= {name + rest: count for name in names for rest, count in found.items()}
    by_layer = tuple(after - before for before, after in zip(short, long, strict=True))
    return RunSizes(sum(by_layer), sum(short) - lengths[0] * sum(by_layer), top_k, by_layer, shapes)


def _recording_step(name: str, top_k: dict[str, int]) -> Step:
    def step(hidden: torch.Tensor, top_k_index: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        top_k[name] = top_k_index.shape[-1]
        return torch.empty_like(hidden)

    return step


def _measure_cache(
    skeleton: PreTrainedModel, tokens: int, alike: dict[str, list[str]]
) -> tuple[list[int], tuple[KvShape | None, ...]]:
    """Bytes of each layer of the cache after a pass, and shapes of its keys and values."""
    cache = DynamicCache(config=skeleton.config)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # A default device that the user set would decide where meta kernels make their results.
    with torch.no_grad(), torch.device("meta"), one_of_each_kind(skeleton, alike), _unread_tokens(skeleton):
        skeleton(input_ids=ids, past_key_values=cache, use_cache=True)
    # The layer that ran for each; those that did not run may hold something all the same.
    ran = {int(name.rpartition(".")[2]): int(first.rpartition(".")[2]) for first in alike for name in alike[first]}
    held = [sum(t.numel() * t.element_size() for t in _tensors(vars(layer))) for layer in cache.layers]
    latent = latent_width(skeleton)
    shapes = [_shape(layer, latent) for layer in cache.layers]
    places = [ran.get(index, index) for index in range(max(len(held), *ran, 0) if ran else len(held))]
    return [held[place] for place in places], tuple(shapes[place] for place in places)


@contextmanager
def _unread_tokens(skeleton: PreTrainedModel) -> Iterator[None]:
    """Within the block nobody looks for padding among tokens, which on meta have no values."""
    models = [module for module in skeleton.modules() if isinstance(module, PreTrainedModel)]
    try:
        for model in models:
            model.__dict__[_LOOKS_FOR_PADDING] = lambda *_args: None
        yield
    finally:
        for model in models:
            model.__dict__.pop(_LOOKS_FOR_PADDING, None)


def _shape(layer: Any, latent: int) -> KvShape | None:
    """Of a layer that keeps all keys and values; where it keeps latents of that width, they are both."""
    if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None or layer.keys.dim() != 4:
        return None
    heads, width, value_width = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
    if heads == 1 and width == latent:
        return KvShape(1, width + value_width, 0, width)
    return KvShape(heads, width, value_width)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def dense_weights(skeleton: PreTrainedModel, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every weight and buffer that is not a routed expert's, tied ones once, by name.

    Args:
        skeleton: whose experts modules have no parameters any more.
        dtype: in which it is loaded; parameters that transformers keeps in fp32 are counted so.
    """
    kept = skeleton._get_dtype_plan(dtype)
    tied = set(skeleton.all_tied_weights_keys)
    sizes = {}
    for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers()):
        if name in tied:
            continue
        wide = any(re.search(pattern.replace("*", r"\d+"), name) for pattern in kept)
        sizes[name] = tensor.numel() * (4 if wide else tensor.element_size())
    return sizes


def activation_nbytes_per_token(
    skeleton: PreTrainedModel, expert_count: int, context_tokens: int, *, quantised: bool = False
) -> int:
    """Most bytes that one new token of a forward pass keeps alive at once, from the widths of the model's layers.

    At the widest point a layer holds the residual stream, its norm in fp32 with two temporaries, the inputs and
    outputs of a projection in a few layouts, and the router's probabilities. The MoE step is not in it. Attention that
    materialises its scores ("eager") adds heads x context values in three copies. A quantised layer holds its input in
    int8 with scales and its output in fp32 besides.
    """
    config = skeleton.config.get_text_config()
    element = skeleton.dtype.itemsize
    nbytes: int = 6 * config.hidden_size * 4 + 6 * _widest(skeleton) * element + 16 * expert_count
    if quantised:
        nbytes += 6 * _widest(skeleton)
    if skeleton.config._attn_implementation == "eager":
        nbytes += getattr(config, "num_attention_heads", 0) * context_tokens * (2 * element + 4)
    return nbytes


def attention_nbytes_per_token(skeleton: PreTrainedModel) -> int:
    """Bytes for one cached token while a layer attends: keys and values repeated for every query head."""
    return 2 * _widest(skeleton) * skeleton.dtype.itemsize


def kept_products_nbytes(skeleton: PreTrainedModel) -> int:
    """Bytes of compiled products of attention that has new sizes with every token, see `offload.kept_products`."""
    grows = skeleton.config._attn_implementation == "eager" and skeleton.dtype != torch.float32
    return KEPT_NBYTES if grows else 0


def _widest(skeleton: PreTrainedModel) -> int:
    """Outputs of the widest linear layer that is not the vocabulary's."""
    config = skeleton.config.get_text_config()
    widths = [module.out_features for module in skeleton.modules() if isinstance(module, torch.nn.Linear)]
    return max((width for width in widths if width != config.vocab_size), default=int(config.hidden_size))
