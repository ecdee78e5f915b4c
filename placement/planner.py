"""From sizes and budgets to a plan: dense weights and KV in RAM, as many expert slots as fit."""

from __future__ import annotations

from dataclasses import replace

from formats.packed import round_up
from placement.hardware_profile import HardwareProfile
from placement.homes import Homes
from placement.kv import (
    KvChoice,
    KvPlan,
    fixed_nbytes,
    landmarks_nbytes,
    layout_format,
    minimum_nbytes,
    plan_kv,
    scratch_nbytes,
)
from placement.kv_cost import in_blocks, with_blocks_in_vram, with_reads, with_sparsity
from placement.model_spec import ModelSpec
from placement.outputs import GROUP_NBYTES, kept_nbytes
from placement.plan import Plan, RamUse, VramPlan
from placement.predict import Routing, predict
from placement.prediction import Prediction
from placement.workload import Workload
from prefetch.policies.links import tables_nbytes

MINIMUM_SLOTS = 2
"""One expert computes while the next one loads."""

READ_CHUNK_NBYTES = 4 << 20
"""The most that is read at once, so that what is needed now overtakes."""

READER_THREADS = 4

_PAGE_NBYTES = 4096
_SAMPLING_COPIES = 3
"""generate() holds the last logits in the model's dtype, in fp32, and once more while it samples."""

_ALLOCATOR_NBYTES = 30 << 20
"""What allocators, readers and libraries keep beside what is asked of them, whatever the model (`offload.allocator`
bounds it). Seen: 8 to 30 MB."""

_EXPECTED_ALLOCATOR_NBYTES = 19 << 20
"""Of that, in the middle: a plan must hold, an expectation is as likely above as below."""

_LOADING_NBYTES = 16 << 20
"""What loading takes beside dense weights and its scratch, seen at most."""

KV_ROOM_TOKENS = 64
"""A cache that grows in place has room for a multiple of so many tokens."""

_STORE_RECORD_NBYTES = 512
_STORE_SLACK_NBYTES = 2 << 20
"""What a store needs beside its bundles: headers, manifest, the file system's records."""


class PlanInfeasibleError(ValueError):
    """Nothing within the budget can run this.

    Attributes:
        minimum_ram_nbytes: the least budget with which it can.
    """

    def __init__(self, message: str, minimum_ram_nbytes: int) -> None:
        super().__init__(message)
        self.minimum_ram_nbytes = minimum_ram_nbytes


def kv_nbytes(spec: ModelSpec, batch: int, tokens: int, repeated_tokens: int | None = None) -> int:
    """Bytes of the cache of `batch` sequences of `tokens` tokens, at its peak.

    DynamicCache concatenates, and attention may repeat keys and values for every query head, of so many tokens (None:
    of all): for a moment one layer has both. A cache that grows in place has room for some tokens more.
    """
    repeated = round_up(tokens if repeated_tokens is None else repeated_tokens, KV_ROOM_TOKENS)
    tokens = round_up(tokens, KV_ROOM_TOKENS)
    cached = batch * (tokens * spec.kv_nbytes_per_token + spec.kv_fixed_nbytes)
    return cached + cached // max(spec.layer_count, 1) + batch * repeated * spec.attention_nbytes_per_token


def activation_nbytes(spec: ModelSpec, batch: int, tokens: int, *, all_logits: bool, host: bool = True) -> int:
    """Bytes of activations of a forward pass of `batch` x `tokens` new tokens, logits included.

    On the host with what its allocators keep, and the tables by which the cache policy decides.
    """
    kept = 0
    if host:
        kept = (
            _ALLOCATOR_NBYTES + spec.kept_products_nbytes + tables_nbytes(tuple(layer.count for layer in spec.experts))
        )
    logits = batch * spec.vocab_size * 4 * _SAMPLING_COPIES
    if all_logits:
        logits += batch * tokens * spec.vocab_size * 4
    return _most_rows_nbytes(spec, batch * tokens, host=host) + logits + kept


def _most_kept_rows(spec: ModelSpec, *, host: bool) -> int:
    """Tokens of a pass up to which the outputs of all its pairs are kept."""
    return kept_nbytes(accelerated=not host) // (max(spec.top_k, 1) * spec.hidden_size * 4)


def _most_rows_nbytes(spec: ModelSpec, rows: int, *, host: bool) -> int:
    """Bytes of a pass of so many tokens at most: the longest may take less than a shorter one."""
    return max(_rows_nbytes(spec, some, host=host) for some in (rows, min(rows, _most_kept_rows(spec, host=host))))


