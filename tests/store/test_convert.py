from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from formats.bundle import BundleLayout
from offload.errors import CheckpointChangedError, InvalidArgumentError, StoreCorruptError
from offload.store import ExpertGroup, ExpertStore, conversion_nbytes, convert, files, find, writer
from offload.store.convert import find_store
from offload.store.shards import Shard, chunks, plan_shards
from tests.store.faults import Calls
from tests.store.sources import (
    GROUPS,
    IDENTITY,
    SHARD_NBYTES,
    SeededSource,
    assert_whole,
    experts,
    read_bundle,
)


def converted(root: Path, source: SeededSource | None = None) -> ExpertStore:
    return convert(source or SeededSource(), root, shard_nbytes=SHARD_NBYTES)


def test_a_dense_model_has_an_empty_store_of_which_nothing_is_written(tmp_path: Path) -> None:
    source = SeededSource(groups=())
    for store in (convert(source, tmp_path / "root"), find_store(source, tmp_path / "root")):
        assert store is not None
        assert (store.groups, store.shard_paths, store.nbytes, store.identity) == ((), (), 0, IDENTITY)
    assert not (tmp_path / "root").exists()


class RecordedProgress:
    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def start(self, total_bytes: int, description: str) -> None:
        self.events.append(("start", total_bytes, description))

    def advance(self, nbytes: int) -> None:
        self.events.append(("advance", nbytes))

    def finish(self) -> None:
        self.events.append(("finish",))


def test_every_bundle_is_at_its_location(tmp_path: Path) -> None:
    source = SeededSource()
    store = converted(tmp_path / "new" / "root", source)
    assert len(store.shard_paths) > 1
    for group_index, expert in experts(GROUPS):
        bundle = source.bundle(group_index, expert)
        assert np.array_equal(read_bundle(store, group_index, expert), bundle)
        assert store.checksum(group_index, expert) == xxhash.xxh3_64_intdigest(bundle.data)
        location = store.location(group_index, expert)
        assert location.offset % 4096 == 0
        assert location.nbytes == GROUPS[group_index].layout.nbytes
    assert (store.identity, store.name, store.format) == (IDENTITY, "Org/Tiny-MoE", "bf16")
    assert store.nbytes == sum(path.stat().st_size for path in store.shard_paths)
    assert_whole(store, source)


def test_safetensors_reads_the_shards(tmp_path: Path) -> None:
    source = SeededSource(name="Org/Ti\N{SNOWMAN}ny \udc80")
    found = {}
    for path in converted(tmp_path, source).shard_paths:
        with safe_open(path, "np") as shard:
            assert shard.metadata()["source_identity"] == IDENTITY
            assert shard.metadata()["source_name"] == "Org/Ti\N{SNOWMAN}ny ?"
            for name in shard.keys():  # noqa: SIM118
                assert name not in found
                found[name] = shard.get_tensor(name)
    assert len(found) == len(experts(GROUPS))
    for group_index, expert in experts(GROUPS):
        tensor = found[f"{GROUPS[group_index].module}.{expert}"]
        assert tensor.dtype == np.uint8
        assert np.array_equal(tensor, source.bundle(group_index, expert))


def test_shards_are_bounded_and_never_split_a_bundle(tmp_path: Path) -> None:
    store = convert(SeededSource(), tmp_path, shard_nbytes=10_000)
    largest = max(group.layout.nbytes for group in GROUPS)
    assert all(path.stat().st_size <= largest + 4096 for path in store.shard_paths)


def test_a_direct_read_gives_the_bundle(tmp_path: Path) -> None:
    store = converted(tmp_path)
    location = store.location(1, 2)
    buffer = files.aligned_buffer(location.nbytes)
    try:
        fd = store.open_shard(location.shard, direct=True)
    except OSError as error:
        assert error.errno == errno.EINVAL
        pytest.skip("this file system has no O_DIRECT")
    try:
        assert files.read_all(fd, buffer, location.offset) == location.nbytes
    finally:
        os.close(fd)
    assert np.array_equal(buffer, SeededSource().bundle(1, 2))


@pytest.mark.parametrize("index", [(-1, 0), (3, 0), (0, -1), (0, 3)])
def test_no_such_expert(tmp_path: Path, index: tuple[int, int]) -> None:
    store = converted(tmp_path)
    with pytest.raises(IndexError):
        store.location(*index)
    with pytest.raises(IndexError):
        store.checksum(*index)


def test_a_second_conversion_opens_the_first(tmp_path: Path) -> None:
    first = converted(tmp_path)

    def refuse() -> None:
        raise AssertionError("filled again")

    # The model's name is for people: under another, it is still the same store.
    second = converted(tmp_path, SeededSource(name="/models/renamed", on_fill=refuse))
    assert second.path == first.path
    assert [entry.name for entry in tmp_path.iterdir()] == [first.path.name]


