"""Turning a transformers model into one that the runtime carries: hooks, guards and chunked prefill.

The class stays the transformers class; what changes hangs on the instance.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from offload.errors import UnsupportedOperationError
from offload.hf.experts_interface import attach_step
from offload.runtime import Runtime


def adopt(model: PreTrainedModel, runtime: Runtime) -> None:
    """Make `model` run on `runtime`; `model.offload` is the runtime from now on.

    Args:
        model: its experts dispatch to the offload implementation and have no weights; all else is loaded.
        runtime: carries exactly the model's experts layers.
    """
    for layer in runtime.layers:
        attach_step(layer.module, functools.partial(runtime.step, layer))
    model.offload = runtime  # type: ignore[assignment]
    _watch_passes(model, runtime)
    _chunk_prefill(model, runtime.plan.workload.prefill_chunk_tokens)
    _guard(model)


def _watch_passes(model: PreTrainedModel, runtime: Runtime) -> None:
    """Before each forward pass see to the budget, after it count."""
    started = threading.local()

    def before(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, tokens = _shape(args, kwargs)
        past = kwargs.get("past_key_values")
        past_tokens = int(past.get_seq_length()) if past is not None else 0
        all_logits = not kwargs.get("logits_to_keep", 0)
        runtime.make_room(batch, tokens, past_tokens, all_logits=all_logits, cache=past)
        started.pass_ = batch, tokens, perf_counter()

    def after(_module: torch.nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any) -> None:
        batch, tokens, at = started.pass_
        runtime.count_pass(batch * tokens, decode=tokens == 1, seconds=perf_counter() - at)

    def ended(_module: torch.nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        if output is None:
            runtime.pass_failed(sys.exception())

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    if runtime.accelerated is not None:
        model.register_forward_hook(ended, with_kwargs=True, always_call=True)


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    return (1, 1) if inputs is None else (int(inputs.shape[0]), int(inputs.shape[1]))


def _chunk_prefill(model: PreTrainedModel, chunk_tokens: int) -> None:
    """Let generate() cut long prompts, so that activations stay within what the plan says."""
    prefill: Callable[..., Any] = model._prefill  # type: ignore[assignment]

    @functools.wraps(prefill)
    def chunked(input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], **rest: Any) -> Any:
        cached = model_kwargs.get("past_key_values") is not None
        text = model_kwargs.get("inputs_embeds") is None
        if cached and text and generation_config.prefill_chunk_size is None and input_ids.shape[1] > chunk_tokens:
            generation_config.prefill_chunk_size = chunk_tokens
        return prefill(input_ids, generation_config, model_kwargs, **rest)

    setattr(model, "_prefill", chunked)  # noqa: B010 - nn.Module's annotations do not know methods


def _guard(model: PreTrainedModel) -> None:
    """Operations that would move, cast or save weights that are not in the model: done if trivial, else refused."""

    def to(*args: Any, **kwargs: Any) -> PreTrainedModel:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        own = model.device
        another = device is not None and own.index is not None and device.index not in (None, own.index)
        if device is not None and (device.type != own.type or another):
            _refuse(
                f"to({device})", "where its weights live is decided by the plan; load it with another budget instead"
            )
        if dtype is not None and dtype != model.dtype:
            _refuse(f"to({dtype})", f'its experts are stored in {model.dtype}; load it with dtype="{dtype}" instead')
        return model

    def cast(dtype: torch.dtype) -> Callable[[], PreTrainedModel]:
        return lambda: to(dtype)

    replacements: dict[str, Callable[..., Any]] = {"to": to, "cpu": lambda: to(torch.device("cpu"))}
    replacements |= {"half": cast(torch.float16), "bfloat16": cast(torch.bfloat16)}
    replacements |= {"float": cast(torch.float32), "double": cast(torch.float64)}
    replacements["cuda"] = lambda device=None: to(
        torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    )
    reason = "its experts are in the store and not in the model; the checkpoint that it was loaded from is unchanged"
    for name in ("save_pretrained", "push_to_hub", "state_dict", "load_state_dict"):
        replacements[name] = _refusal(name, reason)
    for name, function in replacements.items():
        setattr(model, name, function)


def _refusal(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        _refuse(f"{name}()", reason)

    return refuse


def _refuse(what: str, reason: str) -> NoReturn:
    raise UnsupportedOperationError(f"{what} is not possible on an offloaded model: {reason}")
