from __future__ import annotations

import json
from pathlib import Path

from offload.store import list_stores
from tests.cli.conftest import PROMPT, Invoke


def test_a_store_is_written_once_and_used_by_run(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    result = invoke("quantize", checkpoint, "--quant", "int4", "--nvme", tmp_path, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    (store,) = list_stores(tmp_path)
    assert json.loads(result.stdout) == {"path": str(store.path), "format": "int4", "nbytes": store.nbytes}
    written = (store.path / "manifest.json").stat().st_mtime_ns
    again = invoke("quantize", checkpoint, "--quant", "int4", "--nvme", tmp_path)
    assert "experts in int4" in again.stdout
    arguments = ["--quant", "int4", "--nvme", tmp_path, "--ram", "200MiB"]
    assert "store there:" in " ".join(invoke("plan", checkpoint, *arguments).stdout.split())
    run = invoke("run", checkpoint, "-p", PROMPT, "-n", 3, *arguments, "--json")
    assert run.exit_code == 0, run.stderr
    plan = json.loads(run.stdout)["plan"]
    assert (plan["format"], plan["dense_format"], plan["head_format"]) == ("int4", "int4", "int8")
    assert [info.key for info in list_stores(tmp_path)] == [store.key]
    assert (store.path / "manifest.json").stat().st_mtime_ns == written
    assert invoke("store", "verify", "--nvme", tmp_path).exit_code == 0


def test_parts_have_formats_of_their_own(invoke: Invoke, checkpoint: Path) -> None:
    result = invoke("plan", checkpoint, "--ram", "200MiB", "--quant", "experts=mxfp4,dense=int8", "--json")
    plan = json.loads(result.stdout)
    assert (plan["format"], plan["dense_format"], plan["head_format"]) == ("mxfp4", "int8", "fp32")


def test_bad_formats_are_usage_errors(invoke: Invoke, checkpoint: Path) -> None:
    for command in ("plan", "quantize"):
        result = invoke(command, checkpoint, "--quant", "int3")
        assert result.exit_code == 2
        assert "int8, int4, mxfp4, fp8_e4m3" in " ".join(result.stderr.split())
    assert invoke("quantize", checkpoint).exit_code == 2


def test_a_store_is_not_for_a_budget_so_its_format_is_named(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    result = invoke("quantize", checkpoint, "--quant", "experts=auto", "--nvme", tmp_path)
    assert result.exit_code == 2
    assert "offload plan MODEL --quant auto" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
