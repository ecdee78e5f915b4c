"""Files that the user named are whole or as they were."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from offload.errors import StorageError
from offload.written_files import check_place, write_whole


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    write_whole(file, b"first")
    written = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        written(path, data[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageError, match=r"report\.html: No space left"):
            write_whole(file, b"second")
    assert file.read_bytes() == b"first"
    write_whole(file, b"third")
    assert file.read_bytes() == b"third"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    write_whole(tmp_path / "one", b"")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    link, target, pipe = tmp_path / "link", tmp_path / "target", tmp_path / "pipe"
    link.symlink_to(target)
    write_whole(link, b"through")
    assert link.is_symlink()
    assert target.read_bytes() == b"through"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"down the pipe")
    reader.join()
    assert found == [b"down the pipe"]
    assert pipe.is_fifo()


def test_a_place_is_looked_at_before_there_is_anything_to_write(tmp_path: Path) -> None:
    check_place(None)
    check_place(tmp_path / "new")
    (tmp_path / "file").write_bytes(b"")
    for file in (tmp_path / "missing" / "new", tmp_path / "file" / "new"):
        with pytest.raises(StorageError, match=f"writing {file}: there is no directory {file.parent}"):
            check_place(file)
    assert os.listdir(tmp_path) == ["file"]
