"""Run in a process of its own: how much memory a load and a generation take beyond the interpreter's own.

Arguments: checkpoint, store root, budget in bytes, context, prompt tokens, a tiny checkpoint to warm up with.
Prints JSON: peak_nbytes, plan_peak_nbytes, footprint_nbytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

import offload


def _status_nbytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _generate(directory: str, root: str, ram: int, context: int, tokens: int) -> offload.Plan:
    model = offload.load(directory, ram=ram, nvme=root, context=context)
    ids = torch.randint(2, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    model.generate(ids, max_new_tokens=context - tokens, do_sample=False, eos_token_id=None)
    model.offload.check()
    plan = model.offload.plan
    model.offload.close()
    return plan


def main() -> None:
    directory, root, ram, context, tokens, warm_up = sys.argv[1:]
    # Kernels, thread pools and transformers' lazy imports belong to the interpreter's footprint, and what compiling
    # them takes; the cache policy's come with experts that are missing.
    whole = _generate(warm_up, root, 1 << 30, 24, 12)
    _generate(warm_up, root, whole.peak_ram_nbytes - whole.ram.slot_nbytes // 2, 24, 12)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    footprint = _status_nbytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    plan = _generate(directory, root, int(ram), int(context), int(tokens))
    print(
        json.dumps(
            {
                "peak_nbytes": _status_nbytes("VmHWM") - footprint,
                "plan_peak_nbytes": plan.peak_ram_nbytes,
                "footprint_nbytes": footprint,
            }
        )
    )


if __name__ == "__main__":
    main()
