"""Tokens a second at several budgets against transformers in RAM and against accelerate's disk offload."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import checkpoints
from benchmarks.disk import raw_expert_bandwidth
from benchmarks.equality import (
    BF16_NOISE,
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    Outcome,
    gate_close,
    gate_same_bits,
    gate_tokens,
    outcome,
    relative_maximum,
    relative_rms,
)
from benchmarks.harness import Report, Row, Spread, interleave, ratios, say
from benchmarks.machine import gemm_flops, read_bandwidth, require_memory
from benchmarks.peers import Peer
from benchmarks.scratch import scratch_directory
from benchmarks.sessions import Fed, ModelOptions, Session

DECODE_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PREFILL_IMPLEMENTATIONS = ("eager", "grouped_mm")
"""batched_mm copies an expert for every pair of a token and an expert: 13 GB for 512 tokens."""

_LIBRARIES_NBYTES = 600 << 20


@dataclass(frozen=True)
class DecodeScale:
    """How much to run.

    Attributes:
        resident: shares of the experts that the budgets of ours hold, beside all of them.
        compared: the share at which accelerate gets the same budget.
        prompt_tokens: length of the prompt before decoding.
        prefills: lengths of prompts that are timed.
        turn_tokens: tokens that a peer decodes in its turn.
        accelerate_tokens: tokens that accelerate decodes in its turn.
        rounds: turns of each.
        gate_layers: layers of the fp32 model that is compared.
        gate_tokens: greedy tokens that are compared.
    """

    resident: tuple[float, ...] = (0.10, 0.25, 0.50)
    compared: float = 0.25
    prompt_tokens: int = 32
    prefills: tuple[int, ...] = (128, 512)
    turn_tokens: int = 24
    accelerate_tokens: int = 2
    rounds: int = 5
    gate_layers: int = 4
    gate_tokens: int = 32


FULL = DecodeScale()
QUICK = DecodeScale(
    resident=(0.25,), prefills=(64,), turn_tokens=6, accelerate_tokens=1, rounds=2, gate_layers=2, gate_tokens=8
)

CONTEXT_TOKENS = 1024


def run(work: Path, shape: checkpoints.Shape, scale: DecodeScale) -> Report:
    """The benchmark."""
    report = Report("decode")
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    root = checkpoints.store_root(work)
    say("comparing in fp32")
    gate_fp32(report, work, replace(shape, layers=scale.gate_layers, dtype="float32", seed=1), scale.gate_tokens)
    budgets = {share: checkpoints.budget_for(checkpoint, share, CONTEXT_TOKENS) for share in (*scale.resident, 1.0)}
    say("measuring limits")
    limits = {
        "memory": read_bandwidth(),
        "gemm": gemm_flops(getattr(torch, shape.dtype)),
        "disk": raw_expert_bandwidth(work, checkpoint),
    }
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_directory(work))
        ours = {
            share: ModelOptions("ours", str(checkpoint), ram, str(root), CONTEXT_TOKENS)
            for share, ram in budgets.items()
        }
        resident = stack.enter_context(_loaded(ours[1.0], budgets[1.0]))
        expected = _in_memory(report, resident, checkpoint, scratch, shape, scale, limits)
        _beyond_memory(report, resident, ours, scratch, shape, scale, limits, expected)
    report.tables["Limits measured in this run"] = [
        {"limit": "memory, reading", "GB/s": limits["memory"] / 1e9, "GFLOP/s": None},
        {"limit": "disk, raw random reads of bundles", "GB/s": limits["disk"] / 1e9, "GFLOP/s": None},
        {"limit": f"matrix product of 2048, {shape.dtype}", "GB/s": None, "GFLOP/s": limits["gemm"] / 1e9},
    ]
    report.notes += [
        "Weights and tokens are random, scaled so that routing follows the token: it is nearly uniform over the "
        "experts, and no cache can predict it. Trained models route less evenly and hit more often.",
        "Decoding goes on with one sequence from turn to turn. Both sides run the same loop: a forward pass of one "
        "token with a DynamicCache, then argmax.",
    ]
    return report


def gate_fp32(report: Report, work: Path, shape: checkpoints.Shape, new_tokens: int) -> None:
    """Gate on ours in fp32 giving transformers' logits and greedy tokens, with all experts resident and with a few."""
    checkpoint = checkpoints.ensure_checkpoint(shape, work)
    prompt = checkpoints.random_tokens(48, shape.vocab, seed=1)
    ours = ModelOptions("ours", str(checkpoint), 0, str(checkpoints.store_root(work)), CONTEXT_TOKENS)
    options = {
        "all": replace(ours, ram=checkpoints.budget_for(checkpoint, 1.0, CONTEXT_TOKENS)),
        "few": replace(ours, ram=checkpoints.budget_for(checkpoint, 0.1, CONTEXT_TOKENS)),
    }
    found: dict[str, Outcome] = {}
    with scratch_directory(work) as scratch:
        for name, option in {"transformers": replace(ours, kind="transformers"), **options}.items():
            session = Session(option)
            try:
                found[name] = outcome(session, prompt, new_tokens, scratch)
            finally:
                session.close()
    expected = found["transformers"]
    gate_close(report, "fp32 logits", found["all"].logits, expected.logits, relative_maximum, FP32_TOLERANCE)
    gate_same_bits(report, "fp32 logits by budget", {name: found[name].logits for name in options})
    gate_same_bits(report, "fp32 greedy tokens", {name: one.decoded.tokens for name, one in found.items()})


