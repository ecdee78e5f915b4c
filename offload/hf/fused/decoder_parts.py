"""What a decoder layer is made of, if it is one that `decoder.py` can compute: proven by running it on stand-ins.

    x + o(attention(rotary(norms(q, k)), v)) = r,    r + mlp(norm(r))

A layer counts as such if its own code, with its projections and its MLP replaced by modules that return given tensors,
hands on exactly what this form says.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from cpu_kernels.rms_norm import Form, rms_norm
from cpu_kernels.rotary import rotary
from offload.devices.host_threads import kernel_pool
from offload.hf.dtypes import FORMAT_OF_DTYPE
from offload.hf.fused.rms_norm import known_form
from offload.hf.fused.stand_ins import Given, with_children
from offload.hf.fused.swap import plain_class
from offload.hf.quantised_linear import QuantisedLinear

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_PAIRS_OF_NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
_PAST_TOKENS = 5
_LARGE = 100.0
"""Values that show whether something clips them."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm that the kernel computes."""

    module: nn.Module
    form: Form
    epsilon: float


@dataclass(frozen=True)
class DecoderParts:
    """The modules of a decoder layer and how they go together.

    Attributes:
        attention: of the layer.
        before: norm of the attention's input.
        after: norm of the MLP's input.
        mlp: the MLP or MoE block.
        q, k, v, o: projections.
        q_norm, k_norm: norms of queries and keys, each head alone or all together; None where there are none.
        norms_first: whether they come before the rotation.
        angles: width of the cosines.
        shared_angles: see `rotary`.
        heads, kv_heads, width: of the attention.
        scale: of its scores.
    """

    attention: nn.Module
    before: Norm
    after: Norm
    mlp: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    q_norm: Norm | None
    k_norm: Norm | None
    norms_first: bool
    angles: int
    shared_angles: bool
    heads: int
    kv_heads: int
    width: int
    scale: float

    def modules(self) -> Iterator[nn.Module]:
        """Those whose calls a fused layer leaves out."""
        yield self.attention
        yield from (self.q, self.k, self.v, self.o, self.before.module, self.after.module)
        yield from (norm.module for norm in (self.q_norm, self.k_norm) if norm is not None)


def find_parts(layer: nn.Module, angles: int) -> DecoderParts | None:
    """The parts of a layer; None if it is not of the form.

    Args:
        layer: a decoder layer with its weights, on the CPU.
        angles: width of the cosines that it is given.
    """
    children = dict(layer.named_children())
    if set(children) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    before, after = norm_of(children["input_layernorm"]), norm_of(children["post_attention_layernorm"])
    attention = children["self_attn"]
    if before is None or after is None or not _is_prenorm(layer):
        return None
    parts = dict(attention.named_children())
    names = [pair for pair in _PAIRS_OF_NORMS if set(parts) == {*_PROJECTIONS, *pair}]
    if not names and set(parts) != set(_PROJECTIONS):
        return None
    projections = [parts[name] for name in _PROJECTIONS]
    norms = [norm_of(parts[name]) for name in names[0]] if names else [None, None]
    if not all(map(is_linear, projections)) or (names and None in norms):
        return None
    width = getattr(attention, "head_dim", None)
    if not isinstance(width, int) or any(_outputs(module) % width for module in projections[:3]):
        return None
    q, k, v, o = projections
    for norms_first in (True, False):
        for shared_angles in (False, True):
            found = DecoderParts(
                attention, before, after, children["mlp"], q, k, v, o, norms[0], norms[1], norms_first,
                angles, shared_angles, _outputs(q) // width, _outputs(k) // width, width,
                getattr(attention, "scaling", width**-0.5),
            )  # fmt: skip
            if _attends_so(found):
                return found
    return None


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module is, if it is one that the kernel computes."""
    found = known_form(module)
    return None if found is None else Norm(module, found[0], getattr(module, found[1]))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that tapes know, packed or not."""
    return plain_class(module) is nn.Linear or type(module) is QuantisedLinear


def _outputs(linear: nn.Module) -> int:
    found = linear.out_features
    assert isinstance(found, int)
    return found


def _is_prenorm(layer: nn.Module) -> bool:
    """Whether the layer's forward is the form, bit by bit, with any attention and MLP."""
    norm, after = layer.get_submodule("input_layernorm"), layer.get_submodule("post_attention_layernorm")
    weight = norm.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(1, 1, len(weight), generator=generator, device="cpu").to(weight.dtype)

    x, attended, out = random(), random(), random()
    attention, mlp = Given((attended, None)), Given(out)
    stand_in = with_children(layer, {"self_attn": attention, "mlp": mlp})
    passed = {"attention_mask": None, "past_key_values": DynamicCache(), "position_embeddings": (x, x)}
    try:
        with torch.no_grad():
            found = stand_in(x.clone(), **passed, use_cache=True)
            residual = x + attended
            expected = residual + out
            normed, normed_after = norm(x), after(residual)
    except Exception:  # noqa: BLE001 - whatever a layer of another form raises
        return False
    if not isinstance(found, torch.Tensor) or len(attention.calls) != 1 or len(mlp.calls) != 1:
        return False
    (args, kwargs), (mlp_args, mlp_kwargs) = attention.calls[0], mlp.calls[0]
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    return (
        torch.equal(found, expected)
        and isinstance(hidden, torch.Tensor)
        and torch.equal(hidden, normed)
        and len(mlp_args) == 1
        and not mlp_kwargs
        and torch.equal(mlp_args[0], normed_after)
        and len(args) <= 1
        and all(kwargs.get(name) is value for name, value in passed.items())
    )


