"""What a process may use, in made-up cgroup trees."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from profiler import memory
from profiler.memory import (
    available_ram_nbytes,
    process_peak_rss_nbytes,
    process_rss_nbytes,
    reset_peak_rss,
)

MACHINE = 1 << 40


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=MACHINE))


Group = Callable[..., None]


@pytest.fixture
def v2(tmp_path: Path) -> Group:
    def group(
        path: str, limit: object = None, use: object = None, stat: str | None = None, high: object = None
    ) -> None:
        directory = tmp_path / "cgroup" / path
        directory.mkdir(parents=True, exist_ok=True)
        files = {"memory.max": limit, "memory.current": use, "memory.stat": stat, "memory.high": high}
        for name, content in files.items():
            if content is not None:
                (directory / name).write_text(f"{content}\n")

    return group


@pytest.fixture
def v1(tmp_path: Path) -> Group:
    def group(path: str, limit: object, use: object, stat: str | None = None) -> None:
        directory = tmp_path / "cgroup" / "memory" / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (directory / "memory.usage_in_bytes").write_text(f"{use}\n")
        if stat is not None:
            (directory / "memory.stat").write_text(stat)

    return group


def available(tmp_path: Path, membership: str) -> int:
    (tmp_path / "cgroup").mkdir(exist_ok=True)
    (tmp_path / "membership").write_text(membership)
    return available_ram_nbytes(proc_cgroup=tmp_path / "membership", root=tmp_path / "cgroup")


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    assert available_ram_nbytes(proc_cgroup=tmp_path / "none", root=tmp_path / "none") == MACHINE
    assert available(tmp_path, "") == MACHINE
    assert available(tmp_path, "0::/gone/away\n") == MACHINE


def test_v2_limit_less_use(tmp_path: Path, v2: Group) -> None:
    v2("app", limit=1000, use=300)
    assert available(tmp_path, "0::/app\n") == 700


def test_a_limit_above_the_machine_changes_nothing(tmp_path: Path, v2: Group) -> None:
    v2("app", limit=2 * MACHINE, use=0)
    assert available(tmp_path, "0::/app\n") == MACHINE


@pytest.mark.parametrize(("outer", "inner", "expected"), [(1000, 5000, 600), (5000, 1000, 900), ("max", 1000, 900)])
def test_the_tightest_ancestor_counts(tmp_path: Path, v2: Group, outer: object, inner: object, expected: int) -> None:
    v2("a", limit=outer, use=400)
    v2("a/b")
    v2("a/b/c", limit=inner, use=100)
    assert available(tmp_path, "0::/a/b/c\n") == expected


def test_a_limit_at_the_root_of_a_container_counts(tmp_path: Path, v2: Group) -> None:
    v2("", limit=1000, use=100)
    assert available(tmp_path, "0::/\n") == 900


def test_no_limit_is_no_limit(tmp_path: Path, v2: Group) -> None:
    v2("app", limit="max", use=300, high="max")
    assert available(tmp_path, "0::/app\n") == MACHINE


def test_the_lower_of_the_two_v2_limits_counts(tmp_path: Path, v2: Group) -> None:
    v2("app", limit=1000, use=300, high=800)
    assert available(tmp_path, "0::/app\n") == 500
    v2("app", limit="max")
    assert available(tmp_path, "0::/app\n") == 500


def test_page_cache_counts_as_free(tmp_path: Path, v2: Group) -> None:
    v2("app", limit=1000, use=900, stat="anon 500\ninactive_file 350\nactive_file 50")
    assert available(tmp_path, "0::/app\n") == 450


def test_more_cache_than_use_frees_no_more_than_the_limit(tmp_path: Path, v2: Group) -> None:
    v2("app", limit=1000, use=100, stat="inactive_file 400")
    assert available(tmp_path, "0::/app\n") == 1000


def test_a_group_over_its_limit_has_nothing(tmp_path: Path, v2: Group) -> None:
    v2("app", limit=1000, use=1500)
    assert available(tmp_path, "0::/app\n") == 0


@pytest.mark.parametrize("stat", ["inactive_file\n", "inactive_file many\n", "inactive_file -3\n", "\n\n", "x"])
def test_a_strange_statistics_file_is_no_cache(tmp_path: Path, v2: Group, stat: str) -> None:
    v2("app", limit=1000, use=300, stat=stat)
    assert available(tmp_path, "0::/app\n") == 700


@pytest.mark.parametrize("content", ["", "many", "-1"])
def test_a_limit_that_is_no_number_is_none(tmp_path: Path, v2: Group, content: str) -> None:
    v2("app", limit=content, use=300)
    assert available(tmp_path, "0::/app\n") == MACHINE


def test_a_limit_without_use_is_not_guessed_at(tmp_path: Path, v2: Group) -> None:
    v2("app", limit=1000)
    assert available(tmp_path, "0::/app\n") == MACHINE


def test_v1(tmp_path: Path, v1: Group) -> None:
    v1("docker/abc", limit=1000, use=600, stat="cache 300\ninactive_file 10\ntotal_inactive_file 250\n")
    v1("docker", limit=9223372036854771712, use=10_000)
    lines = "12:pids:/docker/abc\n4:cpu,memory:/docker/abc\n1:name=systemd:/docker/abc\n"
    assert available(tmp_path, lines) == 650


def test_v1_in_a_container_that_sees_the_host_path(tmp_path: Path, v1: Group) -> None:
    v1("", limit=1000, use=400)
    assert available(tmp_path, "4:memory:/kubepods/pod7/abc\n") == 600


def test_both_versions_at_once(tmp_path: Path, v1: Group, v2: Group) -> None:
    v1("a", limit=1000, use=400)
    v2("b", limit=1000, use=500)
    assert available(tmp_path, "4:memory:/a\n0::/b\n") == 500


@pytest.mark.parametrize("line", ["0::/../..\n", "nonsense\n", "::\n", "4:memory\n", "0::\n"])
def test_strange_membership_ends(tmp_path: Path, line: str) -> None:
    assert available(tmp_path, line) == MACHINE


def test_this_process_has_memory() -> None:
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert process_rss_nbytes() == pytest.approx(resident_pages * os.sysconf("SC_PAGE_SIZE"), rel=0.2)


def test_the_peak_is_read_and_reset(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    assert process_peak_rss_nbytes(status=status) == 2 << 20
    assert process_peak_rss_nbytes(status=tmp_path / "none") > 1 << 20, "what is resident is a peak too"
    assert reset_peak_rss(clear_refs=tmp_path / "clear_refs")
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert not reset_peak_rss(clear_refs=tmp_path / "none" / "clear_refs")
