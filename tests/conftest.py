"""Fixtures that tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import pytest


@pytest.fixture
def plugin_folder(tmp_path, monkeypatch) -> Iterator:
    """An empty folder of plugins that SANDBOX_PLUGINS names; what it adds is forgotten afterwards."""
    from hydra.core.config_store import ConfigStore

    from sandbox import config, registry

    config.setup()
    store = ConfigStore.instance()
    kept = copy(registry._plugins), copy(registry._classes), {k: copy(v) for k, v in store.repo.items()}
    folder = tmp_path / "plugins_of_mine"
    folder.mkdir()
    monkeypatch.setenv("SANDBOX_PLUGINS", str(folder))
    yield folder
    for now, before in zip((registry._plugins, registry._classes, store.repo), kept, strict=True):
        now.clear()
        now.update(before)
