"""Fixtures that tests of several folders share."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST_WORKERS = 8  # each imports torch and collects all tests
ALONE = 4  # so many files, or fewer, start no workers

# One thread for each worker: small tensors gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if sys.dont_write_bytecode:
    # The tests start Python hundreds of times, and without compiled files `import lightning` takes
    # ten seconds: keep them, but outside the checkout.
    sys.pycache_prefix = str(Path(tempfile.gettempdir()) / f"sandbox-pycache-{os.getuid()}")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False

LONG = frozenset({
    "test_command.py", "test_config.py", "test_encode.py", "test_errors.py",
    "test_first_stages.py", "test_resume.py", "test_supervisor.py",
})  # fmt: skip


def pytest_configure() -> None:
    """Ctrl-C means something to the tests, also where a shell started them in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers for `-n auto`: none for a few files, which end sooner than workers start."""
    named = [Path(arg.partition("::")[0]) for arg in config.args]
    if len(named) <= ALONE and all(path.suffix == ".py" for path in named):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min((cores or 1) + 1, MOST_WORKERS)  # one more: many tests wait for processes


def pytest_collection_finish() -> None:
    """Imported modules stay: excluding them from garbage collection saves a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests go first, and files that take long, so that workers end together; those that
    need a GPU are left out where there is none.
    """
    items.sort(key=lambda item: not (item.get_closest_marker("slow") or item.path.name in LONG))
    for_a_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_a_gpu:
        import torch

        if not torch.cuda.is_available():
            config.hook.pytest_deselected(items=for_a_gpu)
            items[:] = [item for item in items if item not in for_a_gpu]


@pytest.fixture
def plugin_folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder that SANDBOX_PLUGINS names; plugins that it adds are forgotten afterwards."""
    from hydra.core.config_store import ConfigStore

    from sandbox.config import discovery, registry

    discovery.setup()
    before = {p.key for p in registry.plugins()}
    folder = tmp_path / "plugins_of_mine"
    folder.mkdir()
    monkeypatch.setenv("SANDBOX_PLUGINS", str(folder))
    yield folder
    for plugin in registry.plugins():
        if plugin.key not in before:
            registry._forget(registry._plugins.pop(plugin.key))
            node = ConfigStore.instance().repo
            for part in plugin.group.split("/"):
                node = node.get(part, {})
            node.pop(f"{plugin.name}.yaml", None)
