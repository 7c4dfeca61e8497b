"""Composition: typed, safe, every problem at once, and on top of earlier runs."""

import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from sandbox import compose
from sandbox.cli.command_line import Line, parse
from sandbox.cli.jobs import check, resolve_run
from sandbox.cli.main import _main
from sandbox.config import composition, discovery, registry
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS, Root, from_container, to_container, to_root
from sandbox.contracts import ConfigError, PluginConfig, SandboxError
from sandbox.runs.lookup import inherited_options


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    discovery.setup()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- the root -------------------------------------------------------------------------------------


def test_the_groups_of_the_root_are_those_of_the_table_of_contents():
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    groups = {k for d in listed if isinstance(d, dict) for k in d if not k.startswith("override")}
    assert groups - {"experiment", "debug"} == set(GROUPS)
    assert set(GROUPS) <= set(vars(Root()))


def test_the_default_configuration_is_complete_and_typed():
    root = compose()
    for group in GROUPS:
        value = getattr(root, group)
        assert isinstance(value, PluginConfig) or value in ({}, None), group
    assert root.lr is not None and root.steps is not None
    assert root.backbone.in_channels == 32
    assert isinstance(root.optimizer.betas, tuple)


@pytest.mark.parametrize(
    "words", [[], ["experiment=digits_long"], ["vae=kl", "callbacks=[samples]"]]
)
def test_a_saved_configuration_is_read_as_it_was(words):
    root = compose(*words)
    assert from_container(yaml.safe_load(yaml.safe_dump(to_container(root)))) == root


def test_a_saved_configuration_with_an_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match="stepz: no such setting; did you mean 'steps'"):
        from_container({"stepz": 3})


def test_parts_inside_parts_are_checked_too():
    inner = registry.default("vae", "pca")
    root = replace(Root(), data=replace(registry.default("data", "video_folder"), root=inner))
    assert [path for path, _ in root.parts()] == ["data", "data.root"]


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        (["logger=null"], ["~logger"]),
        (["callbacks=null"], ["callbacks=[]"]),
        (["task=sample", "prompts=[a]"], ["task=sample", "task.prompts=[a]"]),
        (["prompts=[a]"], ["prompts=[a]"]),  # not a setting of task=train
        (["samples=3"], ["task.samples=3"]),
        (["steps=3", "task=sample", "task.count=1"], ["steps=3", "task=sample", "task.count=1"]),
    ],
)
def test_shorthands(words, expanded):
    discovery.setup()
    assert composition.expand_shorthands(words) == expanded