def _attends_so(parts: DecoderParts) -> bool:
    """Whether the attention's forward computes what `parts` say, in fp32, between its projections."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    heads, kv_heads, width, angles = parts.heads, parts.kv_heads, parts.width, parts.angles
    pairs = angles if parts.shared_angles else angles // 2
    if _outputs(parts.v) != kv_heads * width or 2 * pairs > width or heads % kv_heads:
        return False
    # Clipping would show in values that nothing normalises.
    q, k, v = random(1, 1, heads * width), random(1, 1, kv_heads * width), _LARGE * random(1, 1, kv_heads * width)
    past = random(1, kv_heads, _PAST_TOKENS, width), random(1, kv_heads, _PAST_TOKENS, width)
    cos, sin = random(1, 1, angles), random(1, 1, angles)
    o = Given(random(1, 1, 8))
    children: dict[str, nn.Module] = {"q_proj": Given(q), "k_proj": Given(k), "v_proj": Given(v), "o_proj": o}
    children |= {
        name: _in_fp32(norm.module)
        for norm in (parts.q_norm, parts.k_norm)
        if norm is not None
        for name, module in parts.attention.named_children()
        if module is norm.module
    }
    stand_in = with_children(parts.attention, children)
    cache = DynamicCache()
    index = getattr(parts.attention, "layer_idx", None)
    if not isinstance(index, int) or parts.attention.training:
        return False
    try:
        with torch.no_grad():
            for _ in range(index):
                cache.update(past[0][:, :, :1], past[1][:, :, :1], len(cache.layers))
            cache.update(*past, index)
            stand_in(
                hidden_states=q.new_zeros(1, 1, 8), position_embeddings=(cos, sin), attention_mask=None,
                past_key_values=cache,
            )  # fmt: skip
            expected = _reference(parts, q, k, v, past, cos, sin)
    except Exception:  # noqa: BLE001 - whatever an attention of another form raises
        return False
    (found,) = o.calls[0][0] or (None,)
    return (
        isinstance(found, torch.Tensor)
        and found.shape == (1, 1, len(expected))
        and torch.allclose(found[0, 0], expected, rtol=1e-4, atol=1e-5 * _LARGE)
    )


def _in_fp32(module: nn.Module) -> nn.Module:
    stand_in = copy.copy(module)
    stand_in._parameters = {
        name: None if weight is None else nn.Parameter(weight.detach().float(), requires_grad=False)
        for name, weight in module._parameters.items()
    }
    return stand_in


def _reference(
    parts: DecoderParts, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor],
    cos: torch.Tensor, sin: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What goes into the output projection, [heads * width]."""
    pool = kernel_pool()

    def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if norm is None:
            return x
        weight = norm.module.get_parameter("weight").detach().float()
        return rms_norm(x.reshape(-1, len(weight)), weight, norm.epsilon, norm.form, pool).view(x.shape)

    def per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.reshape(1, heads, 1, parts.width)

    if parts.norms_first:
        q, k = normed(q, parts.q_norm), normed(k, parts.k_norm)
    q, k = rotary(
        per_head(q, parts.heads), per_head(k, parts.kv_heads), cos, sin, shared_angles=parts.shared_angles, pool=pool
    )
    if not parts.norms_first:
        q, k = normed(q.contiguous(), parts.q_norm), normed(k.contiguous(), parts.k_norm)
    group = parts.heads // parts.kv_heads
    keys = torch.cat([past[0], k], 2).repeat_interleave(group, 1)[0]
    values = torch.cat([past[1], per_head(v, parts.kv_heads)], 2).repeat_interleave(group, 1)[0]
    shares = torch.softmax(parts.scale * torch.einsum("hod,hsd->hs", q[0], keys), -1)
    return torch.einsum("hs,hsd->hd", shares, values).reshape(-1)


def dtype_of(parts: DecoderParts) -> torch.dtype | None:
    """The one dtype of all weights that are not packed; None if they differ or no kernel takes it."""
    dtypes = {
        tensor.dtype
        for module in parts.modules()
        if not isinstance(module, QuantisedLinear)
        for tensor in module._parameters.values()
        if tensor is not None
    }
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in FORMAT_OF_DTYPE else None
