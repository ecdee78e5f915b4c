from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from offload.store import ExpertStore, convert
from tests.cli.conftest import Invoke
from tests.store.sources import SeededSource


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "stores"


@pytest.fixture
def store(root: Path) -> ExpertStore:
    return convert(SeededSource(), root)


def damage(store: ExpertStore) -> None:
    location = store.location(0, 0)
    with store.shard_paths[location.shard].open("r+b") as file:
        file.seek(location.offset)
        byte = file.read(1)[0]
        file.seek(location.offset)
        file.write(bytes([byte ^ 1]))


def test_nothing_there(invoke: Invoke, root: Path) -> None:
    assert invoke("store", "ls", "--nvme", root).stdout == f"No stores in {root}.\n"
    assert invoke("store", "verify", "--nvme", root).stdout == f"No stores in {root}.\n"
    report = json.loads(invoke("store", "ls", "--nvme", root, "--json").stdout)
    assert report == {"root": str(root), "stores": [], "total_nbytes": 0}
    assert not root.exists()


def test_the_default_directory(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert json.loads(invoke("store", "ls", "--json").stdout)["root"] == str(tmp_path / "offload")


def test_round_trip(invoke: Invoke, root: Path, store: ExpertStore) -> None:
    key = store.path.name
    listed = invoke("store", "ls", "--nvme", root)
    assert listed.exit_code == 0
    for part in (key, store.name, store.format, "complete", str(root)):
        assert part in listed.stdout
    report = json.loads(invoke("store", "ls", "--nvme", root, "--json").stdout)
    (info,) = report["stores"]
    assert list(info) == ["key", "path", "name", "format", "nbytes", "created_unix", "status", "detail"]
    assert (info["key"], info["nbytes"], info["status"]) == (key, store.nbytes, "complete")
    assert report["total_nbytes"] == store.nbytes

    for arguments in ([], [key]):
        verified = invoke("store", "verify", *arguments, "--nvme", root)
        assert (verified.exit_code, verified.stdout, verified.stderr) == (0, f"{key}: ok\n", "")
    report = json.loads(invoke("store", "verify", "--nvme", root, "--json").stdout)
    assert report["ok"] is True
    assert report["stores"] == [{"key": key, "path": str(store.path), "state": "ok", "problems": []}]

    removed = invoke("store", "rm", key, "--yes", "--nvme", root)
    assert removed.exit_code == 0
    assert f"Removed {key}" in removed.stdout
    assert not store.path.exists()


def test_a_corrupted_shard(invoke: Invoke, root: Path, store: ExpertStore) -> None:
    damage(store)
    key = store.path.name
    assert "complete" in invoke("store", "ls", "--nvme", root).stdout
    result = invoke("store", "verify", "--nvme", root)
    assert result.exit_code == 4
    bundle = f"{store.groups[0].module}.0"
    assert f"{key}: damaged\n  {bundle}: checksum " in result.stdout
    assert f"offload store rm {key}" in result.stderr
    result = invoke("store", "verify", key, "--nvme", root, "--json")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["stores"][0]["state"] == "damaged"
    assert [problem["where"] for problem in report["stores"][0]["problems"]] == [bundle]


def test_a_missing_shard(invoke: Invoke, root: Path, store: ExpertStore) -> None:
    store.shard_paths[0].unlink()
    key = store.path.name
    listed = invoke("store", "ls", "--nvme", root)
    assert listed.exit_code == 0
    assert "corrupt" in listed.stdout
    assert store.shard_paths[0].name in listed.stdout
    result = invoke("store", "verify", "--nvme", root)
    assert result.exit_code == 4
    assert "damaged" in result.stdout
    assert json.loads(invoke("store", "rm", key, "-y", "--nvme", root, "--json").stdout)["removed"] == key
    assert not store.path.exists()


def test_an_incomplete_store(invoke: Invoke, root: Path) -> None:
    key = ".0123456789abcdef-bf16.partial"
    (root / key).mkdir(parents=True)
    listed = invoke("store", "ls", "--nvme", root)
    assert "incomplete" in listed.stdout
    assert "did not end" in listed.stdout
    verified = invoke("store", "verify", "--nvme", root)
    assert verified.exit_code == 0
    assert f"{key}: incomplete" in verified.stdout
    assert invoke("store", "rm", key, "--yes", "--nvme", root).exit_code == 0
    assert not (root / key).exists()


@pytest.mark.parametrize("command", [["verify"], ["rm", "--yes"]])
def test_an_unknown_key(invoke: Invoke, root: Path, store: ExpertStore, command: list[str]) -> None:
    result = invoke("store", *command, "no-such-key", "--nvme", root)
    assert result.exit_code == 2
    assert store.path.name in result.stderr


def test_a_root_that_is_a_file(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for command in (["ls"], ["verify"]):
        assert invoke("store", *command, "--nvme", tmp_path / "file").exit_code == 2


def test_rm_does_not_guess_without_a_terminal(invoke: Invoke, root: Path, store: ExpertStore) -> None:
    result = invoke("store", "rm", store.path.name, "--nvme", root, stdin="y\n")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert store.path.exists()


@pytest.mark.parametrize(("answer", "exit_code", "gone"), [(b"y\n", 0, True), (b"\n", 1, False), (b"n\n", 1, False)])
def test_rm_asks_on_a_terminal(root: Path, store: ExpertStore, answer: bytes, exit_code: int, gone: bool) -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = subprocess.run(
            [sys.executable, "-m", "offload.cli", "store", "rm", store.path.name, "--nvme", root],
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, store.path.exists()) == (exit_code, not gone)
    assert f"Remove {store.path.name}" in done.stderr
    assert "Remove " not in done.stdout


def test_tables_are_not_cut(invoke: Invoke, root: Path) -> None:
    name = "/models/" + "a-very-long-name-" * 8 + "[/x]"
    store = convert(SeededSource(name=name), root)
    listed = invoke("store", "ls", "--nvme", root).stdout
    assert name in listed
    assert store.path.name in listed


def test_progress_is_shown_on_demand(invoke: Invoke, root: Path, store: ExpertStore) -> None:
    result = invoke("store", "verify", "--nvme", root, "--progress")
    assert "verifying" in result.stderr
    assert result.stdout == f"{store.path.name}: ok\n"
