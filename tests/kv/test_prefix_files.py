"""Saved prefixes: found again, never half there, refused when damaged or foreign."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from offload.errors import DoesNotFitError, StorageError, StoreCorruptError
from offload.kv.prefix_files import PrefixFiles
from offload.store import files

SIZES = [4096, 8192, 4096]
MIB = 1 << 20
Bytes = npt.NDArray[np.uint8]


def _tokens(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 50_000, count)


def _blocks(seed: int = 0) -> list[Bytes]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in SIZES]


def _read(prefixes: PrefixFiles, tokens: npt.NDArray[np.int64]) -> tuple[dict[str, Any], list[Bytes]]:
    with prefixes.open(tokens) as saved:
        assert saved.tokens == len(tokens)
        return saved.description, [block.copy() for block in saved.blocks]


def test_a_saved_prefix_is_found_by_its_tokens_and_its_model(tmp_path: Path) -> None:
    prefixes = PrefixFiles(tmp_path / "new", MIB, "model, bf16")
    tokens, blocks = _tokens(300), _blocks()
    assert prefixes.longest(tokens) == 0
    prefixes.save(tokens[:100], {"layers": 2}, SIZES, _blocks(1))
    prefixes.save(tokens[:200], {"layers": 3}, SIZES, blocks)
    assert prefixes.longest(tokens) == 200
    assert prefixes.longest(tokens[:199]) == 100
    assert prefixes.longest(_tokens(300, 1)) == 0
    assert PrefixFiles(tmp_path / "new", MIB, "model, fp32").longest(tokens) == 0
    description, found = _read(prefixes, tokens[:200])
    assert description == {"layers": 3}
    assert all(np.array_equal(one, other) for one, other in zip(found, blocks, strict=True))
    assert not list(tmp_path.glob("**/*.unfinished")) and not list(tmp_path.glob("**/*.lock"))


def test_any_damaged_byte_is_noticed(tmp_path: Path) -> None:
    prefixes = PrefixFiles(tmp_path, MIB, "model")
    tokens = _tokens(50)
    path = prefixes.save(tokens, {}, SIZES, _blocks())
    sound = path.read_bytes()
    for place in (0, 9, 17, 40, 4096 + 8, 8192, 8192 + 5000, len(sound) - 1):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(StoreCorruptError, match=path.name):
            _read(prefixes, tokens)
    for length in (0, 20, 4096, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(StoreCorruptError, match=path.name):
            _read(prefixes, tokens)
    path.write_bytes(sound)
    _read(prefixes, tokens)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    prefixes, others = PrefixFiles(tmp_path, MIB, "model"), PrefixFiles(tmp_path, MIB, "other model")
    tokens, different = _tokens(50), _tokens(50, 1)
    path = prefixes.save(tokens, {}, SIZES, _blocks())
    foreign = others.save(tokens, {}, SIZES, _blocks())
    target = prefixes.save(different, {}, SIZES, _blocks())
    shutil.copyfile(foreign, target)
    with pytest.raises(StoreCorruptError, match="expected identity 'model', found 'other model'"):
        _read(prefixes, different)
    shutil.copyfile(path, target)
    with pytest.raises(StoreCorruptError, match="its tokens are not those"):
        _read(prefixes, different)
    prefixes.remove(different)
    assert prefixes.longest(different) == 0
    with pytest.raises(StorageError, match="No such file"):
        _read(prefixes, different)


def test_the_prefixes_used_longest_ago_go(tmp_path: Path) -> None:
    probe = PrefixFiles(tmp_path / "probe", MIB, "model").save(_tokens(10), {}, SIZES, _blocks())
    size = probe.stat().st_size
    prefixes = PrefixFiles(tmp_path, 3 * size + 70_000, "model")
    all_tokens = [_tokens(10, seed) for seed in range(5)]
    for seed, tokens in enumerate(all_tokens[:3]):
        path = prefixes.save(tokens, {}, SIZES, _blocks(seed))
        os.utime(path, ns=(seed, seed))
    _read(prefixes, all_tokens[0])
    prefixes.save(all_tokens[3], {}, SIZES, _blocks(3))
    assert [prefixes.longest(tokens) for tokens in all_tokens] == [10, 0, 10, 10, 0]
    with pytest.raises(DoesNotFitError, match="prefix_cache allows"):
        PrefixFiles(tmp_path, size, "model").save(all_tokens[4], {}, SIZES, _blocks())


def _die(call: str, killed_at: int) -> None:
    """Have this process end at the so manieth call, without a word."""
    original, count = getattr(files, call), itertools.count(1)

    def dying(*arguments: Any) -> Any:
        if next(count) == killed_at:
            os._exit(1)
        return original(*arguments)

    setattr(files, call, dying)


def _save_and_die(prefixes: PrefixFiles, tokens: npt.NDArray[np.int64], call: str, killed_at: int) -> int:
    """Save in a child that ends at the so manieth call, without a word; its exit code."""
    pid = os.fork()
    if pid == 0:
        _die(call, killed_at)
        prefixes.save(tokens, {}, SIZES, _blocks())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_a_writer_that_fails_or_dies_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes, tokens = PrefixFiles(tmp_path, MIB, "model"), _tokens(50)
    original = getattr(files, call)

    def failing(*arguments: Any) -> Any:
        # The lock writes its holder's number.
        if call == "pwrite" and len(arguments[1]) < 100:
            return original(*arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, call, failing)
        with pytest.raises(StorageError, match="free space"):
            prefixes.save(tokens, {}, SIZES, _blocks())
    assert prefixes.longest(tokens) == 0

    for killed_at in range(1, 7):
        status = _save_and_die(prefixes, tokens, call, killed_at)
        if prefixes.longest(tokens):
            _, found = _read(prefixes, tokens)
            assert all(np.array_equal(one, other) for one, other in zip(found, _blocks(), strict=True))
            assert status == 0 or call == "fsync"
            break
    prefixes.save(_tokens(20), {}, SIZES, _blocks())
    assert not list(tmp_path.glob("*.unfinished"))


def _save_all(directory: Path, seeds: list[int]) -> None:
    prefixes = PrefixFiles(directory, MIB, "model")
    for seed in seeds:
        prefixes.save(_tokens(40, seed), {"seed": seed}, SIZES, _blocks(seed))


def _save_all_and_die(directory: Path, seeds: list[int], call: str, killed_at: int) -> None:
    """As `_save_all`, in a child that ends without a word at the so manieth call."""
    _die(call, killed_at)
    _save_all(directory, seeds)


@pytest.mark.parametrize("seed", range(4))
def test_writers_at_once_some_of_which_die(tmp_path: Path, seed: int) -> None:
    """Whatever a reader finds meanwhile and afterwards is whole, and who lives writes what the dead did not."""
    context, generator = multiprocessing.get_context("fork"), np.random.default_rng(seed)
    seeds = list(range(8))
    workers = [
        context.Process(
            target=_save_all_and_die,
            args=(
                tmp_path, generator.permutation(seeds).tolist(), ["pwrite", "fsync", "rename"][i % 3],
                int(generator.integers(1, 9)) if i else 1 << 30,
            ),
        )
        for i in range(5)
    ]  # fmt: skip
    for worker in workers:
        worker.start()
    prefixes = PrefixFiles(tmp_path, MIB, "model")
    while any(worker.is_alive() for worker in workers):
        _assert_whole(prefixes, seeds)
    for worker in workers:
        worker.join()
    assert workers[0].exitcode == 0
    assert any(worker.exitcode == 1 for worker in workers[1:])
    assert _assert_whole(prefixes, seeds) == len(seeds)
    prefixes.save(_tokens(20, 99), {}, SIZES, _blocks())
    assert not list(tmp_path.glob("*.unfinished"))


def _assert_whole(prefixes: PrefixFiles, seeds: list[int]) -> int:
    """How many of the prefixes are there, each with all of its bytes."""
    found = 0
    for seed in seeds:
        if prefixes.longest(_tokens(40, seed)):
            description, blocks = _read(prefixes, _tokens(40, seed))
            assert description == {"seed": seed}
            assert all(np.array_equal(one, other) for one, other in zip(blocks, _blocks(seed), strict=True))
            found += 1
    return found


def test_writers_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    seeds = list(range(12))
    workers = [context.Process(target=_save_all, args=(tmp_path, np.roll(seeds, 3 * i).tolist())) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    prefixes = PrefixFiles(tmp_path, MIB, "model")
    for seed in seeds:
        description, found = _read(prefixes, _tokens(40, seed))
        assert description == {"seed": seed}
        assert all(np.array_equal(one, other) for one, other in zip(found, _blocks(seed), strict=True))
    assert len(list(tmp_path.iterdir())) == len(seeds)
