"""A tape against the kernels' own functions, bit by bit, and its router against float64 and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.decode_attention import decode_attention
from cpu_kernels.expert_mlp import expert_mlp
from cpu_kernels.linear import linear
from cpu_kernels.openmp import OpenMpPool
from cpu_kernels.packed_expert_mlp import packed_expert_mlp
from cpu_kernels.packed_linear import PackedWeights, packed_linear
from cpu_kernels.rms_norm import FORMS, rms_norm
from cpu_kernels.rotary import rotary
from cpu_kernels.tape import Tape
from cpu_kernels.tape_kernel import AHEAD, AHEAD_NBYTES
from cpu_kernels.threads import shared_pool
from cpu_kernels.weighted_sum import weighted_sum
from formats.bundle import BundleLayout
from formats.pack import pack_matrix
from formats.packed import MatrixLayout
from offload.devices.host_threads import _loaded_runtimes, kernel_pool

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@pytest.fixture(params=["launched", "in one region"])
def pool(request):
    return shared_pool(2) if request.param == "launched" else kernel_pool()


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, torch.nan).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_linear_and_sum(dtype, pool):
    x, weight, bias = randn(3, 96, dtype=dtype), randn(70, 96, dtype=dtype, seed=1), randn(70, dtype=dtype, seed=2)
    scale, other = randn(96, dtype=dtype, seed=3), randn(3, 70, dtype=dtype, seed=4)
    for form in FORMS:
        tape = Tape(dtype)
        normed, out, total = poisoned(3, 96, dtype=dtype), poisoned(3, 70, dtype=dtype), poisoned(3, 70, dtype=dtype)
        tape.rms_norm(x.data_ptr(), scale, 3, normed.data_ptr(), 1e-5, form)
        tape.linear(normed.data_ptr(), weight, bias, 3, out.data_ptr())
        tape.add(out.data_ptr(), other.data_ptr(), out.numel(), total.data_ptr())
        assert tape.play(pool) == tape.rows == 3
        expected = rms_norm(x, scale, 1e-5, form, pool)
        assert torch.equal(normed, expected)
        assert torch.equal(out, linear(expected, weight, bias, pool))
        assert torch.equal(total, out + other)


@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_linear(format, dtype, with_bias, pool):
    layout = MatrixLayout(50, 130, format)
    codes, scales = pack_matrix(randn(50, 130).numpy(), format)
    weights = PackedWeights(torch.from_numpy(codes), torch.from_numpy(scales), layout)
    bias = randn(50, seed=5) if with_bias else None
    x = randn(2, 130, dtype=dtype, seed=1)
    out, expected = poisoned(2, 50, dtype=dtype), poisoned(2, 50, dtype=dtype)
    tape = Tape(dtype)
    tape.packed_linear(x.data_ptr(), weights, bias, 2, out.data_ptr())
    tape.play(pool)
    packed_linear(x, weights, expected, bias, pool)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("past", [0, 1, 300])
def test_rotation_cache_and_attention(dtype, shared, past, pool):
    batch, heads, kv_heads, width, angles, room = 2, 6, 3, 16, 8, 320
    q, k = randn(batch, heads, 1, width, dtype=dtype), randn(batch, kv_heads, 1, width, dtype=dtype, seed=1)
    v = randn(batch, kv_heads, 1, width, dtype=dtype, seed=2)
    cos, sin = randn(batch, 1, angles, dtype=dtype, seed=3), randn(batch, 1, angles, dtype=dtype, seed=4)
    keys, values = (poisoned(batch, kv_heads, room, width, dtype=dtype) for _ in range(2))
    keys[:, :, :past] = randn(batch, kv_heads, past, width, dtype=dtype, seed=5)
    values[:, :, :past] = randn(batch, kv_heads, past, width, dtype=dtype, seed=6)
    turned_q, turned_k = rotary(q, k, cos, sin, shared_angles=shared, pool=pool)
    all_keys, all_values = torch.cat([keys[:, :, :past], turned_k], 2), torch.cat([values[:, :, :past], v], 2)
    expected = decode_attention(turned_q, all_keys, all_values, 0.3, pool)

    tape = Tape(dtype)
    q_out, k_out, out = (poisoned(tensor.numel(), dtype=dtype) for tensor in (q, k, q))
    tape.rotary(
        q.data_ptr(), heads, k.data_ptr(), kv_heads, batch, width, cos.data_ptr(), sin.data_ptr(), angles,
        q_out.data_ptr(), k_out.data_ptr(), shared_angles=shared,
    )  # fmt: skip
    stores = [tape.store_rows(source.data_ptr(), batch * kv_heads, width) for source in (k_out, v)]
    spots = tape.attention(q_out.data_ptr(), batch, kv_heads, heads // kv_heads, width, out.data_ptr(), 0.3)
    for (place, stride), buffer in zip(stores, (keys, values), strict=True):
        tape.words[place] = buffer.data_ptr() + past * width * dtype.itemsize
        tape.words[stride] = room * width * dtype.itemsize
    for name, buffer in (("key", keys), ("value", values)):
        tape.words[spots[f"{name}s"]] = buffer.data_ptr()
        tape.words[spots[f"{name}_batch"]] = kv_heads * room * width
        tape.words[spots[f"{name}_head"]] = room * width
    tape.words[spots["tokens"]] = past + 1
    tape.play(pool)
    assert torch.equal(keys[:, :, : past + 1], all_keys)
    assert torch.equal(values[:, :, : past + 1], all_values)
    assert keys[:, :, past + 1 :].isnan().all() and values[:, :, past + 1 :].isnan().all()
    assert torch.equal(out, expected.flatten())


def bundles_of(layout, count):
    generator = np.random.default_rng(0)
    memory = np.zeros((count, layout.nbytes + 64), np.uint8)
    start = -memory.ctypes.data % 64
    addresses = []
    for expert in range(count):
        bundle = memory[expert, start : start + layout.nbytes]
        for component in layout.components.values():
            part = bundle[component.offset : component.offset + component.nbytes]
            if layout.is_packed:
                continue
            values = torch.from_numpy(generator.standard_normal(component.nbytes).astype(np.float32))
            dtype = next(dtype for dtype, name in FORMAT.items() if name == layout.format)
            part[:] = values[: component.nbytes // dtype.itemsize].mul(0.1).to(dtype).view(torch.uint8).numpy()
        if layout.is_packed:
            for name in ("gate", "up", "down"):
                matrix = layout.matrix(name)
                weights = generator.standard_normal((matrix.rows, matrix.columns)).astype(np.float32)
                codes, scales = pack_matrix(weights, layout.format)
                for part, raw in ((name, codes), (f"{name}_scale", scales)):
                    component = layout.components[part]
                    bundle[component.offset : component.offset + component.nbytes] = raw.view(np.uint8).reshape(-1)
        addresses.append(bundle.ctypes.data)
    return memory, np.array(addresses, np.int64)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32), ("int8", torch.bfloat16),
     ("int4", torch.float32), ("mxfp4", torch.bfloat16), ("fp8_e4m3", torch.bfloat16)],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_are_those_of_the_kernels(format, dtype, tokens, pool):
    layout = BundleLayout(128, 64, format)
    memory, addresses = bundles_of(layout, 6)
    x, logits, residual = (randn(tokens, n, dtype=dtype, seed=n) for n in (128, 6, 127))
    residual = randn(tokens, 128, dtype=dtype, seed=9)
    out = poisoned(tokens, 128, dtype=dtype)
    tape = Tape(dtype)
    choice = tape.choose(logits.data_ptr(), 6, tokens, 2, renormalise=True, rounded=False)
    sums = tape.experts(layout, "silu", addresses, choice, x.data_ptr())
    tape.add_sums(residual.data_ptr(), sums, out.numel(), out.data_ptr())
    assert tape.play(pool) == tape.rows

    pairs = np.argsort(choice.ids.view(-1).numpy(), kind="stable")
    experts, counts = np.unique(choice.ids.numpy(), return_counts=True)
    outputs = torch.full((2 * tokens, 128), torch.nan)
    inputs = x.view(torch.int16).numpy().view(np.uint16) if dtype is torch.bfloat16 else x.numpy()
    (packed_expert_mlp if layout.is_packed else expert_mlp)(
        addresses[experts], layout, np.r_[0, np.cumsum(counts)], pairs // 2, inputs, "silu", outputs.numpy(), pairs,
        threads=pool,
    )  # fmt: skip
    total = weighted_sum(outputs, choice.weights, pool)
    assert torch.equal(out, residual + total.to(dtype))
    assert len(memory) == 6


@pytest.mark.parametrize(("format", "dtype"), [("bf16", torch.bfloat16), ("int4", torch.float32)])
def test_experts_may_come_one_after_the_other(format, dtype, pool):
    layout, tokens = BundleLayout(128, 64, format), 3
    _memory, addresses = bundles_of(layout, 6)
    x, logits, residual = (randn(tokens, n, dtype=dtype, seed=n) for n in (128, 6, 128))
    found = []
    for groups in ([range(6)], [[4], [], [0, 5, 1], [3, 2]]):
        own, out = np.zeros(6, np.int64), poisoned(tokens, 128, dtype=dtype)
        tape = Tape(dtype)
        choice = tape.choose(logits.data_ptr(), 6, tokens, 2, renormalise=True, rounded=False)
        row = tape.rows
        sums = tape.experts(layout, "silu", own, choice, x.data_ptr())
        tape.add_sums(residual.data_ptr(), sums, out.numel(), out.data_ptr())
        tape.play(pool, end=row)
        for group in groups:
            own[list(group)] = addresses[list(group)]
            tape.play(pool, row, row + 1)
            own[:] = 0
        tape.play(pool, row + 1)
        found.append(out)
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_weights_of_zero_leave_an_expert_out(pool):
    layout = BundleLayout(64, 64, "fp32")
    _memory, addresses = bundles_of(layout, 3)
    addresses[2] = 0  # must not be read
    logits = torch.tensor([[0.0, -1.0, -2.0]])
    x, residual, out = randn(1, 64), randn(1, 64, seed=1), poisoned(1, 64, dtype=torch.float32)
    tape = Tape(torch.float32)
    choice = tape.choose(logits.data_ptr(), 3, 1, 3, renormalise=False, rounded=False)
    sums = tape.experts(layout, "silu", addresses, choice, x.data_ptr())
    tape.add_sums(residual.data_ptr(), sums, 64, out.data_ptr())
    tape.play(pool, end=1)
    choice.shares[0, 2] = 0
    choice.ids.copy_(torch.tensor([[0, 1, 2]]))
    tape.play(pool, first=1)
    assert choice.weights[0, 2] == 0
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (8, 2), (5, 5), (3, 1)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_choice_is_that_of_softmax_in_float64(dtype, experts, top_k, renormalise, pool):
    logits = randn(8, experts, dtype=dtype, seed=top_k) * 2
    tape = Tape(dtype)
    choice = tape.choose(logits.data_ptr(), experts, 8, top_k, renormalise=renormalise, rounded=dtype != torch.float32)
    probabilities = logits.double().softmax(-1)
    expected, ids = torch.topk(probabilities, top_k)
    assert tape.play(pool) == tape.rows
    assert torch.equal(choice.ids, torch.topk(choice.shares, top_k).indices)
    assert torch.equal(logits.gather(1, choice.ids), logits.gather(1, ids))
    if renormalise:
        expected = expected / expected.sum(-1, keepdim=True)
    step = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    assert torch.allclose(choice.weights.double(), expected, rtol=step, atol=0)


@pytest.mark.parametrize(
    ("logits", "clear", "equals"),
    [([3.0, 2.0, 1.0, 0.0], True, False), ([3.0, 3.0, 1.0, 0.0], True, True), ([3.0, 2.0, 2.0, 0.0], True, True),
     ([3.0, 2.0, 1.0, 1.0], True, False), ([3.0, torch.nan, 1.0, 0.0], False, False),
     ([torch.inf, 2.0, 1.0, 0.0], False, False), ([-torch.inf, 2.0, 1.0, 0.0], True, False)],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_only_a_clear_choice_goes_on(logits, clear, equals, known, pool, monkeypatch):
    monkeypatch.setattr("cpu_kernels.tape.orders_as_torch", lambda experts, top_k: known)
    tape = Tape(torch.float32)
    given = torch.tensor([logits])
    choice = tape.choose(given.data_ptr(), 4, 1, 2, renormalise=True, rounded=False)
    clear = clear and (known or not equals)
    assert tape.play(pool) == (2 if clear else 1)
    if clear:
        assert torch.equal(choice.ids, torch.topk(choice.shares, 2).indices)


def test_rows_know_the_weights_that_come_next():
    x, small, large = torch.zeros(8), torch.zeros(4, 8), torch.zeros(1 << 15, 8)
    tape = Tape(torch.float32)
    address = x.data_ptr()
    tape.add(address, address, 4, address)
    tape.linear(address, small, None, 1, address)
    tape.add(address, address, 4, address)
    tape.linear(address, large, None, 1, address)
    ahead = tape.words[:, AHEAD].tolist(), tape.words[:, AHEAD_NBYTES].tolist()
    assert ahead[0] == [small.data_ptr(), large.data_ptr(), large.data_ptr(), 0]
    assert ahead[1][0] == small.nbytes
    assert 0 < ahead[1][1] == ahead[1][2] < large.nbytes
    assert ahead[1][3] == 0


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_one_region_has_the_bits_of_one_thread(threads):
    """More threads than cores, so that some come late to a phase or not at all."""
    layout = BundleLayout(128, 64, "int4")
    generator = np.random.default_rng(0)
    bundles = generator.integers(0, 255, (4, layout.nbytes), dtype=np.uint8)
    for name, part in layout.components.items():
        if name.endswith("scale"):
            bundles[:, part.offset : part.offset + part.nbytes] = np.full(part.nbytes // 2, 0x3C00, "<u2").view("u1")
    addresses = bundles.ctypes.data + layout.nbytes * np.arange(4)
    x, router, weight = randn(2, 128), randn(4, 128, seed=1), randn(5000, 128, seed=2)
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            logits, out = poisoned(2, 4, dtype=torch.float32), poisoned(2, 5000, dtype=torch.float32)
            tape = Tape(torch.float32)
            tape.linear(x.data_ptr(), router, None, 2, logits.data_ptr())
            choice = tape.choose(logits.data_ptr(), 4, 2, 2, renormalise=True, rounded=False)
            sums = tape.experts(layout, "silu", addresses, choice, x.data_ptr())
            tape.linear(sums, weight, None, 2, out.data_ptr())
            pool = OpenMpPool(_loaded_runtimes()[0], threads)
            assert (pool.team is None) == (count == 1)
            for _ in range(1 if count == 1 else 200):
                out.fill_(torch.nan)
                assert tape.play(pool) == tape.rows
                results.append(out.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert results[0].isfinite().all()


def test_a_tape_in_use_takes_no_more_rows(pool):
    tape = Tape(torch.float32)
    x = torch.zeros(4)
    tape.add(x.data_ptr(), x.data_ptr(), 4, x.data_ptr())
    tape.play(pool)
    with pytest.raises(RuntimeError, match="no more rows"):
        tape.add(x.data_ptr(), x.data_ptr(), 4, x.data_ptr())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no kernel"):
        Tape(torch.float64)
    tape = Tape(torch.bfloat16)
    with pytest.raises(ValueError, match="multiple of 8"):
        tape.store_rows(0, 1, 3)
    choice = tape.choose(0, 4, 1, 2, renormalise=True, rounded=True)
    with pytest.raises(ValueError, match="fp32 on a tape"):
        tape.experts(BundleLayout(64, 64, "fp32"), "silu", np.zeros(4, np.int64), choice, 0)
    with pytest.raises(ValueError, match="has no kernel"):
        tape.experts(BundleLayout(64, 64, "bf16"), "mish", np.zeros(4, np.int64), choice, 0)
