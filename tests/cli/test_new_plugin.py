"""task=new: what it writes works as it is, for every group, in the checkout and outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.cli.main import main
from sandbox.config import composition, discovery, registry
from sandbox.config.paths import CHECKOUT
from sandbox.config.root import GROUPS, to_root
from sandbox.config.wiring import wire
from sandbox.contracts import PluginConfig
from sandbox.tasks.new import TEMPLATES, presets, render_files, templates
from tests.helpers import composed, sampled, tiny, train, wired_around

MOST_LINES = 60  # of an example that is read to the end
each_group = pytest.mark.parametrize("group", templates())


def new(*words: str) -> int:
    """The exit code of `python run.py task=new ...`."""
    with pytest.raises(SystemExit) as left:
        main(["task=new", *words])
    return int(left.value.code or 0)


def write(group: str, name: str, folder: Path) -> list[Path]:
    assert new(f"group={group}", f"name={name}", f"plugins_path={folder}") == 0
    return sorted(p for p in folder.rglob("*") if p.is_file())


def composed_preset(group: str) -> PluginConfig:
    """The Config of the preset that task=new writes for the plugin `mine`."""
    (size,) = presets(group)
    name = f"mine_{size}"
    override = f"{group}=[{name}]" if group in registry.SEVERAL else f"{group}={name}"
    found = getattr(to_root(composition.compose([override])), group)
    return found["mine"] if group in registry.SEVERAL else found


def test_every_group_has_a_template_that_is_short_enough_to_be_its_example():
    assert set(templates()) == set(GROUPS)
    assert all(len(presets(group)) == 1 for group in templates())
    lines = {g: (TEMPLATES / g / "plugin.py.txt").read_text().count("\n") for g in templates()}
    assert [g for g in lines if lines[g] > MOST_LINES] == []


# --- what it writes -------------------------------------------------------------------------------


@pytest.mark.slow
@each_group
def test_a_new_plugin_trains_and_samples_and_its_preset_is_an_option(
    group, plugin_folder, tmp_path
):
    write(group, "mine", plugin_folder)
    discovery.setup()
    plugin = registry.find(f"{group}/mine")
    assert plugin.path == plugin_folder / group / "mine.py"
    cfg = registry.default(group, "mine")
    preset = composed_preset(group)
    assert preset.plugin == f"{group}/mine" and preset != cfg
    if group == "task":
        wiring = wired_around("task", registry.default("task", "train"))
        assert registry.create(cfg)(replace(wiring, root=replace(wiring.root, task=cfg)))
        return
    if group == "adapter":  # which wants a network to begin with
        base = train(wire(tiny()), tmp_path / "base").folder
        wiring = wire(replace(tiny(), adapter=cfg, init_from=str(base)))
    else:
        wiring = wired_around(group, cfg)
    trained = train(wiring, tmp_path / "runs")
    assert len(trained.losses) == 2
    assert sampled(trained.system).isfinite().all()


def test_it_says_what_it_wrote_and_what_to_do_next(plugin_folder, capsys):
    files = write("backbone", "mine", plugin_folder)
    said = capsys.readouterr().out
    assert [f for f in files if str(f) not in said] == []
    assert f"python run.py backbone=mine debug=fast plugins_path={plugin_folder}" in said
    assert "python -m pytest" in said


def test_in_the_checkout_files_go_to_their_places():
    places = [str(p.relative_to(CHECKOUT)) for p in render_files("vae", "mine")]
    assert places == [
        "plugins/vae/mine.py",
        "conf/vae/mine_p8.yaml",
        "tests/plugins/vae/test_mine.py",
    ]
    assert render_files("task", "mine").keys() >= {CHECKOUT / "sandbox" / "tasks" / "mine.py"}


@pytest.mark.parametrize("name", ["clip", "tensor", "iterator", "config", "nn"])
def test_a_name_that_the_template_uses_itself_does_no_harm(name, plugin_folder):
    for group in ("vae", "metric"):
        write(group, name, plugin_folder)
        discovery.setup()
        assert (
            registry.plugin_class(f"{group}/{name}").Config
            is registry.find(f"{group}/{name}").config
        )


@each_group
def test_files_are_formatted_and_clean(group):
    ruff = [sys.executable, "-m", "ruff"]
    if subprocess.run([*ruff, "--version"], capture_output=True).returncode:
        pytest.skip("ruff is not installed")
    for path, text in render_files(group, "mine").items():
        for words in (["check"], ["format", "--diff"]) if path.suffix == ".py" else ():
            done = subprocess.run(
                [*ruff, *words, "--stdin-filename", str(path), "-"],
                cwd=CHECKOUT, input=text, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "no group and no name": ([], ["task.group=null", "task.name=null"]),
    "unknown group": (["group=bakbone", "name=mine"], ["task.group='bakbone': no such group"]),
    "no identifier": (["group=vae", "name=my-net"], ["task.name='my-net'", "name=my_net"]),
    "a word of Python": (["group=vae", "name=class"], ["task.name='class'", "name=my_class"]),
    "a word of YAML": (["group=vae", "name='true'"], ["task.name='true'", "name=my_true"]),
    "capitals": (["group=vae", "name=Mine"], ["task.name='Mine'", "name=mine"]),
    "taken by a plugin": (["group=vae", "name=pca"], ["vae=pca exists", "vae/pca.py"]),
    "taken by a preset": (["group=vae", "name=kl_f8"], ["vae=kl_f8 exists", "a preset"]),
    "misspelt setting": (["group=vae", "nam=mine"], ["nam"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_writes_nothing(mistake, plugin_folder, capsys):
    words, expected = MISTAKES[mistake]
    assert new(*words, f"plugins_path={plugin_folder}") == 2
    said = capsys.readouterr().err
    assert [e for e in expected if e not in said] == [], said
    assert not list(plugin_folder.iterdir())


def test_a_file_that_is_there_is_never_written_over(plugin_folder, capsys):
    there = plugin_folder / "tests" / "vae" / "test_mine.py"
    there.parent.mkdir(parents=True)
    there.write_text("precious")
    assert new("group=vae", "name=mine", f"plugins_path={plugin_folder}") == 2
    assert "test_mine.py: it exists already" in capsys.readouterr().err
    assert there.read_text() == "precious"
    assert [p.name for p in plugin_folder.rglob("*.py")] == ["test_mine.py"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert new("group=vae", "name=mine", f"plugins_path={tmp_path / 'nowhere'}") == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_plugin_that_is_only_there_changes_no_configuration(plugin_folder):
    before = composed()
    write("vae", "mine", plugin_folder)
    assert composed() == before


# --- the whole way, in processes of its own -------------------------------------------------------


# The tests of both places differ in two lines, whose names and format are checked above.
IN_PLACE = ("backbone", "callbacks", "task")
WRITE = """
import sys
from sandbox.main import main
for group in sys.argv[1].split(","):
    try:
        main(["task=new", f"group={group}", *sys.argv[2:]])
    except SystemExit as e:
        assert not e.code, group
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tests_of_new_plugins_pass_in_a_checkout_and_outside(tmp_path):
    checkout, outside = tmp_path / "checkout", tmp_path / "outside"
    outside.mkdir()
    for part in ("sandbox", "plugins", "kernels", "conf"):
        shutil.copytree(CHECKOUT / part, checkout / part)
    for part in ("run.py", "pyproject.toml"):
        shutil.copy(CHECKOUT / part, checkout)

    def python(*words: str) -> str:
        """Runs it in the copy of the checkout."""
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words], cwd=checkout, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    python("-c", WRITE, ",".join(IN_PLACE), "name=mine")
    python("-c", WRITE, ",".join(templates()), "name=yours", f"plugins_path={outside}")
    for folder in ("tests", str(outside / "tests")):
        assert " passed" in python("-m", "pytest", folder, "--import-mode=importlib")
