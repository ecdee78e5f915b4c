"""Run Mixture-of-Experts transformers models that do not fit in memory.

>>> import offload
>>> model = offload.load("path-or-hub-id", ram="4GiB", nvme="~/.cache/offload")  # doctest: +SKIP

Importing this package imports neither torch nor numba; they come with the first model.
"""

from offload import errors
from offload.loading import load, plan
from placement.plan import Plan

__all__ = ["Plan", "errors", "load", "plan"]
