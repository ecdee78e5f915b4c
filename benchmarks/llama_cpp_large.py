"""The model of the size of Qwen3-30B-A3B in int4 beside llama.cpp's q4_0, everything in RAM, one after the other.

Both sides have random weights of their own, whose bytes are written straight into their files: time does not depend on
them. The output layer has 4 bits on both sides; ours has 8 where nothing is said of it.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.gguf_files import ensure_random_gguf
from benchmarks.harness import Report, Spread, interleave, ratios, say
from benchmarks.large_model import (
    EVERYTHING,
    QUANT,
    decode_beside_stream,
    load_random,
    prefill_speed,
    weights_of_a_token_nbytes,
)
from benchmarks.llama_cpp import LlamaScale, ensure_built, run_llama_bench


@dataclass(frozen=True)
class _Turn:
    """Tokens a second by task, and decode as a share of what the read bandwidth beside it allows."""

    speeds: dict[str, float]
    share: float


FULL = LlamaScale(prompts=(512,), new_tokens=64, rounds=5)
QUICK = LlamaScale(prompts=(32,), new_tokens=4, rounds=1)


def run(work: Path, shape: checkpoints.Shape, scale: LlamaScale) -> Report:
    """The benchmark; builds llama.cpp once, needs room for both files (33 GB) and RAM for one side."""
    report = Report("llama_cpp_large")
    tools = ensure_built(work)
    file = ensure_random_gguf(shape.config(), work, shape.name)
    turns = interleave(
        {
            "ours": lambda: _ours(work, shape, scale),
            "llama.cpp": lambda: _Turn(run_llama_bench(tools, file, scale), 0.0),
        },
        scale.rounds,
    )
    rows = report.tables.setdefault("tokens/s, int4 beside q4_0, everything in RAM", [])
    for task in turns["ours"][0].speeds:
        ours, theirs = ([turn.speeds[task] for turn in turns[side]] for side in ("ours", "llama.cpp"))
        ratio = ratios(ours, theirs)
        rows.append(
            {
                "task": task,
                "ours tokens/s": Spread.of(ours),
                "llama.cpp tokens/s": Spread.of(theirs),
                "ours / llama.cpp": ratio,
            }
        )
        report.target(f"int4 / q4_0, {task}", ratio.median, "at least", 1.2 if task == "decode" else 2.0)
    report.tables["Ours beside the stream"] = [
        {"decode / (stream / bytes of a token)": Spread.of([turn.share for turn in turns["ours"]])}
    ]
    report.notes.append(
        "Random weights on both sides, the output layer in 4 bits; llama.cpp with as many threads as there are cores."
    )
    return report


def _ours(work: Path, shape: checkpoints.Shape, scale: LlamaScale) -> _Turn:
    say("ours")
    model = load_random(work, shape, EVERYTHING, lm_head=QUANT)
    prefill_speed(model, shape, 64)
    speeds = {f"prefill {count}": max(prefill_speed(model, shape, count) for _ in range(2)) for count in scale.prompts}
    token_nbytes = weights_of_a_token_nbytes(model, shape)
    decoded = [decode_beside_stream(model, shape, scale.new_tokens, token_nbytes) for _ in range(2)]
    speeds["decode"] = max(speed for speed, _ in decoded)
    share = Spread.of([share for _, shares in decoded for share in shares]).median
    runtime: Any = model.offload
    runtime.close()
    del model, runtime
    gc.collect()
    return _Turn(speeds, share)
