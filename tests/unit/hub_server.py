"""A stand-in for the Hugging Face hub: it serves repositories from memory to the real client.

Only the far end is replaced; what is asked, cached and checked is done by huggingface_hub and datasets themselves.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """Files at one commit. Those with a suffix of ``large`` are in large file storage, as weights are."""

    files: dict[str, bytes]
    commit: str
    large: tuple[str, ...] = (".safetensors", ".parquet")
    served: dict[str, bytes] = field(default_factory=dict)
    """Other bytes than the metadata promises, for files that arrive damaged."""

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith(self.large):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def etag(self, path: str) -> str:
        entry = self.entry(path)
        return str(entry.get("lfs", entry)["oid"])


class HubServer(ThreadingHTTPServer):
    """``repos`` by ``models/ORG/NAME`` or ``datasets/ORG/NAME``; ``requests`` are the paths that were asked for."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Repo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def downloads(self) -> list[str]:
        return [path for path in self.requests if path.startswith("GET") and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        repo = self._repo(path.removeprefix("/api/"))
        if repo is None or "/paths-info/" not in path:
            self._json({"error": "not found"}, status=404)
            return
        wanted = json.loads(raw)["paths"]
        self._json([repo.entry(name) for name in wanted if name in repo.files])

    def _repo(self, path: str) -> Repo | None:
        return next((repo for name, repo in self.server.repos.items() if f"{path}/".startswith(f"{name}/")), None)

    def _serve(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/api/"):
            self._api(path.removeprefix("/api/"))
            return
        plain = path.lstrip("/")
        repo = self._repo(plain if plain.startswith("datasets/") else f"models/{plain}")
        _, _, rest = plain.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo is None or name not in repo.files or revision not in (repo.commit, "main"):
            self._json({"error": "not found"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        data = repo.served.get(name, repo.files[name])
        self.send_response(200)
        self.send_header("ETag", f'"{repo.etag(name)}"')
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _api(self, path: str) -> None:
        repo = self._repo(path)
        if repo is None:
            self._json({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
            return
        named = path.partition("/revision/")[2] or path.partition("/tree/")[2].split("/")[0]
        if named and named not in (repo.commit, "main"):
            self._json({"error": "Invalid rev id"}, status=404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        if "/tree/" in path:
            inside = path.partition("/tree/")[2].partition("/")[2]
            self._json([repo.entry(name) for name in sorted(repo.files) if name.startswith(inside)])
            return
        name = "/".join(path.split("/")[1:3])
        siblings = [{"rfilename": file} for file in sorted(repo.files)]
        self._json({"id": name, "modelId": name, "sha": repo.commit, "private": False, "siblings": siblings})

    def _json(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def hub_server(repos: dict[str, Repo]) -> Iterator[HubServer]:
    server = HubServer(repos)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
