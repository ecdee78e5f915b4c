"""Sketches of keys: what they keep of keys, and what they make of odd ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from formats.key_sketch import SketchLayout, sketch_keys, sketched_keys

Float32 = npt.NDArray[np.float32]


def _keys(tokens: int, width: int) -> Float32:
    generator = np.random.default_rng(0)
    return (generator.normal(size=(tokens, width)) + 3 * generator.normal(size=width)).astype(np.float32)


@pytest.mark.parametrize(("width", "tokens"), [(64, 64), (128, 64), (48, 16), (576, 128)])
def test_a_sketch_holds_the_side_of_every_number_and_the_best_factors(width: int, tokens: int) -> None:
    layout, keys = SketchLayout(width, tokens), _keys(tokens, width)
    sketch = sketch_keys(keys, layout)
    assert sketch.shape == (layout.nbytes,) and layout.nbytes % 64 == 0
    middles, deviations, factors = sketched_keys(sketch, layout)
    bound = np.abs(keys).max(0) / 128
    assert (np.abs(middles - (keys.min(0) + keys.max(0)) / 2) <= bound).all()
    assert ((deviations > 0) == (keys > middles)).all()
    assert (np.abs(np.abs(deviations) - np.abs(keys - middles).mean(0)) <= bound).all()
    away = keys - middles
    best = (away * deviations).sum(1) / (deviations**2).sum(1)
    assert np.abs(factors / best - 1).max() <= 2**-8
    assert np.square(away - factors[:, None] * deviations).mean() / np.square(away).mean() < 0.5


def test_channels_that_are_alike_have_no_spread() -> None:
    layout, keys = SketchLayout(64, 64), _keys(64, 64)
    keys[:, 5] = 0.75
    middles, deviations, factors = sketched_keys(sketch_keys(keys, layout), layout)
    assert middles[5] == 0.75 and (deviations[:, 5] == 0).all() and np.isfinite(factors).all()
    keys[:] = -2
    middles, deviations, factors = sketched_keys(sketch_keys(keys, layout), layout)
    assert (middles == -2).all() and (deviations == 0).all() and (factors == 0).all()
