from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.packed_expert_mlp import packed_expert_down, packed_expert_mlp, packed_expert_up
from cpu_kernels.packed_reference import packed_expert_mlp_reference, packed_expert_up_reference
from formats.bundle import BundleLayout
from tests.cpu_kernels.experts import Call, encode
from tests.cpu_kernels.packed import FORMATS, random_packed_bundle

# A sum that falls to the other side of a rounding moves a code of h by one of up to 127, in few of its columns.
RELATIVE_TO_LARGEST = 2.0**-7


def random_call(layout: BundleLayout, tokens_of_experts: list[int], element: str = "fp32") -> Call:
    generator = torch.Generator().manual_seed(0)
    pairs = sum(tokens_of_experts)
    storage = [random_packed_bundle(layout, seed) for seed in range(len(tokens_of_experts))]
    x = torch.randn(max(1, pairs // 2), layout.hidden, generator=generator)
    stored = encode(x, element)
    return Call(
        layout=layout,
        storage=storage,
        bundles=np.array([bundle.ctypes.data for bundle in storage], np.int64),
        pair_offsets=np.cumsum([0, *tokens_of_experts]),
        pair_tokens=torch.randint(0, len(x), (pairs,), generator=generator).numpy(),
        x=stored,
        pair_rows=torch.randperm(pairs, generator=generator).numpy(),
        exact_x=torch.from_numpy(stored).view(torch.bfloat16) if element == "bf16" else torch.from_numpy(stored),
    )


def expected(call: Call, activation: str) -> np.ndarray:
    result = np.full((len(call.pair_rows), call.layout.hidden), np.nan)
    for expert, bundle in enumerate(call.storage):
        pairs = slice(call.pair_offsets[expert], call.pair_offsets[expert + 1])
        x = call.exact_x[call.pair_tokens[pairs]]
        result[call.pair_rows[pairs]] = packed_expert_mlp_reference(bundle, call.layout, x, activation).numpy()
    return result


def run(call: Call, activation: str = "silu", threads: int = 2) -> np.ndarray:
    out = call.poisoned(call.layout.hidden)
    packed_expert_mlp(*call.arguments, activation, out, call.pair_rows, threads=threads)
    return out


def assert_near(actual: np.ndarray, wanted: np.ndarray) -> None:
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=RELATIVE_TO_LARGEST * np.abs(wanted).max(initial=1e-30))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [(1, 1), (64, 64), (65, 63), (100, 130), (300, 17), (200, 512)],  # around tiles, blocks and chunks
)
def test_shapes(format: str, hidden: int, intermediate: int) -> None:
    call = random_call(BundleLayout(hidden, intermediate, format), [1, 0, 4, 3])
    assert_near(run(call), expected(call, "silu"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [*range(10), 70, 512])
def test_numbers_of_tokens(format: str, tokens: int) -> None:
    call = random_call(BundleLayout(72, 40, format), [tokens, 1, 0, tokens])
    assert_near(run(call), expected(call, "silu"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "gpt_oss"])
def test_activations(format: str, activation: str, has_gate: bool, has_bias: bool) -> None:
    layout = BundleLayout(64, 100, format, has_gate=has_gate, has_bias=has_bias)
    call = random_call(layout, [2, 5])
    if activation == "gpt_oss" and not has_gate:
        with pytest.raises(ValueError, match="no gate"):
            run(call, activation)
        return
    assert_near(run(call, activation), expected(call, activation))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
def test_types_of_x(format: str, element: str) -> None:
    call = random_call(BundleLayout(80, 96, format), [2, 3], element)
    assert_near(run(call), expected(call, "silu"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("has_gate", [False, True])
def test_halves_make_the_whole(format: str, has_gate: bool) -> None:
    call = random_call(BundleLayout(100, 70, format, has_gate=has_gate, has_bias=True), [3, 0, 6])
    sums = call.poisoned(70 * (1 + has_gate))
    packed_expert_up(*call.arguments, sums, threads=2)
    for expert, bundle in enumerate(call.storage):
        pairs = slice(call.pair_offsets[expert], call.pair_offsets[expert + 1])
        x = call.exact_x[call.pair_tokens[pairs]]
        wanted = packed_expert_up_reference(bundle, call.layout, x).numpy()
        np.testing.assert_allclose(sums[pairs], wanted, rtol=0, atol=2e-5)
    h = np.maximum(sums[:, :70], 0) * sums[:, 70:] if has_gate else np.maximum(sums, 0)
    out = call.poisoned(100)
    packed_expert_down(call.bundles, call.layout, call.pair_offsets, h, out, call.pair_rows, threads=2)
    np.testing.assert_array_equal(out, run(call, "relu"))


@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_for_any_number_of_threads_and_alone_or_together(format: str) -> None:
    call = random_call(BundleLayout(256, 200, format, has_bias=True), [1, 2, 0, 69])
    together = run(call, threads=1)
    for threads in (2, 3):
        np.testing.assert_array_equal(run(call, threads=threads).view(np.uint32), together.view(np.uint32))
    for expert, pair in [(0, 0), (1, 2), (3, 50), (3, 71)]:
        alone = np.full((1, 256), np.nan, np.float32)
        bundle, token = call.bundles[expert : expert + 1], call.pair_tokens[pair : pair + 1]
        packed_expert_mlp(bundle, call.layout, np.array([0, 1]), token, call.x, "silu", alone, np.zeros(1, int))
        np.testing.assert_array_equal(alone[0].view(np.uint32), together[call.pair_rows[pair]].view(np.uint32))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "gpt_oss"])
def test_values_that_are_not_finite_stay_in_their_rows(format: str, activation: str) -> None:
    call = random_call(BundleLayout(64, 32, format), [3])
    call.pair_tokens = np.array([0, 1, 0])
    call.x = np.concatenate([call.x, call.x])
    call.x[1, 5] = np.nan
    out = run(call, activation)
    assert np.isnan(out[call.pair_rows[1]]).all()
    assert np.isfinite(out[call.pair_rows[[0, 2]]]).all()


def test_no_pairs_and_no_experts() -> None:
    call = random_call(BundleLayout(64, 32, "int4"), [0, 0])
    assert run(call).shape == (0, 64)
    call.bundles, call.pair_offsets = call.bundles[:0], call.pair_offsets[:1]
    assert run(call).shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": BundleLayout(64, 32, "bf16")}, "format 'bf16' is not packed"),
        ({"x": np.zeros((4, 64))}, "x: expected one of bf16, fp16, fp32"),
        ({"x": np.zeros((4, 63), np.float32)}, r"x: expected float32 \[rows, 64\]"),
        ({"pair_offsets": np.array([0, 2, 1])}, "pair_offsets: expected to rise"),
        ({"pair_tokens": np.array([0, 1, 4])}, "pair_tokens: a pair has no row"),
        ({"pair_rows": np.array([0, 1, 3])}, "pair_rows: a pair has no row"),
        ({"activation": "tanh"}, "has no kernel"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    call = random_call(BundleLayout(64, 32, "int4"), [1, 2])
    arguments: dict[str, Any] = {
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
        packed_expert_mlp(**{**arguments, **change})
