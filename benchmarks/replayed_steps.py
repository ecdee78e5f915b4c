"""What Python takes of a decode step that is replayed as a graph: between two steps, and beside one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward

import offload
from benchmarks import checkpoints
from benchmarks.equality import FP32_TOLERANCE, gate_close, relative_maximum
from benchmarks.gpu_timing import accelerator
from benchmarks.harness import Report, Spread, interleave, say
from offload.hf.graphs.attention import attend_in_groups

NARROW = checkpoints.Shape(
    layers=48, hidden=64, experts=128, expert_intermediate=32, top_k=8, heads=4, kv_heads=2, head_dim=16, vocab=1024,
    dtype="float32",
)  # fmt: skip
"""As many layers and experts as Qwen3-30B-A3B, and next to nothing to compute in them."""

TARGET_US = 10.0

_PROMPT_TOKENS = 16
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 4, 128
"""Of Qwen3-30B-A3B."""

_SHARES = (1.0, 0.5)


@dataclass(frozen=True)
class ReplayScale:
    """Decode steps that are timed, after so many that are not; columns of keys that are attended to, and how often."""

    steps: int
    before: int
    columns: int
    rounds: int


FULL = ReplayScale(steps=100, before=12, columns=8192, rounds=30)
QUICK = ReplayScale(steps=8, before=4, columns=256, rounds=3)


def run(work: Path, shape: checkpoints.Shape, scale: ReplayScale) -> Report:
    """The benchmark."""
    report = Report("replayed_steps")
    _attention(report, scale)
    step_tables(report, work, shape, scale)
    return report


def step_tables(report: Report, work: Path, shape: checkpoints.Shape, scale: ReplayScale) -> None:
    """Microseconds of a layer of replayed steps, on the GPU that is here, or where host memory plays one: with all
    experts above, which then stay there, and with half of them, the others in host memory.

    Args:
        report: takes gates, targets and the table.
        work: directory for checkpoints and stores.
        shape: of the model.
        scale: how much.

    Raises:
        GateError: replayed steps give other logits, or none was replayed.
    """
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    say("loading without graphs")
    with torch.no_grad(), _load(checkpoint, work, scale, _SHARES[-1], step_graph=False) as plain:
        expected = _logits(plain, shape)
    for share in _SHARES:
        say(f"loading with {share:.0%} of the experts above")
        with torch.no_grad(), _load(checkpoint, work, scale, share, step_graph=True) as model:
            found = _logits(model, shape)
            name = f"logits, {share:.0%} above, replayed and not"
            gate_close(report, name, found, expected, relative_maximum, FP32_TOLERANCE)
            timed = _timed(model, shape, scale)
        report.gate(f"steps were replayed, {share:.0%} above", len(timed.between_s) == scale.steps, f"{scale.steps}")
        between, beside, replay = (
            Spread.of([1e6 * seconds / shape.layers for seconds in each])
            for each in (timed.between_s, timed.beside_s, timed.replay_s)
        )
        report.tables.setdefault("A layer of a replayed step, microseconds", []).append(
            {
                "experts above": share,
                "between steps": between,
                "beside the step": beside,
                "the step itself": replay,
                "experts copied a step": timed.copies / scale.steps,
            }
        )
        report.target(
            f"host microseconds of a layer between replayed steps, {share:.0%} above", between.median, "at most",
            TARGET_US,
        )  # fmt: skip
    report.notes.append(
        f"{shape.layers} layers of hidden {shape.hidden}, {shape.experts} experts top-{shape.top_k}, fp32; random "
        "weights and tokens; batch 1. Seconds of a step divided by its layers. Between steps is the decoder's forward "
        "without the graph's replay: the output layer and sampling are not in it, starting the copies of experts is. "
        "Beside the step is what Python does once a replay has begun; where host memory plays the accelerator that "
        "comes before the operations."
    )


def _attention(report: Report, scale: ReplayScale) -> None:
    """One token with a mask: transformers' functions, and groups of query heads."""
    groups, scaling = _HEADS // _KV_HEADS, _HEAD_DIM**-0.5
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, _HEAD_DIM, generator=generator)
        for heads, tokens in ((_HEADS, 1), (_KV_HEADS, scale.columns), (_KV_HEADS, scale.columns))
    )
    sees = (torch.arange(scale.columns) < scale.columns - 9)[None, None, None]
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = groups
    grouped = query.view(1, _KV_HEADS, groups, _HEAD_DIM)
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "transformers' eager": lambda: eager_attention_forward(module.eval(), query, key, value, added, scaling)[0],
        "transformers' sdpa": lambda: ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, sees, scaling=scaling
        )[0],
        "in groups": lambda: attend_in_groups(grouped, key, value, added, scaling).reshape(1, 1, _HEADS, _HEAD_DIM),
    }  # fmt: skip
    expected = functions["transformers' eager"]().numpy()
    for name, function in functions.items():
        gate_close(report, f"attention, {name}", function().numpy(), expected, relative_maximum, FP32_TOLERANCE)
    turns = interleave({name: partial(_seconds, function) for name, function in functions.items()}, scale.rounds)
    report.tables[f"Attention of one token over {scale.columns:,}, milliseconds"] = [
        {"function": name, "call": Spread.of([1e3 * seconds for seconds in each])} for name, each in turns.items()
    ]
    report.notes.append(f"Attention: {_HEADS} heads on {_KV_HEADS} of {_HEAD_DIM}, fp32, with a mask.")


