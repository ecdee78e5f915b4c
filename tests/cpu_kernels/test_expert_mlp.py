from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cpu_kernels import isa
from cpu_kernels.expert_mlp import INPUT_DTYPES, expert_down, expert_mlp, expert_up
from cpu_kernels.expert_mlp_reference import TORCH_DTYPES, expert_down_reference, expert_up_reference
from cpu_kernels.threads import ThreadPool
from formats.bundle import BundleLayout
from tests.assertions import assert_close
from tests.cpu_kernels.experts import Call, encode, random_call

FORMATS = tuple(INPUT_DTYPES)


def run(call: Call, activation: str = "silu", threads: ThreadPool | int = 2) -> np.ndarray:
    out = call.poisoned(call.layout.hidden)
    expert_mlp(*call.arguments, activation, out, call.pair_rows, threads=threads)
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [
        (1, 1),  # less than one lane
        (15, 16),  # below, at and above 16 elements, one step of fp32
        (16, 15),
        (33, 31),  # below and above 32 elements, one step of 16-bit formats
        (48, 96),
        (100, 129),  # a step of every chain and a tail
        (300, 7),  # rows that fill no group
        (1024, 512),  # several chunks
    ],
)
def test_shapes_that_hit_the_edges_of_steps_chains_and_groups(format: str, hidden: int, intermediate: int) -> None:
    call = random_call(BundleLayout(hidden, intermediate, format), [1, 0, 4, 3])
    assert_close(run(call), call.expected("silu"), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", range(10))
def test_every_number_of_tokens(format: str, tokens: int) -> None:
    call = random_call(BundleLayout(72, 40, format), [tokens, 1, tokens])
    assert_close(run(call), call.expected("silu"), format)


@pytest.mark.parametrize("format", FORMATS)
def test_many_tokens_of_one_expert(format: str) -> None:
    call = random_call(BundleLayout(80, 50, format), [0, 75, 0])
    assert_close(run(call), call.expected("silu"), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "gpt_oss"])
