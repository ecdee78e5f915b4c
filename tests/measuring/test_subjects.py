"""What the profiler calls is the runtime, and computes and reads what it says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.prepared_attention import PreparedAttention
from formats.kv import KvLayout
from offload.errors import StoreCorruptError
from offload.measuring import block_attention, calibration, grouped_sums, kernels, models
from offload.measuring.from_disk import DecodeFromDisk, PromptFromDisk
from offload.measuring.kernels import ExpertCalls, LinearCalls, attention_calls, chosen_by, uneven_loads
from offload.measuring.reads import FileReads, Scratch
from offload.measuring.subjects import RuntimeSubjects
from offload.moe import accumulate
from placement.hardware_profile import FormatCurve, Speeds
from profiler.stream import stream_bytes_per_s
from profiler.timing import repeated
from tests.placement.machines import machine


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"HIDDEN": 128, "INTERMEDIATE": 64, "NARROW_HIDDEN": 64, "NARROW_INTERMEDIATE": 32, "COLD_NBYTES": 1 << 20}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_experts_take_turns(format: str) -> None:
    calls = ExpertCalls(format)
    product = calls.product(3, 5)
    assert product.weights == 3 * 3 * 128 * 64
    first = calls._addresses(3)
    product.run()
    second = calls._addresses(3)
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("format", "panels", "entries"),
    [("int8", False, 1), ("bf16", True, 1), ("bf16", False, 0)],
)
def test_entries_are_told_apart_where_kernels_prepare_them(
    format: str, panels: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "takes_panels", lambda dtype: panels and dtype is torch.bfloat16)
    assert ExpertCalls(format).product(3, 5).entries == entries * 3 * (128 + 3 * 64)


@pytest.mark.parametrize(("grouped_s", "beyond_s"), [(1.0, 0.75), (0.2, 0.0)])
def test_sums_of_groups_are_timed_against_the_sum_of_all(
    grouped_s: float, beyond_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate, "_kept_rows", torch.ones)
    summed: list[torch.Tensor] = []
    add = grouped_sums._sum
    monkeypatch.setattr(grouped_sums, "_sum", lambda *args: summed.append(add(*args)))
    # The first of both says when all began, the last when that was enough.
    clock = iter([0.0, *[0.0, grouped_s] * 5, 0.0, 0.0, *[0.0, 0.25] * 5, 0.0])
    monkeypatch.setattr(grouped_sums, "repeated", partial(repeated, clock=lambda: next(clock)))
    assert grouped_sums.grouped_output_s() == pytest.approx(beyond_s / (256 * 8 * 2048))
    assert len(summed) == 12
    for one in summed:
        torch.testing.assert_close(one, torch.ones(256, 2048), msg="every pair is summed, with its weight")


def test_linears_compute_what_a_linear_layer_does() -> None:
    calls = LinearCalls("bf16", 32)
    assert len({id(layer.weight) for layer in calls._layers}) == len(calls._layers) > 1
    x = torch.randn(1, 1, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        found = calls._layers[0](x)
    torch.testing.assert_close(found, x @ calls._layers[0].weight.T, atol=1e-2, rtol=1e-2)
    for tokens, at_once in ((4, 4), (9, 1)):
        product = calls.product(tokens)
        assert (product.weights, product.entries, product.calls) == (32 * 128, 32 + 128, at_once)
        for _ in range(3):
            product.run()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_attention_to_blocks_goes_through_memory(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "COLD_NBYTES", 4 << 20)
    attended: list[tuple[int, ...]] = []
    attend = PreparedAttention.attend

    def note(prepared: PreparedAttention, query: torch.Tensor, tokens: int, position: int, pool: Any) -> None:
        attend(prepared, query, tokens, position, pool)
        attended.append((tokens, position))

    monkeypatch.setattr(PreparedAttention, "attend", note)
    calls = block_attention.block_attention_calls(format, 130)
    layout = KvLayout(format, kernels.KV_HEADS, kernels.HEAD_WIDTH, kernels.HEAD_WIDTH, 64)
    assert calls.kv_nbytes == 2 * layout.nbytes
    assert calls.flops == 4 * kernels.HEADS * kernels.HEAD_WIDTH * 128
    calls.run()
    assert attended == [(128, 127)] * calls.calls
    assert calls.scores == kernels.HEADS * 128
    narrow = block_attention.block_attention_calls(format, 130, narrow=True)
    assert (narrow.scores, narrow.flops) == (calls.scores, calls.flops * kernels.NARROW_HEAD_WIDTH / kernels.HEAD_WIDTH)
    narrow.run()


def test_packed_linears_have_weights_of_their_own() -> None:
    calls = LinearCalls("int8", 32)
    addresses = {layer.weights.addresses for layer in calls._layers}
    assert len(addresses) == len(calls._layers) > 1
    calls.product(1).run()


def test_attention_counts_its_flops() -> None:
    work = attention_calls(1, 15)
    assert work.kv_nbytes == 16 * kernels.KV_HEADS * kernels.HEAD_WIDTH * 4
    assert work.flops == pytest.approx(4 * kernels.HEADS * kernels.HEAD_WIDTH * 16)
    work.run()
    prompt = attention_calls(8, 0)
    assert prompt.flops == pytest.approx(4 * kernels.HEADS * kernels.HEAD_WIDTH * sum(range(1, 9)))
    assert prompt.scores == kernels.HEADS * sum(range(1, 9))
    prompt.run()
    narrow = attention_calls(8, 0, narrow=True)
    assert narrow.scores == prompt.scores
    assert narrow.flops / prompt.flops == narrow.kv_nbytes / prompt.kv_nbytes
    assert narrow.flops / prompt.flops == kernels.NARROW_HEAD_WIDTH / kernels.HEAD_WIDTH
    narrow.run()


@pytest.mark.parametrize(("block", "depth"), [(4096, 1), (10_000, 2), (1 << 20, 4)])
def test_reads_are_checked_and_leave_nothing(tmp_path: Path, block: int, depth: int) -> None:
    with Scratch(tmp_path, 8 << 20) as scratch:
        assert scratch.paths[0].stat().st_size == 8 << 20
        assert scratch.read(block, depth, 7) > 0
        with open(scratch.paths[0], "r+b") as file:
            file.write(b"\xff" * (8 << 20))
        with pytest.raises(StoreCorruptError, match="scratch"):
            scratch.read(block, depth, 7)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_read_whole_and_left(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"\1" * 8192)
    large.write_bytes(bytes(range(256)) * 256)
    files = FileReads([small, large])
    assert files.nbytes == 8192 + (64 << 10)
    assert files.read(4096, 2, 40) > 0
    places = [files._places(8192, 400) for _ in range(2)]
    assert places[0] != places[1], "other places each time"
    assert {file for file, _ in places[0]} == {0, 1}
    assert {offset for file, offset in places[0] if file == 0} == {0}
    assert {file for file, _ in files._places(32 << 10, 40)} == {1}, "of the others no block is large enough"
    with pytest.raises(ValueError, match="1,048,576 bytes"):
        files.read(1 << 20, 1, 1)
    files.read(8192, 2, 3)
    arrived = files._memory(1).bytes()[: 3 * 8192]
    assert set(arrived.tolist()) <= set(range(256))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "small"]


def test_what_was_read_once_is_read_again_and_nothing_else(tmp_path: Path) -> None:
    part = 32 << 20
    whole, long = tmp_path / "whole", tmp_path / "long"
    for path, nbytes in ((whole, 5 << 20), (long, 6 * part + (20 << 20))):
        with open(path, "wb") as file:
            file.truncate(nbytes)
    files = FileReads([whole, long])
    read: list[tuple[int, int]] = []
    alone = files._read

    def note(places: Sequence[tuple[int, int]], size: int, in_flight: int) -> float:
        assert size == 4 << 20
        read.extend(places)
        return alone(places, size, in_flight)

    files._read = note  # type: ignore[method-assign]
    assert files.read_first(3 * part - 1) > 0
    files._read = alone  # type: ignore[method-assign]
    parts = {(file, start // part) for file, start in read}
    assert len(read) == len(set(read)) and 3 <= len(parts) <= 4
    assert (1, 6) not in parts, "what is left of a file is no part"
    assert read.count((0, 0)) <= 1 and (0, 4 << 20) not in read
    for size in (4096, 12 << 20):
        places = files._places(size, 500)
        assert {(file, start // part) for file, start in places} <= parts
        assert all(start // part == (start + size - 1) // part for _, start in places), "within one part"
    assert FileReads([whole]).read_first(1 << 40) > 0, "a file smaller than a part is read whole"


def test_memory_is_streamed() -> None:
    assert 1e8 < stream_bytes_per_s(1 << 24, repeats=2) < 1e13


@pytest.mark.parametrize(
    ("prompt", "element", "speed"), [(40e-3, 1e-9, 1.0), (5.0, 2e-3 / 32 / 1024, 1.0), (40e-3, 1e-9, 0.5)]
)
def test_overheads_come_from_two_depths(
    prompt: float, element: float, speed: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Known overheads come back from remainders made of them, at the speed of the profile; a long pass that was
    disturbed takes no more than all.
    """
    layer, step, each = 3e-4, 1e-4, 1e-9 * 1024

    decode, prompt_read = (
        DecodeFromDisk(0.5, 0.2, 0.1, 16, 2, 10**6),
        PromptFromDisk(16, 0.5, 0.3, 0.12, 0.05, 0.2, 100, 1, 10**6),
    )
    read = decode, prompt_read

    def remainders(*_: object) -> tuple[Any, ...]:
        shallow, deep = (made(layers) for layers in calibration.DEPTHS)
        return Speeds(steps=speed, prompts=speed), shallow, deep, read

    def made(layers: int) -> calibration.Remainders:
        decode = 2e-3 + layers * layer
        short = 2e-3 + layers * 2e-3
        long = 2e-3 + layers * (2e-3 + each * (calibration.PROMPT_TOKENS - calibration.SHORT_TOKENS))
        return calibration.Remainders(decode, decode + layers * step, short, long if prompt < 1 else prompt)

    monkeypatch.setattr(calibration, "_remainders", remainders)
    passes = calibration.measure_passes(machine(gpu=False), tmp_path, 3)
    found = passes.overheads
    assert (passes.many, found.arrival_s) == (prompt_read.overlap, prompt_read.arrival_s)
    assert found.step_arrival_s is not None and 0 < found.step_arrival_s < 0.25 / 8
    assert found.layer_s == pytest.approx(layer)
    assert found.pass_s == pytest.approx(2e-3)
    assert found.step_s == pytest.approx(step)
    assert found.element_s == pytest.approx(element)
    assert found.prompt_layer_s == pytest.approx(2e-3 - element * 32 * 1024, abs=1e-12)
    monkeypatch.setattr(calibration, "_remainders", lambda *_: (Speeds(), made(4), made(4), read))
    found = calibration.measure_passes(machine(gpu=False), tmp_path, 3, depths=(4,)).overheads
    assert (found.pass_s, found.layer_s) == pytest.approx((0, layer + 2e-3 / 4)), "of one model all is its layers'"


