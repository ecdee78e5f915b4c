"""Which kernels loading and decoding a model compile, one by one, so that two processes can share the work.

What is missing here is compiled nevertheless, by whoever needs it first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cpu_kernels import (
    ask_ahead,
    decode_attention_kernel,
    expert_mlp_kernel,
    linear_kernel,
    paged_attention_block,
    paged_attention_kernel,
    rms_norm_kernel,
    rotary_kernel,
    tape_experts_kernel,
    tape_kernel,
    tape_team_kernel,
)
from cpu_kernels.compiling.together import Kernel, prepare_named
from cpu_kernels.kv_simd import KvCode
from cpu_kernels.packed_expert_mlp import compile_packed_kernels
from cpu_kernels.panel_mlp import compile_panel_kernels
from cpu_kernels.prompt_attention import compile_prompt_attention
from cpu_kernels.tensors import FORMAT_OF_DTYPE, elements_of
from cpu_kernels.weighted_sum import compile_sums
from cpu_kernels.wide_linear import takes_panels
from formats.packed import PACKED_FORMATS

_POLICY_ENTRIES = (
    ("prefetch.policies.forecast_kernel", "visit_layer"),
    ("prefetch.policies.forecast_kernel", "value_foretold"),
    ("prefetch.policies.selection_kernel", "select"),
)

_READER_ENTRIES = ("serve", "submit", "promote", "cancel", "wait")


def kernels_of_model(
    dtype: torch.dtype, formats: Iterable[str], *, with_policy: bool, decodes: bool, attends: bool
) -> list[Kernel]:
    """What a model in a dtype compiles; the small ones are in the middle, where two processes meet.

    Args:
        dtype: of activations.
        formats: of its weights.
        with_policy: whether experts come and go, by the default policy.
        decodes: whether whole decode steps run as a tape, which not all families' do.
        attends: whether a kernel attends to prompts.
    """
    small: list[Kernel] = [(compile_sums, ())]
    first: list[Kernel] = [(prepare_named, ("cpu_kernels.routing_kernel", "group_pairs"))]
    first += [(prepare_named, ("cpu_kernels.read_queue_kernel", entry)) for entry in _READER_ENTRIES]
    last: list[Kernel] = []
    if with_policy:
        first += [(prepare_named, entry) for entry in _POLICY_ENTRIES]
    if dtype not in FORMAT_OF_DTYPE:
        return first + small
    elements = elements_of(dtype)
    formats = set(formats)
    last += [(compile_packed_kernels, (format,)) for format in sorted(formats & PACKED_FORMATS.keys())]
    if FORMAT_OF_DTYPE[dtype] in formats:
        last.append((expert_mlp_kernel.rows_task, (elements,)))
        if takes_panels(dtype):
            last.append((compile_panel_kernels, (FORMAT_OF_DTYPE[dtype],)))
    if decodes:
        first.append((prepare_named, (tape_kernel.__name__, "run_tape")))
        small.append((prepare_named, (ask_ahead.__name__, "ask_ahead")))
        first += [(prepare_named, (tape_team_kernel.__name__, "play_in_team")), (tape_team_kernel.body_address, ())]
        last.append((decode_attention_kernel.run_task, (elements,)))
        small += [
            (linear_kernel.linear_task, (elements,)),
            (decode_attention_kernel.combine_task, (elements,)),
            (rotary_kernel.rotary_task, (elements,)),
            (rms_norm_kernel.rms_norm_task, (elements,)),
            # Modules are recognised by what theirs do in fp32.
            (rotary_kernel.rotary_task, (elements_of(torch.float32),)),
            (rms_norm_kernel.rms_norm_task, (elements_of(torch.float32),)),
            (tape_experts_kernel.choice_task, (elements,)),
            (tape_experts_kernel.weighing_task, (elements,)),
            (tape_experts_kernel.add_sums_task, (elements,)),
        ]
    if attends:
        last += [
            (paged_attention_block.multiply_function, (KvCode("fp32"),)),
            (paged_attention_kernel.attention_task, ()),
            (compile_prompt_attention, (dtype,)),
        ]
    return first + small + last