def _rows_nbytes(spec: ModelSpec, rows: int, *, host: bool) -> int:
    """Bytes of a pass of so many tokens, with the outputs of its MoE step and what is between an expert's projections.

    Outputs of all (token, expert) pairs, as far as that goes; beyond, of a group, and their sum.
    """
    row_nbytes = spec.hidden_size * 4
    token_nbytes = spec.activation_nbytes_per_token
    if not spec.experts:
        return rows * token_nbytes
    pair_nbytes = row_nbytes + 4 * max(layer.layout.intermediate for layer in spec.experts)
    if rows <= _most_kept_rows(spec, host=host):
        return rows * (token_nbytes + spec.top_k * pair_nbytes)
    # An expert that all tokens go to is a group of its own.
    pairs = max(rows, GROUP_NBYTES // row_nbytes)
    return rows * (token_nbytes + row_nbytes) + pairs * pair_nbytes


def pass_nbytes(spec: ModelSpec, batch: int, tokens: int, past_tokens: int, *, all_logits: bool) -> int:
    """Bytes that a forward pass holds beside dense weights and experts."""
    return kv_nbytes(spec, batch, past_tokens + tokens) + activation_nbytes(spec, batch, tokens, all_logits=all_logits)


def fixed_ram(spec: ModelSpec, workload: Workload, paged_nbytes: int | None = None, slots_nbytes: int = 0) -> RamUse:
    """Host memory that the request needs before the first expert slot.

    Args:
        spec: the model.
        workload: what will run.
        paged_nbytes: memory of a KV cache in blocks; None for one that grows in place.
        slots_nbytes: of the slots that will follow.
    """
    loading = spec.load_scratch_nbytes + _LOADING_NBYTES
    tokens_at_once = min(workload.context_tokens, workload.prefill_chunk_tokens)
    activations = activation_nbytes(spec, workload.batch, tokens_at_once, all_logits=False)
    if paged_nbytes is None:
        kv = _page_up(kv_nbytes(spec, workload.batch, workload.context_tokens))
    else:
        kv = _page_up(paged_nbytes + fixed_nbytes(spec, workload))
        activations += scratch_nbytes(spec, workload)
    return RamUse(
        dense_nbytes=spec.dense_nbytes,
        kv_nbytes=kv,
        # While weights load there is no KV cache yet, and there are no slots.
        activation_nbytes=_page_up(max(activations, loading - kv - slots_nbytes)),
        slot_nbytes=0,
    )


def unused_ram_nbytes(spec: ModelSpec, workload: Workload, *, paged: bool) -> int:
    """What a plan's memory for passes has beyond what its own workload takes at the peak.

    A plan holds any sequence up to the context, in prompts of any length. This workload's tokens may be fewer, only its
    prompt repeats keys and values, and a long pass, whose outputs are summed in groups, may take less than a shorter
    one.

    Args:
        spec: the model.
        workload: what will run.
        paged: the KV cache lies in blocks, of which the plan has as many as the budget allows.
    """
    batch, context = workload.batch, workload.context_tokens
    prompt = min(workload.prompt_tokens, context)
    chunk = min(prompt, workload.prefill_chunk_tokens)
    passes = {1, chunk, prompt % chunk or chunk}
    longest = max(_rows_nbytes(spec, batch * tokens, host=True) for tokens in passes)
    any_pass = _most_rows_nbytes(spec, batch * min(context, workload.prefill_chunk_tokens), host=True)
    unused = max(0, any_pass - longest)
    if not paged:
        tokens = min(context, prompt + workload.new_tokens)
        unused += kv_nbytes(spec, batch, context) - kv_nbytes(spec, batch, tokens, prompt)
    return unused


def make_plan(
    spec: ModelSpec,
    workload: Workload,
    ram_budget_nbytes: int,
    profile: HardwareProfile | None = None,
    routing: Routing | None = None,
    kv: KvChoice | None = None,
) -> Plan:
    """The plan for a machine without an accelerator: what the runtime executes.

    Args:
        spec: the model by its sizes.
        workload: what will run.
        ram_budget_nbytes: bound on all that the runtime holds in host memory.
        profile: the machine, for the prediction; None makes none.
        routing: what is known of the experts' popularity, for the prediction.
        kv: what the user wants of the KV cache; None for the plain one while it fits, else blocks.

    Raises:
        PlanInfeasibleError: the budget is below what dense weights, KV, activations and two expert slots need.
        ValueError: `profile` cannot predict this spec.
    """
    slot_nbytes = spec.bundle_nbytes
    minimum_slots = min(MINIMUM_SLOTS, spec.expert_count)
    paged_nbytes, paged, minimum = _kv_and_minimum(
        spec, workload, ram_budget_nbytes, KvChoice() if kv is None else kv
    )  # fmt: skip
    # What loading takes beside dense weights is free again when slots are made.
    fixed = fixed_ram(spec, workload, paged_nbytes, spec.load_scratch_nbytes + _LOADING_NBYTES)
    if ram_budget_nbytes < minimum:
        slots_needed = f", {minimum_slots} expert slots of {slot_nbytes:,}" if minimum_slots else ""
        raise PlanInfeasibleError(
            f"{spec.name} needs at least {minimum:,} bytes of RAM: dense weights {fixed.dense_nbytes:,}, "
            f"KV cache of {workload.batch} x {workload.context_tokens} tokens {fixed.kv_nbytes:,}, "
            f"activations {fixed.activation_nbytes:,}{slots_needed}; the budget is {ram_budget_nbytes:,}",
            minimum,
        )
    slots = min(spec.expert_count, (ram_budget_nbytes - fixed.total_nbytes) // slot_nbytes)
    fixed = fixed_ram(spec, workload, paged_nbytes, slots * slot_nbytes)
    prediction = None
    if profile is not None:
        # While weights load there are neither passes nor slots.
        loading = fixed.dense_nbytes + spec.load_scratch_nbytes + _LOADING_NBYTES
        passes = fixed.total_nbytes + slots * slot_nbytes - unused_ram_nbytes(spec, workload, paged=paged is not None)
        passes -= _ALLOCATOR_NBYTES - _EXPECTED_ALLOCATOR_NBYTES
        prediction = predicted(spec, profile, slots, workload, routing, paged)
        prediction = replace(prediction, peak_ram_nbytes=max(loading, passes))
    return Plan(
        model=spec.name,
        model_type=spec.model_type,
        format=spec.expert_format,
        dense_format=spec.dense_format,
        head_format=spec.head_format,
        workload=workload,
        dense_tier="ram",
        kv_tier="ram",
        expert_home="nvme",
        expert_count=spec.expert_count,
        expert_nbytes=spec.expert_nbytes,
        experts_per_token=sum(layer.top_k for layer in spec.experts),
        slot_nbytes=slot_nbytes,
        ram_slots=slots,
        ram=RamUse(fixed.dense_nbytes, fixed.kv_nbytes, fixed.activation_nbytes, slots * slot_nbytes),
        ram_budget_nbytes=ram_budget_nbytes,
        minimum_ram_nbytes=minimum,
        disk_nbytes=_store_nbytes(spec),
        kv_nbytes_per_token=spec.kv_nbytes_per_token,
        read_chunk_nbytes=read_chunk_nbytes(slot_nbytes),
        reader_threads=READER_THREADS,
        prediction=prediction,
        kv=paged,
    )


def _kv_and_minimum(
    spec: ModelSpec, workload: Workload, ram_budget_nbytes: int, choice: KvChoice
) -> tuple[int | None, KvPlan | None, int]:
    """Memory of a KV cache in blocks and that cache, None for one that grows in place; the least budget that would do.

    A cache that fits and keeps what the model computed grows in place. In blocks, the cache goes before experts: a byte
    of it that is on disk is read for every token, an expert's only where it is routed to.
    """
    slots_nbytes = min(MINIMUM_SLOTS, spec.expert_count) * spec.bundle_nbytes
    fixed = fixed_ram(spec, workload, None, slots_nbytes)
    minimum = fixed.total_nbytes + slots_nbytes
    format = layout_format(choice.format, spec.dtype)
    pageable = any(shape is not None for shape in spec.kv_shapes)
    within = not choice.blocks and (choice.ram_nbytes is None or fixed.kv_nbytes <= choice.ram_nbytes)
    if not pageable or (format == spec.dtype and within and minimum <= ram_budget_nbytes):
        return None, None, minimum
    least = minimum_nbytes(spec, workload.batch, format, above=choice.vram_nbytes != 0)
    known = landmarks_nbytes(spec, workload.batch, workload.context_tokens, choice.sparsity)
    beside = fixed_ram(spec, workload, known, slots_nbytes).total_nbytes
    paged = blocks_within(spec, workload, choice, ram_budget_nbytes - beside)
    kept = known + min(least, paged.ram_nbytes)
    paged_minimum = fixed_ram(spec, workload, kept, slots_nbytes).total_nbytes + slots_nbytes
    if format == spec.dtype and within and paged_minimum >= minimum:
        # Blocks would take more than they save.
        return None, None, minimum
    return known + paged.ram_nbytes, paged, paged_minimum


def blocks_within(spec: ModelSpec, workload: Workload, choice: KvChoice, room_nbytes: int) -> KvPlan:
    """A KV cache in blocks where all else, the fewest slots included, leaves so much of the budget; no less than blocks
    need.
    """
    least = minimum_nbytes(
        spec, workload.batch, layout_format(choice.format, spec.dtype), above=choice.vram_nbytes != 0
    )  # fmt: skip
    # The experts of one layer and token keep their slots where that leaves enough for blocks.
    experts = spec.top_k * spec.bundle_nbytes
    return plan_kv(spec, workload, choice, max(least, room_nbytes - experts))


def read_chunk_nbytes(bundle_nbytes: int) -> int:
    """Bytes of the pieces in which such an expert is read: equal ones, as a short last one is slow for what it brings,
    above all ahead of time, where one piece is under way at a time.
    """
    pieces = -(-bundle_nbytes // READ_CHUNK_NBYTES)
    return round_up(-(-bundle_nbytes // pieces), _PAGE_NBYTES)


def nothing_in_vram(spec: ModelSpec, ram_slots: int = 0) -> Homes:
    """Where everything lives without an accelerator."""
    return Homes((), (), False, 0, ram_slots, read_chunk_nbytes(spec.bundle_nbytes), READER_THREADS)


def can_predict(profile: HardwareProfile, vram: VramPlan | None) -> bool:
    """Whether `predicted` knows what it would have to: not of an accelerator that the profile has not."""
    return vram is None or profile.gpu is not None


def with_prediction(spec: ModelSpec, plan: Plan, profile: HardwareProfile, routing: Routing | None = None) -> Plan:
    """The plan with what is expected of it; as it is where that is not known, see `can_predict`."""
    if not can_predict(profile, plan.vram):
        return plan
    told = predicted(spec, profile, plan.ram_slots, plan.workload, routing, plan.kv, plan.vram)
    return replace(plan, prediction=told)


def predicted(
    spec: ModelSpec,
    profile: HardwareProfile,
    ram_slots: int,
    workload: Workload,
    routing: Routing | None = None,
    kv: KvPlan | None = None,
    vram: VramPlan | None = None,
) -> Prediction:
    """What is expected of a plan with so many slots in RAM, and what `vram` says on an accelerator.

    Raises:
        ValueError: not `can_predict`.
    """
    homes = nothing_in_vram(spec, ram_slots)
    if not can_predict(profile, vram):
        raise ValueError("a prediction needs a profile of the accelerator")
    if vram is not None:
        homes = _in_vram(homes, spec, vram, kv)
    found = predict(in_blocks(spec, kv), profile, homes, workload, routing)
    if vram is not None:
        found = with_blocks_in_vram(found, spec, profile, workload, kv)
    return with_reads(with_sparsity(found, spec, workload, kv), spec, profile, workload, kv)


def _in_vram(homes: Homes, spec: ModelSpec, vram: VramPlan, kv: KvPlan | None) -> Homes:
    """With what an accelerator has; where some layers stream, all compute there, and so does attention."""
    homes = replace(homes, head_in_vram=vram.head, vram_slots=vram.slots)
    if not vram.window_layers:
        return replace(homes, dense_in_vram=vram.dense_layers, kv_in_vram=vram.kv_layers)
    every = tuple(range(len(spec.layers)))
    streamed = tuple(index for index in every if index not in vram.dense_layers)
    there = every if kv is None and vram.use.kv_nbytes else ()
    return replace(homes, dense_in_vram=every, kv_in_vram=there, dense_streamed=streamed)


def _store_nbytes(spec: ModelSpec) -> int:
    """What a store needs on disk; a dense model has none."""
    if not spec.experts:
        return 0
    return spec.expert_nbytes + spec.expert_count * _STORE_RECORD_NBYTES + _STORE_SLACK_NBYTES


def _page_up(nbytes: int) -> int:
    return round_up(nbytes, _PAGE_NBYTES)
