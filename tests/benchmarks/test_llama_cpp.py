from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks.llama_cpp import LlamaBench, LlamaScale

SCALE = LlamaScale(prompts=(32,), new_tokens=4, rounds=2, decodes=2)

_STAND_IN = """#!/usr/bin/env python3
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
for _ in options["-t"].split(","):
    for name in ("-p", "-n"):
        for count in options[name].split(","):
            print(json.dumps({"samples_ts": [float(count)]}), flush=True)
"""


def _tools(directory: Path, program: str) -> Path:
    (directory / "llama-bench").write_text(program)
    (directory / "llama-bench").chmod(0o755)
    return directory


def test_turns_are_the_tests_of_one_process_in_order(tmp_path: Path) -> None:
    with LlamaBench(_tools(tmp_path, _STAND_IN), tmp_path / "model.gguf", SCALE) as bench:
        assert [bench.turn() for _ in SCALE.tasks * SCALE.rounds] == [32, 4, 4, 32, 4, 4]
        with pytest.raises(RuntimeError, match="llama-bench ended with exit code 0"):
            bench.turn()


def test_between_turns_it_is_stopped_and_afterwards_gone(tmp_path: Path) -> None:
    waits = _STAND_IN + "import signal\nsignal.pause()\n"
    with LlamaBench(_tools(tmp_path, waits), tmp_path / "model.gguf", SCALE) as bench:
        bench.turn()
        process = psutil.Process(bench.process_id)
        assert process.status() == psutil.STATUS_STOPPED
    assert not process.is_running()
