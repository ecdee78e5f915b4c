"""The controller keeps what takes less time, whatever noise says, and looks again."""

from __future__ import annotations

import math
import random

import pytest

from prefetch.controller import Controller


def feed(controller: Controller, passes: int, on_s: float, off_s: float, noise: float = 0.0, seed: int = 0) -> int:
    """Passes that ran with prefetching."""
    chance = random.Random(seed)
    ran = 0
    for _ in range(passes):
        ran += controller.on
        seconds = on_s if controller.on else off_s
        controller.note_pass(seconds * (1 + noise * chance.random()))
    return ran


@pytest.mark.parametrize(("on_s", "off_s", "wins"), [(1.0, 1.5, True), (1.5, 1.0, False), (1.0, 1.0, False)])
def test_what_takes_less_time_is_kept(on_s: float, off_s: float, wins: bool) -> None:
    for seed in range(20):
        controller = Controller(epoch=4, rounds=3, most_rounds=3, kept=50, margin=0.01)
        feed(controller, 24, on_s, off_s, noise=0.0 if on_s == off_s else 0.3, seed=seed)
        assert controller.trials == 1
        assert not controller.trying
        assert controller.on is wins
        assert controller.seconds(on=True) > 0


@pytest.mark.parametrize(("on_s", "wins"), [(0.9, True), (1.1, False)])
def test_a_machine_that_drifts_hides_nothing(on_s: float, wins: bool) -> None:
    for seed in range(20):
        chance, speed, controller = random.Random(seed), 1.0, Controller()
        while controller.trying:
            # Up to 1.5 times as fast or slow within tens of passes, and a fifth of noise.
            speed = min(max(speed * chance.uniform(0.93, 1.07), 0.67), 1.5)
            controller.note_pass(speed * chance.uniform(0.9, 1.1) * (on_s if controller.on else 1.0))
        assert controller.on is wins, seed


def test_one_slow_epoch_decides_nothing() -> None:
    controller = Controller(epoch=2, rounds=3, most_rounds=3, kept=10)
    for index in range(12):
        # The second pass of the first epoch meets something else that uses the disk.
        controller.note_pass(100.0 if index == 1 else (1.0 if controller.on else 1.5))
    assert controller.on


def test_it_looks_again_and_changes_its_mind() -> None:
    controller = Controller(epoch=2, rounds=1, most_rounds=1, kept=10)
    assert feed(controller, 4, 1.0, 2.0) == 2
    assert controller.on
    assert feed(controller, 10, 1.0, 2.0) == 10
    assert controller.trying
    feed(controller, 4, 2.0, 1.0)
    assert (controller.trials, controller.on) == (2, False)


def test_the_first_pass_of_an_epoch_is_not_counted() -> None:
    controller = Controller(epoch=3, rounds=1, most_rounds=1, kept=5)
    for seconds in (50.0, 1.0, 3.0, 50.0, 4.0, 6.0):
        controller.note_pass(seconds)
    assert (controller.seconds(on=True), controller.seconds(on=False)) == (2.0, 5.0)
    with pytest.raises(ValueError, match="epoch=1"):
        Controller(epoch=1)
    with pytest.raises(ValueError, match="most_rounds=3"):
        Controller(rounds=4, most_rounds=3)


LONGEST = 44 * 2 * 4 + 33 * 24
"""Passes of a trial that is never sure."""


def test_what_leads_runs_while_a_trial_is_not_sure() -> None:
    """Pairs that are told apart by chance only: both ways have their turns, the leader all else."""
    chance, controller, ran = random.Random(1), Controller(rounds=4, most_rounds=8, between=10), []
    while controller.trying:
        ran.append(controller.on)
        controller.note_pass((0.97 if controller.on else 1.0) * math.exp(chance.gauss(0.0, 0.5)))
    pairs = len(controller._epochs[True])
    assert 4 < pairs <= 8
    assert len(ran) == pairs * 8 + (pairs - 4) * 10
    for start in range(32, len(ran), 18):
        assert len(set(ran[start : start + 10])) == 1, "the leader runs between pairs"
        assert sum(ran[start + 10 : start + 18]) == 4, "then each way has its turn"


def noisy_trial(on_s: float, seed: int) -> tuple[bool, int]:
    """What a trial decides, and after how many passes, where epochs of one way scatter by 0.13 and by much at times."""
    chance, controller, passes = random.Random(seed), Controller(), 0
    while controller.trying:
        if passes % 4 == 0:
            noise = chance.gauss(0.0, 0.13) * (3.0 if chance.random() < 0.05 else 1.0)
        controller.note_pass((on_s if controller.on else 1.0) * math.exp(noise))
        passes += 1
    return controller.on, passes


@pytest.mark.parametrize(("on_s", "wins"), [(0.94, True), (1.05, False)])
def test_a_small_difference_is_found_in_much_noise(on_s: float, wins: bool) -> None:
    found = [noisy_trial(on_s, seed) for seed in range(60)]
    assert sum(on is wins for on, _ in found) >= 54
    assert max(passes for _, passes in found) <= LONGEST


def test_a_large_difference_is_found_soon() -> None:
    found = [noisy_trial(0.7, seed) for seed in range(20)]
    assert all(on for on, _ in found)
    assert max(passes for _, passes in found) == 11 * 2 * 4


def test_no_difference_is_decided_in_the_end() -> None:
    for seed in range(20):
        assert noisy_trial(0.99, seed)[1] <= LONGEST
