"""Blocks of a KV cache on the CUDA device over a fake driver: bytes are the host's, attention is float64's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels.kv_blocks import pack_block, read_tokens, write_tokens
from cpu_kernels.paged_attention_reference import paged_attention_reference
from formats.kv import KvLayout
from offload.devices.base import AttentionBatch
from offload.devices.cuda import CudaDevice
from offload.kv.slots import view
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency
from tests.assertions import assert_close
from tests.devices.fake_cuda import FakeCudaDriver
from tests.tiers.readers import random_bytes

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the fake's memory is the host's, which compiled kernels do not read"
)

PLAIN = KvLayout("fp32", 2, 20, 8, 64)


class Pair:
    """Blocks in a device's memory, and the same in the host's, written by each one's own ways."""

    def __init__(self, layout: KvLayout, blocks: int) -> None:
        self.layout = layout
        self.driver = FakeCudaDriver()
        self.device = CudaDevice(self.driver, 4 * blocks * layout.nbytes)
        self.slab = self.device.allocate(blocks * layout.nbytes)
        # Where the device's poison stays, the host's does.
        self.host = np.full(blocks * layout.nbytes, 0xFF, np.uint8)
        steps = np.arange(blocks) * layout.nbytes
        self.above, self.below = self.slab.address + steps, self.host.ctypes.data + steps

    def write(self, sequences: int, tokens: int, first: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads, layout = self.layout.kv_heads, self.layout
        keys = torch.randn(sequences, heads, tokens, layout.key_width, generator=generator)
        values = torch.randn(sequences, heads, tokens, layout.value_width, generator=generator)
        offsets = np.linspace(0, len(self.above), sequences + 1).astype(np.int64)
        firsts = np.full(sequences, first)
        self.device.write_tokens(keys, values, offsets, self.above, firsts, layout)
        write_tokens(keys, values, offsets, self.below, firsts, layout)

    def check(self) -> None:
        assert np.array_equal(self.slab.tensor().numpy(), self.host)


def test_tokens_are_written_as_the_host_writes_them() -> None:
    pair = Pair(PLAIN, 4)
    for tokens, first in ((70, 0), (1, 70), (1, 127)):
        pair.write(2, tokens, first, seed=first)
        pair.check()
    assert len(pair.driver.moments) == 3


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8", "int4"])
def test_blocks_are_packed_as_the_host_packs_them(format: str) -> None:
    pair = Pair(PLAIN, 2)
    pair.write(1, 128, 0)
    layout = KvLayout(format, 2, 20, 8, 64)
    target = pair.device.allocate(2 * layout.nbytes)
    targets = target.address + np.arange(2) * layout.nbytes
    pair.device.pack_blocks(pair.above, PLAIN, targets, layout)
    host = np.empty(2 * layout.nbytes, np.uint8)
    for index, source in enumerate(pair.below.tolist()):
        pack_block(source, PLAIN, host.ctypes.data + index * layout.nbytes, layout)
    assert np.array_equal(target.tensor().numpy(), host)
    for found, expected in zip(
        pair.device.read_blocks(targets, 100, layout),
        read_tokens(host.ctypes.data + np.arange(2) * layout.nbytes, 0, 100, layout),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_attention(padded: bool) -> None:
    """Two lists of one sequence and one of another, two new tokens."""
    pair = Pair(PLAIN, 4)
    pair.write(2, 100, 0)
    valid = None
    if padded:
        valid = np.ones((3, 100), np.bool_)
        valid[:, :70] = False
    batch = AttentionBatch(
        torch.randn(3, 4, 2, 20, generator=torch.Generator().manual_seed(1)), np.array([0, 1, 2, 4]), pair.above,
        np.array([64, 36, 100]), np.array([0, 64, 0]), np.tile([98, 99], (3, 1)), PLAIN, 0.3, valid,
    )  # fmt: skip
    work = pair.device.start_attention(batch)
    expected = paged_attention_reference(
        batch.query, batch.offsets, pair.below, batch.lengths, batch.first_positions, batch.query_positions, PLAIN, 0.3,
        valid=valid,
    )  # fmt: skip
    for found, wanted in zip(work.finish(), expected, strict=True):
        assert_close(found, wanted, "fp32")


def test_copies_down_follow_what_was_written() -> None:
    pair = Pair(PLAIN, 2)
    pair.write(1, 128, 0)
    engine = ReadEngine(pair.device.copy_down_reader(), threads=1, chunk_nbytes=4096)
    target = np.zeros(PLAIN.nbytes, np.uint8)
    request = ReadRequest(0, int(pair.above[1]), view(target.ctypes.data, target.nbytes), None, "KV blocks")
    ticket = engine.submit(request, Urgency.NOW)
    engine.wait_all([ticket])
    engine.close()
    assert ticket.succeeded
    assert np.array_equal(target, pair.host[PLAIN.nbytes :])
    assert set(pair.driver.followed) == {pair.driver.moments[-1]}
    assert engine.reader.bytes_read == PLAIN.nbytes


def test_copies_up_and_within() -> None:
    pair = Pair(PLAIN, 3)
    first, second, third = pair.above.tolist()
    content = random_bytes(PLAIN.nbytes, seed=5)
    pair.device.copy_up(content, second)
    pair.device.copy_within(second, third, PLAIN.nbytes)
    found = pair.slab.tensor().numpy().reshape(3, -1)
    assert (found[0] == 0xFF).all()
    assert np.array_equal(found[1], content)
    assert np.array_equal(found[2], content)
    assert len(pair.driver.moments) == 2
    other = pair.device.allocate(4096)
    for address, nbytes in ((first - 1, 2), (third, PLAIN.nbytes + 1), (other.address, 4097)):
        with pytest.raises(ValueError, match="are not in the memory of"):
            pair.device.copy_within(first, address, nbytes)
