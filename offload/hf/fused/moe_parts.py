"""What a MoE block is made of, if it is one that a tape can compute: proven by running it on stand-ins.

experts(x, choice(x))    with choice = the k largest of softmax(W x) in fp32, renormalised or not
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.checkpoint.hf_mapping import is_experts_module
from offload.hf.fused.stand_ins import Given, with_children

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class MoeParts:
    """The modules of a MoE block and how its router chooses.

    Attributes:
        block: the MoE block.
        router: with one weight [E, H].
        experts: the experts module.
        top_k: experts of a token.
        renormalise: weights of a token's experts add up to 1.
        rounded: they are rounded to the model's dtype.
    """

    block: nn.Module
    router: nn.Module
    experts: nn.Module
    top_k: int
    renormalise: bool
    rounded: bool

    @property
    def weight(self) -> nn.Parameter:
        """Of the router."""
        return self.router.get_parameter("weight")

    def modules(self) -> Iterator[nn.Module]:
        """Those whose calls a tape leaves out."""
        yield from (self.block, self.router, self.experts)


def find_moe_parts(block: nn.Module) -> MoeParts | None:
    """The parts of a block; None if it is not of the form."""
    children = dict(block.named_children())
    names = [name for name, child in children.items() if is_experts_module(child)]
    if len(children) != 2 or len(names) != 1 or block._parameters or block._buffers:
        return None
    (router_name,) = set(children) - set(names)
    router, experts = children[router_name], children[names[0]]
    weight = router._parameters.get("weight")
    if set(router._parameters) != {"weight"} or router._buffers or router._modules or weight is None:
        return None
    if weight.dim() != 2 or not _hands_on(block, router_name, names[0], weight):
        return None
    return _recognise_choice(block, router, experts, weight)


def _hands_on(block: nn.Module, router_name: str, experts_name: str, weight: torch.Tensor) -> bool:
    """Whether the block is experts(x, ids, weights) of the router's answer and nothing else."""
    columns = weight.shape[1]
    x = torch.randn(1, 1, columns, device="cpu").to(weight.dtype)
    ids, weights = torch.tensor([[1, 0]]), torch.tensor([[0.75, 0.5]]).to(weight.dtype)
    out = torch.randn(1, columns, device="cpu").to(weight.dtype)
    router, experts = Given((torch.zeros(1, len(weight), dtype=weight.dtype), weights, ids)), Given(out)
    stand_in = with_children(block, {router_name: router, experts_name: experts})
    try:
        with torch.no_grad():
            found = stand_in(x)
    except Exception:  # noqa: BLE001 - whatever a block of another form raises
        return False
    if not isinstance(found, torch.Tensor) or len(router.calls) != 1 or len(experts.calls) != 1:
        return False
    (router_args, router_kwargs), (args, kwargs) = router.calls[0], experts.calls[0]
    return (
        not router_kwargs
        and not kwargs
        and len(router_args) == 1
        and len(args) == 3
        and torch.equal(router_args[0].reshape(-1), x.reshape(-1))
        and torch.equal(args[0], x[0])
        and args[1] is ids
        and args[2] is weights
        and torch.equal(found, out[None])
    )


def _recognise_choice(block: nn.Module, router: nn.Module, experts: nn.Module, weight: torch.Tensor) -> MoeParts | None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_TOKENS, weight.shape[1], generator=generator, device="cpu").to(weight.dtype)
    try:
        with torch.no_grad():
            answer: Any = router(x)
        logits, weights, ids = answer
        top_k = int(ids.shape[-1])
    except Exception:  # noqa: BLE001 - a router that answers otherwise
        return None
    with torch.no_grad():
        probabilities = torch.softmax(torch.nn.functional.linear(x, weight), -1, dtype=torch.float32)
    expected, chosen = torch.topk(probabilities, top_k, -1)
    if (
        logits.dtype is not weight.dtype
        or weights.dtype not in (weight.dtype, torch.float32)
        or weights.shape != expected.shape
    ):
        return None
    # Logits of few bits tie, and a kernel may sum them in another order: most choices must agree, not every one.
    agrees = (ids == chosen).all(-1)
    if agrees.float().mean() < 0.5:
        return None
    step = 4 * torch.finfo(weight.dtype).eps
    for renormalise in (True, False):
        shares = expected / expected.sum(-1, keepdim=True) if renormalise else expected
        if torch.allclose(weights[agrees].float(), shares[agrees], rtol=step, atol=0):
            rounded = weights.dtype is not torch.float32
            return MoeParts(block, router, experts, top_k, renormalise, rounded)
    return None
