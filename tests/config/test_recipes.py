"""A recipe's settings of a group belong to the option that it chose."""

from __future__ import annotations

import logging
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.types import RunMode

from sandbox.cli.main import _main
from sandbox.cli.multirun import jobs
from sandbox.cli.wandb_agent import PARAMETERS
from sandbox.config import composition, discovery, hydra_compose, recipes
from sandbox.config.moved_modules import OLD_MODULES
from sandbox.config.moved_names import OLD_METHODS, OLD_PRESETS
from sandbox.config.paths import CHECKOUT, CONF
from sandbox.config.root import GROUPS, Root, to_root
from sandbox.contracts import ConfigError

BASE = """\
defaults:
  - override /backbone: unet2d
  - override /sampler: ddim
  - override /adapter: lora
  - override /callbacks: [val_loss, images_rare]
recipe: base
backbone: {model_channels: 32}
sampler: {steps: 33}
adapter: {rank: 5}
data: {batch_size: 5}  # of the option that conf/config.yaml chooses
task: {samples: 3}
callbacks: {val_loss: {every: 7}, images: {max_images: 2}}
"""
FILES = {
    "experiment/base": BASE,
    "experiment/child": "defaults: [base, _self_]\nrecipe: child\nbackbone: {dropout: 0.5}\n",
    "experiment/other":
        "defaults: [base, {override /sampler: euler}, _self_]\nsampler: {steps: 4}\n",
    "experiment/crafter": "defaults: [dynamicrafter_512, _self_]\nbackbone: {model_channels: 64}\n",
    "callbacks/images_rare": "defaults: [images, _self_]\nimages: {every: 900}\n",
    "backbone/unet2d_small": "defaults: [unet2d, _self_]\nmodel_channels: 16\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder of recipes and presets."""
    made = tmp_path_factory.mktemp("conf")
    for name, text in FILES.items():
        path = made / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(("# @package _global_\n" if "experiment" in name else "") + text)
    return made


@pytest.fixture
def lines(caplog):
    """The lines that name what was left out."""
    recipes._log_once.cache_clear()
    caplog.set_level(logging.WARNING, recipes.__name__)
    return lambda: [r.getMessage() for r in caplog.records if r.name == recipes.__name__]


def composed(folder: Path, *words: str) -> Root:
    discovery.setup(words)
    return to_root(
        composition.compose(composition.expand_shorthands(words), config_dir=str(folder))
    )


def facts(root: Root) -> dict[str, object]:
    """What the cases compare."""
    return {
        "backbone": root.backbone and root.backbone.plugin.partition("/")[2],
        "channels": getattr(root.backbone, "model_channels", None),
        "steps": root.sampler.steps,
        "rank": getattr(root.adapter, "rank", None),
        "batch": root.data.batch_size,
        "samples": root.task.samples,
        "every": {name: cfg.every for name, cfg in root.callbacks.items()},
    }


KEPT = {"backbone": "unet2d", "channels": 32, "steps": 33, "rank": 5, "batch": 5, "samples": 3,
        "every": {"val_loss": 7, "images": 900}}  # fmt: skip
CASES = {  # words after experiment=: what differs, and the groups that are named
    "base": ({}, ""),
    "base backbone=unet2d": ({}, ""),
    "base backbone=dit": ({"backbone": "dit", "channels": None}, "backbone"),
    "base backbone=unet2d_small": ({"channels": 16}, "backbone"),
    "base backbone.model_channels=96": ({"channels": 96}, ""),
    "base backbone={model_channels:96}": ({"channels": 96}, ""),
    "base backbone=unet3d backbone.model_channels=96":
        ({"backbone": "unet3d", "channels": 96}, "backbone"),
    "base adapter=null": ({"rank": None}, "adapter"),
    "base ~adapter": ({"rank": None}, "adapter"),
    "base data=moving_digits_still": ({"batch": 16}, "data"),
    "base data=moving_digits": ({}, ""),
    "base callbacks=[val_loss]": ({"every": {"val_loss": 7}}, "callbacks.images"),
    "base callbacks=[val_loss,images]": ({"every": {"val_loss": 7, "images": 500}},
                                         "callbacks.images"),
    "base callbacks=null": ({"every": {}}, "callbacks.val_loss, callbacks.images"),
    "base debug=fast": ({"samples": 2}, ""),
    "base debug=fast backbone=unet2d": ({"samples": 2}, ""),
    "child": ({}, ""),
    "child backbone=dit": ({"backbone": "dit", "channels": None}, "backbone"),
    "other": ({"steps": 4}, ""),
    "other sampler=ddim": ({}, "sampler"),
    "other sampler=heun": ({"steps": 20}, "sampler"),
}  # fmt: skip


@pytest.mark.parametrize("words", CASES)
def test_settings_of_a_swapped_option_are_left_out_and_named(words, folder, lines):
    differs, named = CASES[words]
    got = facts(composed(folder, *f"experiment={words}".split()))
    assert got == KEPT | differs
    recipe = words.split()[0]
    expected = f"experiment={recipe}: its settings of {named} are omitted"
    assert [line.partition(", because")[0] for line in lines()] == ([expected] if named else [])


def test_a_setting_of_the_recipes_option_is_refused_for_another(folder):
    with pytest.raises(ConfigError, match="backbone=dit has no such setting"):
        composed(folder, "experiment=base", "backbone=dit", "backbone.model_channels=7")


def test_a_users_recipe_extends_one_of_the_project(folder):
    published = composed(folder, "experiment=dynamicrafter_512").backbone
    own = composed(folder, "experiment=crafter").backbone
    assert (own.model_channels, own.context_dim) == (64, published.context_dim)
    assert composed(folder, "experiment=crafter", "backbone=dit").backbone.plugin == "backbone/dit"


def test_a_folder_of_plugins_may_have_recipes(folder, tmp_path, lines):
    (tmp_path / "conf").symlink_to(folder)
    (tmp_path / "conf/sampler").mkdir(exist_ok=True)
    words = [f"plugins_path={tmp_path}", "experiment=base", "backbone=dit"]
    discovery.setup(words)
    root = to_root(composition.compose(words))
    assert facts(root) == KEPT | {"backbone": "dit", "channels": None}
    assert len(lines()) == 1


def test_every_job_of_a_sweep_is_composed_with_its_own_option(folder, lines):
    discovery.setup()
    planned = jobs(["experiment=base", "backbone=dit,unet2d,unet3d", "seed=0,1"])
    got = [facts(composed(folder, *words)) for words in planned or ()]
    assert [g["channels"] for g in got] == [None, None, 32, 32, 64, 64]
    assert len(lines()) == 1


def test_a_launcher_composes_a_job_in_its_own_process(folder):
    """Launchers such as joblib pickle the loader and compose there."""
    discovery.setup()
    hydra = recipes.hydra(CONF, GROUPS)
    place = hydra_compose.search_path((), str(folder))
    loader = pickle.loads(pickle.dumps(hydra.config_loader))
    shared = hydra.config_loader.load_configuration("config", place, RunMode.RUN)
    for option, channels in (("dit", None), ("unet2d", 32)):
        cfg = loader.load_sweep_config(shared, ["experiment=base", f"backbone={option}", *place])
        assert cfg.backbone.get("model_channels") == channels


def test_a_trial_of_a_wandb_sweep_swaps_an_option(tmp_path, monkeypatch, capsys, lines):
    node = {"experiment": "dynamicrafter_512_tiny", "backbone": "dit", "sampler": {"steps": 3}}
    path = tmp_path / "config-trial.yaml"
    path.write_text(yaml.safe_dump({k: {"value": v} for k, v in node.items()}))
    monkeypatch.setenv(PARAMETERS, str(path))
    assert _main([*(f"{k}={v}" for k, v in node.items()), "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["backbone"]["plugin"] == "backbone/dit"
    assert (shown["sampler"]["steps"], shown["sampler"]["eta"]) == (3, 1.0)
    assert len(lines()) == 1


def test_the_defaults_list_of_a_swapped_option_is_made(folder):
    """For --info defaults, which would leave a handler of Hydra's in this process."""
    discovery.setup()
    loader = recipes.hydra(CONF, GROUPS).config_loader
    words = ["experiment=dynamicrafter_512", "backbone=dit"]
    found = loader.compute_defaults_list("config", words, RunMode.RUN).defaults
    paths = [d.config_path for d in found]
    assert "backbone/dit" in paths and "backbone/unet3d" not in paths


def test_code_in_a_recipes_settings_is_refused_where_it_is_used(tmp_path):
    path = tmp_path / "experiment/evil.yaml"
    path.parent.mkdir()
    path.write_text(
        "# @package _global_\ndefaults: [{override /callbacks: [images]}]\n"
        "callbacks: {images: {every: 3}, x: {_target_: builtins.open}}\n"
    )
    with pytest.raises(ConfigError, match="_target_"):
        composed(tmp_path, "experiment=evil")


def test_a_wrong_setting_of_a_recipe_is_named_with_its_file(tmp_path):
    path = tmp_path / "experiment/wrong.yaml"
    path.parent.mkdir()
    path.write_text("# @package _global_\nbackbone: {widht: 3}\n")
    with pytest.raises(ConfigError, match=r"experiment/wrong\.yaml: .*widht"):
        composed(tmp_path, "experiment=wrong")


def test_the_command_swaps_an_option():
    words = ["experiment=dynamicrafter_512", "backbone=dit", "--cfg", "job", "-p", "backbone"]
    done = subprocess.run([sys.executable, "run.py", *words], cwd=CHECKOUT, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert "plugin: backbone/dit" in done.stdout and "model_channels" not in done.stdout
    assert done.stderr.count("its settings of backbone are omitted") == 1


# --- old presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", sorted({name.partition("/")[0] for name in OLD_PRESETS}))
def test_the_error_for_an_old_preset_says_what_to_write(group):
    discovery.setup()
    names = [key.partition("/")[2] for key in OLD_PRESETS if key.startswith(f"{group}/")]
    assert not set(names) & set(discovery.options(group))
    name = names[0]
    with pytest.raises(ConfigError) as e:
        composition.compose([f"{group}=[{name}]" if group in ("callbacks", "stage") else
                        f"{group}={name}"])  # fmt: skip
    assert e.value.problems[0].endswith(f"write {OLD_PRESETS[f'{group}/{name}']}")


def test_what_replaces_an_old_preset_is_there():
    """Options and recipes; a few settings are composed, one replacement of each group."""
    discovery.setup()
    words = {text: shlex.split(text) for text in OLD_PRESETS.values()}
    for first, *_ in words.values():
        group, _, name = first.partition("=")
        recipe = CONF / f"{group}/{name}.yaml"
        assert recipe.is_file() or name.strip("[]") in discovery.options(group), first
    groups = {first.partition("=")[0]: [first, *rest] for first, *rest in words.values()}
    for group, chosen in groups.items():
        assert group == "experiment" or getattr(to_root(composition.compose(chosen)), group)


def test_few_files():
    """110, and eight released sizes of backbone=mmdit, vae=dc_ae and vae=wan, which users type."""
    assert sum(p.is_file() for p in CONF.rglob("*")) <= 118


def test_the_migration_page_has_the_table():
    page = (CHECKOUT / "docs/migration.md").read_text(encoding="utf-8")
    assert [k for k, v in OLD_PRESETS.items() if f"| `{k}` | `{v}` |" not in page] == []


def test_the_migration_page_has_every_old_module_and_method():
    page = (CHECKOUT / "docs/migration.md").read_text(encoding="utf-8")
    rows = {
        f"| `sandbox.{old}` | {', '.join(f'`sandbox.{x}`' for x in new)} |"
        for old, new in OLD_MODULES.items()
    }
    names = {f"`{x}`" for methods in OLD_METHODS.values() for y in methods.items() for x in y}
    assert {x for x in rows | names if x not in page} == set()


@pytest.mark.parametrize("task", ["sample", "plan", "evaluate", "export", "verify", "report"])
def test_another_task_is_chosen_without_a_word_about_the_recipes(tmp_path, caplog, task):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ntask: {score_clips: 3}\nlr: 0.5\n")
    cfg = composition.compose(["experiment=mine", f"task={task}"], config_dir=str(tmp_path))
    assert cfg.lr == 0.5 and "omitted" not in caplog.text
