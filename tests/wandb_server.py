"""A stand-in for the W&B server on loopback: as much of its API as runs, sweeps and agents use.

It takes what the real client sends (GraphQL, file streams, uploads) and keeps it in memory for a
test to read. Its sweeps hand out the trials of a grid, or of a search (each range from end to end,
where the real server would think), one after the other; they end those that a test names, and with
early_terminate those that are worse than another one at the first bracket.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

KEY = "0123456789abcdef0123456789abcdef01234567"  # an API key that the client finds well formed


@dataclass
class Run:
    """What the server knows of a run."""

    name: str
    group: str | None = None
    sweep: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False  # it wants to go on elsewhere


@dataclass
class Sweep:
    """`asked` counts how many trials an agent has got."""

    name: str
    config: dict[str, Any]
    asked: int = 0
    ended: set[str] = field(default_factory=set)  # runs that were told to stop
    again: dict[str, int] = field(default_factory=dict)  # runs handed out twice -> rows before

    def trials(self) -> list[dict[str, Any]]:
        values = {k: _values(p) for k, p in self.config["parameters"].items()}
        if self.config["method"] == "grid":
            return [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]
        count = self.config["run_cap"]
        return [{k: v[i * len(v) // count] for k, v in values.items()} for i in range(count)]

    def is_worse(self, run: Run, others: list[Run]) -> bool:
        """Whether hyperband ends it: another one had a better best at the first bracket."""
        rule, metric = self.config.get("early_terminate"), self.config.get("metric", {})
        if rule is None:
            return False
        sign = -1 if metric["goal"] == "maximize" else 1
        first = rule["min_iter"]

        def best(of: Run) -> float | None:
            found = [sign * row[metric["name"]] for row in of.history if metric["name"] in row]
            return min(found[:first]) if len(found) >= first else None

        own, rest = best(run), [b for o in others if o is not run and (b := best(o)) is not None]
        return own is not None and bool(rest) and min(rest) < own


def _values(parameter: dict[str, Any]) -> list[Any]:
    if "min" in parameter:
        return [parameter["min"], parameter["max"]]
    return parameter.get("values", [parameter.get("value")])


@dataclass
class Server:
    """`stop_after`: trial (sweep0-0 is the first) -> rows of history after which it ends."""

    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    stop_after: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)  # operations that it does not know

    def environment(self) -> dict[str, str]:
        """Variables under which the client talks to it."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def answer(self, operation: str, v: dict[str, Any]) -> dict[str, Any]:
        known = getattr(self, f"_{operation}", None)
        if known is None:
            self.refused.append(operation)
            return {}
        return known(v)

    def _Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
        who = {"id": "1", "entity": "us", "username": "me", "email": "", "flags": "{}"}
        return {"viewer": {**who, "teams": {"edges": []}}}

    def _RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        entity = {"id": "1", "name": v["entity"]}
        found = None
        if run is not None:
            found = {
                "id": _id(run.name),
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.name,
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": {"id": "1", "name": v["project"], "entity": entity, "bucket": found}}

    def _UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        is_new = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], Run(v["name"]))
        run.group = v.get("groupName") or run.group
        run.sweep = v.get("sweep") or run.sweep
        run.config |= json.loads(v.get("config") or "{}")
        run.summary |= json.loads(v.get("summaryMetrics") or "{}")
        entity = {"id": "1", "name": v["entity"] or "us"}
        project = {"id": "1", "name": v["project"], "entity": entity}
        bucket = {
            "id": _id(run.name),
            "name": run.name,
            "displayName": v.get("displayName") or run.name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": run.sweep,
            "project": project,
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": f, "uploadUrl": f"{self.url}/put/{v['run']}/{f}"} for f in v["files"]]
        made = {"runID": _id(v["run"]), "uploadHeaders": [], "files": files}
        return {"createRunFiles": made}

    def _RunStoppedStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def _ServerFeaturesQuery(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _ArtifactType(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}  # nothing of this name yet

    def _CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        """As one that is there already: nothing of it is sent; a table is a file of its run too."""
        sequence = {"id": "1", "latestArtifact": {"id": "1", "versionIndex": 0}}
        artifact = {"id": "1", "state": "COMMITTED", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _UpsertSweep(self, v: dict[str, Any]) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = Sweep(name, yaml.safe_load(v["config"]))
        project = {"id": "1", "name": v["projectName"], "entity": {"id": "1", "name": "us"}}
        made = {"name": name, "project": project}
        return {"upsertSweep": {"sweep": made, "configValidationWarnings": []}}

    def _SweepWithRuns(self, v: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps[v["sweep"]]
        absent = ("description", "heartbeatAt", "updatedAt", "bestLoss", "controller", "scheduler")
        found = {
            "id": _id(sweep.name),
            "name": sweep.name,
            "method": sweep.config["method"],
            "state": "RUNNING",
            "config": yaml.safe_dump(sweep.config),
            "createdAt": "2026-01-01T00:00:00",
            "earlyStopJobRunning": False,
            "runs": {"edges": []},
        }
        return {"project": {"sweep": dict.fromkeys(absent) | found}}

    def _CreateAgent(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": _id(v["sweep"])}}}

    def _Heartbeat(self, v: dict[str, Any]) -> dict[str, Any]:
        """A stop for each trial that is due, else the next trial for an idle agent."""
        sweep = self.sweeps[base64.b64decode(v["id"]).decode()]
        running = [run for run, alive in json.loads(v["runState"]).items() if alive]
        commands = []
        for name in running:
            rows = self.runs[name].history if name in self.runs else []
            limit = self.stop_after.get(name)
            is_due = limit is not None and len(rows) >= limit + sweep.again.get(name, 0)
            others = [r for r in self.runs.values() if r.sweep == sweep.name]
            if is_due or (rows and sweep.is_worse(self.runs[name], others)):
                sweep.ended.add(name)
                commands.append({"type": "stop", "id": f"stop-{name}", "run_id": name})
        trials = sweep.trials()
        waiting = [n for n in sweep.ended if self.runs[n].preempting and n not in sweep.again]
        if not running and (waiting or sweep.asked < len(trials)):
            run = waiting[0] if waiting else f"{sweep.name}-{sweep.asked}"
            number = int(run.rpartition("-")[2])
            if waiting:
                sweep.again[run] = len(self.runs[run].history)
            args = {k: {"value": value} for k, value in trials[number].items()}
            start = {"type": "run", "id": run, "run_id": run, "args": args}
            commands.append({**start, "program": sweep.config["program"]})
            sweep.asked = max(sweep.asked, number + 1)
        elif not running:
            commands.append({"type": "exit", "id": "exit"})
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}

    def stream(self, run: Run, sent: dict[str, Any]) -> None:
        """Takes in lines of a run's history and summary, and its end."""
        for name, part in sent.get("files", {}).items():
            lines = [json.loads(line) for line in part["content"] if name.endswith("json")]
            lines += [json.loads(line) for line in part["content"] if name.endswith("jsonl")]
            if name == "wandb-history.jsonl":
                run.history[part["offset"] :] = lines
            elif name == "wandb-summary.json":
                run.summary |= lines[-1]
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")


def _id(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


@contextmanager
def serving() -> Iterator[Server]:
    """The server inside the block, at a free port of loopback."""
    server, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

        def do_GET(self) -> None:
            self.reply({})

        def do_PUT(self) -> None:
            _, _, run, name = self.path.split("/", 3)
            with lock:
                server.runs[run].files[name] = self.body()
            self.reply({})

        def do_POST(self) -> None:
            body = self.body()
            streamed = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
            with lock:
                if self.path == "/graphql":
                    asked = json.loads(body)
                    found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                    operation = found.group(1) if found else ""
                    self.reply({"data": server.answer(operation, asked.get("variables") or {})})
                elif streamed:
                    server.stream(server.runs[streamed.group(1)], json.loads(body))
                    self.reply({"exitcode": None, "limits": {}})
                else:
                    self.reply({})

        def body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return (
                gzip.decompress(data)
                if "gzip" in self.headers.get("Content-Encoding", "")
                else data
            )

        def reply(self, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
