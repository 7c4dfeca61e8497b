"""Published recipes set every value; tiny siblings differ only in size."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import yaml

from sandbox.cli.jobs import check_and_wire
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS
from sandbox.contracts import ADDED, PluginConfig
from tests.helpers import recipe

SYSTEMS = ("ldm", "dynamicrafter", "easyanimate")
RECIPES = sorted(p.stem for s in SYSTEMS for p in CONF.glob(f"experiment/{s}_*.yaml"))
TINY_LDM = [name for name in RECIPES if name.startswith("ldm") and name.endswith("_tiny")]
FULL = [name for name in RECIPES if not name.endswith("_tiny")]
OF_THE_USER = {"logger", "resume", "kernels", "adapter", "metric", "reconstruction", "stage",
               "features"}  # fmt: skip
STATED = ("data", "vae", "backbone", "schedule", "loss", "sampler", "optimizer", "lr_schedule",
          "ema", "checkpoint")  # fmt: skip
# paths, memory use and write retries: not part of a recipe
OPERATIONAL = {"plugin", "root", "weights", "train_list", "val_list", "val_fraction", "max_bad",
               "train_frames", "frames_per_pass", "attempts", "wait", "cosine_s", "turning_step",
               "one_by_one", "every", "best_of"}  # fmt: skip


def pages(recipe: str) -> list[dict[str, Any]]:
    """The files of the recipe and of the recipes that it extends, outermost first."""
    node = yaml.safe_load((CONF / f"experiment/{recipe}.yaml").read_text())
    nested = [d for d in node["defaults"] if isinstance(d, str) and d != "_self_"]
    return [node, *(page for name in nested for page in pages(name))]


def chosen(recipe: str) -> dict[str, str]:
    """Group -> option chosen by the recipe or the recipes that it extends."""
    found: dict[str, str] = {}
    for page in pages(recipe):
        for entry in page["defaults"]:
            if isinstance(entry, dict):
                found = {k.removeprefix("override /"): v for k, v in entry.items()} | found
    return found


def stated(group: str, option: str, recipe: str) -> set[str]:
    """Fields set by the recipe, or by its preset and the presets which that extends."""
    found = {name for page in pages(recipe) for name in page.get(group) or ()}
    path = CONF / group / f"{option}.yaml"
    while path.is_file():
        node = yaml.safe_load(path.read_text())
        base = next(d for d in node.pop("defaults") if d != "_self_")
        found, path = found | set(node), CONF / group / f"{base}.yaml"
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_chooses_every_group(name):
    assert set(GROUPS) - OF_THE_USER - {"task"} <= set(chosen(name))


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("group", STATED)
def test_it_states_every_number(name, group):
    """So changing a default never changes a published recipe."""
    cfg = getattr(recipe(name), group)
    assert isinstance(cfg, PluginConfig)
    own = {f.name for f in fields(cfg) if ADDED not in f.metadata} - OPERATIONAL
    assert own <= stated(group, chosen(name)[group], name)


@pytest.mark.parametrize("name", FULL)
def test_missing_data_and_weights_are_named_before_a_run(name):
    from sandbox.contracts import ConfigError

    with pytest.raises(ConfigError) as raised:
        check_and_wire(recipe(name))
    assert all(p.startswith(("data.", "vae.weights", "init_from")) for p in raised.value.problems)


# DynamiCrafter's go on from released weights: tests/systems/test_recipes_dynamicrafter.py
@pytest.mark.parametrize("name", TINY_LDM)
def test_a_tiny_sibling_differs_only_in_size_and_data(name):
    """The same plugins, noise, loss, architecture, optimizer and EMA."""
    full, tiny = (recipe(n) for n in (name.removesuffix("_tiny"), name))
    for group in STATED[1:]:
        assert getattr(full, group).plugin == getattr(tiny, group).plugin, group
    for group in ("schedule", "loss", "optimizer", "lr_schedule", "ema", "trainer", "guidance"):
        assert getattr(full, group) == getattr(tiny, group), group
    assert (full.seed, full.precision) == (tiny.seed, tiny.precision)
