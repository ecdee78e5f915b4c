"""Routers' scores reach policies after the step that they belong to, and no other."""

from __future__ import annotations

import threading

import numpy as np

from offload.observer import StepObserver
from offload.scores import RouterScores
from prefetch.policies.base import Scores
from prefetch.policies.geometry import Geometry
from prefetch.policies.mrs import MrsPolicy

GEOMETRY = Geometry((4, 3))


class Told(MrsPolicy):
    def __init__(self) -> None:
        super().__init__(GEOMETRY)
        self.heard: list[tuple[int, list[float]]] = []

    def on_scores(self, first_key: int, scores: Scores) -> None:
        self.heard.append((first_key, scores.tolist()))


def some(value: float, count: int) -> np.ndarray:
    return np.full(count, value, np.float32)


def test_all_policies_are_told_once_of_the_layer_that_came() -> None:
    policies = [Told(), Told()]
    scores = RouterScores(policies, [0, 4])
    scores.tell(0)
    scores.note(0, some(0.25, 4))
    scores.tell(0)
    scores.tell(0)
    # A step that failed leaves scores that are another layer's.
    scores.note(0, some(0.5, 4))
    scores.tell(1)
    scores.note(0, some(0.5, 4))
    scores.note(1, some(0.75, 3))
    scores.tell(1)
    for policy in policies:
        assert policy.heard == [(0, [0.25] * 4), (4, [0.75] * 3)]


def test_threads_do_not_take_each_others() -> None:
    policy = Told()
    scores = RouterScores([policy], [0, 4])
    scores.note(0, some(0.25, 4))

    def other() -> None:
        scores.tell(0)
        scores.note(0, some(0.5, 4))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    scores.tell(0)
    assert policy.heard == [(0, [0.25] * 4)]


def test_an_observer_tells_when_the_step_is_done() -> None:
    policy, observer = Told(), StepObserver()
    assert not observer.is_asked
    observer.scores = RouterScores([policy], [0, 4])
    assert observer.is_asked
    observer.scores.note(1, some(0.5, 3))
    observer.begin(1)
    assert not policy.heard
    observer.finished(np.array([[0, 2]]))
    assert policy.heard == [(4, [0.5] * 3)]
