"""RMS normalisations, recognised by what they compute."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from cpu_kernels.rms_norm import FORMS, Form, rms_norm
from offload.devices.host_threads import kernel_pool
from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.hf.fused.conditions import is_plain, is_weight
from offload.hf.fused.swap import Fused, swap

_EPSILONS = ("variance_epsilon", "eps")
_PROBE_ROWS = 12
# Of probed bf16 values: sums in another order round one to its other neighbour now and then; another form, a third.
_MOST_NEIGHBOURS = 0.02


def fuse_rms_norms(model: PreTrainedModel) -> int:
    """Modules with one weight that normalise as one of the kernel's forms does; returns how many."""
    known: dict[tuple[object, ...], Form | None] = {}
    count = 0
    for module in model.modules():
        epsilon = _epsilon_name(module)
        if epsilon is None:
            continue
        key = (type(module), module.get_parameter("weight").shape, *_settings(module))
        if key not in known:
            known[key] = _recognise(module, epsilon)
        form = known[key]
        if form is not None:
            swap(module, _forward(form, epsilon))
            count += 1
    return count


def _epsilon_name(module: torch.nn.Module) -> str | None:
    """The attribute that holds the epsilon, of a module that may be an RMS norm."""
    weight = module._parameters.get("weight")
    if set(module._parameters) != {"weight"} or module._buffers or module._modules or weight is None:
        return None
    parameters = inspect.signature(type(module).forward).parameters
    if weight.dim() != 1 or weight.dtype not in FORMAT_OF_DTYPE or len(parameters) != 2:
        return None
    return next((name for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)


def _settings(module: torch.nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}={value!r}" for name, value in vars(module).items() if not name.startswith("_"))


def _recognise(module: torch.nn.Module, epsilon: str) -> Form | None:
    """The form that gives the module's values in fp32 and its roundings in bf16."""
    generator = torch.Generator().manual_seed(0)
    (columns,) = module.get_parameter("weight").shape
    # Small rows, so that epsilon shows, and large ones.
    scales = torch.logspace(-4, 2, _PROBE_ROWS, device="cpu")[:, None]
    x = torch.randn(_PROBE_ROWS, columns, generator=generator, device="cpu") * scales
    weight = 1 + torch.randn(columns, generator=generator, device="cpu")
    forms = list(FORMS)
    for dtype in (torch.float32, torch.bfloat16):
        probe = copy.copy(module)
        probe._parameters = {"weight": torch.nn.Parameter(weight.to(dtype), requires_grad=False)}
        with torch.no_grad():
            expected = probe(x.to(dtype)[None])
        if not isinstance(expected, torch.Tensor) or expected.dtype is not dtype or expected.shape != (1, *x.shape):
            return None
        forms = [
            form
            for form in forms
            if _same(
                rms_norm(x.to(dtype), weight.to(dtype), getattr(module, epsilon), form, kernel_pool()), expected[0]
            )
        ]
    return forms[0] if forms else None


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    step = 2 * torch.finfo(found.dtype).eps
    if not torch.allclose(found, expected, rtol=4 * step if found.dtype is torch.float32 else step, atol=0):
        return False
    differing = (found != expected).float().mean().item()
    return found.dtype is torch.float32 or differing <= _MOST_NEIGHBOURS


@cache
def _forward(form: Form, epsilon: str) -> Callable[..., torch.Tensor]:
    def forward(self: Fused, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self._parameters.get("weight")
        if is_plain(hidden_states) and is_weight(weight, hidden_states) and hidden_states.is_contiguous():
            return rms_norm(hidden_states, weight, getattr(self, epsilon), form, kernel_pool())
        return self.plain.forward(self, hidden_states)  # type: ignore[no-any-return]

    _FORMS_OF_FORWARDS[forward] = form, epsilon
    return forward


_FORMS_OF_FORWARDS: dict[Any, tuple[Form, str]] = {}


def known_form(module: torch.nn.Module) -> tuple[Form, str] | None:
    """The form of a module that `fuse_rms_norms` recognised, and the attribute that holds its epsilon."""
    return _FORMS_OF_FORWARDS.get(type(module).forward)
