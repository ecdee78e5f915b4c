"""The step over three tiers: the bits of the step over two, whatever is where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.devices.base import ExpertBatch, Work
from offload.devices.link import Link, LinkReader
from offload.errors import PartError, StorageError, StoreCorruptError
from offload.moe import accumulate
from offload.moe.costs import ObservedCosts
from offload.moe.layer import ExpertsLayer
from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.records import LayerCosts
from prefetch.scheduler.static import StaticOrder
from tests.moe.rig import Rig
from tests.moe.tiered_rig import COPY_ALL, COPY_NONE, COPY_SOME, InTurn, TieredRig


@pytest.fixture
def make_rig() -> Iterator[type[TieredRig]]:
    made = []

    class Made(TieredRig):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)  # type: ignore[arg-type]
            made.append(self)

    yield Made
    for rig in made:
        rig.close()


@pytest.mark.parametrize("costs", [COPY_ALL, COPY_NONE, COPY_SOME], ids=["all", "none", "some"])
@pytest.mark.parametrize(("above", "slots"), [(1, 2), (3, 2), (6, 6)])
def test_bits_are_those_of_two_tiers(above: int, slots: int, costs: LayerCosts, make_rig: type[TieredRig]) -> None:
    rig, plain = make_rig(above=above, slots=slots, costs=costs), Rig(slots=6)
    for seed in range(6):
        inputs = rig.inputs(4, 3, seed=seed)
        found = rig.tiered(seed % 2, *inputs)
        assert torch.equal(found, plain.step(seed % 2, *inputs))
        rig.assert_close(found, rig.reference(seed % 2, *inputs))
        rig.assert_idle()
    counters = rig.pair.above.counters
    if costs is COPY_ALL:
        assert counters.loads
    if costs is COPY_NONE:
        assert not counters.loads
    plain.close()


@pytest.mark.parametrize("scheduler", [StaticOrder(), InTurn()], ids=["off", "in turn"])
@pytest.mark.parametrize(("above", "slots"), [(1, 1), (1, 2), (3, 2), (2, 6), (6, 6)])
def test_bits_do_not_depend_on_the_scheduler(
    above: int, slots: int, scheduler: StepScheduler, make_rig: type[TieredRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, plain = make_rig(above=above, slots=slots, costs=COPY_ALL), Rig(slots=6)
    rig.accelerated.scheduler = scheduler
    on_cpu: list[list[int]] = []
    start = rig.device.start_experts

    def counted(layer: ExpertsLayer, batch: ExpertBatch, *tensors: torch.Tensor) -> Work:
        keys = {rig.tier.address(key): key for key in rig.tier.table}
        on_cpu[-1] += [keys[address] for address in batch.addresses.tolist()]
        return start(layer, batch, *tensors)

    monkeypatch.setattr(rig.device, "start_experts", counted)
    for seed in range(6):
        inputs = rig.inputs(4, 3, seed=seed)
        on_cpu.append([])
        assert torch.equal(rig.tiered(seed % 2, *inputs), plain.step(seed % 2, *inputs))
        rig.assert_idle()
        assert on_cpu[-1] == sorted(on_cpu[-1]), "not in turn"
    copies = rig.pair.above.counters.loads
    if isinstance(scheduler, StaticOrder):
        assert not copies and all(on_cpu)
    else:
        # With a single slot below none can be kept until it is copied.
        assert bool(copies) == (slots > 1)
    plain.close()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([7], "gave 7, expected places from 0 to"),
        ([-1], "gave -1, expected places from 0 to"),
        ([0], "gave 0, an expert that is on the accelerator already"),
        ([1.0], "gave 1.0, expected whole numbers"),
        ([True], "gave True, expected places"),
        (None, "gave None, expected places of experts"),
    ],
)
@pytest.mark.parametrize("comes", [True, False])
@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["summed in order", "kept"])
def test_a_scheduler_that_names_what_cannot_be_copied_is_refused(
    said: object, message: str, comes: bool, kept: int, make_rig: type[TieredRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(StepScheduler):
        as_they_come = comes

        def copies(self, *_: object) -> Sequence[int]:
            return said  # type: ignore[return-value]

    monkeypatch.setattr(accumulate, "kept_nbytes", lambda **_: kept)
    rig, plain = make_rig(above=1, slots=3, costs=COPY_NONE), Rig(slots=6)
    rig.pair.preload([0], lambda _key: None)
    hidden, _, weights = rig.inputs(2, 3)
    index = torch.tensor([[0, 2, 4], [0, 1, 2]])
    usual, rig.accelerated.scheduler = rig.accelerated.scheduler, Wrong()
    with pytest.raises(PartError, match=f"^Wrong.copies {message}"):
        rig.tiered(0, hidden, index, weights)
    rig.assert_idle()
    rig.accelerated.scheduler = usual
    assert torch.equal(rig.tiered(0, hidden, index, weights), plain.step(0, hidden, index, weights))
    plain.close()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tiers_any_costs(data: st.DataObject) -> None:
    seconds = st.sampled_from((0.0, 1e-3, 1.0, 10.0))
    costs = LayerCosts(
        cpu_token_s=data.draw(seconds), cpu_expert_s=data.draw(seconds), gpu_expert_s=data.draw(seconds),
        gpu_token_s=data.draw(seconds), link_expert_s=data.draw(seconds), disk_expert_s=data.draw(seconds),
    )  # fmt: skip
    rig = TieredRig(above=data.draw(st.integers(1, 5)), slots=data.draw(st.integers(2, 6)), costs=costs, threads=1)
    plain = Rig(slots=12, threads=1)
    try:
        for _ in range(3):
            layer, tokens = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 6))
            inputs = rig.inputs(tokens, data.draw(st.integers(1, 6)), seed=data.draw(st.integers(0, 99)))
            assert torch.equal(rig.tiered(layer, *inputs), plain.step(layer, *inputs))
            rig.assert_idle()
    finally:
        rig.close()
        plain.close()


def test_many_pairs_are_summed_in_order(make_rig: type[TieredRig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulate, "kept_nbytes", lambda **_: 0)
    rig, plain = make_rig(above=3, slots=2, costs=COPY_ALL), Rig(slots=6)
    rig.pair.preload([1, 4, 5], lambda _key: None)
    for seed in range(3):
        inputs = rig.inputs(5, 4, seed=seed)
        assert torch.equal(rig.tiered(0, *inputs), plain.step(0, *inputs))
        rig.assert_idle()
    assert rig.pair.above.counters.hits
    plain.close()


@pytest.mark.parametrize("most_pairs", [1, 9, 20, 1000])
@pytest.mark.parametrize("resident", [range(8), (0, 2, 3, 6, 7)], ids=["all", "some"])
def test_experts_above_are_computed_with_one_call_as_far_as_outputs_are_bounded(
    resident: Sequence[int], most_pairs: int, make_rig: type[TieredRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate, "kept_nbytes", lambda **_: 0)
    rig, plain = make_rig(above=8, slots=4, costs=COPY_NONE, count=8), Rig(slots=8, count=8)
    rig.pair.preload(list(resident), lambda _key: None)
    calls: list[list[int]] = []
    start = rig.accelerator.start_experts

    def counted(layer: ExpertsLayer, batch: ExpertBatch, *tensors: torch.Tensor) -> Work:
        calls.append(np.diff(batch.offsets).tolist())
        return start(layer, batch, *tensors)

    monkeypatch.setattr(rig.accelerator, "start_experts", counted)
    hidden, index, weights = rig.inputs(11, 4, seed=3)
    monkeypatch.setattr(accumulate, "GROUP_NBYTES", most_pairs * 4 * hidden.shape[1])
    assert torch.equal(rig.tiered(0, hidden, index, weights), plain.step(0, hidden, index, weights))
    rig.assert_idle()
    pairs = [(index == expert).sum().item() for expert in resident]
    assert [one for call in calls for one in call] == [one for one in pairs if one]
    assert all(len(call) == 1 or sum(call) <= most_pairs for call in calls)
    for call, following in pairwise(calls):
        assert sum(call) + following[0] > most_pairs, "one call would have done"
    plain.close()


@pytest.mark.parametrize("costs", [COPY_ALL, COPY_NONE, COPY_SOME], ids=["all", "none", "some"])
@pytest.mark.parametrize(("above", "slots"), [(1, 2), (2, 3), (4, 2), (3, 6)])
@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["summed in order", "kept"])
def test_a_prompt_copies_each_expert_at_most_once(
    kept: int, above: int, slots: int, costs: LayerCosts, make_rig: type[TieredRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both layers, one after the other, as chunks of a prompt run: bits as on two tiers."""
    monkeypatch.setattr(accumulate, "kept_nbytes", lambda *, accelerated: 0 if accelerated else kept)
    rig, plain = make_rig(above=above, slots=slots, costs=costs), Rig(slots=12)
    for seed in range(4):
        for layer in range(2):
            inputs = rig.inputs(9, 4, seed=seed)
            before = rig.pair.above.counters.loads
            assert torch.equal(rig.tiered(layer, *inputs), plain.step(layer, *inputs))
            assert rig.pair.above.counters.loads - before <= len(inputs[1].unique())
            rig.assert_idle()
    counters = rig.pair.above.counters
    assert (counters.loads > 0) == (costs is not COPY_NONE)
    plain.close()


