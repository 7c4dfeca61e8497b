"""Recipes of published systems leave nothing to a default; tiny siblings are the same, shrunk."""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import pytest
import yaml

from sandbox.cli.jobs import checked
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS, Root
from sandbox.contracts import PluginConfig
from tests.helpers import composed

SYSTEMS = ("ldm", "dynamicrafter", "easyanimate")
RECIPES = sorted(p.stem for s in SYSTEMS for p in CONF.glob(f"experiment/{s}_*.yaml"))
TINY_LDM = [name for name in RECIPES if name.startswith("ldm") and name.endswith("_tiny")]
FULL = [name for name in RECIPES if not name.endswith("_tiny")]
OF_THE_USER = {"logger", "resume", "kernels", "adapter", "metric", "reconstruction", "stage"}
STATED = ("data", "vae", "backbone", "schedule", "loss", "sampler", "optimizer", "lr_schedule",
          "ema", "checkpoint")  # fmt: skip
# where files are, how much memory is used, how often a write is tried: not of a recipe
OPERATIONAL = {"plugin", "root", "weights", "train_list", "val_list", "val_fraction", "max_bad",
               "train_frames", "frames_per_pass", "attempts", "wait", "cosine_s", "turning_step",
               "one_by_one", "every", "best_of"}  # fmt: skip


@cache
def whole(recipe: str) -> Root:
    return composed(f"experiment={recipe}")


def chosen(recipe: str) -> dict[str, str]:
    """Group -> option, as the recipe's own list says."""
    said = yaml.safe_load((CONF / f"experiment/{recipe}.yaml").read_text())["defaults"]
    return {k.removeprefix("override /"): v for entry in said for k, v in entry.items()}


def stated(group: str, option: str) -> set[str]:
    """Fields that the preset and those it is made from set."""
    path = CONF / group / f"{option}.yaml"
    if not path.is_file():
        return set()
    node = yaml.safe_load(path.read_text())
    base = next(d for d in node.pop("defaults") if d != "_self_")
    return set(node) | stated(group, base)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_chooses_every_group(recipe):
    assert set(GROUPS) - OF_THE_USER - {"task"} <= set(chosen(recipe))


@pytest.mark.parametrize("recipe", FULL)
@pytest.mark.parametrize("group", STATED)
def test_its_presets_state_every_number(recipe, group):
    """A default that is tuned later changes no published recipe."""
    cfg = getattr(whole(recipe), group)
    assert isinstance(cfg, PluginConfig)
    own = {f.name for f in fields(cfg)} - OPERATIONAL
    assert own <= stated(group, chosen(recipe)[group])


@pytest.mark.parametrize("recipe", FULL)
def test_absent_data_and_weights_are_named_before_a_run(recipe):
    from sandbox.contracts import ConfigError

    with pytest.raises(ConfigError) as raised:
        checked(whole(recipe))
    assert all(p.startswith(("data.", "vae.weights", "init_from")) for p in raised.value.problems)


# DynamiCrafter's go on from released weights: tests/systems/test_recipes_dynamicrafter.py
@pytest.mark.parametrize("recipe", TINY_LDM)
def test_a_tiny_sibling_differs_in_size_and_data_alone(recipe):
    """The same plugins, and the same noise, loss, network form, optimizer and average."""
    full, tiny = (whole(name) for name in (recipe.removesuffix("_tiny"), recipe))
    for group in STATED[1:]:
        assert getattr(full, group).plugin == getattr(tiny, group).plugin, group
    for group in ("schedule", "loss", "optimizer", "lr_schedule", "ema", "trainer", "guidance"):
        assert getattr(full, group) == getattr(tiny, group), group
    assert (full.seed, full.precision) == (tiny.seed, tiny.precision)
