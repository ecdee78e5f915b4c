"""How close is close: one assertion for the whole project, with a tolerance for each element format."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# Half a unit in the last place of one, which is what one rounding to the format may cost.
ROUNDING = {"bf16": 2.0**-9, "fp16": 2.0**-12, "fp32": 2.0**-25}
# Errors of a sum relative to its largest result: roundings of its inputs that fall to the other side average out.
RELATIVE_TO_LARGEST = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20}


def assert_close(actual: Any, expected: Any, format: str) -> None:
    """Fail unless |actual - expected| <= RELATIVE_TO_LARGEST[format] * max |expected|, element by element.

    Shapes must agree; a NaN or an infinity agrees with itself alone. Takes numpy arrays and torch tensors.
    """
    actual, expected = (
        value.detach().to(torch.float64).cpu().numpy()
        if isinstance(value, torch.Tensor)
        else np.asarray(value, np.float64)
        for value in (actual, expected)
    )
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    if not finite.any():
        return
    largest = np.abs(expected[finite]).max()
    error = np.abs(actual[finite] - expected[finite])
    worst = error.max()
    limit = RELATIVE_TO_LARGEST[format] * largest
    assert worst <= limit, f"error {worst:.3g} above {limit:.3g} ({format}, largest expected value {largest:.3g})"
