"""Tokens a second beside llama.cpp on the same weights, built here for this CPU from the source that PyPI has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks import checkpoints
from benchmarks.gguf_files import differing_tensors, ensure_gguf
from benchmarks.harness import Report, Spread, interleave, ratios, say
from benchmarks.machine import read_bandwidth, require_memory
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
    """How much to run: each of `rounds` reads the prompts and `decodes` times decodes `new_tokens`."""

    prompts: tuple[int, ...]
    new_tokens: int
    rounds: int
    decodes: int = 1

    @property
    def tasks(self) -> list[str]:
        """What one round does, in order."""
        return [*(f"prefill {count}" for count in self.prompts), *["decode"] * self.decodes]


FULL = LlamaScale(prompts=(128, 512), new_tokens=16, rounds=3, decodes=4)
QUICK = LlamaScale(prompts=(32,), new_tokens=4, rounds=1)


def run(work: Path, shape: checkpoints.Shape, scale: LlamaScale) -> Report:
    """The benchmark; builds llama.cpp and writes its files once.

    Needs room on disk for 2.5 times the checkpoint, and in memory for both sides.
    """
    report = Report("llama_cpp")
    tools = ensure_built(work)
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    source = ensure_gguf(checkpoint, work)
    wrong = differing_tensors(checkpoint, source)
    report.gate("llama.cpp's weights = the checkpoint's", not wrong, ", ".join(wrong) or "equal")
    require_memory(2 * source.stat().st_size, "a model on each side")
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
        f"llama.cpp of {SOURCE}, built for this CPU, with as many threads as there are cores. Both sides are in memory "
        "and take short turns, each after a warm-up, while the other waits; ratios are of turns that follow each "
        "other. Random weights; time does not depend on them."
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
    """Tokens a second by task and side, in the order of turns."""
    tasks = scale.tasks * scale.rounds
    to_do = iter(tasks)
    with Peer(options) as ours:
        ours.ready()
        ours.start(checkpoints.random_tokens(16, vocab, seed=0))
        with LlamaBench(tools, file, scale) as theirs:
            turns = interleave(
                {"llama.cpp": theirs.turn, "ours": lambda: _turn(ours, next(to_do), vocab, scale)}, len(tasks)
            )
    speeds: dict[str, dict[str, list[float]]] = {task: {side: [] for side in turns} for task in scale.tasks}
    for side, values in turns.items():
        for task, value in zip(tasks, values, strict=True):
            speeds[task][side].append(value)
    return speeds


def _turn(peer: Peer, task: str, vocab: int, scale: LlamaScale) -> float:
    """Tokens a second of ours, warmed up as llama-bench is."""
    kind, _, count = task.partition(" ")
    if kind == "prefill":
        peer.start(checkpoints.random_tokens(int(count), vocab, seed=2))
        return int(count) / peer.start(checkpoints.random_tokens(int(count), vocab, seed=1))
    peer.start(checkpoints.random_tokens(16, vocab, seed=3))
    peer.feed(checkpoints.random_tokens(2, vocab, seed=4))
    return peer.feed(checkpoints.random_tokens(scale.new_tokens, vocab, seed=5)).tokens_per_s


class LlamaBench:
    """One llama-bench that does all rounds, stopped between its turns: a model is loaded once.

    It warms up before each turn. A context manager: at its end the process is gone.

    Attributes:
        process_id: of it.
    """

    def __init__(self, tools: Path, file: Path, scale: LlamaScale) -> None:
        """Start loading; the first turn waits for it."""
        threads = len(os.sched_getaffinity(0))
        # All its tests of one number of threads come before those of the next: that makes rounds. It sleeps before
        # each test, which leaves the time to stop it.
        command = (
            tools / "llama-bench", "-m", file, "-p", ",".join(map(str, scale.prompts)),
            "-n", ",".join([str(scale.new_tokens)] * scale.decodes), "-t", ",".join([str(threads)] * scale.rounds),
            "-r", 1, "--delay", 1, "-o", "jsonl",
        )  # fmt: skip
        self._process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.process_id = self._process.pid

    def turn(self) -> float:
        """Tokens a second of the next test.

        Raises:
            RuntimeError: llama-bench ended.
        """
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama-bench ended with exit code {self._process.wait()}")
        self._process.send_signal(signal.SIGSTOP)
        # Where it had ended after this line, asking whether the signal has somebody to go to has taken that.
        if self._process.returncode is None:
            os.waitid(os.P_PID, self.process_id, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        (speed,) = json.loads(line)["samples_ts"]
        return float(speed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


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