@pytest.mark.parametrize(
    ("word", "expanded"),
    [
        ("out=~/runs", "out=/home/me/runs"),
        ("task.runs=[~/a,'~/b']", "task.runs=[/home/me/a,'/home/me/b']"),
        ("vae.weights=choice(~/a,x/~/b)", "vae.weights=choice(/home/me/a,x/~/b)"),
        ("~logger", "~logger"),
    ],
)
def test_a_value_that_starts_with_a_tilde_is_below_the_home_folder(word, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    discovery.setup()
    assert composition.expand_shorthands([word]) == [expanded]


def test_files_of_yaml_with_a_tilde_are_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    write(tmp_path / "experiment/mine.yaml", GLOBAL + "init_from: ~/a\nvae: {weights: ~/b}\n")
    cfg = composition.compose(["experiment=mine"], config_dir=str(tmp_path))
    root = to_root(cfg)
    assert (root.init_from, root.vae.weights) == ("/home/me/a", "/home/me/b")


# --- safety ---------------------------------------------------------------------------------------

EVIL = "{_target_: builtins.open, file: ran, mode: w}"
CALLBACKS = "hydra: {callbacks: {x: " + EVIL + "}}"
GLOBAL = "# @package _global_\n"


def refused(words: list[str], folder: Path, *expected: str) -> None:
    """The line is refused, and nothing in it has run."""
    with pytest.raises(ConfigError) as e:
        _main([*words, "task=plugins"])
    for text in expected:
        assert text in str(e.value)
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize(
    "override",
    [
        f"callbacks={{x: {EVIL}}}",
        f"+evil={EVIL}",
        "+callbacks.x._target_=builtins.open",
        f"++hydra.callbacks.x={EVIL}",
        "hydra.launcher._target_=builtins.open",
        f"+hydra.launcher.evil={EVIL}",
        "++hydra.sweeper._target_=builtins.open",
    ],
)
def test_code_on_the_command_line_is_refused(here, override):
    refused([override], here, "_target_ runs code")


PLACES = {  # what somebody else's folder may hold, and the words that choose it
    "recipe": ("experiment/evil.yaml", GLOBAL + CALLBACKS, "experiment=evil"),
    "debug preset": ("debug/evil.yaml", GLOBAL + CALLBACKS, "debug=evil"),
    "preset of a group": (
        "vae/evil.yaml", GLOBAL + "defaults: [pca@vae]\n" + CALLBACKS, "vae=evil",
    ),
    "environment of jobs": (
        "experiment/evil.yaml", GLOBAL + "hydra: {job: {env_set: {PATH: ran}}}", "experiment=evil",
    ),
    "launcher": (
        "experiment/evil.yaml",
        GLOBAL + "defaults: [{override /hydra/launcher: joblib}]", "experiment=evil",
    ),
    "setting of hydra": (
        "experiment/evil.yaml", GLOBAL + "hydra: {verbose: true}", "experiment=evil",
    ),
    "included file": (
        "experiment/evil.yaml", GLOBAL + "defaults: [/more/evil]", "experiment=evil",
    ),
    "logging": (
        "experiment/evil.yaml",
        GLOBAL + "hydra: {job_logging: {handlers: {x: {(): builtins.open}}}}", "experiment=evil",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "how"), [("recipe", "plugins_path"), *((kind, "--config-dir") for kind in PLACES)]
)
def test_a_file_of_others_sets_nothing_under_hydra(here, kind, how):
    name, text, chosen = PLACES[kind]
    folder = here / "theirs" / ("conf" if how == "plugins_path" else "")
    write(folder / name, text)
    write(folder / "more/evil.yaml", GLOBAL + CALLBACKS)
    where = ["-cd", "theirs"] if how == "--config-dir" else ["plugins_path=theirs"]
    refused([*where, chosen], here, "hydra.")


def test_a_multirun_is_no_way_around(here):
    write(here / "theirs/experiment/evil.yaml", GLOBAL + CALLBACKS)
    refused(["-m", "-cd", "theirs", "experiment=digits_long,evil"], here, "job 1: hydra.callbacks")
    refused(["-m", f"+evil={EVIL}", "lr=1,2"], here, "_target_ runs code")


@pytest.mark.parametrize("name", ["launcher", "sweeper"])
def test_a_launcher_or_sweeper_of_others_is_refused(here, name):
    write(here / f"theirs/hydra/{name}/evil.yaml", EVIL.strip("{}").replace(", ", "\n"))
    refused(["-cd", "theirs", f"hydra/{name}=evil"], here, f"hydra.{name}._target_=builtins.open")


def test_code_inside_a_launcher_of_hydra_is_refused(here):
    text = "_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\nx: " + EVIL
    write(here / "theirs/hydra/launcher/evil.yaml", text)
    refused(["-cd", "theirs", "hydra/launcher=evil"], here, "hydra.launcher.x._target_")


def test_code_in_a_recipe_is_refused_and_the_setting_named(here):
    write(here / "theirs/experiment/evil.yaml", GLOBAL + "callbacks: {x: " + EVIL + "}")
    refused(["-cd", "theirs", "experiment=evil"], here, "callbacks.x._target_: _target_ runs code")


def test_the_recipe_that_sets_hydra_is_named(here):
    path = write(here / "theirs/experiment/evil.yaml", GLOBAL + CALLBACKS)
    refused(["-cd", "theirs", "experiment=evil"], here, f"experiment=evil ({path})")


def test_yaml_that_would_make_objects_is_not_followed(here):
    write(
        here / "theirs/experiment/evil.yaml",
        GLOBAL + "recipe: !!python/object/apply:os.mkdir [ran]",
    )
    refused(["-cd", "theirs", "experiment=evil"], here, "evil.yaml")


def test_the_command_line_itself_may_choose_hydras_launchers_and_folders(here):
    for words in (
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local"],
        ["hydra.sweep.dir=there"],
        ["+hydra.job.env_set={A: b}"],
    ):
        assert Line().compose(words).hydra


@pytest.mark.slow
def test_our_recipes_and_presets_set_nothing_under_hydra():
    discovery.setup()
    for folder in ("experiment", "debug"):
        for path in sorted((CONF / folder).glob("*.yaml")):
            assert Line().compose([f"{folder}={path.stem}"]), path


# --- all problems at once -------------------------------------------------------------------------


def problems(*words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as e:
        compose(*words)
    return e.value.problems


def test_unknown_names_wrong_types_bad_ranges_and_misfits_are_reported_together():
    words = "lrr=3 backbone.widht=3 vae=kl data.height=18 seed=-1 steps=abc loss=msee"
    found = problems(*words.split(), "optimizer.betas=[0.9]")
    assert [p.split(":")[0] for p in found] == [
        "loss=msee",
        "lrr",
        "backbone.widht",
        "steps=abc",
        "seed=-1",
        "optimizer.betas=[0.9]",
        "data.height=18 does not fit vae=kl, which wants a multiple of 4",
    ]


def test_what_follows_from_a_wrong_choice_is_not_reported():
    assert problems("vae=magvitt", "vae.ch=3", "backbone.patch=3") == (
        "vae=magvitt: no such option; did you mean 'magvit'?",
    )


def test_a_line_that_is_wrong_everywhere_gets_one_problem_for_each_word():
    words = ["a", "c=[", "vae=x", "data.x=1", "lr=y", "e=1,2", "~lr_schedule.warmup"]
    assert len(problems(*words)) == len(words)


# --- files ----------------------------------------------------------------------------------------


def check_line(words: list[str]) -> None:
    """What the command does before it starts anything."""
    line = parse(words)
    discovery.setup(line.overrides)
    overrides = composition.expand_shorthands(line.overrides)
    check(line.compose([*inherited_options(overrides), *overrides]), overrides)


def complaint(words: list[str]) -> str:
    with pytest.raises(SandboxError) as e:
        check_line(words)
    assert e.value.exit_code == 2
    return str(e.value)


@pytest.mark.parametrize(
    ("place", "text", "expected"),
    [
        ("backbone/mine.yaml", "defaults: [dit, _self_]\nwidht: 3\n", "widht"),
        ("backbone/mine.yaml", "defaults: [dit, _self_]\nwidth: abc\n", "abc"),
        ("backbone/mine.yaml", "defaults: [dti, _self_]\n", "did you mean 'dit'?"),
        ("backbone/mine.yaml", "width: [3\n", "mine.yaml:2: not YAML"),
        ("experiment/mine.yaml", GLOBAL + "defaults: [{override /backbon: dit}]", "'backbone'?"),
        ("experiment/mine.yaml", GLOBAL + "defaults: [{override /backbone: dti}]", "'dit'?"),
        ("experiment/mine.yaml", GLOBAL + "lrr: 3", "lrr"),
        ("experiment/mine.yaml", GLOBAL + "task: {score_clip: 3}", "score_clip"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_preset_or_recipe_names_its_file(here, place, text, expected):
    path = write(here / "theirs" / place, text)
    said = complaint(["-cd", "theirs", f"{path.parent.name}=mine"])
    assert "mine" in said and expected in said
    assert len(said.splitlines()) == 1


def test_a_configuration_that_does_not_start_from_ours_is_refused():
    with pytest.raises(ConfigError, match="- root"):
        to_root(OmegaConf.create({"a": 1}))


def test_a_table_of_contents_that_is_not_there_is_said(here):
    assert "--config-name other: no such file; there is config" in complaint(["-cn", "other"])


# --- on top of an earlier run ---------------------------------------------------------------------


@cache
def saved(task: str, *words: str) -> str:
    """The text of config.yaml; many tests use the same few."""
    node = to_container(compose(*words))
    node["task"]["plugin"] = task
    return yaml.safe_dump(node)


def earlier(folder: Path, *words: str, task: str = "task/train") -> Path:
    """A finished run, as far as configurations go."""
    write(folder / "config.yaml", saved(task, *words))
    write(folder / "result.json", "{}")
    return folder


def on_top(*words: str) -> Root:
    words = composition.expand_shorthands(words)
    return resolve_run(to_root(composition.compose([*inherited_options(words), *words])), words)


def test_a_task_on_a_run_takes_its_configuration_and_what_the_line_names(here):
    earlier(here / "outputs/a", "schedule=ddpm", "sampler=ddim", "sampler.eta=0.5", "seed=7")
    root = on_top("task=sample", "sampler.steps=3", "vae.weights=null")
    assert (root.sampler.plugin, root.sampler.eta, root.sampler.steps) == ("sampler/ddim", 0.5, 3)
    assert (root.seed, root.schedule.plugin, root.vae.weights) == (7, "schedule/ddpm", None)
    assert root.task.plugin == "task/sample" and root.task.run.endswith("a")


def test_a_setting_of_the_runs_own_component_can_be_named(here):
    earlier(here / "outputs/a", "schedule=ddpm", "sampler=ddim", "sampler.steps=7")
    root = on_top("task=sample", "sampler.eta=1")
    assert root.sampler.eta == 1 and root.sampler.steps == 7


def test_a_component_that_the_line_chooses_replaces_that_of_the_run(here):
    earlier(here / "outputs/a", "schedule=ddpm", "sampler=ddim", "sampler.eta=0.5")
    assert on_top("task=sample", "sampler=ddim").sampler.eta == 0.0
    assert on_top("task=sample", "sampler=heun").sampler.plugin == "sampler/heun"


def test_what_leaves_the_meaning_of_weights_alone_may_differ_from_the_run(here):
    earlier(here / "outputs/a", "backbone.in_channels=32")
    may = ("schedule.shift=3", "backbone.gradient_checkpointing=true", "backbone.in_channels=null")
    root = on_top("task=sample", *may, "backbone.width=64", "conditioning=words", "data.frames=13")
    assert root.schedule.shift == 3 and root.backbone.gradient_checkpointing
    assert root.backbone.in_channels is None and root.data.frames == 13


def test_the_newest_run_that_has_a_system_is_taken(here):
    for age, (name, task) in enumerate(
        [("c", "task/train_vae"), ("b", "task/train"), ("a", "task/train")]
    ):
        result = earlier(here / "outputs" / name, task=task) / "result.json"
        os.utime(result, (1000 - age, 1000 - age))
    assert on_top("task=evaluate").task.run == "outputs/b"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["task=sample"], "task.run=null: no finished run in out=outputs"),
        (["task=sample", "run=nowhere"], "task.run=nowhere: no run there"),
        (["task=sample", "run=first"], "task=train_vae, which has no system to sample from"),
        (["task=sample", "run=mine", "experiment=digits_long"], "configuration of an earlier run"),
        (["task=sample", "run=mine", "sampler.eta=1"], "sampler=euler has no such setting"),
        (["task=sample", "run=mine", "sampler=ddim", "schedule.timesteps=3"], "schedule=flow has"),
        (["task=sample", "run=broken"], "broken: vae.pach: vae/pca has no such setting"),
        (["task=sample", "run=wrong"], "wrong: vae.patch: Value 'four'"),
        (["task=sample", "run=mine", "data.frames=8"], "data.frames=8 does not fit vae=pca"),
        (
            ["task=sample", "run=mine", "backbone=unet3d"],
            "backbone=unet3d: the weights of mine were trained with backbone=dit; leave this",
        ),
        (
            ["task=evaluate", "run=mine", "schedule=ddpm", "sampler=ddim"],
            "schedule=ddpm: the weights of mine were trained with schedule=flow",
        ),
        (
            ["task=sample", "run=eps", "schedule.prediction=v"],
            "schedule.prediction=v: the weights of eps were trained with schedule.prediction=eps",
        ),
        (["task=sample", "run=mine", "schedule=null"], "schedule=null: want one of"),
        (
            ["task=sample", "run=mine", "backbone.width=16", "backbone.num_heads=1"],
            "backbone.width=16, backbone.num_heads=1: the weights of mine were trained with "
            "backbone.width=64, backbone.num_heads=2; leave this setting out",
        ),
        (
            ["task=sample", "run=mine", "vae=pca", "vae.patch=2"],
            "vae.patch=2: the weights of mine were trained with vae.patch=4",
        ),
        (["task=sample", "run=mine", "lr=0.1"], "lr=0.1: has no effect on task=sample; leave"),
        (
            ["task=evaluate", "run=mine", "steps=50"],
            "steps=50: has no effect on task=evaluate; leave it out, or give sampler.steps",
        ),
        (["task=export", "run=mine", "optimizer=muon"], "optimizer=muon: has no effect on"),
        (["task=sample", "run=mine", "callbacks=[samples]"], "callbacks=[samples]: has no effect"),
        (["task=sample", "run=mine", "init_from=a"], "init_from=a and task.run=mine: a run has"),
        (["task=sample", "init_from=a", "images=[b]"], "init_from=a: no such file or folder"),
        (["task=sample", "init_from=a", "images=[b]"], "task.images[0]=b: no such file or folder"),
        (["task=evaluate", "init_from=a"], "task.run=null: no finished run"),
    ],
)
def test_what_cannot_be_put_on_a_run_is_said(here, words, expected):
    text = (earlier(here / "mine") / "config.yaml").read_text()
    earlier(here / "eps", "schedule=ddpm", "schedule.prediction=eps", "sampler=ddim")
    other = {"first": ("task/train", "task/train_vae"), "broken": ("patch: 4", "pach: 4"),
             "wrong": ("patch: 4", "patch: four")}  # fmt: skip
    for name, (old, new) in other.items():
        write(here / name / "config.yaml", text.replace(old, new))
        write(here / name / "result.json", "{}")
    assert expected in complaint(words)
    with pytest.raises(SandboxError, match=re.escape(expected)):
        _main(["-m", *words])


def test_the_run_of_another_first_stage_is_refused_with_all_else_that_is_wrong(here):
    earlier(here / "first", "vae=kl", task="task/train_vae")
    said = complaint(["vae=vq", "vae.weights=first", "lr=-1"])
    assert "vae.weights=first: a run of vae=kl, not of vae=vq" in said and "lr=-1" in said
    said = complaint(["vae=kl", "vae.embed_dim=6", "vae.weights=first"])
    assert "makes latents of 4x9x4x4, vae=kl has settings for 6x9x4x4" in said
    check_line(["vae=kl", "vae.weights=first", "vae.resolution=32"])


def test_published_weights_stand_for_a_run_with_the_configuration_of_the_line(here):
    earlier(here / "outputs/a", "schedule=ddpm", "sampler=ddim", "seed=7")
    root = on_top("task=sample", "init_from=model.ckpt", "schedule.std=2")
    assert root.task.run is None and (root.seed, root.schedule.plugin) == (0, "schedule/flow")
    root = on_top("task=sample", "experiment=dynamicrafter_512")
    assert root.task.run is None and root.backbone.plugin == "backbone/unet3d"


def test_a_sweep_over_runs_takes_the_configuration_of_each(here):
    earlier(here / "a", "seed=1")
    earlier(here / "b", "seed=2")
    with pytest.raises(ConfigError, match=r"job 1: task.run=c: no run there"):
        _main(["-m", "task=sample", "run=a,c,b"])
