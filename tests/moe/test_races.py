"""Two tiers and a link under every order of steps, reads and copies ahead, cancels, evictions, faults and interrupts.

Nothing runs beside the test: `ScheduledEngine` takes the turns of reader threads, by a chance that hypothesis seeds.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from offload.devices.base import ExpertBatch
from offload.devices.host import HostDevice
from offload.errors import StorageError, StoreCorruptError
from offload.moe import accumulate
from offload.moe.layer import ExpertsLayer
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.transfer import Urgency
from prefetch.policies.geometry import Geometry
from prefetch.policies.named import make_policy
from prefetch.scheduler.base import StepScheduler
from prefetch.scheduler.earliest_completion import EarliestCompletion
from prefetch.scheduler.static import StaticOrder
from tests.moe.rig import Rig
from tests.moe.tiered_rig import COPY_ALL, COPY_NONE, COPY_SOME, FixedCosts, InTurn, TieredRig
from tests.tiers.readers import MemoryReader
from tests.tiers.scheduled_direct_engine import FileReader, ScheduledDirectEngine
from tests.tiers.scheduled_engine import ScheduledEngine

COUNT, LAYERS, TOP_K = 6, 2, 3
EXPERTS = COUNT * LAYERS
# Sets of experts as bits of one number, which is quicker to draw than lists.
KEYS = st.integers(0, (1 << EXPERTS) - 1).map(lambda bits: [key for key in range(EXPERTS) if bits >> key & 1])
MOST_COLLECTS = 500
"""A step that asks more often than that what has arrived asks forever."""


class WatchedDevice(HostDevice):
    """Looks at the bytes of what it computes; the arithmetic is one product, for the kernels have tests of their own.

    Attributes:
        computed: keys, in the order in which they were computed.
    """

    def __init__(self, rig: Rig) -> None:
        nbytes = rig.layout.nbytes
        bundles = rig.reader.shard.reshape(-1, nbytes)
        self._nbytes = nbytes
        self._keys = {xxhash.xxh3_64_intdigest(bundle): key for key, bundle in enumerate(bundles)}
        self.computed: list[int] = []

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        for index, address in enumerate(batch.addresses.tolist()):
            key = self._keys.get(xxhash.xxh3_64_intdigest(ctypes.string_at(address, self._nbytes)))
            assert key is not None, "a torn expert is computed"
            self.computed.append(key)
            pairs = slice(int(batch.offsets[index]), int(batch.offsets[index + 1]))
            out[torch.from_numpy(batch.rows[pairs])] = hidden[torch.from_numpy(batch.tokens[pairs])] * (key + 0.3)


@cache
def expected(layer: int, tokens: int, seed: int, ordered: bool) -> torch.Tensor:
    """What a rig of one tier gives, with everything in it and no policy at work."""
    rig = Rig(slots=EXPERTS, count=COUNT, layers=LAYERS, threads=1)
    rig.device = WatchedDevice(rig)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate, "kept_nbytes", lambda **_: -1 if ordered else 1 << 40)
        out = rig.step(layer, *rig.inputs(tokens, TOP_K, seed=seed))
    rig.close()
    return out


class Ahead:
    """A step's watch: reads and copies ahead once the step's own are under way."""

    def __init__(self, rig: TieredRig, reads: list[int], copies: list[int], prefill: bool) -> None:
        self.rig, self.reads, self.copies, self.prefill = rig, reads, copies, prefill

    def loads_started(self) -> None:
        for key in self.copies:
            self.rig.pair.copy_ahead(key)
        for key in self.reads:
            if self.rig.pair.above.table.slot_of(key) is None:
                self.rig.tier.start_loads([key], Urgency.SOON)


def scheduled(reader: Any, *, chance: random.Random, **options: Any) -> Any:
    """The engine of a reader: of what has a descriptor, the compiled queue."""
    make: Any = ScheduledDirectEngine if isinstance(reader, FileReader) else ScheduledEngine
    return make(reader, chance=chance, **options)


class RaceMachine(RuleBasedStateMachine):
    """What a runtime does to its tiers."""

    reader = MemoryReader

    @initialize(
        above=st.integers(1, 6),
        slots=st.integers(2, 6),
        threads=st.integers(1, 3),
        policy=st.sampled_from(["lru", "forecast", "arc", "mrs"]),
        seed=st.integers(0, 1 << 32),
    )
    def start(self, above: int, slots: int, threads: int, policy: str, seed: int) -> None:
        geometry = Geometry.uniform(LAYERS, COUNT)
        self.rig = TieredRig(
            above=above, slots=slots, costs=COPY_SOME, threads=threads, count=COUNT, layers=LAYERS,
            engine=partial(scheduled, chance=random.Random(seed)), policy=partial(make_policy, policy, geometry),
            reader=self.reader,
        )  # fmt: skip
        self.device = WatchedDevice(self.rig)
        self.rig.accelerator._host = self.rig.accelerated.host = self.device
        self.slots = slots
        self.broken: set[int] = set()
        self.flipped: set[int] = set()
        self.torn_copies = False
        self.rig.before_read = self._before_read
        self.rig.reader.after_read = self._after_read
        link_read = self.rig.link.read
        self.rig.link.read = partial(self._copy, link_read)  # type: ignore[method-assign]
        for tier in self.tiers:
            tier.collect = self._counted(tier.collect)  # type: ignore[method-assign]
        self.collects = 0

    @property
    def tiers(self) -> tuple[ExpertTier, ExpertTier]:
        return self.rig.pair.above, self.rig.tier

    @property
    def engines(self) -> list[Any]:
        return [tier.engine for tier in self.tiers]

    def _before_read(self, key: int) -> None:
        if key in self.broken:
            raise StorageError("no such sector")

    def _after_read(self, offset: int, out: memoryview) -> None:
        if offset // self.rig.layout.nbytes in self.flipped:
            out[-1] ^= 1

    def _copy(self, read: Callable[..., None], shard: int, offset: int, out: memoryview) -> None:
        read(shard, offset, out)
        if self.torn_copies:
            out[0] ^= 1

    def _counted(self, collect: Callable[[Any], list[int]]) -> Callable[[Any], list[int]]:
        def counted(keys: Any) -> list[int]:
            self.collects += 1
            assert self.collects <= MOST_COLLECTS, "a step that never ends"
            return collect(keys)

        return counted

    @rule(
        layer=st.integers(0, LAYERS - 1), tokens=st.integers(1, 3), inputs=st.integers(0, 7), reads=KEYS, copies=KEYS,
        costs=st.sampled_from([COPY_ALL, COPY_NONE, COPY_SOME]), ordered=st.booleans(), prefill=st.booleans(),
        scheduler=st.sampled_from([EarliestCompletion(), InTurn(), StaticOrder()]),
        interrupt=st.one_of(st.none(), st.tuples(st.integers(0, 1), st.integers(0, 12))),
    )  # fmt: skip
    def step(
        self, layer: int, tokens: int, inputs: int, reads: list[int], copies: list[int], costs: Any, ordered: bool,
        prefill: bool, scheduler: StepScheduler, interrupt: tuple[int, int] | None,
    ) -> None:  # fmt: skip
        rig = self.rig
        rig.accelerated.costs, rig.accelerated.scheduler = FixedCosts(costs), scheduler
        self.collects = 0
        if interrupt is not None:
            engine = self.engines[interrupt[0]]
            engine.interrupt_at = engine.turns + interrupt[1]
        hidden = rig.inputs(tokens, TOP_K, seed=inputs)
        needed = {layer * COUNT + expert for expert in hidden[1].reshape(-1).tolist()}
        self.device.computed.clear()
        watch = Ahead(rig, reads, copies, prefill)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(accumulate, "kept_nbytes", lambda **_: -1 if ordered else 1 << 40)
                out = rig.tiered(layer, *hidden, watch=watch)
        except (StorageError, StoreCorruptError):
            assert self.torn_copies or needed & (self.broken | self.flipped)
        except KeyboardInterrupt:
            assert interrupt is not None
        else:
            assert torch.equal(out, expected(layer, tokens, inputs, ordered)), "not what one tier gives"
            assert sorted(self.device.computed) == sorted(needed), "lost or doubled"
        for engine in self.engines:
            engine.interrupt_at = None

    @rule(keys=KEYS)
    def read_ahead(self, keys: list[int]) -> None:
        self.rig.tier.start_loads(keys, Urgency.SOON)

    @rule(keys=KEYS)
    def copy_ahead(self, keys: list[int]) -> None:
        for key in keys:
            self.rig.pair.copy_ahead(key)

    @rule(keys=KEYS, tier=st.integers(0, 1))
    def change_of_mind(self, keys: list[int], tier: int) -> None:
        self.tiers[tier].cancel_ahead(keys)

    @rule(slots=st.integers(1, 6))
    def resize(self, slots: int) -> None:
        """As `Runtime.make_room`."""
        self.rig.pair.end_copies()
        self.rig.tier.resize(slots)
        assert self.rig.tier.table.usable_slots == min(slots, self.slots)

    @rule(turns=st.integers(1, 30))
    def time_passes(self, turns: int) -> None:
        for engine in self.engines:
            engine.some_turns(turns)

    @rule(broken=st.integers(-3, EXPERTS - 1), flipped=st.integers(-3, EXPERTS - 1), torn=st.booleans())
    def weather(self, broken: int, flipped: int, torn: bool) -> None:
        # What is on its way arrives in the weather that it left in.
        for tier in self.tiers:
            tier.engine.wait_all(list(tier._tickets.values()))
        self.broken, self.flipped = {broken}, {flipped}
        self.torn_copies = torn and broken < 0

    @invariant()
    def whole(self) -> None:
        self.rig.pair.check()
        for tier in self.tiers:
            counters = tier.counters
            settled = counters.ahead_used + counters.ahead_late + counters.ahead_wasted
            assert counters.ahead_issued == settled + len(tier._ahead), "a read ahead was lost or counted twice"

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.broken, self.flipped, self.torn_copies = set(), set(), False
        for tier in self.tiers:
            tier.engine.wait_all(list(tier._tickets.values()))
        for layer in range(LAYERS):
            self.step(layer, 3, 0, [], [], COPY_SOME, False, False, EarliestCompletion(), None)
        self.rig.pair.end_copies()
        self.rig.assert_idle()
        self.rig.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of a few numbers by several threads take longer than all else here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TestRaces = RaceMachine.TestCase
TestRaces.settings = settings(
    max_examples=1000, stateful_step_count=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class DirectRaceMachine(RaceMachine):
    """The same with the compiled queue below."""

    reader = FileReader


TestDirectRaces = DirectRaceMachine.TestCase
TestDirectRaces.settings = settings(TestRaces.settings, max_examples=500)


def test_the_schedule_is_the_seeds() -> None:
    """The same seed gives the same turns, so that a failure can be run again."""

    def run(seed: int) -> list[tuple[int, int]]:
        rig = TieredRig(
            above=2, slots=3, costs=COPY_SOME, engine=partial(ScheduledEngine, chance=random.Random(seed))
        )  # fmt: skip
        for layer in (0, 1, 0):
            rig.tiered(layer, *rig.inputs(3, 3, seed=layer))
        calls = list(rig.reader.calls)
        rig.close()
        return calls

    assert run(1) == run(1)
    assert run(1) != run(2)
