from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch

from cpu_kernels import panel_mlp
from cpu_kernels.expert_mlp import INPUT_DTYPES
from cpu_kernels.expert_mlp_reference import TORCH_DTYPES, expert_down_reference, expert_up_reference
from cpu_kernels.panel_mlp import (
    compile_panel_kernels,
    panel_expert_down,
    panel_expert_mlp,
    panel_expert_up,
    panel_linear,
)
from cpu_kernels.panel_simd import DEPTH
from cpu_kernels.simd import TileShape
from cpu_kernels.threads import ThreadPool, shared_pool
from formats.bundle import BundleLayout
from tests.assertions import assert_close
from tests.cpu_kernels.experts import Call, encode, random_call

FORMATS = tuple(INPUT_DTYPES)
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def run(call: Call, activation: str = "silu", threads: ThreadPool | int = 2) -> np.ndarray:
    out = call.poisoned(call.layout.hidden)
    panel_expert_mlp(*call.arguments, activation, out, call.pair_rows, threads=threads)
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [
        (1, 1),
        (5, 7),  # below and above a tile of 6 rows
        (97, 100),  # above a chunk of rows
        (DEPTH, 12),
        (DEPTH + 1, 13),  # a part of one column
        (2 * DEPTH + 30, DEPTH + 3),
    ],
)
def test_shapes_that_hit_the_edges_of_tiles_chunks_and_depths(format: str, hidden: int, intermediate: int) -> None:
    call = random_call(BundleLayout(hidden, intermediate, format), [1, 0, 17, 3])
    assert_close(run(call), call.expected("silu"), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 9, 15, 16, 17, 33, 250])
def test_numbers_of_tokens(format: str, tokens: int) -> None:
    call = random_call(BundleLayout(72, 40, format), [tokens, 1, 0, tokens])
    assert_close(run(call), call.expected("silu"), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "has_gate"),
    [("silu", True), ("gelu", True), ("gelu_tanh", True), ("gpt_oss", True), ("silu", False), ("relu2", False)],
)
def test_activations_and_biases(format: str, activation: str, has_gate: bool, has_bias: bool) -> None:
    call = random_call(BundleLayout(64, 35, format, has_gate=has_gate, has_bias=has_bias), [20, 5])
    assert_close(run(call, activation), call.expected(activation), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_gate", [False, True])
def test_halves_with_an_activation_in_between(format: str, has_gate: bool) -> None:
    layout = BundleLayout(100, 50, format, has_gate=has_gate, has_bias=True)
    call = random_call(layout, [3, 0, 26])
    sums = call.poisoned(50 * (1 + has_gate))
    panel_expert_up(*call.arguments, sums, threads=2)
    h = torch.randn(29, 50, generator=torch.Generator().manual_seed(1)).to(TORCH_DTYPES[format])
    out = call.poisoned(100)
    panel_expert_down(call.bundles, layout, call.pair_offsets, encode(h, format), out, call.pair_rows, threads=2)
    for expert, bundle in enumerate(call.storage):
        pairs = slice(call.pair_offsets[expert], call.pair_offsets[expert + 1])
        inputs = call.exact_x[call.pair_tokens[pairs]]
        if len(inputs):
            assert_close(sums[pairs], expert_up_reference(bundle, layout, inputs), "fp32")
            expected = expert_down_reference(bundle, layout, h[pairs].to(torch.float64))
            assert_close(out[call.pair_rows[pairs]], expected, "fp32")


@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_for_any_threads_tiles_runs_and_company(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call(BundleLayout(300, 200, format, has_bias=True), [1, 20, 0, 150])
    one = run(call, threads=1)
    np.testing.assert_array_equal(run(call, threads=3).view(np.uint32), one.view(np.uint32))
    alone = np.full((1, 300), np.nan, np.float32)
    token = call.pair_tokens[30:31]
    panel_expert_mlp(
        call.bundles[3:], call.layout, np.array([0, 1]), token, call.x, "silu", alone, np.zeros(1, int), threads=2
    )
    np.testing.assert_array_equal(alone[0].view(np.uint32), one[call.pair_rows[30]].view(np.uint32))
    monkeypatch.setattr(panel_mlp, "_SCRATCH_NBYTES", 0)
    np.testing.assert_array_equal(run(call, threads=2).view(np.uint32), one.view(np.uint32))
    monkeypatch.setattr(panel_mlp, "tile_shape", lambda isa: TileShape(rows=12, tokens=1, chains=1))
    panel_mlp._tasks.cache_clear()
    np.testing.assert_array_equal(run(call, threads=2).view(np.uint32), one.view(np.uint32))
    panel_mlp._tasks.cache_clear()


def test_other_rows_of_the_output_are_left_alone_and_strides_are_honoured() -> None:
    call = random_call(BundleLayout(40, 24, "bf16"), [2, 1])
    wide_x = np.full((len(call.x), 50), 0xFFFF, np.uint16)
    wide_x[:, :40] = call.x
    wide = np.full((8, 44), np.nan, np.float32)
    rows = np.array([6, 1, 4], np.int32)
    arguments = (call.bundles, call.layout, call.pair_offsets.astype(np.int32), call.pair_tokens.astype(np.uint16))
    panel_expert_mlp(*arguments, wide_x[:, :40], "silu", wide[:, :40], rows, threads=2)
    call.pair_rows = np.arange(3)
    np.testing.assert_array_equal(wide[rows, :40], run(call))
    assert np.isnan(np.delete(wide, rows, axis=0)).all()
    assert np.isnan(wide[:, 40:]).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("hidden", [33, 64])
def test_nothing_is_read_past_the_last_component(format: str, hidden: int) -> None:
    # The bundle's last byte is the last of readable memory; a read beyond it ends the process.
    layout = BundleLayout(hidden, 32, format)
    call = random_call(layout, [5, 1])
    whole = -(-layout.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, whole + mmap.PAGESIZE)
    memory = np.frombuffer(region, np.uint8)
    address = memory.ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    start = whole - max(part.offset + part.nbytes for part in layout.components.values())
    memory[start:whole] = call.storage[1][: whole - start]
    call.bundles[1] = address + start
    assert_close(run(call), call.expected("silu"), format)


def test_values_that_are_not_finite_stay_in_their_rows() -> None:
    call = random_call(BundleLayout(64, 32, "bf16"), [3])
    call.pair_tokens = np.array([0, 1, 0])
    call.x = encode(torch.randn(2, 64, generator=torch.Generator().manual_seed(2)), "bf16")
    call.x[1, 5] = encode(torch.tensor([torch.nan]), "bf16")[0]
    out = run(call)
    assert np.isnan(out[call.pair_rows[1]]).all()
    assert np.isfinite(out[call.pair_rows[[0, 2]]]).all()


def test_no_pairs_and_no_experts() -> None:
    call = random_call(BundleLayout(64, 32, "bf16"), [0, 0])
    assert run(call).shape == (0, 64)
    call.bundles, call.pair_offsets = call.bundles[:0], call.pair_offsets[:1]
    assert run(call).shape == (0, 64)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 40, 50), (0, 8, 8), (129, 64, 33), (5, 1, 1), (1024, 30, 25)], ids=str)