def _seconds(function: Callable[[], object]) -> float:
    begin = perf_counter()
    function()
    return perf_counter() - begin


@contextmanager
def _load(
    checkpoint: Path, work: Path, scale: ReplayScale, share: float, *, step_graph: bool
) -> Iterator[PreTrainedModel]:
    context = _PROMPT_TOKENS + scale.before + scale.steps + 16
    ram, root, device = checkpoints.budget_for(checkpoint, 1.0, context), checkpoints.store_root(work), accelerator()
    vram = checkpoints.vram_for(checkpoint, share, device=device, ram=ram, context=context, root=root)
    model: Any = offload.load(
        checkpoint, ram=ram, nvme=root, context=context, device=device, vram=vram, step_graph=step_graph,
        progress=False,
    )  # fmt: skip
    with model.offload:
        yield model


def _cache(model: PreTrainedModel, shape: checkpoints.Shape) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([checkpoints.random_tokens(_PROMPT_TOKENS, shape.vocab, 0)], device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _step(model: PreTrainedModel, cache: DynamicCache, token: int) -> torch.Tensor:
    ids = torch.tensor([[token]], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


def _logits(model: PreTrainedModel, shape: checkpoints.Shape) -> Any:
    cache = _cache(model, shape)
    tokens = checkpoints.random_tokens(4, shape.vocab, 1)
    return torch.cat([_step(model, cache, token)[0] for token in tokens]).float().numpy(force=True)


# --- timing ------------------------------------------------------------------------------------------------------


@dataclass
class _Timed:
    """Seconds of each replayed step, and experts copied in all."""

    between_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    replay_s: list[float] = field(default_factory=list)
    copies: int = 0


def _timed(model: PreTrainedModel, shape: checkpoints.Shape, scale: ReplayScale) -> _Timed:
    cache = _cache(model, shape)
    tokens = checkpoints.random_tokens(scale.before + scale.steps, shape.vocab, 2)
    for token in tokens[: scale.before]:
        _step(model, cache, token)
    say(f"timing {scale.steps} steps")
    runtime: Any = model.offload
    copied = runtime.stats().accelerator.copies
    with _watched(model) as timed:
        for token in tokens[scale.before :]:
            _step(model, cache, token)
    timed.copies = runtime.stats().accelerator.copies - copied
    return timed


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[_Timed]:
    """Within the block replayed steps are timed."""
    runtime: Any = model.offload
    graphs, graph = type(runtime.graphs), type(runtime.accelerated.accelerator.step_graph())
    run, replay = graphs.run, graph.replay
    timed = _Timed()

    def timed_replay(self: Any, meanwhile: Callable[[], None] = lambda: None) -> None:
        beside: list[float] = []

        def timed_meanwhile() -> None:
            begin = perf_counter()
            meanwhile()
            beside.append(perf_counter() - begin)

        begin = perf_counter()
        replay(self, timed_meanwhile)
        timed.replay_s.append(perf_counter() - begin)
        timed.beside_s.append(beside[0])

    def timed_run(self: Any, *request: Any) -> Any:
        replayed, begin = len(timed.replay_s), perf_counter()
        output = run(self, *request)
        whole = perf_counter() - begin
        if len(timed.replay_s) == replayed + 1:
            timed.between_s.append(whole - timed.replay_s[-1])
        return output

    with patch.object(graph, "replay", timed_replay), patch.object(graphs, "run", timed_run):
        yield timed
