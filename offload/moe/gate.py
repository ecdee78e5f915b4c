"""Which gate an experts module has, found by trying it.

Kernels fuse the gates that they know. Which of them a module's `_apply_gate` or `act_fn` is, is decided by its values
on a probe and not by names, so that a family that renames its activation is still recognised and one that changes it
is not mistaken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

_GATES = (*(eighths / 8 for eighths in range(-240, 241)), -0.0, 6.9, 7.1, -1e4, -1e3, -1e2, 1e2, 1e3, 1e4)
_UPS = (-1e4, -1e2, -21.0, -7.1, -6.9, -1.0, -0.3, 0.0, 0.7, 6.9, 7.1, 21.0, 1e2, 1e4)
"""The large values tell a gate that is clamped, wherever its limit lies."""

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
    gate = torch.tensor(_GATES, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        if has_gate:
            up = torch.tensor(_UPS, dtype=torch.float32, device="cpu").repeat(gate.shape[0])
            gate = gate.repeat_interleave(len(_UPS))
            found = apply_gate(module, torch.cat([gate, up])[None], has_gate=True)[0]
            known = {name: function(gate, up) for name, function in _GATED.items()}
        else:
            found = apply_gate(module, gate[None], has_gate=False)[0]
            known = {name: function(gate) for name, function in _UNGATED.items()}
    for name, expected in known.items():
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-6, atol=1e-7):
            return name
    return None