def test_activations_with_a_gate(format: str, activation: str, has_bias: bool) -> None:
    call = random_call(BundleLayout(64, 35, format, has_bias=has_bias), [2, 5])
    call.exact_x *= 8  # reaches the limits of gpt_oss; a power of two stays exact
    call.x = encode(call.exact_x, format)
    assert_close(run(call, activation), call.expected(activation), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_without_a_gate(format: str, activation: str, has_bias: bool) -> None:
    call = random_call(BundleLayout(64, 35, format, has_gate=False, has_bias=has_bias), [2, 5])
    assert_close(run(call, activation), call.expected(activation), format)


@pytest.mark.parametrize("value", [-1e4, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 1e4])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "gpt_oss"])
def test_activations_far_from_zero(activation: str, value: float) -> None:
    call = random_call(BundleLayout(1, 1, "fp32"), [1])
    call.storage[0].view(np.float32)[:1] = value
    call.storage[0].view(np.float32)[1:2] = 1
    call.storage[0].view(np.float32)[16:17] = 1
    call.x[:] = call.exact_x[:] = 1
    expected = call.expected(activation).numpy()
    # Where exp leaves the range of fp32, the result is below 1e-30 in truth and here.
    np.testing.assert_allclose(run(call, activation), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_gate", [False, True])
def test_halves_with_an_activation_in_between(format: str, has_gate: bool) -> None:
    layout = BundleLayout(100, 50, format, has_gate=has_gate, has_bias=True)
    call = random_call(layout, [3, 0, 6])
    sums = call.poisoned(50 * (1 + has_gate))
    expert_up(*call.arguments, sums, threads=2)
    h = torch.randn(9, 50, generator=torch.Generator().manual_seed(1)).to(TORCH_DTYPES[format])
    out = call.poisoned(100)
    stored = encode(h, format)
    expert_down(call.bundles, layout, call.pair_offsets, stored, out, call.pair_rows, threads=2)
    for expert, bundle in enumerate(call.storage):
        pairs = slice(call.pair_offsets[expert], call.pair_offsets[expert + 1])
        inputs = call.exact_x[call.pair_tokens[pairs]]
        if len(inputs):
            assert_close(sums[pairs], expert_up_reference(bundle, layout, inputs), "fp32")
            expected = expert_down_reference(bundle, layout, h[pairs].to(torch.float64))
            assert_close(out[call.pair_rows[pairs]], expected, "fp32")


def test_halves_make_the_whole() -> None:
    call = random_call(BundleLayout(96, 48, "fp32"), [2, 3])
    sums = call.poisoned(96)
    expert_up(*call.arguments, sums, threads=1)
    gate, up = sums[:, :48], sums[:, 48:]
    out = call.poisoned(96)
    h = np.maximum(gate, 0) * up
    expert_down(call.bundles, call.layout, call.pair_offsets, h, out, call.pair_rows, threads=1)
    np.testing.assert_array_equal(out, run(call, "relu"))


@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_for_any_number_of_threads(format: str) -> None:
    call = random_call(BundleLayout(512, 200, format, has_bias=True), [1, 2, 0, 5])
    one = run(call, threads=1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(run(call, threads=threads).view(np.uint32), one.view(np.uint32))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [2, 3, 4, 7])
def test_same_bits_alone_and_together(format: str, tokens: int) -> None:
    call = random_call(BundleLayout(333, 90, format), [tokens])
    together = run(call)
    for pair in range(tokens):
        alone = np.full((1, 333), np.nan, np.float32)
        token = call.pair_tokens[pair : pair + 1]
        expert_mlp(call.bundles, call.layout, np.array([0, 1]), token, call.x, "silu", alone, np.zeros(1, int))
        np.testing.assert_array_equal(alone[0].view(np.uint32), together[call.pair_rows[pair]].view(np.uint32))


def test_other_rows_of_the_output_are_left_alone_and_strides_are_honoured() -> None:
    call = random_call(BundleLayout(40, 24, "bf16"), [2, 1])
    wide_x = np.full((len(call.x), 50), 0xFFFF, np.uint16)
    wide_x[:, :40] = call.x
    wide = np.full((8, 44), np.nan, np.float32)
    rows = np.array([6, 1, 4], np.int32)
    arguments = (call.bundles, call.layout, call.pair_offsets.astype(np.int32), call.pair_tokens.astype(np.uint16))
    expert_mlp(*arguments, wide_x[:, :40], "silu", wide[:, :40], rows, threads=2)
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
    payload = call.storage[1][: whole - start]
    memory[start:whole] = payload
    call.bundles[1] = address + start
    assert_close(run(call), call.expected("silu"), format)


@pytest.mark.parametrize("format", FORMATS)
def test_values_that_are_not_finite_stay_in_their_rows(format: str) -> None:
    call = random_call(BundleLayout(64, 32, format), [3])
    call.pair_tokens = np.array([0, 1, 0])
    call.x = encode(torch.randn(2, 64, generator=torch.Generator().manual_seed(2)), format)
    call.x[1, 5] = encode(torch.tensor([torch.nan]), format)[0]
    out = run(call)
    assert np.isnan(out[call.pair_rows[1]]).all()
    assert np.isfinite(out[call.pair_rows[[0, 2]]]).all()


def test_no_pairs_and_no_experts() -> None:
    call = random_call(BundleLayout(64, 32, "bf16"), [0, 0])
    assert run(call).shape == (0, 64)
    call.bundles, call.pair_offsets = call.bundles[:0], call.pair_offsets[:1]
    assert run(call).shape == (0, 64)


def test_every_isa_of_this_machine_agrees_with_the_reference() -> None:
    script = (
        "import numpy as np, sys\n"
        "from tests.cpu_kernels.experts import random_call\n"
        "from tests.cpu_kernels.test_expert_mlp import run\n"
        "from formats.bundle import BundleLayout\n"
        "call = random_call(BundleLayout(333, 90, 'bf16', has_bias=True), [1, 2, 7])\n"
        "sys.stdout.buffer.write(run(call).tobytes())\n"
    )
    call = random_call(BundleLayout(333, 90, "bf16", has_bias=True), [1, 2, 7])
    for name in isa.ISAS:
        if isa.supports(name):
            environment = {**os.environ, isa.ISA_VARIABLE: name}
            done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
            out = np.frombuffer(done.stdout, np.float32).reshape(10, 333)
            assert_close(out, call.expected("silu"), "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 63), np.float32)}, "x: expected float32"),
        ({"x": np.zeros((4, 64), np.float64)}, "x: expected float32"),
        ({"x": np.zeros((64, 4), np.float32).T}, "contiguous"),
        ({"out": np.zeros((3, 64), np.float64)}, "out: expected float32"),
        ({"pair_offsets": np.array([0, 1])}, "pair_offsets: expected integers"),
        ({"pair_offsets": np.array([0, 4, 3])}, "pair_offsets: expected to rise"),
        ({"pair_offsets": np.array([0, 1, 2])}, "pair_offsets: expected to rise"),
        ({"pair_offsets": np.array([1, 1, 3])}, "pair_offsets: expected to rise"),
        ({"pair_tokens": np.array([0, 1, 4])}, "pair_tokens"),
        ({"pair_tokens": np.array([0, -1, 1])}, "pair_tokens"),
        ({"pair_rows": np.array([0, 1, 3])}, "pair_rows"),
        ({"pair_rows": np.array([0, 1])}, "pair_rows: expected integers"),
        ({"pair_tokens": np.array([0.0, 1.0, 2.0])}, "pair_tokens: expected integers"),
        ({"activation": "mish"}, "'mish' has no kernel; known: silu"),
        ({"threads": 0}, "threads=0"),
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
        "threads": 2,
    }
    with pytest.raises(ValueError, match=message):
        expert_mlp(**{**arguments, **change})  # type: ignore[arg-type]


def test_gpt_oss_needs_a_gate() -> None:
    call = random_call(BundleLayout(64, 32, "fp32", has_gate=False), [1])
    with pytest.raises(ValueError, match="no gate"):
        run(call, "gpt_oss")


@pytest.mark.parametrize("name", ["swish", "gelu_pytorch_tanh"])
def test_names_that_transformers_uses(name: str) -> None:
    call = random_call(BundleLayout(64, 32, "fp32"), [2])
    same = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[name]
    np.testing.assert_array_equal(run(call, name), run(call, same))