@pytest.mark.parametrize("quant", [None, "int4"])
def test_overheads_are_what_predictions_leave(
    quant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 128, "head_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setattr(models, "SIZES", models.SIZES | sizes)
    monkeypatch.setattr(calibration, "SIZES", models.SIZES)
    monkeypatch.setattr(calibration, "_WIDE", 128)
    monkeypatch.setattr(calibration, "PROMPT_TOKENS", 16)
    monkeypatch.setattr(calibration, "SHORT_TOKENS", 4)
    with Scratch(tmp_path, 4 << 20) as scratch:
        subjects = RuntimeSubjects(scratch, tmp_path, repeats=3, depths=(1, 3) if quant else (2,))
        profile = machine(gpu=False, ram=1e12, cpu_flops=1e15)
        # The output layer of "int4" is in int8.
        linears = (*profile.cpu.linears, FormatCurve("int8", profile.cpu.linear("int4")))
        profile = dataclasses.replace(profile, cpu=dataclasses.replace(profile.cpu, linears=linears))
        passes = subjects.passes(profile, quant)
        found = passes.overheads
        assert passes.many.tokens > 1
        # Signs and sizes are this machine's, and others may use it meanwhile.
        assert all(math.isfinite(value) for value in dataclasses.astuple(found))
        assert found.step_arrival_s is not None
        assert min(found.pass_s, found.step_s, found.element_s, found.arrival_s, found.step_arrival_s) >= 0
        said, share = subjects.beside_kernels(lambda: 2.5, "bf16", 1, 3)
        assert said == 2.5
        assert 0 < share <= 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "tokens"), [(8, 1), (8, 2), (8, 4), (8, 16), (2, 32), (2, 512), (1, 8)])
