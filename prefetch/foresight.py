"""What reading ahead decides at a layer, in one compiled call, for the policy and the predictor that it knows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiling.compiler import direct
from prefetch import foresight_kernel as kernel
from prefetch.packing import int64s
from prefetch.policies.base import CachePolicy
from prefetch.policies.forecast import ForecastPolicy
from prefetch.predictors.predictor import Predictor


class Choice(NamedTuple):
    """What to do now.

    Attributes:
        unlikely: keys that are to be read no longer. Where there are any, nothing else was chosen.
        keys: to be read, in this order.
        victims: to be evicted for them once no slot is free, in this order.
    """

    unlikely: tuple[int, ...]
    keys: tuple[int, ...]
    victims: tuple[int, ...]


class Foresight:
    """Predicts and chooses as the policy's and the predictor's own methods do when they are asked one by one."""

    @staticmethod
    def takes(policy: CachePolicy, predictor: object) -> bool:
        """Whether they are those of this package, with no method replaced."""
        return type(policy) is ForecastPolicy and type(predictor) is Predictor

    def __init__(
        self,
        policy: ForecastPolicy,
        predictor: Predictor,
        top_k: Sequence[int],
        *,
        least: float,
        sure: float,
        cancel_below: float,
    ) -> None:
        """Decide for a tier.

        Args:
            policy: of the tier.
            predictor: of the same geometry.
            top_k: experts of a token in each layer.
            least: what is less probable is not read.
            sure: what is less probable does not wait for others beyond the layer's time.
            cancel_below: what is less probable is not read on.

        Raises:
            ValueError: a policy or a predictor that `takes` does not.
        """
        if not self.takes(policy, predictor):
            raise ValueError(f"{type(policy).__name__} and {type(predictor).__name__} decide in Python")
        self._policy, self._predictor_tables = policy, predictor.tables(top_k)
        layers, total = policy.geometry.layers, policy.geometry.total
        self._layers, self._depth = layers, predictor.depth
        self._told: Any = np.zeros(kernel.TOLD + 4 * total + layers, np.int64)
        self._found: Any = np.zeros(kernel.FOUND + 2 * total, np.int64)
        self._limits = np.array([least, sure, cancel_below, 0.0, 0.0])
        self._foresee = direct(kernel.foresee)

    def choose(
        self,
        layer: int,
        said: npt.NDArray[np.float32],
        active: npt.NDArray[np.int64],
        *,
        predicts: bool,
        pinned: Collection[int],
        reading: Collection[int],
        waiting: Collection[int],
        urgent: int,
        room: int,
        free: int,
        read_s: float,
        layer_s: float,
    ) -> Choice:
        """Predict the next layers if asked to, tell the policy, and choose.

        Args:
            layer: at which the token is.
            said: float32 [1 + next layers, most experts], what routers say of its hidden state, its own the first.
            active: int64, the experts that its router chose.
            predicts: False where it was predicted and what was unlikely has been ended.
            pinned: keys that must not be evicted.
            reading: keys that are being read ahead.
            waiting: of them, those of which nothing has been read yet; of use where it predicts.
            urgent: reads on their way that are needed now.
            room: how many more may be.
            free: slots that nobody has.
            read_s: seconds of a read; 0 where that is not known, as of the next.
            layer_s: seconds of a layer.
        """
        moved, changed = self._policy.take_news()
        ahead = min(len(said) - 1, self._depth, self._layers - 1 - layer)
        asked = [-1 - key if key in waiting else key for key in reading] if predicts else ()
        numbers: Any = (
            len(moved), len(changed), len(pinned), len(asked), layer, ahead, predicts, len(reading), urgent,
            max(room, 0), free,
        )  # fmt: skip
        count = kernel.TOLD + len(moved) + len(changed) + len(pinned) + len(asked)
        if count > len(self._told):
            self._told = np.zeros(2 * count, np.int64)
        int64s(count).pack_into(self._told, 0, *numbers, *moved, *changed, *pinned, *asked)
        self._limits[kernel.READ_S], self._limits[kernel.LAYER_S] = read_s, layer_s
        self._foresee(
            self._told, self._limits, said, active, self._found, *self._predictor_tables, *self._policy.tables
        )
        unlikely, chosen, victims = int64s(kernel.FOUND).unpack_from(self._found)
        found = int64s(unlikely + chosen + victims).unpack_from(self._found, 8 * kernel.FOUND)
        return Choice(found[:unlikely], found[unlikely : unlikely + chosen], found[unlikely + chosen :])
