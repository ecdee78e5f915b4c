"""Attention of one token against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cpu_kernels import isa
from cpu_kernels.decode_attention import decode_attention
from cpu_kernels.decode_attention_reference import decode_attention_reference
from cpu_kernels.threads import shared_pool
from offload.devices.host_threads import kernel_pool
from tests.cpu_kernels.tensors import DTYPES, attention_inputs

# One token; a part's end; several runs, and runs of several parts; one to many heads a group; widths that differ, have
# tails and are odd numbers of 16 channels; several sequences.
SHAPES = [
    (1, 4, 4, 1, 16, 16),
    (1, 8, 2, 255, 24, 13),
    (2, 6, 2, 256, 20, 40),
    (1, 5, 1, 257, 128, 128),
    (3, 3, 3, 1030, 48, 33),
    (1, 19, 1, 64, 64, 80),
    (2, 16, 2, 4099, 32, 64),
]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return attention_inputs(*shape[:3], 1, *shape[3:], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    query, key, value = _inputs(shape, dtype)
    found = decode_attention(query, key, value, 0.3, kernel_pool())
    exact = decode_attention_reference(query, key, value, 0.3)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * value.double().abs().max()
    assert found.dtype is dtype
    assert found.shape == exact.shape and found.is_contiguous()
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(2, 6, 2, 300, 32, 48), (3, 4, 4, 7, 16, 16)])
def test_sinks_take_their_share(shape: tuple[int, ...]) -> None:
    query, key, value = _inputs(shape, torch.float32)
    sinks = torch.linspace(-3.0, 60.0, shape[1])
    found = decode_attention(query, key, value, 0.3, kernel_pool(), sinks)
    exact = decode_attention_reference(query, key, value, 0.3, sinks)
    assert ((found.double() - exact).abs() <= 1e-5 * value.abs().max()).all()
    for wrong in (sinks[:-1], sinks.double(), sinks.repeat(2)[::2]):
        with pytest.raises(ValueError, match="expected sinks"):
            decode_attention(query, key, value, 0.3, kernel_pool(), wrong)


def test_rows_that_do_not_touch_each_other() -> None:
    buffers = [torch.full((2, 3, 400, 64), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    query, key, value = _inputs((2, 6, 3, 290, 64, 64), torch.bfloat16)
    for buffer, states in zip(buffers, (key, value), strict=True):
        buffer[:, :, :290] = states
    found = decode_attention(query, *(buffer[:, :, :290] for buffer in buffers), 0.2, kernel_pool())
    assert torch.equal(found, decode_attention(query, key, value, 0.2, kernel_pool()))


def test_bits_do_not_depend_on_threads_or_other_sequences() -> None:
    # A thread takes several runs in a row.
    query, key, value = _inputs((2, 6, 3, 9000, 32, 32), torch.bfloat16)
    expected = decode_attention(query, key, value, 0.2, shared_pool(1))
    for pool in (shared_pool(3), kernel_pool()):
        assert torch.equal(decode_attention(query, key, value, 0.2, pool), expected)
    alone = decode_attention(query[1:], key[1:], value[1:], 0.2, kernel_pool())
    assert torch.equal(alone, expected[1:])


SCRIPT = """
import sys
from tests.cpu_kernels.test_decode_attention import DTYPES, every_tile
for dtype in DTYPES:
    sys.stdout.buffer.write(every_tile(dtype).numpy().tobytes())
"""


def every_tile(dtype: torch.dtype) -> torch.Tensor:
    """Fp32 results of groups of 1 to 16 heads, with tokens that no tile divides."""
    found = []
    for heads in (1, 2, 3, 4, 7, 8, 15):
        query, key, value = _inputs((1, heads, 1, 293, 96, 80), dtype)
        found.append(decode_attention(query, key, value, 0.2, kernel_pool()).float().flatten())
    return torch.cat(found)


@pytest.mark.parametrize("name", [name for name in isa.ISAS if isa.supports(name)])
def test_isas_of_this_machine_agree(name: str) -> None:
    environment = {**os.environ, isa.ISA_VARIABLE: name}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=True)
    found = iter(torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).chunk(len(DTYPES)))
    for dtype in DTYPES:
        expected, other = every_tile(dtype), next(found)
        if dtype is not torch.bfloat16:
            assert torch.equal(other, expected)
        # VDPBF16PS sums in another order.
        assert torch.allclose(other, expected, rtol=2**-7, atol=1e-5)


def test_scores_far_apart_stay_finite() -> None:
    query, key, value = _inputs((1, 2, 1, 300, 16, 16), torch.float32)
    found = decode_attention(1e3 * query, key, value, 1e2, kernel_pool())
    exact = decode_attention_reference(1e3 * query, key, value, 1e2)
    assert (found.double() - exact).abs().max() <= 1e-3


def test_a_nan_is_not_hidden() -> None:
    query, key, value = _inputs((1, 2, 2, 20, 16, 16), torch.float32)
    key[0, 1, 3, 2] = torch.nan
    found = decode_attention(query, key, value, 0.2, kernel_pool())
    assert found[0, 0, 1].isnan().all() and found[0, 0, 0].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = _inputs((1, 4, 2, 20, 16, 16), torch.float32)
    wrong = [
        (query.expand(1, 4, 2, 16), key, value),
        (query[:, :3], key, value),
        (query, key[:, :, :0], value[:, :, :0]),
        (query, key[..., ::2], value),
        (query, key.transpose(1, 2), value.transpose(1, 2)),
        (query, key.bfloat16(), value),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="decode_attention: expected"):
            decode_attention(*arguments, 0.2, kernel_pool())