def test_loads_are_uneven_around_their_mean(count: int, tokens: int) -> None:
    loads = uneven_loads(count, tokens)
    assert loads.sum() == count * tokens
    assert loads.min() >= 0
    if count > 1 and tokens > 1:
        assert loads.max() - loads.min() >= tokens**0.5
    if tokens == 1:
        assert (loads == 1).all()


@pytest.mark.parametrize("loads", [(1, 1, 1), (3, 1, 2, 2), (0, 4, 1), (5,), (2, 2, 1)], ids=str)
def test_tokens_choose_different_experts(loads: tuple[int, ...]) -> None:
    chosen = chosen_by(np.array(loads))
    assert np.bincount(chosen.reshape(-1), minlength=len(loads)).tolist() == list(loads)
    assert all(len(set(row)) == len(row) for row in chosen.tolist())


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_experts_of_few_tokens_run_on_a_tape(format: str) -> None:
    calls = ExpertCalls(format)
    product = calls.product(2, 2)
    assert (product.weights, product.calls) == (2 * 3 * 128 * 64, 4)
    before = calls._next
    product.run()
    assert calls._next == (before + 8) % calls._copies
    assert calls.product(2, 4).calls == 1


def test_linears_after_reads_have_a_share(tmp_path: Path) -> None:
    with Scratch(tmp_path, 4 << 20) as scratch:
        subjects = RuntimeSubjects(scratch, tmp_path, repeats=0)
        assert 0 < subjects.between_reads(lambda: scratch.read(4096, 1, 2), "bf16") <= 1
