"""A Hub of one machine: what its client asks for when headers are read, over HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories, and what was asked of them.

    Attributes:
        repositories: directories by id.
        gated: ids that exist and may not be read.
        address: of the server.
        served: bytes sent of each file, by "repository/file".
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    address: str = ""
    served: dict[str, int] = field(default_factory=dict)


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = info or file
            if found is None or found[1] in hub.gated:
                self._send(403, b"", {"X-Error-Code": "GatedRepo"} if found else {})
            elif found[1] not in hub.repositories:
                # What the Hub says of a repository that is private and of one that does not exist.
                self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif found[2] not in (None, "main", COMMIT):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif info is not None:
                self._send(200, json.dumps(_info(info[1], hub.repositories[info[1]])).encode(), {})
            else:
                assert file is not None
                self._file(file[1], hub.repositories[file[1]] / file[3])

        def _file(self, repository: str, path: Path) -> None:
            if not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            status = 200
            if asked is not None:
                first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                data, status = data[first : last + 1], 206
            if self.command == "GET":
                name = f"{repository}/{path.name}"
                hub.served[name] = hub.served.get(name, 0) + len(data)
            self._send(status, data, headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _info(repository: str, directory: Path) -> dict[str, Any]:
    files = sorted(path.name for path in directory.iterdir())
    return {
        "id": repository,
        "modelId": repository,
        "sha": COMMIT,
        "private": False,
        "tags": [],
        "siblings": [{"rfilename": name, "size": (directory / name).stat().st_size} for name in files],
    }