def test_experts_that_a_prompt_is_routed_to_most_stay_above(
    make_rig: type[TieredRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate, "kept_nbytes", lambda **_: 0)
    # All but the few through which others pass.
    rig = make_rig(above=8, slots=4, costs=COPY_ALL, count=8)
    hidden, _, _ = rig.inputs(6, 1)
    weights = torch.full((6, 3), 0.5)

    def run(*hot: int) -> None:
        others = [expert for expert in range(8) if expert not in hot]
        index = torch.tensor([[*hot, other] for other in others])
        for _ in range(3):
            for layer in range(2):
                rig.tiered(layer, hidden, index, weights)

    run(1, 6)
    assert {1, 6, 9, 14} <= set(rig.pair.above.table)
    # Decoding ends the prompt: the next one's counts begin at nothing.
    with monkeypatch.context() as patch:
        patch.setattr(accumulate, "kept_nbytes", lambda **_: 1 << 20)
        rig.tiered(0, *rig.inputs(1, 2))
    run(0, 4)
    assert {0, 4, 8, 12} <= set(rig.pair.above.table)


@pytest.mark.parametrize("seed", range(30))
def test_a_prompt_whose_reads_fail_leaves_both_tiers_whole(
    seed: int, make_rig: type[TieredRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate, "kept_nbytes", lambda **_: 0)
    rig, choose = make_rig(above=1 + seed % 4, slots=2 + seed % 3, costs=COPY_ALL), np.random.default_rng(seed)
    inputs = rig.inputs(7, 3, seed=seed)
    failing = choose.choice(inputs[1].unique().tolist())

    def fail(key: int) -> None:
        if key == failing:
            raise StorageError("no such sector")

    rig.before_read = fail
    with pytest.raises(StorageError, match="no such sector"):
        rig.tiered(0, *inputs)
    rig.assert_idle()
    rig.before_read = lambda _key: None
    rig.assert_close(rig.tiered(0, *inputs), rig.reference(0, *inputs))
    rig.assert_idle()


def test_preloaded_experts_are_found_and_not_read_again(make_rig: type[TieredRig]) -> None:
    rig = make_rig(above=6, slots=2, costs=COPY_NONE)
    arrived: list[int] = []
    rig.pair.preload(range(6), arrived.append)
    assert arrived == [*range(6)]
    rig.assert_idle()
    reads = len(rig.reader.calls)
    hidden, index, weights = rig.inputs(4, 3)
    rig.assert_close(rig.tiered(0, hidden, index, weights), rig.reference(0, hidden, index, weights))
    assert len(rig.reader.calls) == reads
    assert rig.pair.above.counters.misses == 0


def test_a_read_that_fails_leaves_both_tiers_whole(make_rig: type[TieredRig]) -> None:
    rig = make_rig(above=2, slots=3, costs=COPY_ALL)
    inputs = rig.inputs(4, 3)
    failing = int(inputs[1].max())

    def fail(key: int) -> None:
        if key == failing:
            raise StorageError("no such sector")

    rig.before_read = fail
    with pytest.raises(StorageError, match="no such sector"):
        rig.tiered(0, *inputs)
    rig.assert_idle()
    rig.before_read = lambda _key: None
    rig.assert_close(rig.tiered(0, *inputs), rig.reference(0, *inputs))


@pytest.mark.parametrize("during", ["step", "preload"])
def test_a_copy_that_arrives_wrong_is_reported(
    during: str, make_rig: type[TieredRig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(above=2, slots=3, costs=COPY_ALL)
    inputs = rig.inputs(2, 2)
    read = LinkReader.read

    def spoil(self: LinkReader, shard: int, offset: int, out: memoryview) -> None:
        read(self, shard, offset, out)
        out[7] ^= 1

    monkeypatch.setattr(LinkReader, "read", spoil)
    with pytest.raises(StoreCorruptError, match="the copy of expert"):
        if during == "step":
            rig.tiered(0, *inputs)
        else:
            rig.pair.preload([0], lambda _key: None)
    rig.assert_idle()
    monkeypatch.undo()
    rig.assert_close(rig.tiered(0, *inputs), rig.reference(0, *inputs))


def test_observed_costs_follow_what_was_seen() -> None:
    costs = ObservedCosts(Link(1e9, 0.0), 100e9)
    before = costs.of_layer(1000)
    for _ in range(100):
        costs.saw_cpu(1000, 1.0)
        costs.saw_disk(500, 1.0)
        costs.saw_disk(0, 1.0)
        costs.saw_cpu(0, 1.0)
    after = costs.of_layer(1000)
    assert after.cpu_expert_s == pytest.approx(1.0, rel=1e-2)
    assert after.disk_expert_s == pytest.approx(2.0, rel=1e-2)
    assert after.link_expert_s == before.link_expert_s == pytest.approx(1e-6)
    assert after.gpu_expert_s == pytest.approx(1e-8)
    assert np.isfinite(after.as_array()).all()
