"""Published recipes set every value; tiny siblings differ only in size."""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import pytest
import yaml

from sandbox.config import CONF, GROUPS, Root
from sandbox.contracts import PluginConfig
from sandbox.main import checked
from tests.helpers import composed

SYSTEMS = ("ldm", "dynamicrafter", "easyanimate")
RECIPES = sorted(p.stem for s in SYSTEMS for p in CONF.glob(f"experiment/{s}_*.yaml"))
TINY_LDM = [name for name in RECIPES if name.startswith("ldm") and name.endswith("_tiny")]
FULL = [name for name in RECIPES if not name.endswith("_tiny")]
OF_THE_USER = {"logger", "resume", "kernels", "adapter", "metric", "reconstruction", "stage"}
STATED = ("data", "vae", "backbone", "schedule", "loss", "sampler", "optimizer", "lr_schedule",
          "ema", "checkpoint")  # fmt: skip
# paths, memory use and write retries: not part of a recipe
OPERATIONAL = {"plugin", "root", "weights", "train_list", "val_list", "val_fraction", "max_bad",
               "train_frames", "frames_per_pass", "attempts", "wait", "cosine_s", "turning_step",
               "one_by_one", "every", "best_of"}  # fmt: skip


@cache
def root_of(recipe: str) -> Root:
    return composed(f"experiment={recipe}")


def chosen(recipe: str) -> dict[str, str]:
    """Group -> option of the recipe's defaults list."""
    defaults = yaml.safe_load((CONF / f"experiment/{recipe}.yaml").read_text())["defaults"]
    return {k.removeprefix("override /"): v for entry in defaults for k, v in entry.items()}


def stated(group: str, option: str) -> set[str]:
    """Fields that the preset and its parents set."""
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
    """So that changing a default changes no published recipe."""
    cfg = getattr(root_of(recipe), group)
    assert isinstance(cfg, PluginConfig)
    own = {f.name for f in fields(cfg)} - OPERATIONAL
    assert own <= stated(group, chosen(recipe)[group])


@pytest.mark.parametrize("recipe", FULL)
def test_absent_data_and_weights_are_named_before_a_run(recipe):
    from sandbox.contracts import ConfigError

    with pytest.raises(ConfigError) as raised:
        checked(root_of(recipe))
    assert all(p.startswith(("data.", "vae.weights", "init_from")) for p in raised.value.problems)


# DynamiCrafter's start from released weights: tests/systems/test_recipes_dynamicrafter.py
@pytest.mark.parametrize("recipe", TINY_LDM)
def test_a_tiny_sibling_differs_only_in_size_and_data(recipe):
    """The same plugins, schedule, loss, network structure, optimizer and EMA."""
    full, tiny = (root_of(name) for name in (recipe.removesuffix("_tiny"), recipe))
    for group in STATED[1:]:
        assert getattr(full, group).plugin == getattr(tiny, group).plugin, group
    for group in ("schedule", "loss", "optimizer", "lr_schedule", "ema", "trainer", "guidance"):
        assert getattr(full, group) == getattr(tiny, group), group
    assert (full.seed, full.precision) == (tiny.seed, tiny.precision)