def _in_memory(
    report: Report,
    ours: Peer,
    checkpoint: Path,
    scratch: Path,
    shape: checkpoints.Shape,
    scale: DecodeScale,
    limits: Mapping[str, float],
) -> Outcome:
    """Everything in RAM: ours against each of transformers' experts implementations; what ours gave."""
    prompt = checkpoints.random_tokens(scale.prompt_tokens, shape.vocab, seed=2)
    options = ModelOptions("transformers", str(checkpoint))
    with _loaded(options, checkpoints.weights_nbytes(checkpoint)) as theirs:
        say(f"comparing in {shape.dtype}")
        theirs.use_experts("eager")
        expected = outcome(theirs, prompt, scale.gate_tokens, scratch)
        theirs.use_experts("grouped_mm")
        noise = relative_rms(outcome(theirs, prompt, 1, scratch).logits, expected.logits)
        found = outcome(ours, prompt, scale.gate_tokens, scratch)
        tolerance = max(BF16_TOLERANCE, BF16_NOISE * noise)
        gate_close(report, f"{shape.dtype} logits", found.logits, expected.logits, relative_rms, tolerance)
        gate_tokens(report, f"{shape.dtype} greedy tokens", found, expected)
        report.notes.append(
            f"transformers' eager and grouped_mm differ from each other by relative_rms {noise:.2e} in {shape.dtype}."
        )
        _prefill(report, ours, theirs, shape, scale, limits)
        _decode(report, ours, theirs, prompt, shape, scale, limits)
    return found


def _prefill(
    report: Report, ours: Peer, theirs: Peer, shape: checkpoints.Shape, scale: DecodeScale, limits: Mapping[str, float]
) -> None:
    rows = report.tables.setdefault("Prefill, everything in RAM", [])
    for tokens in scale.prefills:
        say(f"prefill of {tokens} tokens")
        prompt = checkpoints.random_tokens(tokens, shape.vocab, seed=tokens)

        names = ("ours", *PREFILL_IMPLEMENTATIONS)
        runs = {name: partial(_prefill_speed, ours, theirs, name, prompt) for name in names}
        interleave(runs, 1)
        speeds = interleave(runs, scale.rounds)
        best = _best(speeds, PREFILL_IMPLEMENTATIONS)
        ratio = ratios(speeds["ours"], speeds[best])
        for name in names:
            flops = 2 * shape.active_parameters * Spread.of(speeds[name]).median
            rows.append(
                {
                    "prompt": tokens,
                    "runs": name if name == "ours" else f"transformers {name}",
                    "tokens/s": Spread.of(speeds[name]),
                    "GFLOP/s": flops / 1e9,
                    "share of gemm": flops / limits["gemm"],
                    "ours / this": ratios(speeds["ours"], speeds[name]) if name != "ours" else None,
                }
            )
        report.target(f"prefill {tokens}: ours / transformers {best}", ratio.median, "at least", 1.0)


class TokenStream:
    """Random tokens without end; of one seed the same in every run."""

    def __init__(self, vocab: int, seed: int = 4) -> None:
        self._generator = random.Random(seed)
        self._vocab = vocab

    def take(self, count: int) -> list[int]:
        """The next ones."""
        return [self._generator.randrange(self._vocab) for _ in range(count)]


def _feed(peer: Peer, tokens: TokenStream, count: int) -> Fed:
    return peer.feed(tokens.take(count))


def _prefill_speed(ours: Peer, theirs: Peer, name: str, prompt: list[int]) -> float:
    if name == "ours":
        return len(prompt) / ours.start(prompt)
    theirs.use_experts(name)
    return len(prompt) / theirs.start(prompt)


