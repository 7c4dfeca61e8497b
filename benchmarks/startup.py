"""CPU time of commands that do not train and of imports, against bare Python and bare Hydra.

python benchmarks/startup.py        # writes benchmarks/results/startup.{json,md}
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import HOME, write

ROUNDS = 5
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import hydra": ["-c", "import hydra, hydra.core.config_store, omegaconf"],
    "run.py --help": ["run.py", "--help"],
    "run.py --cfg job": ["run.py", "--cfg", "job"],
    "run.py backbone=dti (error)": ["run.py", "backbone=dti"],
    "run.py data.height=18 (wiring error)": ["run.py", "data.height=18"],
    "run.py -m lr=1e-3,abc (sweep error)": ["run.py", "-m", "lr=1e-3,abc"],
    "run.py task=plugins": ["run.py", "task=plugins"],
    "import torch": ["-c", "import torch"],
    "import lightning": ["-c", "import lightning"],
}
HEAVY = ("torch", "lightning", "wandb")


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=HOME, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def heavy_imports(command: list[str]) -> list[str]:
    """The heavy packages that a command imports, from -X importtime."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        cwd=HOME,
        capture_output=True,
        text=True,
        check=False,
    )
    names = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    return sorted(names.intersection(HEAVY))


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for name, command in COMMANDS.items():
        times, heavy = [cpu_seconds(command) for _ in range(ROUNDS)], heavy_imports(command)
        cpu = statistics.median(times)
        rows.append({"command": name, "cpu_s": cpu, "all_s": times, "heavy": heavy})
        print(f"{name}: {cpu:.2f} s of CPU, imports {heavy or 'nothing heavy'}", flush=True)
    base = rows[1]["cpu_s"]
    machine = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    lines = [
        "# Start-up", "", f"Median of {ROUNDS}, {machine}", "",
        "| command | CPU | over `import hydra` | torch, lightning, wandb |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| `{r['command']}` | {r['cpu_s']:.2f} s | {r['cpu_s'] / base:.1f} | "
        f"{', '.join(r['heavy']) or 'none'} |"
        for r in rows
    ]
    write("startup", {"machine": machine, "rows": rows}, lines)


if __name__ == "__main__":
    main()
