"""What each decoder layer of a skeleton consists of, for the planner's cost model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.hf.layer_kinds import decoder_layers
from offload.store.source import ExpertGroup
from placement.model_spec import LayerSpec, LinearSpec


def layer_specs(
    skeleton: PreTrainedModel,
    groups: Sequence[ExpertGroup],
    dense: Mapping[str, int],
    kv_nbytes_per_token: Sequence[int],
    formats: Mapping[str, str],
) -> tuple[LayerSpec, ...]:
    """The decoder's layers in order.

    Args:
        skeleton: on meta, its experts without parameters.
        groups: the routed experts, in order.
        dense: bytes of every weight that is not a routed expert's, by name; of quantised layers by their path.
        kv_nbytes_per_token: growth of each layer of the cache.
        formats: packed formats of linear layers, by path.

    Returns:
        one entry for each layer; none where the decoder's layers cannot be told from other modules.
    """
    experts = {group.module: index for index, group in enumerate(groups)}
    text: Any = skeleton.config.get_text_config()
    # Of families whose layers differ in heads and widths the config of the whole does not say which.
    configs = text.per_layer_config if text.is_heterogeneous else None
    specs = []
    for number, (path, layer) in enumerate(decoder_layers(skeleton)):
        own = [index for module, index in experts.items() if module.startswith(f"{path}.")]
        config = text if configs is None else configs[number]
        growth = kv_nbytes_per_token[number] if number < len(kv_nbytes_per_token) else 0
        specs.append(
            LayerSpec(
                dense_nbytes=sum(nbytes for name, nbytes in dense.items() if name.startswith(f"{path}.")),
                linears=_linears(path, layer, formats),
                kv_nbytes_per_token=growth,
                attention_values=_attention_values(config) if growth else 0,
                window_tokens=_window(config, number),
                experts=own[0] if own else None,
                attention_heads=config.num_attention_heads if growth else 0,
            )
        )
    return tuple(specs)


def head_spec(skeleton: PreTrainedModel, formats: Mapping[str, str]) -> tuple[LinearSpec | None, bool]:
    """(the output layer, whether its weights are the embedding's)."""
    head = skeleton.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None, False
    name = next(path for path, module in skeleton.named_modules() if module is head)
    shared = f"{name}.weight" in skeleton.all_tied_weights_keys and name not in formats
    format = formats.get(name, FORMAT_OF_DTYPE[skeleton.dtype])
    return LinearSpec(head.out_features, head.in_features, format), shared


def _linears(path: str, layer: nn.Module, formats: Mapping[str, str]) -> tuple[LinearSpec, ...]:
    """Linear layers and routers, which are matrices of modules of their own; alike ones counted together."""
    counts: Counter[tuple[int, int, str]] = Counter()
    for name, module in layer.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 2:
                format = formats.get(f"{path}.{name}", FORMAT_OF_DTYPE.get(parameter.dtype, "fp32"))
                counts[parameter.shape[0], parameter.shape[1], format] += 1
    return tuple(LinearSpec(*shape, count) for shape, count in counts.items())


def _attention_values(config: Any) -> int:
    """Products of one query with a cached key, and of its weight with the value, over all heads."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key = getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0)
    value = getattr(config, "v_head_dim", None) or width
    return int(config.num_attention_heads * ((key or width) + value))


def _window(config: Any, layer: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and types[layer] != "sliding_attention"):
        return None
    uses = getattr(config, "use_sliding_window", True)
    return int(window) if uses else None
