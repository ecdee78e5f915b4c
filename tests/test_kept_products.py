"""A process keeps few of torch's compiled products, unless the user said how many."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cpu_kernels.wide_linear import multiplies_natively
from offload.kept_products import KEPT_NBYTES

_VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_GROWTH = """
import gc, resource, sys
import torch
from offload.kept_products import keep_few_products

assert keep_few_products() == (sys.argv[1] == "few")

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def multiply(first, end):
    for length in range(first, end):
        torch.ones(4, 16, 64, dtype=torch.bfloat16) @ torch.ones(4, 64, length, dtype=torch.bfloat16)

multiply(17, 80)
before = resident()
multiply(80, 280)
print(resident() - before)
"""


def _growth_nbytes(kept: str) -> int:
    """By how much a process grows that multiplies matrices of 200 sizes."""
    environment = {_VARIABLE: "1024"} if kept == "many" else {}
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, kept], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not multiplies_natively(torch.bfloat16), reason="torch compiles no products of 16 bits here")
def test_a_process_grows_less_with_every_size() -> None:
    few, many = _growth_nbytes("few"), _growth_nbytes("many")
    assert few < many - KEPT_NBYTES // 2


def test_what_the_user_chose_stays() -> None:
    code = f"from offload.kept_products import *; print(keep_few_products(), os.environ['{_VARIABLE}'])"
    command = [sys.executable, "-c", f"import os; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={_VARIABLE: "7"})
    assert done.stdout.split() == ["False", "7"]