def _decode(
    report: Report,
    ours: Peer,
    theirs: Peer,
    prompt: list[int],
    shape: checkpoints.Shape,
    scale: DecodeScale,
    limits: Mapping[str, float],
) -> None:
    say("decoding, everything in RAM")
    ours.start(prompt)
    theirs.use_experts("eager")
    theirs.start(prompt)

    names = ("ours", *DECODE_IMPLEMENTATIONS)
    tokens = TokenStream(shape.vocab)
    runs = {name: partial(_decode_speed, ours, theirs, name, tokens, scale.turn_tokens) for name in names}
    interleave(runs, 1)
    speeds = interleave(runs, scale.rounds)
    nbytes = shape.active_parameters * shape.element_nbytes
    report.tables["Decode, everything in RAM"] = [
        {
            "runs": name if name == "ours" else f"transformers {name}",
            "tokens/s": Spread.of(speeds[name]),
            "MB a token": nbytes / 1e6,
            "share of memory bandwidth": nbytes * Spread.of(speeds[name]).median / limits["memory"],
            "ours / this": ratios(speeds["ours"], speeds[name]) if name != "ours" else None,
        }
        for name in names
    ]
    best = _best(speeds, DECODE_IMPLEMENTATIONS)
    ratio = ratios(speeds["ours"], speeds[best])
    report.target(f"decode, all resident: ours / transformers {best}", ratio.median, "at least", 1.5)


def _decode_speed(ours: Peer, theirs: Peer, name: str, tokens: TokenStream, count: int) -> float:
    peer = ours
    if name != "ours":
        peer = theirs
        peer.use_experts(name)
    return peer.feed(tokens.take(count)).tokens_per_s


def _beyond_memory(
    report: Report,
    resident: Peer,
    options: Mapping[float, ModelOptions],
    scratch: Path,
    shape: checkpoints.Shape,
    scale: DecodeScale,
    limits: Mapping[str, float],
    expected: Outcome,
) -> None:
    prompt = checkpoints.random_tokens(scale.prompt_tokens, shape.vocab, seed=2)
    with ExitStack() as stack:
        peers = {
            f"{share:.0%}": stack.enter_context(_loaded(options[share], options[share].ram)) for share in scale.resident
        }
        say("comparing budgets")
        for name, peer in peers.items():
            found = outcome(peer, prompt, scale.gate_tokens, scratch)
            logits = {"all resident": expected.logits, name: found.logits}
            gate_same_bits(report, "logits by budget", logits)
            tokens = {"all resident": expected.decoded.tokens, name: found.decoded.tokens}
            gate_same_bits(report, "tokens by budget", tokens)
        peers["100%"] = resident
        budgets = {f"{share:.0%}": options[share].ram for share in (*scale.resident, 1.0)}
        counts = dict.fromkeys(peers, scale.turn_tokens)
        compared = f"{scale.compared:.0%}"
        if importlib.util.find_spec("accelerate") is not None:
            say("loading with accelerate")
            budget = budgets[compared]
            placed = replace(options[1.0], kind="accelerate", ram=budget, store=str(scratch / "accelerate"))
            accelerate = stack.enter_context(_loaded(placed, budget))
            peers["accelerate"], budgets["accelerate"] = accelerate, budget
            counts["accelerate"] = scale.accelerate_tokens
        else:
            report.notes.append("accelerate is not installed: not compared.")
        say("decoding by budget")
        for peer in peers.values():
            peer.start(prompt)
        stream = TokenStream(shape.vocab)
        runs = {name: partial(_feed, peer, stream, counts[name]) for name, peer in peers.items()}
        interleave(runs, 1)
        turns = interleave(runs, scale.rounds)
    speeds = {name: [turn.tokens_per_s for turn in found] for name, found in turns.items()}
    report.tables["Decode by budget"] = [_budget_row(name, budgets[name], turns[name], limits) for name in peers]
    if "accelerate" in peers:
        ratio = ratios(speeds[compared], speeds["accelerate"])
        report.target(f"decode, {compared} resident: ours / accelerate", ratio.median, "at least", 10.0)
        report.notes.append(
            "accelerate's weight files are evicted from the page cache with posix_fadvise before each token, outside "
            "the timing: with only its budget of memory they would not stay there, as each token reads all of them."
        )


def _budget_row(
    name: str,
    budget: int,
    turns: Sequence[Fed],
    limits: Mapping[str, float],
) -> Row:
    read = Spread.of([turn.disk_nbytes for turn in turns])
    hits = [turn.hit_rate for turn in turns if turn.hit_rate is not None]
    disk = [turn.disk_nbytes * turn.tokens_per_s for turn in turns]
    return {
        "runs": "transformers + accelerate" if name == "accelerate" else f"ours, {name} of experts",
        "budget MB": budget / 1e6,
        "tokens/s": Spread.of([turn.tokens_per_s for turn in turns]),
        "hit rate": Spread.of(hits).median if hits else None,
        "MB read a token": read.median / 1e6,
        "share of disk": Spread.of(disk).median / limits["disk"],
    }


@contextmanager
def _loaded(options: ModelOptions, nbytes: int) -> Iterator[Peer]:
    require_memory(nbytes + _LIBRARIES_NBYTES, f"{options.kind} with {options.ram / 1e9:.1f} GB")
    with Peer(options) as peer:
        peer.ready()
        yield peer


def _best(speeds: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    return max(names, key=lambda name: Spread.of(speeds[name]).median)
