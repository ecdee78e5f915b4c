"""Reading experts ahead: what a predictor foresees, as far as it gains more than it costs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from offload.copy_ahead import CopyAhead
from offload.foreseen import checked
from offload.tiers.expert_tier import ExpertTier
from offload.tiers.transfer import Urgency
from prefetch.controller import Controller
from prefetch.foresight import Foresight
from prefetch.policies.forecast import ForecastPolicy
from prefetch.policies.geometry import Geometry
from prefetch.predictors.base import LayerPredictor
from prefetch.predictors.predictor import Predictor

Floats = npt.NDArray[np.floating]

Ask = Callable[[], npt.NDArray[np.float32] | None]
"""Gives logits, float32 [1 + next layers, most of their experts]: of a router and of those of the next layers, of the
same hidden state, if they can tell. Rows are longer than layers of fewer experts."""

LEAST_PROBABILITY = 0.5
"""What is less probable is not read ahead."""

SURE_PROBABILITY = 0.8
"""What is less probable is read ahead only while the disk would do nothing else, which is as far as one layer goes: the
next one predicts better, and a read in vain takes the disk from one that is needed."""

CANCEL_BELOW = 0.1
"""A read ahead that has been begun ends when a newer prediction says less."""

_SHARE_OF_SLOTS = 8
"""Reads ahead on their way hold at most one slot in so many."""

_SMOOTHING = 0.1


class Prefetcher:
    """Foresees layers of a decoded token and reads their experts from disk while earlier layers compute.

    Called under the runtime's step lock, but for `note_router`, which the model's thread calls between steps and which
    takes the lock itself. Wrong predictions cost reads, never results.
    """

    def __init__(
        self,
        tier: ExpertTier,
        predictor: LayerPredictor,
        top_k: Sequence[int],
        controller: Controller | None,
        lock: threading.RLock,
        copies: CopyAhead | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            tier: gets the experts.
            predictor: says what will be needed; made for the tier's keys.
            top_k: experts of a token in each layer.
            controller: switches reading ahead on and off; None for always on.
            lock: the runtime's step lock.
            copies: takes experts of the next layer on to an accelerator; None without one.
        """
        self.tier = tier
        self.copies = copies
        self.predictor = predictor
        self.controller = controller
        self.geometry: Geometry = predictor.geometry
        self._top_k = tuple(top_k)
        self._first_keys = self.geometry.first_keys.tolist()
        self._lock = lock
        self._foreseen: dict[int, tuple[int, npt.NDArray[np.float64]]] = {}
        self._logits: dict[int, Floats] = {}
        self._asked: tuple[int, npt.NDArray[np.int64], Ask] | None = None
        self._foresight: Foresight | None = None
        if (
            copies is None
            and isinstance(tier.policy, ForecastPolicy)
            and isinstance(predictor, Predictor)
            and Foresight.takes(tier.policy, predictor)
        ):
            self._foresight = Foresight(
                tier.policy, predictor, self._top_k,
                least=LEAST_PROBABILITY, sure=SURE_PROBABILITY, cancel_below=CANCEL_BELOW,
            )  # fmt: skip
        self._tiers = [tier] if copies is None else [tier, copies.tiers.above]
        self._layer_s = 0.0
        self._read_s = 0.0
        self._last = (tier.counters.loads, tier.engine.reading_s)

    @property
    def on(self) -> bool:
        """Whether it foresees and reads now: the controller wants it, and not everything is here."""
        wanted = self.controller is None or self.controller.on
        return wanted and self._has_work

    @property
    def _has_work(self) -> bool:
        return self.copies is not None or self.tier.table.usable_slots < self.geometry.total

    def note_router(self, layer: int, active: npt.NDArray[np.int64], ask: Ask) -> None:
        """A decoded token's router ran. Later routers are asked once the layer's own reads are under way.

        Args:
            layer: its layer.
            active: int64, the experts that it chose.
            ask: asks the routers of the next layers about the same hidden state.
        """
        with self._lock:
            # What the layer turned out not to need must not hold up what it does.
            self._cancel_other_than(layer, active)
            self._asked = (layer, active, ask)

    def read_ahead(self, layer: int) -> None:
        """Layer `layer` has all that it can have: cancel what is not wanted any more, read what gains most."""
        if not self.on:
            return
        asked, self._asked = self._asked, None
        said = asked[2]() if asked is not None and asked[0] == layer else None
        if asked is not None and said is not None:
            self._logits[layer] = said[0, : self.geometry.counts[layer]]
        # What has arrived may be evicted.
        self.tier.settle_arrived()
        if self._foresight is None:
            self._read_by_policy(layer, said, None if asked is None else asked[1])
        elif asked is not None and said is not None and len(said) > 1:
            self._read_by_foresight(self._foresight, layer, said, asked[1])

    @property
    def _room(self) -> int:
        """How many reads ahead may be on their way."""
        return max(1, self.tier.table.usable_slots // _SHARE_OF_SLOTS)

    # --- in one compiled call ----------------------------------------------------------------------------------

    def _read_by_foresight(
        self, foresight: Foresight, layer: int, said: npt.NDArray[np.float32], active: npt.NDArray[np.int64]
    ) -> None:
        tier = self.tier
        for predicts in (True, False):
            reading = tier.reading_ahead
            choice = foresight.choose(
                layer, said, active, predicts=predicts, pinned=tier.table.pinned, reading=reading,
                waiting=tier.waiting_ahead if predicts else (), urgent=tier.loading - len(reading),
                room=self._room - len(reading), free=tier.table.free_slots, read_s=self._read_s,
                layer_s=self._layer_s,
            )  # fmt: skip
            if not choice.unlikely:
                break
            tier.cancel_ahead(choice.unlikely)
        if choice.keys:
            tier.start_loads(choice.keys, Urgency.SOON, choice.victims)

    # --- by whatever policy and predictor ----------------------------------------------------------------------

    def foresee(self, layer: int, ahead: Sequence[Floats], active: npt.NDArray[np.int64]) -> None:
        """Predict the next layers, and tell policies.

        Args:
            layer: at which the token is.
            ahead: what the routers of the next layers say of the same hidden state, each [experts].
            active: int64, the experts that its router chose.

        Raises:
            PartError: a predictor of a user's own gave no probabilities.
        """
        following = slice(layer + 1, layer + 1 + len(ahead))
        expected = [self.tier.policy.expected(first) for first in self._first_keys[following]]
        said = self.predictor.predict_next(layer, ahead, active, self._top_k[following], expected)
        foreseen = checked(self.predictor, layer, said, self.geometry.counts[following])
        for distance, probabilities in enumerate(foreseen, start=1):
            target = layer + distance
            self._foreseen[target] = (distance, probabilities)
            for tier in self._tiers:
                tier.policy.on_forecast(self._first_keys[target], probabilities)

    def _read_by_policy(
        self, layer: int, said: npt.NDArray[np.float32] | None, active: npt.NDArray[np.int64] | None
    ) -> None:
        if said is not None and len(said) > 1 and active is not None:
            counts = self.geometry.counts[layer + 1 :]
            self.foresee(layer, [line[:count] for line, count in zip(said[1:], counts, strict=False)], active)
        if not self._foreseen:
            return
        if self.copies is not None and layer + 1 in self._foreseen:
            self.copies.copy(layer + 1, self._foreseen[layer + 1][1], self._layer_s)
        self._cancel_unlikely()
        reading = len(self.tier.reading_ahead)
        urgent, room = self.tier.loading - reading, self._room - reading
        chosen: list[tuple[float, int]] = []
        for probability, distance, key in self._candidates(layer):
            before = reading + len(chosen)
            # It would not even be begun when its layer comes, or not before the next layer chooses.
            late = before * self._read_s > distance * self._layer_s > 0
            waits = (before + urgent) * self._read_s > self._layer_s
            if len(chosen) < room and not late and (probability >= SURE_PROBABILITY or not waits):
                chosen.append((probability, key))
        if chosen:
            keys, victims = self._that_gain(chosen)
            self.tier.start_loads(keys, Urgency.SOON, victims)

    def _candidates(self, layer: int) -> list[tuple[float, int, int]]:
        """(probability, layers ahead, key) of what is not here, the most probable of the nearest layer first."""
        found = []
        for target, (_, probabilities) in self._foreseen.items():
            if target <= layer:
                continue
            first = self._first_keys[target]
            for expert in (probabilities >= LEAST_PROBABILITY).nonzero()[0].tolist():
                if all(tier.table.slot_of(first + expert) is None for tier in self._tiers):
                    found.append((float(probabilities[expert]), target - layer, first + expert))
        found.sort(key=lambda one: (-one[0] / (one[1] + 1), one[2]))
        return found

    def _that_gain(self, chosen: Sequence[tuple[float, int]]) -> tuple[list[int], list[int]]:
        """Keys of those, given with their probabilities, that gain more than the absence of their victims loses; those
        victims.
        """
        policy, table = self.tier.policy, self.tier.table
        found = [key for _, key in chosen[: table.free_slots]]
        rest = chosen[table.free_slots :]
        victims = policy.victims(table.pinned, len(rest)) if rest else []
        gone = 0
        for probability, key in rest:
            if gone == len(victims):
                break
            gain, loss = policy.worth(key), policy.worth(victims[gone])
            if probability >= 0.5 if gain is None or loss is None else gain > loss:
                found.append(key)
                gone += 1
        return found, victims[:gone]

    def _cancel_unlikely(self) -> None:
        """What is not expected any more, and what is not sure and has not been begun, which may be chosen again."""
        unlikely, waiting = [], self.tier.waiting_ahead
        for key in self.tier.reading_ahead:
            layer = int(self.geometry.layer_of[key])
            _, probabilities = self._foreseen.get(layer, (0, None))
            below = SURE_PROBABILITY if key in waiting else CANCEL_BELOW
            if probabilities is None or probabilities[key - self._first_keys[layer]] < below:
                unlikely.append(key)
        if unlikely:
            self.tier.cancel_ahead(unlikely)

    def observe(self, layer: int, experts: npt.NDArray[np.int64]) -> None:
        """The layer is computed; it needed `experts` (int64 ids) for one decoded token."""
        self.predictor.observe(layer, experts, self._logits.pop(layer, None))
        self._foreseen.pop(layer, None)
        if self.copies is not None:
            self.copies.end_layer(layer)

    def _cancel_other_than(self, layer: int, active: npt.NDArray[np.int64]) -> None:
        """End reads ahead of experts of `layer` that it does not need."""
        first, end = self._first_keys[layer], self._first_keys[layer + 1]
        ahead = [key for key in self.tier.reading_ahead if first <= key < end]
        if ahead:
            needed = set((first + active).tolist())
            self.tier.cancel_ahead([key for key in ahead if key not in needed])

    def note_pass(self, seconds: float) -> None:
        """A decoded token took so long: for the controller, and for what can arrive in time."""
        if self.controller is not None and self._has_work:
            self.controller.note_pass(seconds)
        self._layer_s += _SMOOTHING * (seconds / self.geometry.layers - self._layer_s)
        loads, reading_s = self.tier.counters.loads, self.tier.engine.reading_s
        loaded, read_s = loads - self._last[0], reading_s - self._last[1]
        self._last = loads, reading_s
        # Counters begin again where statistics do.
        if loaded > 0:
            self._read_s += _SMOOTHING * (read_s / loaded - self._read_s)

    def forget_pass(self) -> None:
        """A pass ended or failed somewhere: what it foresaw is of no use."""
        self._asked = None
        self._foreseen.clear()
        self._logits.clear()
