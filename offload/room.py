"""The budget at run time: expert slots give way to what a forward pass needs, and come back after it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

from formats.packed import round_up
from offload.errors import DoesNotFitError
from offload.kv.budget import pass_nbytes
from offload.kv.paging import Paging
from offload.tiers.expert_tier import ExpertTier
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import KV_ROOM_TOKENS, MINIMUM_SLOTS, kv_nbytes


class ForwardPass(NamedTuple):
    """What runs.

    Attributes:
        batch: sequences.
        tokens: new tokens of each.
        past_tokens: tokens of each that are cached already.
        all_logits: whether logits are computed for every token, not only the last.
    """

    batch: int
    tokens: int
    past_tokens: int
    all_logits: bool


class _RoomMade(NamedTuple):
    """For which pass there is room.

    Attributes:
        asked: sequences, new tokens, tokens of each in the cache's buffers, whether all logits.
        cache: that it extends.
        caches: how many are alive.
        slots: for experts.
    """

    asked: tuple[int, int, int, bool]
    cache: weakref.ref[object]
    caches: int
    slots: int


class Room:
    """The memory that a plan has for expert slots, KV caches and activations together.

    Args:
        plan: with the budget.
        spec: of the model.
        tier: the host's, whose slots give way.
        lock: held while the tier changes.
        end_copies: called before it does, with the lock: lets copies out of the tier end.
    """

    def __init__(
        self, plan: Plan, spec: ModelSpec, tier: ExpertTier, lock: threading.RLock, end_copies: Callable[[], object]
    ) -> None:
        self._plan, self._spec, self._tier, self._lock, self._end_copies = plan, spec, tier, lock, end_copies
        self._caches: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._made: _RoomMade | None = None
        self._kv_elsewhere = plan.kv_tier == "vram"

    def make(self, run: ForwardPass, cache: object | None, paging: Paging | None) -> None:
        """Let expert slots go, or take them back, so that the budget holds during a pass.

        Args:
            run: the pass.
            cache: the KV cache that it extends; caches of other sequences that are alive count too.
            paging: of caches in blocks, which are within a bound of their own.

        Raises:
            DoesNotFitError: even with the fewest slots the pass needs more than the budget.
        """
        tokens = run.past_tokens + run.tokens
        asked = run.batch, run.tokens, round_up(tokens, KV_ROOM_TOKENS), run.all_logits
        if self._is_made(asked, cache):
            return
        plan = self._plan
        own = pass_nbytes(
            self._spec,
            paging,
            run.batch,
            run.tokens,
            run.past_tokens,
            all_logits=run.all_logits,
            kv_elsewhere=self._kv_elsewhere,
        )
        with self._lock:
            if cache is not None:
                self._caches[cache] = kv_nbytes(self._spec, run.batch, tokens)
        counted = paging is None and not self._kv_elsewhere
        needed = own + (self._other_caches_nbytes(cache) if counted else 0)
        slots, fewest = self._slots_beside(needed), min(MINIMUM_SLOTS, plan.ram_slots)
        if slots < fewest:
            # The caches of a request that failed may live on in cycles with the frames of its traceback.
            gc.collect()
            needed = own + (self._other_caches_nbytes(cache) if counted else 0)
            slots = self._slots_beside(needed)
        if slots < fewest:
            minimum = plan.ram.dense_nbytes + needed + fewest * plan.slot_nbytes
            raise DoesNotFitError(
                f"{run.batch} x {tokens} tokens, {run.tokens} of them new, need {needed:,} bytes for KV cache "
                f"and activations; the budget of {plan.ram_budget_nbytes:,} bytes does not hold that beside dense "
                f"weights of {plan.ram.dense_nbytes:,} and {fewest} expert slots; load with ram={minimum} or more, or "
                "take a shorter sequence or a smaller batch",
                minimum_ram_bytes=minimum,
            )
        with self._lock:
            if slots != self._tier.table.usable_slots:
                self._end_copies()
                self._tier.resize(slots)
        if cache is not None and paging is None:
            self._made = _RoomMade(asked, weakref.ref(cache), len(self._caches), self._tier.table.usable_slots)

    def _is_made(self, asked: tuple[int, int, int, bool], cache: object | None) -> bool:
        """Whether the last pass that room was made for needed the same, beside the same caches."""
        made = self._made
        return (
            made is not None
            and made.asked == asked
            and made.cache() is cache is not None
            and made.caches == len(self._caches)
            and made.slots == self._tier.table.usable_slots
        )

    def _other_caches_nbytes(self, cache: object | None) -> int:
        with self._lock:
            return sum(nbytes for other, nbytes in self._caches.items() if other is not cache)

    def _slots_beside(self, needed_nbytes: int) -> int:
        """Expert slots that the budget leaves beside dense weights and what a pass needs; at most those planned."""
        plan = self._plan
        reserved = plan.ram.kv_nbytes + plan.ram.activation_nbytes
        room = plan.ram_budget_nbytes - plan.ram.dense_nbytes - max(needed_nbytes, reserved)
        return min(plan.ram_slots, room // plan.slot_nbytes)
