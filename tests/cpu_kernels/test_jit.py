"""What this package compiles depends on its sources and on those of the packed formats."""

from __future__ import annotations

from cpu_kernels.compiling.compiler import prepare
from cpu_kernels.compiling.kept import source_stamp
from cpu_kernels.weighted_sum_kernel import run_add_weighted


def test_a_kernel_is_kept_under_the_sources_that_it_is_made_of() -> None:
    prepare(run_add_weighted)
    assert run_add_weighted._cache._cache_file._stamp == source_stamp("cpu_kernels", "formats")
    assert source_stamp("cpu_kernels", "formats") != source_stamp("cpu_kernels")
