"""oneDNN's compiled matrix products, of which torch's CPU operators keep many more than are needed again.

Where the CPU multiplies 16-bit numbers, oneDNN compiles a product for every combination of sizes and keeps 1024 of
them. Attention that materialises its scores ("eager") has new sizes with every prompt, and with every token that no
kernel of ours attends for (padding, `fused=` without attention): a process grows by some 0.7 MB with each. With few of
them kept it is 0.4 MB, which stays in heaps and other caches of the library's own.
"""

from __future__ import annotations

import os

KEPT = 32
"""Products that are kept: a pass of a model has about ten."""

KEPT_NBYTES = KEPT * 768 << 10
"""What they take."""

_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")


def keep_few_products() -> bool:
    """Have oneDNN keep few, in this process; False where the user said how many.

    It looks once, before its first product in the process: one that has multiplied 16-bit numbers before keeps 1024.
    """
    if any(name in os.environ for name in _VARIABLES):
        return False
    os.environ[_VARIABLES[0]] = str(KEPT)
    return True
