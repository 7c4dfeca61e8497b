"""CPU time of answers that need no training, and of imports, beside bare Python and bare Hydra in
the same run.

python benchmarks/startup.py        # writes benchmarks/results/startup.{json,md}
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import hydra": ["-c", "import hydra, hydra.core.config_store, omegaconf"],
    "run.py --help": ["run.py", "--help"],
    "run.py --cfg job": ["run.py", "--cfg", "job"],
    "run.py backbone=dti (an error)": ["run.py", "backbone=dti"],
    "run.py data.height=18 (an error of wiring)": ["run.py", "data.height=18"],
    "run.py -m lr=1e-3,abc (a sweep refused)": ["run.py", "-m", "lr=1e-3,abc"],
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
    """Which heavy packages a command imports, from -X importtime."""
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
        times = [cpu_seconds(command) for _ in range(ROUNDS)]
        rows.append(
            {
                "command": name,
                "cpu_s": statistics.median(times),
                "all_s": times,
                "heavy": heavy_imports(command),
            }
        )
        print(
            f"{name}: {rows[-1]['cpu_s']:.2f} s of CPU, "
            f"imports {rows[-1]['heavy'] or 'nothing heavy'}",
            flush=True,
        )
    base = rows[1]["cpu_s"]
    machine = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
    )
    table = [
        "| command | CPU | over `import hydra` | torch, lightning, wandb |",
        "|---|---|---|---|",
    ]
    table += [
        f"| `{r['command']}` | {r['cpu_s']:.2f} s | {r['cpu_s'] / base:.1f} | "
        f"{', '.join(r['heavy']) or 'none'} |"
        for r in rows
    ]
    (RESULTS / "startup.md").write_text(
        f"# Start-up\n\nMedian of {ROUNDS}, {machine}\n\n" + "\n".join(table) + "\n"
    )


if __name__ == "__main__":
    main()
