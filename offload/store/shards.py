"""Which bundle goes where: shards of bounded size, each a valid safetensors file whose data starts at a block.

    header length u64 | JSON header, padded with spaces | bundle | bundle | ...

A bundle is a U8 tensor `<module>.<expert>`. Bundles lie in the order of groups and experts, without gaps, so every
one starts at a multiple of 4 KiB. Pure: nothing here touches a disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from formats.bundle import BUNDLE_ALIGNMENT_BYTES
from formats.packed import round_up
from offload.errors import InvalidArgumentError
from offload.store.source import ExpertGroup

SHARD_NBYTES = 4 * 1024**3


class Bundle(NamedTuple):
    """One expert in a shard; `offset` is in bytes from the start of the shard's data, after the header."""

    group: int
    expert: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """The bundles of one shard, contiguous from offset 0 of its data, and its header."""

    header: bytes
    bundles: tuple[Bundle, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        last = self.bundles[-1]
        return len(self.header) + last.offset + last.nbytes


class Chunk(NamedTuple):
    """Neighbouring bundles of one shard that are written at once; `offset` is in bytes from the start of the file."""

    shard: int
    offset: int
    bundles: tuple[Bundle, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the bundles together."""
        return sum(bundle.nbytes for bundle in self.bundles)


def tensor_name(group: ExpertGroup, expert: int) -> str:
    """The name of an expert's bundle in its shard."""
    return f"{group.module}.{expert}"


def check_groups(groups: Sequence[ExpertGroup]) -> None:
    """Raise InvalidArgumentError unless there are experts, of one element format, in modules that differ."""
    if not groups or any(group.count < 1 for group in groups):
        raise InvalidArgumentError("a store needs at least one MoE layer, and one expert in each")
    formats = sorted({group.layout.format for group in groups})
    if len(formats) > 1:
        raise InvalidArgumentError(f"a store holds experts of one element format, not of {', '.join(formats)}")
    if len({group.module for group in groups}) < len(groups):
        raise InvalidArgumentError("two MoE layers of the model have the same module path")


def plan_shards(groups: Sequence[ExpertGroup], metadata: dict[str, str], shard_nbytes: int) -> tuple[Shard, ...]:
    """Lay the experts of all groups out.

    Args:
        groups: as `check_groups` wants them.
        metadata: the `__metadata__` of every shard.
        shard_nbytes: the most bytes of bundles in a shard; a larger bundle has a shard of its own.
    """
    shards: list[list[Bundle]] = [[]]
    offset = 0
    for index, group in enumerate(groups):
        nbytes = group.layout.nbytes
        for expert in range(group.count):
            if shards[-1] and offset + nbytes > shard_nbytes:
                shards.append([])
                offset = 0
            shards[-1].append(Bundle(index, expert, offset, nbytes))
            offset += nbytes
    return tuple(Shard(shard_header(groups, bundles, metadata), tuple(bundles)) for bundles in shards)


def shard_header(groups: Sequence[ExpertGroup], bundles: Sequence[Bundle], metadata: dict[str, str]) -> bytes:
    """The bytes before a shard's data; their number is a multiple of 4 KiB."""
    entries: dict[str, object] = {"__metadata__": metadata}
    for bundle in bundles:
        entries[tensor_name(groups[bundle.group], bundle.expert)] = {
            "dtype": "U8",
            "shape": [bundle.nbytes],
            "data_offsets": [bundle.offset, bundle.offset + bundle.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    length = round_up(8 + len(text), BUNDLE_ALIGNMENT_BYTES) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def chunks(shards: Sequence[Shard], chunk_nbytes: int) -> Iterator[Chunk]:
    """All bundles in order, as many at a time as fit `chunk_nbytes`, and at least one."""
    for index, shard in enumerate(shards):
        run: list[Bundle] = []
        for bundle in shard.bundles:
            if run and bundle.offset + bundle.nbytes - run[0].offset > chunk_nbytes:
                yield Chunk(index, len(shard.header) + run[0].offset, tuple(run))
                run = []
            run.append(bundle)
        yield Chunk(index, len(shard.header) + run[0].offset, tuple(run))
