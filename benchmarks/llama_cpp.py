"""Tokens a second beside llama.cpp on the same weights, built here for this CPU from the source that PyPI has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.gguf_files import differing_tensors, ensure_gguf
from benchmarks.harness import Report, Spread, interleave, ratios, say
from benchmarks.machine import read_bandwidth
from benchmarks.peers import Peer
from benchmarks.sessions import ModelOptions

SOURCE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-bench", "llama-quantize")
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_UI=OFF",
)

PAIRS: tuple[tuple[str | None, str], ...] = ((None, "bf16"), ("int8", "q8_0"), ("int4", "q4_0"))
"""Ours and the format of llama.cpp that is next to it: 16, 8.25 or 8.5, and 4.5 bits a weight."""

_CONTEXT_TOKENS = 1024
_EVERYTHING = 1 << 50


@dataclass(frozen=True)
class LlamaScale:
    """How much to run: each of `rounds` turns decodes `new_tokens` and reads the prompts."""

    prompts: tuple[int, ...]
    new_tokens: int
    rounds: int


FULL = LlamaScale(prompts=(128, 512), new_tokens=32, rounds=3)
QUICK = LlamaScale(prompts=(32,), new_tokens=4, rounds=1)


def run(work: Path, shape: checkpoints.Shape, scale: LlamaScale) -> Report:
    """The benchmark; builds llama.cpp and writes its files once, needs room for 2.5 times the checkpoint."""
    report = Report("llama_cpp")
    tools = ensure_built(work)
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    source = ensure_gguf(checkpoint, work)
    wrong = differing_tensors(checkpoint, source)
    report.gate("llama.cpp's weights = the checkpoint's", not wrong, ", ".join(wrong) or "equal")
    rows = report.tables.setdefault("tokens/s beside llama.cpp, everything in RAM", [])
    for quant, theirs in PAIRS:
        file = _packed(tools, source, theirs)
        # Without being told, int4 keeps the output layer in int8, which llama.cpp's file does not.
        parts = None if quant is None else dict.fromkeys(("experts", "dense", "lm_head"), quant)
        options = ModelOptions(
            "ours", str(checkpoint), _EVERYTHING, str(checkpoints.store_root(work)), _CONTEXT_TOKENS, parts
        )
        say(f"{quant or 'bf16'} beside {theirs}")
        for task, speeds in _measure(tools, file, options, shape.vocab, scale).items():
            ratio = ratios(speeds["ours"], speeds["llama.cpp"])
            rows.append(
                {
                    "ours": quant or "bf16",
                    "llama.cpp": theirs,
                    "task": task,
                    "ours tokens/s": Spread.of(speeds["ours"]),
                    "llama.cpp tokens/s": Spread.of(speeds["llama.cpp"]),
                    "ours / llama.cpp": ratio,
                }
            )
            bound = 2.0 if task == "prefill 512" else 1.0
            report.target(f"{quant or 'bf16'} / {theirs}, {task}", ratio.median, "at least", bound)
    report.tables["Limits measured in this run"] = [{"limit": "memory, reading", "GB/s": read_bandwidth() / 1e9}]
    report.notes.append(
        f"llama.cpp of {SOURCE}, built for this CPU, with as many threads as there are cores; only one side is in "
        "memory at a time. Random weights; time does not depend on them."
    )
    return report


def ensure_built(work: Path) -> Path:
    """The directory of llama.cpp's programs, built in an environment of their own unless they are there."""
    home = work / "llama.cpp"
    programs = home / "build" / "bin"
    if all((programs / tool).exists() for tool in TOOLS):
        return programs
    say(f"building llama.cpp of {SOURCE}: some minutes")
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home / "venv", with_pip=True)
    binaries = home / "venv" / "bin"
    _run(binaries / "pip", "install", "-q", "cmake", "ninja", "scikit-build-core")
    _run(
        binaries / "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", home,
        SOURCE,
    )  # fmt: skip
    (archive,) = home.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(home, filter="data")
    (tree,) = home.glob("*/vendor/llama.cpp")
    ninja = f"-DCMAKE_MAKE_PROGRAM={binaries / 'ninja'}"
    _run(binaries / "cmake", "-G", "Ninja", ninja, "-S", tree, "-B", home / "build", *_CMAKE_OPTIONS)
    _run(binaries / "cmake", "--build", home / "build", "--target", *TOOLS)
    return programs


def _packed(tools: Path, source: Path, kind: str) -> Path:
    """The GGUF in one of llama.cpp's formats."""
    if kind == "bf16":
        return source
    path = source.with_name(source.name.replace("-bf16.gguf", f"-{kind}.gguf"))
    if not path.exists():
        say(f"packing {kind}")
        unfinished = path.with_suffix(".unfinished")
        # --pure: every matrix in the one format, as ours.
        _run(tools / "llama-quantize", "--pure", source, unfinished, kind.upper())
        unfinished.rename(path)
    return path


def _measure(
    tools: Path, file: Path, options: ModelOptions, vocab: int, scale: LlamaScale
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second by task and side."""
    turns = interleave(
        {
            "ours": lambda: _ours(options, vocab, scale),
            "llama.cpp": lambda: run_llama_bench(tools, file, scale),
        },
        scale.rounds,
    )
    tasks = turns["ours"][0]
    return {task: {side: [turn[task] for turn in found] for side, found in turns.items()} for task in tasks}


def _ours(options: ModelOptions, vocab: int, scale: LlamaScale) -> dict[str, float]:
    """One turn, in a process of its own, so that its memory is free for the other side."""
    speeds: dict[str, float] = {}
    with Peer(options) as peer:
        peer.ready()
        peer.start(checkpoints.random_tokens(16, vocab, seed=0))
        for count in scale.prompts:
            seconds = min(peer.start(checkpoints.random_tokens(count, vocab, seed=seed)) for seed in (1, 2))
            speeds[f"prefill {count}"] = count / seconds
        peer.start(checkpoints.random_tokens(16, vocab, seed=3))
        peer.feed(checkpoints.random_tokens(4, vocab, seed=4))
        turns = (peer.feed(checkpoints.random_tokens(scale.new_tokens, vocab, seed=seed)) for seed in (5, 6))
        speeds["decode"] = max(turn.tokens_per_s for turn in turns)
    return speeds


def run_llama_bench(tools: Path, file: Path, scale: LlamaScale) -> dict[str, float]:
    """One turn of llama-bench, which warms up before each task; the better of two, as ours."""
    prompts = ",".join(map(str, scale.prompts))
    answer = _run(
        tools / "llama-bench", "-m", file, "-p", prompts, "-n", scale.new_tokens, "-r", 2, "-t",
        len(os.sched_getaffinity(0)), "-o", "json",
    )  # fmt: skip
    speeds = {}
    for test in json.loads(answer):
        task = f"prefill {test['n_prompt']}" if test["n_prompt"] else "decode"
        speeds[task] = max(test["samples_ts"])
    return speeds


def _run(*command: object) -> str:
    """Run a program and return what it prints; its messages are shown when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        raise RuntimeError(f"{Path(str(command[0])).name} ended with exit code {done.returncode}")
    return done.stdout
