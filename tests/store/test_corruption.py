"""No damaged or forged store is opened, or its damage is what `verify` finds."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from offload.errors import StoreCorruptError
from offload.store import ExpertStore, convert, find, list_stores, remove_store, verify
from tests.store.sources import GROUPS, IDENTITY, SHARD_NBYTES, SeededSource, experts


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return convert(SeededSource(), tmp_path, shard_nbytes=SHARD_NBYTES)


def assert_refused(store: ExpertStore, match: str = "") -> None:
    with pytest.raises(StoreCorruptError, match=f"(?s){match}.*offload store rm {store.path.name}"):
        ExpertStore.open(store.path)


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_a_flipped_bit_anywhere_in_the_manifest(store: ExpertStore) -> None:
    path = store.path / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert_refused(store)


def test_a_manifest_cut_anywhere(store: ExpertStore) -> None:
    path = store.path / "manifest.json"
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(store)
    path.write_bytes(whole + b"\n")
    assert_refused(store)


def forge(store: ExpertStore, body: bytes) -> None:
    checksum = xxhash.xxh3_64_hexdigest(body).encode()
    (store.path / "manifest.json").write_bytes(b'{"checksum":"' + checksum + b'","manifest":' + body + b"}\n")


def changed(store: ExpertStore, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((store.path / "manifest.json").read_bytes())["manifest"]
    change(fields)
    forge(store, json.dumps(fields).encode())


def set_bundle(group: int, expert: int, index: int, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["groups"][group]["bundles"][expert].__setitem__(index, value)


def set_shard(index: int, name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["shards"][index].__setitem__(name, value)


def set_group(index: int, name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["groups"][index].__setitem__(name, value)


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "newer-version": lambda fields: fields.update(version=2),
    "version-true": lambda fields: fields.update(version=True),
    "no-identity": lambda fields: fields.pop("identity"),
    "name-number": lambda fields: fields.update(name=1),
    "created-infinite": lambda fields: fields.update(created_unix=float("inf")),
    "shards-object": lambda fields: fields.update(shards={}),
    "no-shards": lambda fields: fields.update(shards=[]),
    "no-groups": lambda fields: fields.update(groups=[]),
    "other-format": lambda fields: fields.update(format="fp32"),
    "group-list": lambda fields: fields.update(groups=[[]]),
    "traversal": set_shard(0, "file", "../../../../etc/passwd"),
    "absolute": set_shard(0, "file", "/etc/passwd"),
    "traversal-behind-a-name": set_shard(0, "file", "experts-00001-of-00001.safetensors/../../x"),
    "newline-behind-a-name": set_shard(0, "file", "experts-00001-of-00005.safetensors\n"),
    "same-shard-twice": lambda fields: fields["shards"][1].update(fields["shards"][0]),
    "negative-size": set_shard(0, "nbytes", -1),
    "larger-size": set_shard(0, "nbytes", 10**9),
    "unaligned": set_bundle(0, 0, 1, 4097),
    "in-the-header": set_bundle(0, 0, 1, 0),
    "negative-offset": set_bundle(0, 0, 1, -4096),
    "outside": set_bundle(0, 0, 1, 2**40),
    "huge-offset": set_bundle(0, 0, 1, 4096 * 10**40),
    "overlap": lambda fields: fields["groups"][0]["bundles"].__setitem__(1, fields["groups"][0]["bundles"][0]),
    "shard-beyond": set_bundle(0, 0, 0, 99),
    "shard-negative": set_bundle(0, 0, 0, -1),
    "shard-false": set_bundle(0, 0, 0, False),
    "offset-float": set_bundle(0, 0, 1, 4096.0),
    "checksum-short": set_bundle(0, 0, 2, "12"),
    "checksum-negative": set_bundle(0, 0, 2, "-000000000000001"),
    "checksum-number": set_bundle(0, 0, 2, 12),
    "one-expert-less": lambda fields: fields["groups"][1]["bundles"].pop(),
    "count-zero": lambda fields: (fields["groups"][1].update(count=0), fields["groups"][1]["bundles"].clear()),
    "bundle-size": set_group(1, "bundle_nbytes", 4096),
    "unknown-element-format": lambda fields: fields["groups"][0]["layout"].update(format="int3"),
    "unknown-layout-field": lambda fields: fields["groups"][0]["layout"].update(tiles=8),
    "missing-layout-field": lambda fields: fields["groups"][0]["layout"].pop("hidden"),
    "text-for-a-dimension": lambda fields: fields["groups"][0]["layout"].update(hidden="16"),
    "huge-dimension": lambda fields: fields["groups"][0]["layout"].update(hidden=1e308),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_with_a_right_checksum(store: ExpertStore, name: str) -> None:
    changed(store, FORGERIES[name])
    assert_refused(store)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"{}", b"[]", b"null", b"\xff\xfe", b"", b"1" * 5000])
def test_a_body_that_is_no_manifest(store: ExpertStore, body: bytes) -> None:
    forge(store, body)
    assert_refused(store)


def test_the_version_is_named(store: ExpertStore) -> None:
    changed(store, lambda fields: fields.update(version=2, groups="something new"))
    assert_refused(store, "format version 2, and this version of moe-offload reads 1")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def extended(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4096)


REPLACEMENTS = {change.__name__: change for change in (fifo, directory, loop, cut, extended, Path.unlink)}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_shard_that_is_not_the_file_it_was(store: ExpertStore, name: str) -> None:
    REPLACEMENTS[name](store.shard_paths[1])
    assert_refused(store, store.shard_paths[1].name)
    # A store that was opened before sees it too.
    with pytest.raises(StoreCorruptError):
        store.open_shard(1, direct=False)
    (problem,) = verify(store)
    assert (problem.path, problem.tensor) == (store.shard_paths[1], "")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", sorted({*REPLACEMENTS} - {"extended"}))
def test_a_manifest_that_is_not_a_file(store: ExpertStore, name: str) -> None:
    REPLACEMENTS[name](store.path / "manifest.json")
    assert_refused(store, "manifest.json")


def test_a_flipped_bit_in_any_bundle_is_found(store: ExpertStore) -> None:
    choose = random.Random(0)
    for group_index, expert in experts(GROUPS):
        shard, offset, nbytes = store.location(group_index, expert)
        for position in (0, nbytes - 1, choose.randrange(nbytes)):
            bit = choose.randrange(8)
            flip(store.shard_paths[shard], offset + position, bit)
            (problem,) = verify(ExpertStore.open(store.path))
            assert problem.path == store.shard_paths[shard]
            assert problem.tensor == f"{GROUPS[group_index].module}.{expert}"
            assert "checksum" in problem.message
            flip(store.shard_paths[shard], offset + position, bit)
    assert verify(store) == []


def test_a_flipped_bit_in_a_header_is_found(store: ExpertStore) -> None:
    for position in (0, 7, 8, 100, 4095):
        flip(store.shard_paths[0], position, 3)
        (problem,) = verify(store)
        assert (problem.path, problem.tensor) == (store.shard_paths[0], "")
        flip(store.shard_paths[0], position, 3)


def test_a_damaged_store_is_found_listed_and_removed_but_not_replaced(store: ExpertStore) -> None:
    root = store.path.parent
    flip(store.path / "manifest.json", 100, 0)
    for call in (lambda: find(root, IDENTITY, "bf16"), lambda: convert(SeededSource(), root)):
        with pytest.raises(StoreCorruptError, match=f"offload store rm {store.path.name}"):
            call()
    (info,) = list_stores(root)
    assert (info.status, info.key) == ("corrupt", store.path.name)
    assert "checksum" in info.detail
    remove_store(root, info.key)
    assert convert(SeededSource(), root).path == store.path