def test_one_root_holds_many_models_and_formats(tmp_path: Path) -> None:
    other = SeededSource(identity="f" * 64)
    half = SeededSource(groups=[ExpertGroup("layers.0.experts", 2, BundleLayout(16, 8, "fp16"))])
    # Another model whose identity begins alike: found by the whole of it only.
    alike = SeededSource(identity=IDENTITY[:16] + "0" * 48, name="alike")
    stores = [converted(tmp_path, source) for source in (SeededSource(), other, half, alike)]
    assert len({store.path for store in stores}) == 4
    for store, source in zip(stores, (SeededSource(), other, half, alike), strict=True):
        again = find(tmp_path, store.identity, store.format)
        assert again is not None
        assert_whole(again, source)
    assert find(tmp_path, "e" * 64, "bf16") is None
    assert find(tmp_path, IDENTITY, "fp32") is None
    assert find(tmp_path / "missing", IDENTITY, "bf16") is None


def test_a_store_of_other_layers_is_not_taken(tmp_path: Path) -> None:
    converted(tmp_path)
    with pytest.raises(StoreCorruptError, match=r"other layers.*offload store rm"):
        converted(tmp_path, SeededSource(groups=GROUPS[:2]))


def test_a_source_that_changed_leaves_nothing(tmp_path: Path) -> None:
    def changed() -> None:
        raise CheckpointChangedError("model.safetensors was replaced")

    with pytest.raises(CheckpointChangedError):
        converted(tmp_path, SeededSource(on_check=changed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [CheckpointChangedError("x"), ValueError("x"), KeyboardInterrupt()])
def test_a_source_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    filled = []

    def fail() -> None:
        filled.append(1)
        if len(filled) == 6:
            raise error

    with pytest.raises(type(error)):
        converted(tmp_path, SeededSource(on_fill=fail))
    assert list(tmp_path.iterdir()) == []
    assert_whole(converted(tmp_path), SeededSource())


def test_progress_adds_up(tmp_path: Path) -> None:
    progress = RecordedProgress()
    convert(SeededSource(), tmp_path, progress=progress, shard_nbytes=SHARD_NBYTES)
    total = sum(group.count * group.layout.nbytes for group in GROUPS)
    assert progress.events[0] == ("start", total, "converting Org/Tiny-MoE")
    assert progress.events[-1] == ("finish",)
    assert sum(event[1] for event in progress.events[1:-1]) == total


@pytest.mark.parametrize(
    ("memory_nbytes", "chunk_nbytes"),
    [(None, writer.CHUNK_NBYTES), (1 << 40, writer.CHUNK_NBYTES), (400 << 20, (88 << 20) // 3), (0, 6 << 20)],
)
def test_experts_pass_through_the_stated_memory(tmp_path: Path, memory_nbytes: int | None, chunk_nbytes: int) -> None:
    spans = set()

    class Watched(SeededSource):
        def fill_bundle(self, group_index: int, expert: int, out: np.ndarray) -> None:
            assert out.ctypes.data % 4096 == 0
            spans.add((out.ctypes.data, out.ctypes.data + out.nbytes))
            super().fill_bundle(group_index, expert, out)

    source = Watched(groups=[ExpertGroup("experts", 40, BundleLayout(1024, 512, "fp32"))])
    assert source.groups[0].layout.nbytes == 6 << 20
    fitting = writer.fitting_chunk_nbytes(source.groups, memory_nbytes)
    assert 0 <= chunk_nbytes - fitting < writer.BUFFERS
    convert(source, tmp_path, memory_nbytes=memory_nbytes)
    used = sum(stop - start for start, stop in spans)
    assert used <= writer.BUFFERS * chunk_nbytes
    assert used <= conversion_nbytes(source.groups)
    if memory_nbytes:
        assert (
            conversion_nbytes(source.groups, writer.fitting_chunk_nbytes(source.groups, memory_nbytes)) <= memory_nbytes
        )


@pytest.mark.parametrize("refused", ["open", "write"])
def test_without_direct_io_pages_are_written_out_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    dropped = []
    direct: set[int] = set()
    open_file, pwrite, drop_cache = files.open_file, files.pwrite, files.drop_cache

    def open_without_direct(path: Path, flags: int) -> int:
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = open_file(path, flags)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def write_without_direct(fd: int, data: memoryview | bytes, offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(files, "open_file", open_without_direct)
    monkeypatch.setattr(files, "pwrite", write_without_direct)
    monkeypatch.setattr(files, "drop_cache", lambda fd, *span: (dropped.append(fd), drop_cache(fd, *span)))
    monkeypatch.setattr(writer, "DIRTY_NBYTES", 50_000)
    store = converted(tmp_path)
    assert len(dropped) > len(store.shard_paths)
    assert_whole(store, SeededSource())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = files.pwrite

    def short(fd: int, data: memoryview | bytes, offset: int) -> int:
        # Ends inside a block where there is more than one.
        return pwrite(fd, data[:4096] if len(data) > 4096 else data, offset) + (1000 if len(data) > 5096 else 0)

    monkeypatch.setattr(files, "pwrite", short)
    assert_whole(converted(tmp_path), SeededSource())


def test_each_step_is_durable_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(lambda *_: None).install(monkeypatch)
    store = converted(tmp_path)
    log = [(name, target.name) for name, target in calls.log]
    partial = next(target.name for name, target in calls.log if name == "mkdir")
    manifest_renamed = log.index(("rename", "manifest.json.tmp"))
    published = log.index(("rename", partial))
    for path in store.shard_paths:
        last_write = max(index for index, entry in enumerate(log) if entry == ("pwrite", path.name))
        assert last_write < log.index(("fsync", path.name)) < manifest_renamed
    assert log.index(("fsync", "manifest.json.tmp")) < manifest_renamed < log.index(("fsync", partial)) < published
    assert published < log.index(("fsync", tmp_path.name))


@pytest.mark.parametrize(
    "source",
    [
        SeededSource(groups=[ExpertGroup("experts", 0, BundleLayout(16, 8, "bf16"))]),
        SeededSource(groups=[GROUPS[0], GROUPS[0]]),
        SeededSource(groups=[GROUPS[0], ExpertGroup("other", 1, BundleLayout(16, 8, "fp32"))]),
        SeededSource(identity="../../../../../etc"),
        SeededSource(identity="abc"),
    ],
    ids=["no-experts", "same-module", "two-formats", "path", "short-identity"],
)
def test_sources_that_cannot_be_stored(tmp_path: Path, source: SeededSource) -> None:
    with pytest.raises(InvalidArgumentError):
        convert(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../../x", "/", "a" * 300, "-rf", ".hidden", "a\0b\nc", "модель"])
def test_no_model_name_leads_out_of_the_root(tmp_path: Path, name: str) -> None:
    store = converted(tmp_path / "root", SeededSource(groups=GROUPS[:1], name=name))
    assert store.path.parent == tmp_path / "root"
    assert not store.path.name.startswith((".", "-"))
    assert store.name == name
    assert find(tmp_path / "root", IDENTITY, "bf16") is not None


@pytest.mark.parametrize("below", ["", "below"])
def test_a_root_that_is_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(InvalidArgumentError, match="file"):
        converted(tmp_path / "file" / below)


def test_a_root_that_is_no_path() -> None:
    with pytest.raises(InvalidArgumentError):
        converted(Path("a\0b"))


layouts = st.builds(
    BundleLayout,
    hidden=st.integers(1, 300),
    intermediate=st.integers(1, 300),
    format=st.just("fp32"),
    has_gate=st.booleans(),
    has_bias=st.booleans(),
)
group_lists = st.lists(st.tuples(st.integers(1, 9), layouts), min_size=1, max_size=5).map(
    lambda drawn: [ExpertGroup(f"layers.{i}.experts", count, layout) for i, (count, layout) in enumerate(drawn)]
)


def planned(groups: list[ExpertGroup], shard_nbytes: int) -> tuple[Shard, ...]:
    return plan_shards(groups, {"name": "\N{SNOWMAN}"}, shard_nbytes)


@settings(max_examples=100, deadline=None)
@given(groups=group_lists, shard_nbytes=st.integers(1, 3_000_000), chunk_nbytes=st.integers(1, 3_000_000))
def test_plans_hold_each_expert_once_without_gaps(
    groups: list[ExpertGroup], shard_nbytes: int, chunk_nbytes: int
) -> None:
    shards = planned(groups, shard_nbytes)
    bundles = [bundle for shard in shards for bundle in shard.bundles]
    assert [(bundle.group, bundle.expert) for bundle in bundles] == experts(groups)
    for shard in shards:
        end = 0
        for bundle in shard.bundles:
            assert bundle.offset == end
            assert bundle.offset % 4096 == 0
            end += bundle.nbytes
        assert end <= shard_nbytes or len(shard.bundles) == 1
        assert shard.nbytes == len(shard.header) + end
        assert len(shard.header) % 4096 == 0
        assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8
    pieces = list(chunks(shards, chunk_nbytes))
    assert [bundle for piece in pieces for bundle in piece.bundles] == bundles
    for piece in pieces:
        assert piece.offset == len(shards[piece.shard].header) + piece.bundles[0].offset
        assert piece.nbytes <= chunk_nbytes or len(piece.bundles) == 1


@settings(max_examples=12, deadline=None)
@given(groups=group_lists, shard_nbytes=st.integers(1, 3_000_000))
def test_any_layout_survives_the_roundtrip(
    tmp_path_factory: pytest.TempPathFactory, groups: list[ExpertGroup], shard_nbytes: int
) -> None:
    source = SeededSource(groups=groups)
    assert_whole(convert(source, tmp_path_factory.mktemp("root"), shard_nbytes=shard_nbytes), source)
