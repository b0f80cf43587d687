"""A hub on loopback: what huggingface_hub asks of the real one, as far as fetching a model goes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

_LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Repository:
    """Files of its one commit. `gated`: only for a token; `sent`: other bytes than there are, by file."""

    files: dict[str, bytes]
    gated: bool = False
    sent: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """`asked`: every request, as METHOD and path. `cut`: bytes after which a file's next answers break off; `status`:
    what every request is answered, if anything."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)
    status: int | None = None
    address: str = ""

    def add(self, name: str, folder: Path, **more: bytes) -> Repository:
        """A repository of a folder's files and more."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repositories[name] = Repository(files | more)
        return self.repositories[name]

    def files_asked(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {
            unquote(said.rsplit("/", 1)[1]) for said in self.asked if said.startswith("GET") and "/api/" not in said
        }


def _hash(name: str, content: bytes) -> str:
    """As the hub names it: SHA-256 of large files, git's hash of others."""
    if name.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _wrong(self, status: int, code: str) -> None:
            self._send(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def _answer(self) -> None:
            path = unquote(self.path.split("?")[0])
            hub.asked.append(f"{self.command} {path}")
            if hub.status is not None:
                return self._send(hub.status)
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
            if found is None:
                found = re.fullmatch(r"/([^/]+/[^/]+)/(resolve|cdn)/([^/]+)/(.+)", path)
            repository = hub.repositories.get(found[1]) if found else None
            if found is None or repository is None:
                return self._wrong(401, "RepoNotFound")
            if found[3] not in (None, "main", "v1", repository.commit):
                return self._wrong(404, "RevisionNotFound")
            if found[2] in (None, "revision"):
                return self._send(200, json.dumps(self._info(found[1], repository)).encode())
            if found[2] == "tree":
                return self._send(200, json.dumps(self._tree(repository)).encode())
            if repository.gated and self.headers.get("Authorization") != "Bearer key":
                return self._wrong(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            if found[4] not in repository.files:
                return self._wrong(404, "EntryNotFound")
            return self._file(repository, found[1], found[2], found[4])

        def _info(self, name: str, repository: Repository) -> dict[str, object]:
            siblings = []
            for file, content in repository.files.items():
                siblings.append({"rfilename": file, "size": len(content), "blobId": _hash("", content)})
                if file.endswith(_LARGE):
                    lfs = {"sha256": _hash(file, content), "size": len(content), "pointerSize": 130}
                    siblings[-1]["lfs"] = lfs
            return {"id": name, "sha": repository.commit, "siblings": siblings, "tags": [], "private": False}

        def _tree(self, repository: Repository) -> list[dict[str, object]]:
            found: list[dict[str, object]] = []
            for file, content in repository.files.items():
                found.append({"type": "file", "path": file, "size": len(content), "oid": _hash("", content)})
                if file.endswith(_LARGE):
                    found[-1]["lfs"] = {"oid": _hash(file, content), "size": len(content), "pointerSize": 130}
            return found

        def _file(self, repository: Repository, name: str, how: str, file: str) -> None:
            content, tag = repository.files[file], f'"{_hash(file, repository.files[file])}"'
            if how == "resolve" and file.endswith(_LARGE):  # large files lie elsewhere
                where = f"{hub.address}/{name}/cdn/{repository.commit}/{file}"
                said = {"X_Linked_Etag": tag, "X_Linked_Size": str(len(content)), "X_Repo_Commit": repository.commit}
                return self._send(302, Location=where, ETag='"redirect"', **said)
            content = repository.sent.get(file, content)
            first = 0
            if (wanted := self.headers.get("Range")) is not None:
                hub.ranges.append(wanted)
                first = int(re.findall(r"\d+", wanted)[0])
            headers = {"ETag": tag, "X_Repo_Commit": repository.commit, "Accept_Ranges": "bytes"}
            if first:
                headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            cuts = hub.cut.get(file)
            if self.command == "GET" and cuts:
                self.close_connection = True
                length = str(len(content) - first)
                self._send(
                    206 if first else 200, content[first : first + cuts.pop(0)], **{**headers, "Content_Length": length}
                )
                return None
            return self._send(206 if first else 200, content[first:], **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