def test_linear_equals_float64(dtype: torch.dtype, with_bias: bool, shape: tuple[int, int, int]) -> None:
    tokens, columns, rows = shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    found = panel_linear(x, weight, bias, shared_pool(2))
    assert found.dtype is dtype
    assert found.shape == (tokens, rows)
    limit = EPSILON[dtype] * exact.abs() + (columns + 2) * 2.0**-24 * size * (1 + EPSILON[dtype])
    assert ((found.double() - exact).abs() <= limit).all()


def test_linear_takes_any_leading_shape_and_strided_rows() -> None:
    x = torch.randn(2, 3, 16).bfloat16().transpose(0, 1)
    weight = torch.randn(5, 16).bfloat16()
    found = panel_linear(x, weight, None, shared_pool(1))
    assert found.shape == (3, 2, 5)
    for index in np.ndindex(3, 2):
        assert torch.equal(found[index], panel_linear(x[index], weight, None, shared_pool(1)))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 7), None),
        (torch.zeros(2, 8), torch.zeros(4, 8).bfloat16(), None),
        (torch.zeros(2, 8), torch.zeros(8, 4).T, None),
        (torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(5)),
    ],
)
def test_linear_refuses_what_does_not_fit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="panel_linear: expected"):
        panel_linear(x, weight, bias, shared_pool(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 63), np.float32)}, "x: expected float32"),
        ({"out": np.zeros((3, 64), np.float64)}, "out: expected float32"),
        ({"pair_offsets": np.array([0, 1])}, "pair_offsets: expected integers"),
        ({"pair_offsets": np.array([0, 4, 3])}, "pair_offsets: expected to rise"),
        ({"pair_offsets": np.array([1, 1, 3])}, "pair_offsets: expected to rise"),
        ({"pair_tokens": np.array([0, 1, 4])}, "pair_tokens"),
        ({"pair_rows": np.array([0, 1, 3])}, "pair_rows"),
        ({"activation": "mish"}, "'mish' has no kernel; known: silu"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    call = random_call(BundleLayout(64, 32, "fp32"), [1, 2])
    arguments: dict[str, object] = {
        "bundles": call.bundles,
        "layout": call.layout,
        "pair_offsets": call.pair_offsets,
        "pair_tokens": np.array([0, 1, 2]),
        "x": np.zeros((4, 64), np.float32),
        "activation": "silu",
        "out": call.poisoned(64),
        "pair_rows": call.pair_rows,
    }
    with pytest.raises(ValueError, match=message):
        panel_expert_mlp(**{**arguments, **change})  # type: ignore[arg-type]


def test_kernels_compile_ahead() -> None:
    compile_panel_kernels("bf16")
    with pytest.raises(ValueError, match="has no panel kernel"):
        compile_panel_kernels("int4")
