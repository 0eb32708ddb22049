"""A stand-in for a W&B server: it speaks the few requests of ``wandb sync`` and keeps what it was sent.

The syncing itself is real wandb; only the far end, which is a paid service on the network, is replaced.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """``history`` holds the rows of every run id, at the offsets that the client gave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.keys: set[str] = set()
        self.refuse = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def steps(self, run_id: str) -> list[int]:
        return [row["_step"] for _, row in sorted(self.history[run_id].items())]


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        raw = self._body()
        known = self.path.startswith("/graphql") or self.path.endswith("/file_stream")
        body = json.loads(raw) if known else {}  # telemetry of the client is no JSON
        if self.server.refuse:
            self._answer({"error": "no such key"}, status=401)
            return
        self.server.keys.add(self.headers.get("Authorization", ""))
        if self.path.startswith("/graphql"):
            self._answer({"data": self._graphql(body.get("operationName"), body.get("variables", {}))})
        elif self.path.endswith("/file_stream"):
            run_id = self.path.split("/")[-2]
            sent = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for number, line in enumerate(sent["content"], start=sent["offset"]):
                self.server.history.setdefault(run_id, {})[number] = json.loads(line)
            self._answer({"exitcode": None, "limits": {}})
        else:
            self._answer({})

    def _graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "team"}}
        run_id = variables.get("name") or variables.get("run") or ""
        rows = self.server.history.get(run_id, {})
        tail = json.dumps([json.dumps(rows[max(rows)])] if rows else [])
        bucket = {
            "id": "b",
            "name": run_id,
            "displayName": "n",
            "description": "",
            "config": "{}",
            "sweepName": None,
            "project": project,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": bucket if rows else None}}
        if name == "UpsertBucket":
            return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.server.url}/up/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, value: Any, *, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
