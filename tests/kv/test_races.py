"""Blocks that change hands while the disk is slow, in schedules that seeds decide."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from tests.kv.gate import PATIENCE_S, Gate
from tests.kv.tables import Twin, make_table, small_pool


class SlowDisk(Gate):
    """Writes wait until the schedule lets as many of them go."""

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.pass_one()
        return os.pwrite(fd, data, offset)


@pytest.mark.parametrize("seed", range(6))
def test_blocks_that_are_being_written_may_be_freed_shared_or_reopened(tmp_path: Path, seed: int) -> None:
    chance, disk = random.Random(seed), SlowDisk()
    pool = small_pool(tmp_path, 20, pwrite=disk.pwrite)
    twin = Twin(make_table(pool, 1), seed)
    # As much as fits, so that writes ahead are queued and none is done.
    twin.append(16 * 18)
    assert pool.below.blocks_written > 0
    for _ in range(12):
        match chance.choice(["crop", "copy", "grow", "let go"]):
            case "crop":
                twin.crop(chance.randint(1, twin.table.tokens))
            case "copy":
                other = twin.copy()
                other.check()
                del other
            case "grow" if twin.table.tokens < 16 * 17:
                twin.append(chance.randint(1, 15))
            case _:
                disk.let_go(chance.randint(1, 3))
        twin.check()
        pool.check()
    disk.open()
    twin.append(300)
    twin.check()
    pool.check()
    pool.close()


def test_two_threads_that_generate_share_one_pool(tmp_path: Path) -> None:
    pool = small_pool(tmp_path, 24)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(3):
                twin = Twin(make_table(pool, 1), seed)
                for _ in range(8):
                    twin.append(chance.randint(1, 40))
                    twin.crop(twin.table.tokens - chance.randint(0, 9) if twin.table.tokens > 9 else 1)
                twin.check()
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert pool.below.blocks_written > 0
    pool.check()
    pool.close()
