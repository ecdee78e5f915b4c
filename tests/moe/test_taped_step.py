"""A tape's experts as they come: the bits of the MoE step whatever is resident, and harmless when reads fail."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cpu_kernels.tape import Choice, Tape
from cpu_kernels.threads import shared_pool
from offload.errors import StorageError, StoreCorruptError
from offload.moe.taped_step import taped_step
from tests.moe.rig import Rig

MakeRig = Callable[..., Rig]
POOL = shared_pool(2)


class TapedLayer:
    """The experts of a rig's layer on a tape, given their choice."""

    def __init__(self, rig: Rig, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.rig, self.layer, self.hidden = rig, rig.layers[layer], hidden
        self.addresses = np.zeros(rig.count, np.int64)
        self.computed: list[list[int]] = []
        self.tape = Tape(hidden.dtype)
        self.choice = Choice(ids.contiguous(), weights.float().contiguous(), torch.empty(0))
        self.out = torch.full_like(hidden, torch.nan)
        assert self.layer.activation is not None
        sums = self.tape.experts(
            self.layer.layout, self.layer.activation, self.addresses, self.choice, hidden.data_ptr()
        )
        self.zeros = torch.zeros_like(hidden)
        self.tape.add_sums(self.zeros.data_ptr(), sums, hidden.numel(), self.out.data_ptr())

    def compute(self) -> None:
        self.computed.append(np.flatnonzero(self.addresses).tolist())
        self.tape.play(POOL, 0, 1)

    def run(self, *, in_turn: bool = False) -> torch.Tensor:
        experts = sorted(set(self.choice.ids.flatten().tolist()))
        taped_step(self.layer.first_key, experts, self.addresses, self.compute, self.rig.tier, in_turn=in_turn)
        assert not self.addresses.any()
        if in_turn:
            assert [expert for group in self.computed for expert in group] == experts
        assert sorted(expert for group in self.computed for expert in group) == experts, (
            "an expert was lost or computed twice"
        )
        self.tape.play(POOL, 1)
        return self.out


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("in_turn", [True, False])
def test_has_the_bits_of_the_step(make_rig: MakeRig, format: str, slots: int, tokens: int, in_turn: bool) -> None:
    rig, other = make_rig(format=format, slots=slots), make_rig(format=format, slots=slots)
    chance = random.Random(slots)
    for seed in range(6):
        layer = chance.randint(0, 1)
        inputs = rig.inputs(tokens, top_k=3, seed=seed)
        found = TapedLayer(rig, layer, *inputs).run(in_turn=in_turn)
        assert torch.equal(found, other.step(layer, *inputs))
        rig.assert_close(found, rig.reference(layer, *inputs))
        rig.assert_idle()


@pytest.mark.parametrize("slots", [1, 2, 5, 12])
def test_every_expert_is_read_at_most_once_and_residents_not_at_all(make_rig: MakeRig, slots: int) -> None:
    rig = make_rig(slots=slots)
    reads: Counter[int] = Counter()
    rig.before_read = lambda key: reads.update([key])
    chunks = rig.layout.nbytes // 4096
    for seed in range(8):
        inputs = rig.inputs(2, top_k=3, seed=seed)
        resident, routed = set(rig.tier.table), set(inputs[1].flatten().tolist())
        TapedLayer(rig, 0, *inputs).run()
        assert set(reads) == routed - resident
        assert set(reads.values()) <= {chunks}
        reads.clear()


def test_residents_are_computed_while_misses_load(make_rig: MakeRig) -> None:
    rig = make_rig(slots=6)
    rig.tier.fetch([0, 1, 2], lambda _key: None)
    loading: list[int] = []
    layer = TapedLayer(rig, 0, *rig.inputs(2, top_k=6))
    compute = layer.compute

    def watch() -> None:
        loading.append(len(rig.tier._tickets))
        compute()

    layer.compute = watch  # type: ignore[method-assign]
    layer.run()
    assert layer.computed[0] == [0, 1, 2] and loading[0] == 3


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("slots", [1, 2, 4, 12])
def test_a_step_that_fails_is_as_if_it_had_not_been(make_rig: MakeRig, slots: int, seed: int) -> None:
    chance = random.Random(seed)
    rig = make_rig(slots=slots, threads=chance.randint(1, 3))
    inputs = rig.inputs(chance.randint(1, 3), top_k=chance.randint(1, 6), seed=seed)
    left = chance.randint(0, 4)
    bad = chance.choice([StorageError(errno.EIO, "broken"), StoreCorruptError("flipped"), MemoryError()])
    rig.break_reads(left, bad)
    layer = TapedLayer(rig, 0, *inputs)
    try:
        rig.assert_close(layer.run(), rig.reference(0, *inputs))
    except type(bad) as caught:
        assert caught is bad
        assert not layer.addresses.any()
    rig.assert_idle()
    rig.before_read = lambda _key: None
    rig.assert_close(TapedLayer(rig, 0, *inputs).run(), rig.reference(0, *inputs))
    rig.assert_idle()
