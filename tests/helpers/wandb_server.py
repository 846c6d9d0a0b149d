"""A W&B server of a few lines, on this machine, for the real client to log to, sync to, and lose.

It answers what the client asks (GraphQL under ``/graphql``, rows under ``.../file_stream``, files by PUT) and remembers
what it was told; ``GET /state`` tells that. As a script it is the process that :class:`WandbServer` starts, so that a
test can kill it.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

KEY = "0" * 40
"""An API key of the form that the client accepts."""


class WandbServer:
    """The server in a process of its own, which ``kill`` ends as a crash would and ``freeze`` leaves mute."""

    def __init__(self, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(port)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def state(self) -> dict[str, Any]:
        """``runs`` by id, ``artifacts`` by name with a list of versions, ``views``, and ``unknown`` operations."""
        with urllib.request.urlopen(f"{self.url}/state", timeout=10) as answer:
            state: dict[str, Any] = json.load(answer)
        return state

    def freeze(self) -> None:
        """Connections are still accepted, by the system, and never answered."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Memory:
    """What the server was told."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        self.files: dict[str, int] = {}
        self.unknown: list[str] = []
        self._numbers = count(1)
        self.lock = threading.Lock()

    def state(self) -> dict[str, Any]:
        by_name: dict[str, list[dict[str, Any]]] = {}
        for artifact in self.artifacts.values():
            by_name.setdefault(artifact["name"], []).append(artifact)
        return {"runs": self.runs, "artifacts": by_name, "views": self.views, "unknown": self.unknown}

    def run(self, name: str) -> dict[str, Any]:
        new = {"config": {}, "summary": {}, "history": [], "files": {}, "exit": None, "starts": 0}
        return self.runs.setdefault(name, new)

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer; {} and a note for an operation that is not known here."""
        method = getattr(self, f"on_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            return {}
        data: dict[str, Any] = method(variables)
        return data

    def on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "entity": "local", "username": "local", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": None}

    on_VerifyAuth = on_GetViewer = on_GetDefaultEntity = on_Viewer

    def on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}  # no artifact of this name, of whatever type

    def on_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": None}

    def on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "local"}}}
        last = json.dumps(run["history"][-1]) if run["history"] else None
        bucket = {
            "id": base64.b64encode(variables["name"].encode()).decode(),
            "name": variables["name"],
            "displayName": run.get("name"),
            "config": json.dumps(run["config"]),
            "summaryMetrics": json.dumps(run["summary"]),
            "historyLineCount": len(run["history"]),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([last] if last else []),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": json.dumps({"t": {"value": 1}}),
        }
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "local"}}
        return {"model": {**project, "bucket": bucket}}

    def on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        run = self.run(name)
        run["starts"] += 1
        given = {"project": "project", "groupName": "group", "jobType": "job_type", "displayName": "name"}
        run |= {ours: variables[theirs] for theirs, ours in given.items() if variables.get(theirs) is not None}
        if variables.get("config"):
            run["config"] = json.loads(variables["config"])
        if variables.get("summaryMetrics"):
            run["summary"] |= json.loads(variables["summaryMetrics"])
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "local"}}
        bucket = {
            "id": base64.b64encode(name.encode()).decode(),
            "name": name,
            "displayName": run.get("name"),
            "description": None,
            "config": json.dumps(run["config"]),
            "sweepName": None,
            "historyLineCount": len(run["history"]),
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def on_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables["input"]
        name, digest = given["artifactCollectionName"], given["digest"]
        same = [a for a in self.artifacts.values() if (a["name"], a["digest"]) == (name, digest)]
        if same:  # content that is there already is the version that is there
            artifact = same[0]
        else:
            number = f"artifact{next(self._numbers)}"
            artifact = self.artifacts[number] = {
                "id": number,
                "name": name,
                "type": given["artifactTypeName"],
                "digest": digest,
                "metadata": json.loads(given.get("metadata") or "{}"),
                "aliases": [alias["alias"] for alias in given.get("aliases") or []],
                "made_by": given["runName"],
                "used_by": [],
                "files": {},
                "state": "PENDING",
            }
        sequence = {"id": f"sequence-{name}", "latestArtifact": None}
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": sequence}}}

    def on_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        return {"createArtifactManifest": {"artifactManifest": {"id": f"m{number}", "file": self._upload("manifest")}}}

    def on_UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": self._upload("manifest")}}}

    def on_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for wanted in variables["input"]["artifactFiles"]:
            place = f"{wanted['artifactID']}/{wanted['name']}"
            extra = {"storagePath": place, "uploadMultipartUrls": None, "artifact": {"id": wanted["artifactID"]}}
            edges.append({"node": {**self._upload(place, wanted["name"]), **extra}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[variables["artifactID"]]
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}

    def on_UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables["input"]
        self.artifacts[given["artifactID"]]["used_by"].append(given["runName"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def on_UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:
        view = {**variables, "spec": json.loads(variables["spec"])}
        known = [known for known in self.views if known["id"] == variables.get("id")]
        if known:
            known[0].update(view)
        else:
            self.views.append({**view, "id": f"view{next(self._numbers)}"})
        saved = known[0] if known else self.views[-1]
        return {"upsertView": {"view": {"id": saved["id"], "name": saved["name"]}, "inserted": not known}}

    def on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": self._url(f"run/{name}")} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables.get("run", ""), "uploadHeaders": [], "files": files}}

    def take_rows(self, run_name: str, message: dict[str, Any]) -> None:
        """A message of the file stream: rows from an offset on, the whole summary, or that the run has ended."""
        run = self.run(run_name)
        files = message.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            offset = history["offset"]
            run["history"][offset:] = [json.loads(row) for row in history["content"]]
        if summary := files.get("wandb-summary.json"):
            run["summary"] |= json.loads(summary["content"][-1])
        if message.get("complete"):
            run["exit"] = message.get("exitcode")
        if message.get("preempting"):
            run["preempting"] = True

    def take_file(self, place: str, size: int) -> None:
        number, _, name = place.partition("/")
        if number in self.artifacts:
            self.artifacts[number]["files"][name] = size

    def _upload(self, place: str, name: str = "wandb_manifest.json") -> dict[str, Any]:
        shown = {"id": f"f{next(self._numbers)}", "name": name, "displayName": name}
        return {**shown, "uploadUrl": self._url(place), "uploadHeaders": []}

    def _url(self, place: str) -> str:
        return f"{self.url}/upload/{place}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    memory: Memory

    def do_GET(self) -> None:
        self._send(self.memory.state() if self.path == "/state" else {})

    def do_PUT(self) -> None:
        body = self._body()
        with self.memory.lock:
            self.memory.take_file(self.path.partition("/upload/")[2], len(body))
        self._send({})

    def do_POST(self) -> None:
        body, answer = self._body(), {}
        with self.memory.lock:
            if self.path == "/graphql":
                asked = json.loads(body)
                named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                operation = asked.get("operationName") or (named.group(1) if named else "?")
                answer = {"data": self.memory.answer(operation, asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                self.memory.take_rows(self.path.split("/")[-2], json.loads(body))
        self._send(answer)

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Mistakes of this file are shown; that a client hangs up is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def serve(port: int) -> None:
    server = Server(("127.0.0.1", port), Handler)
    Handler.memory = Memory(f"http://127.0.0.1:{server.server_port}")
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
