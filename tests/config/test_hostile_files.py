"""Plugin files, presets and recipes of others have limits; each ends in one short line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.cli.main import _main, main
from sandbox.config import composition, discovery, registry
from sandbox.config.root import to_root
from sandbox.contracts import ConfigError
from tests.command import CHECKOUT
from tests.config.test_registry import GOOD, write

DEFAULT = "channels: int = CHANNELS"
CONFIGS = {  # what is put in the Config or before it, and the reason
    "exits": ("channels: int = exit(0) or 1", "ends the program (SystemExit)"),
    "exits_hard": ("import os\n        channels: int = os._exit(0)", "calls os._exit"),
    "kills": ("import os\n        channels: int = os.kill(os.getpid(), 9)", "calls os.kill"),
    "forks": ("import os\n        channels: int = os.fork()", "calls os.fork"),
    "loops": ("while True:\n            pass", "takes longer than 3 s"),
    "catches": (
        "while True:\n            try:\n                1 / 0\n            except Exception:\n"
        "                pass",
        "takes longer than 3 s",
    ),
    "raises": ("channels: int = 1 // 0", "ZeroDivisionError"),
    "recurses": ("channels: int = (lambda f: f(f))(lambda f: f(f))", "RecursionError"),
    "allocates": ("channels: int = len([0] * 10**15)", "MemoryError"),
    "exits_later": (
        "channels: int = 1\n\n        def __post_init__(self):\n            raise SystemExit(0)",
        "ends the program (SystemExit)",
    ),
    "nested": (f"channels: int = {'(' * 300}1{')' * 300}", "too many nested parentheses"),
}


def taken(words: str, capsys=None) -> str:
    """What setup and composition say about the plugin folder."""
    discovery.setup(words.split())
    return to_root(composition.compose(words.split())).vae.plugin


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hostile_config_is_left_out_with_one_line(plugin_folder, caplog, kind):
    body, reason = CONFIGS[kind]
    path = write(plugin_folder, GOOD.replace(DEFAULT, body))
    with caplog.at_level(logging.WARNING):
        assert taken("vae=pca") == "vae/pca"
        assert taken("vae=pca") == "vae/pca"  # said once
    (said,) = [r.getMessage() for r in caplog.records if "vae=mine" in r.getMessage()]
    assert said.startswith(f"vae=mine is left out: {path}:") and reason in said
    assert "\n" not in said
    with pytest.raises(ConfigError, match="vae=mine is broken"):
        composition.compose(["vae=mine"])


@pytest.mark.slow
def test_a_config_in_one_endless_call_ends_the_command_and_names_its_line(plugin_folder):
    path = write(plugin_folder, GOOD.replace(DEFAULT, "channels: int = sum(range(10**12))"))
    command = [sys.executable, str(CHECKOUT / "run.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and f'File "{path}", line' in done.stderr


def test_a_config_that_prints_is_read_in_silence(plugin_folder, capfd):
    write(plugin_folder, GOOD.replace(DEFAULT, "print('hello')\n        channels: int = 1"))
    assert taken("vae=mine") == "vae/mine"
    assert capfd.readouterr() == ("", "")


def make_odd(folder: Path, kind: str) -> None:
    path = folder / "vae" / "mine.py"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        path.write_bytes(b"#" * 2_000_000)
    elif kind == "binary":
        path.write_bytes(b"\x00\xff")
    else:
        write(folder, GOOD)
        (folder / "vae" / "loop").symlink_to("..")


@pytest.mark.parametrize("kind", ["pipe", "link to itself", "endless", "large", "binary"])
def test_a_file_that_is_no_text_of_a_sane_size_is_left_out(plugin_folder, caplog, kind):
    make_odd(plugin_folder, kind)
    assert taken("vae=pca") == "vae/pca"
    assert "vae=mine is left out" in caplog.text and "cannot be read" in caplog.text


def test_a_loop_of_folders_is_walked_once(plugin_folder):
    make_odd(plugin_folder, "loop of folders")
    assert taken("vae=mine") == "vae/mine"


def test_a_folder_that_holds_far_more_than_plugins_is_refused(plugin_folder, monkeypatch):
    monkeypatch.setattr(registry, "MAX_FILES", 3)
    for i in range(5):
        write(plugin_folder, GOOD, f"vae/m{i}.py")
    with pytest.raises(ConfigError, match="more than 3 files and folders; want a folder of"):
        discovery.setup()


# --- YAML -----------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
FILES = {  # the text of a recipe, and words of the error
    "bomb": (BOMB, "more than 100000 values once its aliases are expanded"),
    "lists": ("x: " + "[" * 500 + "]" * 500, "nested more than 40 deep"),
    "maps": ("x: " + "{a: " * 500 + "1" + "}" * 500, "nested more than 40 deep"),
    "too_deep": ("x: " + "[" * 5000 + "]" * 5000, "not YAML"),
    "alias": ("backbone: &b\n  width: *b\n", "the alias *b is inside of what it names"),
    "merge": ("x: &x\n  <<: *x\n", "the alias *x is inside of what it names"),
    "large": ("# " + "x" * 2_000_000, "2000026 bytes; want a YAML file of at most"),
    "nul": ("lr: \x00\n", "not YAML"),
    "latin": (b"# \xe4\nlr: 1\n", "not YAML"),
    "tag": ("x: !!python/object/apply:os.system [touch ran]\n", "not YAML"),
    "twice": ("lr: 1\nlr: 2\n", "found duplicate key lr"),
    "itself": ("defaults: [itself, _self_]\n", "experiment/itself -> experiment/itself: include"),
    "absolute": ("defaults: [/experiment/absolute]\n", "experiment/absolute: include one another"),
    "other": ("defaults: [another]\n", "experiment/other -> experiment/another -> experiment/o"),
    "recursive": ("recipe: ${recipe}\n", "recipe: its value refers to itself through ${...}"),
    "pair": ("recipe: ${out}\nout: ${recipe}\n", "its value refers to itself through ${...}"),
    "sibling": ("backbone: {width: '${.width}'}\n", "backbone.width: its value refers to itself"),
    "chain": ("lr: " + "${lr" * 200 + "}" * 200, "interpolations are nested more than 20 deep"),
    "unset": ("recipe: ${oc.env:NOT_SET_HERE}\n", "'NOT_SET_HERE' not found"),
}


def recipe(folder: Path, name: str, text: str | bytes) -> None:
    body = text if isinstance(text, bytes) else text.encode()
    path = folder / "experiment" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"# @package _global_\n" + b"# a\n" + body)


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_recipe_is_one_short_error_within_seconds(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    text, words = FILES[name]
    recipe(tmp_path, name, text)
    recipe(tmp_path, "another", "defaults: [other]\n")
    with pytest.raises(SystemExit) as e:
        main(["-cd", str(tmp_path), f"experiment={name}", "--cfg", "job", "--resolve"])
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and len(said) < 400, said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "endless", "folder"])
def test_a_recipe_that_is_no_regular_file_is_named(tmp_path, kind):
    path = tmp_path / "experiment" / "odd.yaml"
    path.parent.mkdir()
    makers = {
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(path.name),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
    }
    makers[kind]()
    with pytest.raises(ConfigError, match="no regular file; want a YAML file"):
        _main(["-cd", str(tmp_path), "experiment=odd", "--cfg", "job"])
    assert _main(["-cd", str(tmp_path), "--help", "experiment"]) == 0


def test_a_loop_of_folders_in_conf_is_harmless(tmp_path, capsys):
    recipe(tmp_path, "mine", "lr: 0.125\n")
    (tmp_path / "experiment" / "loop").symlink_to("..")
    assert _main(["-cd", str(tmp_path), "experiment=mine", "--cfg", "job"]) == 0
    assert "lr: 0.125" in capsys.readouterr().out


def test_aliases_and_depth_of_ordinary_files_stay_accepted(tmp_path, capsys):
    recipe(tmp_path, "mine", "trainable: &t [blocks, norm]\nbackbone: {width: &w 32}\nseed: *w\n")
    assert _main(["-cd", str(tmp_path), "experiment=mine", "--cfg", "job"]) == 0
    assert "seed: 32" in capsys.readouterr().out
