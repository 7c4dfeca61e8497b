"""CPU time of commands that do not train: against plain Hydra, bare Python and imports.

The plain Hydra program has the same groups, options and settings as YAML files. It and `run.py` run
in turn (A-B-B-A), with warm bytecode and plugin caches; the number is user + system CPU time.

python benchmarks/startup.py        # writes benchmarks/results/startup.{json,md}
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import HOME, write
from sandbox.config import discovery, registry
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS, Root, to_container

ROUNDS = 5
LIMIT = 1.5  # times the CPU time of plain Hydra
PAIRS = {  # command line of run.py -> that of the plain Hydra program
    "--help": ["--help"],
    "--cfg job": ["--cfg", "job"],
    "lr=x": ["nosuch=x"],  # plain Hydra has no types: an unknown setting
    "backbone=dti": ["backbone=dti"],
    "data.height=18": ["data.height=18"],  # plain Hydra composes it and checks nothing
    "-sc query=bash": ["-sc", "query=bash"],
}
PROGRAM = """import hydra

@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    print(cfg)

main()
"""
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


def plain_program(folder: Path) -> Path:
    """Writes a plain Hydra program with the groups, options and settings of this project."""
    discovery.setup()
    copytree(CONF, folder / "conf", ignore=ignore_patterns("hydra"))
    settings = {k: v for k, v in to_container(Root()).items() if k not in GROUPS}
    (folder / "conf/root.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    for plugin in registry.plugins():
        path = folder / f"conf/{plugin.key}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(to_container(registry.default(plugin.group, plugin.name)))
        package = f"{plugin.group}.{plugin.name}" if plugin.group in registry.SEVERAL else "_group_"
        path.write_text(f"# @package {package}\n{text}")
    (folder / "plain.py").write_text(PROGRAM)
    return folder / "plain.py"


def beside_plain_hydra(folder: Path) -> list[dict]:
    """For each of PAIRS: CPU seconds of `run.py` and of plain Hydra, in turn."""
    plain, rows = str(plain_program(folder)), []
    query = {"COMP_LINE": "run.py backbone=", "COMP_POINT": "16", "_HYDRA_OLD_COMP": ""}
    os.environ |= query  # of the completion
    for text, other in PAIRS.items():
        commands = {"ours": ["run.py", *text.split()], "plain": [plain, *other]}
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for command in commands.values():
            cpu_seconds(command)  # fills the caches
        for _ in range(ROUNDS):
            for name in ("ours", "plain", "plain", "ours"):
                times[name].append(cpu_seconds(commands[name]))
        median = {name: statistics.median(of) for name, of in times.items()}
        ratio = median["ours"] / median["plain"]
        rows.append({"command": text, "plain_command": " ".join(other), "ratio": ratio, **times})
        print(f"{text}: {ratio:.2f} times plain Hydra ({median})", flush=True)
    return rows


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
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # turns off bytecode and the plugin cache
    with tempfile.TemporaryDirectory() as folder:
        pairs = beside_plain_hydra(Path(folder))
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
        "# Start-up", "", f"Median of {2 * ROUNDS} (pairs) and {ROUNDS}, {machine}", "",
        "| `run.py` | CPU | plain Hydra, same settings | CPU | ratio |", "|---|---|---|---|---|",
        *(f"| `{p['command']}` | {statistics.median(p['ours']):.2f} s | `{p['plain_command']}` | "
          f"{statistics.median(p['plain']):.2f} s | {p['ratio']:.2f} |" for p in pairs), "",
        f"Wanted: a ratio of at most {LIMIT}.", "",
        "| command | CPU | over `import hydra` | torch, lightning, wandb |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| `{r['command']}` | {r['cpu_s']:.2f} s | {r['cpu_s'] / base:.1f} | "
        f"{', '.join(r['heavy']) or 'none'} |"
        for r in rows
    ]
    write("startup", {"machine": machine, "limit": LIMIT, "pairs": pairs, "rows": rows}, lines)


if __name__ == "__main__":
    main()
