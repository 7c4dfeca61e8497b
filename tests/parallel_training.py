"""Trainings on several processes: `python tests/parallel_training.py JOBS OUT`.

In a process of its own, so that one server imports for all of them. JOBS is a JSON file: a list of
{"name", "root", ...}; a job leaves OUT/<name>.json with its result or error, and its ranks leave
their states by step.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent


def train(settings: dict[str, Any], rank: Any) -> dict[str, Any]:
    """A rank: trains as the task does, without scores, and saves its states by step."""
    import torch

    from sandbox.config.composition import receive_root
    from sandbox.config.wiring import wire
    from sandbox.runs.resume import open_on_rank0
    from sandbox.training.build import build_system
    from sandbox.training.loop import fit
    from sandbox.training.setup import start
    from tests.training_sessions import Recorder

    job = settings["overrides"][0]
    wiring = wire(receive_root(settings["root"]))
    with open_on_rank0(wiring.root, rank) as run:
        with rank.rank0_first():
            system = build_system(wiring, run.folder, rank)
        with start(system, run, None, rank) as training:
            recorder = Recorder(training)
            act = FAILURES.get(job.get("how"))
            if act and rank.index == job["rank"]:
                act(system, training, job["step"])
            try:
                fit(training, [recorder])
                training.unshard(lambda: build_system(wiring, run.folder, rank.as_single()))
            finally:
                torch.save(recorder.states, Path(job["out"]) / f"{job['name']}-{rank.index}.pt")
            weights = training.system.trainable_state() if training.is_first else {}
            whole = all(type(w) is torch.Tensor for w in weights.values())
    return {"folder": str(run.folder), "pid": os.getpid(), "whole": whole}


def _at(system: Any, training: Any, step: int, act: Any) -> None:
    """Does something in the forward pass of step `step` (from 1)."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        if module.training and training.step == step - 1:
            return act(out)
        return out

    system.backbone.register_forward_hook(hook)


def _raises(out: Any) -> None:
    raise ValueError("planned failure")


def _kills(out: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAILURES = {
    "nan": lambda s, t, n: _at(s, t, n, lambda out: out * math.nan),
    "error": lambda s, t, n: _at(s, t, n, _raises),
    "kill": lambda s, t, n: _at(s, t, n, _kills),
    "hang": lambda s, t, n: _at(s, t, n, lambda out: time.sleep(600)),
    "asked": lambda s, t, n: _at(s, t, n, lambda out: t.rank.request_stop(signal.SIGTERM) or out),
}


def main(jobs: Path, out: Path) -> None:
    from sandbox.config import composition, discovery
    from sandbox.contracts import SandboxError
    from sandbox.distributed.supervisor import launch_run

    discovery.setup()
    for job in json.loads(jobs.read_text()):
        began = time.monotonic()
        try:
            root = composition.receive_root(job.pop("root"))
            if "copy" in job:
                (stopped,) = Path(job["copy"]).glob("*/config.yaml")
                shutil.copytree(stopped.parent, root.resume.run)
            found = launch_run(
                "tests.parallel_training:train", root, [{**job, "out": str(out)}], None
            )
        except SandboxError as e:
            found = {"error": str(e), "code": e.exit_code}
        found["seconds"] = time.monotonic() - began
        (out / f"{job['name']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path[:1] = [str(HOME)]
    main(Path(sys.argv[1]), Path(sys.argv[2]))
