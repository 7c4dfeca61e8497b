"""What was read of plugin files is kept on disk, and never gives the answer of other content."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from sandbox.config import config_store, reading_cache, static_reader
from sandbox.config.reading_cache import ReadingCache, cache_file

TEXT = '''
"""One."""
import os
from dataclasses import dataclass
from sandbox.contracts import FirstStageConfig
from sandbox.registry import register

@register("vae", "mine")
class Mine:
    """Pixels as they are."""

    @dataclass
    class Config(FirstStageConfig):
        channels: int = 3
        name: str = os.environ["NAME_OF_MINE"]

        def latents(self, clip):
            return clip

        def fitted(self):
            return "none"
'''


@dataclass
class Part:
    width: int = 3


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setenv("NAME_OF_MINE", "first")
    path = tmp_path / "vae/mine.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(TEXT))
    return path


def read(path: Path):
    """The reading of a new process."""
    cache = ReadingCache(path.parents[1])
    found = cache.read(path, "mine", "vae", "mine")
    cache.write()
    return found


def is_parsed(path: Path, monkeypatch) -> bool:
    """Whether the next reading parses the file."""
    parsed: list[str] = []
    with monkeypatch.context() as m:
        real = static_reader.ast.parse
        m.setattr(static_reader.ast, "parse", lambda *a: (parsed.append("x"), real(*a))[1])
        assert read(path).config is not None
    return bool(parsed)


def test_an_unchanged_file_is_parsed_once(plugin, monkeypatch):
    first, again = read(plugin), read(plugin)
    assert not is_parsed(plugin, monkeypatch)
    assert (again.doc, again.words) == (first.doc, first.words)
    assert again.config().channels == 3 and again.config.__qualname__ == "Mine.Config"


def test_a_change_of_equal_length_and_time_is_seen(plugin):
    read(plugin)
    before = plugin.stat()
    plugin.write_text(plugin.read_text().replace("channels: int = 3", "channels: int = 4"))
    os.utime(plugin, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(plugin).config().channels == 4


def test_code_that_reads_the_environment_runs_at_each_start(plugin, monkeypatch):
    read(plugin)
    monkeypatch.setenv("NAME_OF_MINE", "second")
    assert read(plugin).config().name == "second"


def test_an_error_that_depends_on_the_environment_is_reported(plugin, monkeypatch):
    read(plugin)
    monkeypatch.delenv("NAME_OF_MINE")
    found = read(plugin)
    assert found.config is None and "KeyError" in (found.error or "")
    monkeypatch.setenv("NAME_OF_MINE", "third")
    assert read(plugin).config().name == "third"


def test_a_broken_file_is_not_kept(plugin):
    plugin.write_text("class Mine(:\n")
    assert read(plugin).error and read(plugin).error == read(plugin).error
    assert not cache_file(plugin.parents[1]).exists()


def test_other_code_of_the_reader_or_other_versions_start_anew(plugin, monkeypatch):
    read(plugin)
    monkeypatch.setattr(reading_cache, "_code_used", lambda: b"x" * reading_cache.HASH)
    assert is_parsed(plugin, monkeypatch)
    assert not is_parsed(plugin, monkeypatch)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b[:-1] + b"\0\1"])
def test_a_damaged_cache_is_the_same_as_none(plugin, monkeypatch, damage):
    read(plugin)
    path = cache_file(plugin.parents[1])
    path.write_bytes(damage(path.read_bytes()))
    assert is_parsed(plugin, monkeypatch)


def test_without_bytecode_nothing_is_written(plugin, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert read(plugin).config is not None
    assert not cache_file(plugin.parents[1]).parent.exists()


def test_a_folder_that_cannot_be_written_is_no_error(plugin):
    cache_file(plugin.parents[1]).parent.write_text("a file where the folder would be")
    assert read(plugin).config is not None


def test_writers_at_once_leave_a_whole_cache(plugin, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: write_variant(plugin, n), range(64)))
    assert all(done)
    folder = cache_file(plugin.parents[1]).parent
    assert [p.name for p in folder.iterdir()] == [cache_file(plugin.parents[1]).name]
    assert reading_cache._load(cache_file(plugin.parents[1]))


def write_variant(plugin: Path, number: int) -> bool:
    cache = ReadingCache(plugin.parents[1])
    cache.used[number.to_bytes(32, "little")] = ("", (), "Mine", 1, (), b"")
    cache.write()
    return bool(reading_cache._load(cache.path))


def test_an_option_of_hydra_is_built_when_it_is_loaded(monkeypatch):
    from hydra.core.config_store import ConfigNode, ConfigStore

    monkeypatch.setattr(ConfigStore.instance(), "repo", {})
    built: list[int] = []

    def make() -> Part:
        built.append(1)
        return Part()

    config_store.put("a/b", "mine", make, "a.b", "here")
    store = copy.deepcopy(ConfigStore.instance())  # as Hydra does for each composition
    assert store.list("a/b") == ["mine.yaml"] and not built
    store.load("a/b/mine.yaml").node.width = 5
    assert store.load("a/b/mine.yaml").node.width == 3 and len(built) == 1
    sent = pickle.loads(pickle.dumps(store.repo["a"]["b"]["mine.yaml"]))
    assert type(sent) is ConfigNode and sent.node.width == 3 and sent.package == "a.b"


def test_a_second_command_parses_no_plugin(tmp_path):
    """The real command, with a cache of its own."""
    probe = (
        "import ast, sys; sys.path.insert(0, '.'); real = ast.parse; count = []\n"
        "ast.parse = lambda *a, **k: (count.append(a[1:]), real(*a, **k))[1]\n"
        "from sandbox.config import composition, discovery\n"
        "discovery.setup(); cfg = composition.compose(['backbone=dit'])\n"
        "print(len(count), cfg.backbone.plugin)"
    )
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    home = reading_cache.CHECKOUT
    run = partial(subprocess.run, cwd=home, env=env, capture_output=True, text=True, check=True)
    lines = [run([sys.executable, "-c", probe]).stdout for _ in range(2)]
    assert int(lines[0].split()[0]) > 50
    assert lines[1].split() == ["0", "backbone/dit"]
