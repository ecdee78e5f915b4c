"""Which gate an experts module has, found by trying it.

Kernels fuse the gates that they know. Which of them a module's `_apply_gate` or `act_fn` is, is decided by its values
on a probe and not by names, so that a family that renames its activation is still recognised and one that changes it
is not mistaken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

_LENGTH = 257

_GATED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "gpt_oss": lambda gate, up: (
        (up.clamp(-7.0, 7.0) + 1.0) * gate.clamp(max=7.0) * torch.sigmoid(1.702 * gate.clamp(max=7.0))
    ),
}
_UNGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda up: F.gelu(up, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda up: F.relu(up).square(),
}


def apply_gate(module: torch.nn.Module, projected: torch.Tensor, *, has_gate: bool) -> torch.Tensor:
    """The module's own gate on the up projection's output.

    Args:
        module: a transformers experts module.
        projected: [n, 2I] with all gate values before all up values, or [n, I] without gate.
        has_gate: which of the two.

    Returns:
        [n, I].
    """
    if not has_gate:
        return module.act_fn(projected)  # type: ignore[operator, no-any-return]
    if not module.is_concatenated:
        projected = projected.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return module._apply_gate(projected)  # type: ignore[operator, no-any-return]


def recognise_gate(module: torch.nn.Module, *, has_gate: bool) -> str | None:
    """Name of the kernels' activation that equals the module's gate, or None when there is none."""
    probe = torch.cat([torch.linspace(-30.0, 30.0, _LENGTH - 5), torch.tensor([0.0, -0.0, 6.9, 7.0, 7.1])])
    up = probe.roll(61) * 0.7
    with torch.no_grad():
        if has_gate:
            found = apply_gate(module, torch.stack([probe, up]).reshape(1, -1), has_gate=True)[0]
            known = {name: gate(probe, up) for name, gate in _GATED.items()}
        else:
            found = apply_gate(module, probe[None], has_gate=False)[0]
            known = {name: gate(probe) for name, gate in _UNGATED.items()}
    for name, expected in known.items():
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-6, atol=1e-7):
            return name
    return None
