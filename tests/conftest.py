"""Fixtures that tests of several folders share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

LONG = frozenset(
    {"test_processes.py", "test_default_run.py", "test_cross_product.py", "test_interpreted.py"}
)


def pytest_configure() -> None:
    """Ctrl-C means something to the tests, also where a shell started them in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests go first, and files that take a minute, so that workers end together; those that
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
