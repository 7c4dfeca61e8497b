"""A small system: composed as the command composes it, wired, and trained by the real engine."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from sandbox.cli.wandb_agent import literal
from sandbox.config import composition, discovery, registry
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS, Root, to_container, to_root
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import ConfigError, PluginConfig

TINY = (
    "vae.weights=null",
    "backbone.width=8",
    "backbone.num_blocks=1",
    "backbone.time_features=8",
    "conditioning.width=8",
    "conditioning.buckets=32",
    "sampler.steps=2",
    "data.batch_size=2",
    "data.clips_per_epoch=16",
    "trainer.threads=1",
    "logger=null",
    "steps=2",
)
PARTNERS = ("schedule", "sampler", "loss", "metric", "conditioning", "vae", "data")


# --- configurations -------------------------------------------------------------------------------


def composed(*overrides: str) -> Root:
    """What the command line composes, typed but not wired: numbers of other components are open.

    Composed once, and copied, where plugins are the project's alone.
    """
    own = "SANDBOX_PLUGINS" in os.environ or any(o.startswith("plugins_path=") for o in overrides)
    return _compose(overrides) if own else deepcopy(_composed_once(overrides))


def _compose(overrides: tuple[str, ...]) -> Root:
    discovery.setup(overrides)
    return to_root(composition.compose(composition.expand_shorthands(overrides)))


_composed_once = cache(_compose)


@cache
def tiny() -> Root:
    """The default system in a size that takes a step in milliseconds, not wired."""
    return composed(*TINY)


def with_part(root: Root, group: str, cfg: PluginConfig | None) -> Root:
    """`root` with another component; a first stage that is trained gets random weights.

    A schedule gets a learned variance where the loss takes no other, a sampler that passes numbers
    a method that trains them, one that keeps frames a causal backbone, and a method a sampler and a
    guidance that it accepts, and an encoder where it reads features. Networks of roles get the
    weights of the tiny system.
    """
    if group in registry.SEVERAL and cfg is not None:
        return replace(root, **{group: {cfg.plugin.rpartition("/")[2]: cfg}})
    if group == "vae" and cfg is not None and cfg.fitted() == "trained":
        cfg = replace(cfg, weights=None)
    if group in ("method", "guidance") and cfg is not None:
        files = {name: tiny_weights() for name, path in cfg.files().items() if path is None}
        cfg = replace(cfg, **files)
    root = replace(root, **{group: cfg})
    if group == "method" and cfg is not None:
        if cfg.encodes_video():
            encoder = registry.default("features", "words")
            root = replace(root, features=replace(encoder, width=8, steps=4, clips=16))
        if cfg.learns_guidance():
            root = replace(root, guidance=registry.default("guidance", "none"))
        if any(cfg.accepts_sampler(root.sampler)):
            samplers = (s for _, s in plugin_configs("sampler") if not any(cfg.accepts_sampler(s)))
            root = replace(root, sampler=next(samplers))
    if group == "features" and cfg is not None:
        root = replace(root, method=registry.default("method", "repa"))
    if group == "sampler" and cfg is not None and (needed := frozenset(cfg.scalars())):
        methods = [m for _, m in plugin_configs("method") if needed <= m.scalars().keys()]
        root = replace(root, method=methods[0])
    is_causal = group == "sampler" and cfg is not None and cfg.caches_frames()
    if is_causal and hasattr(root.backbone, "attention"):
        root = replace(root, backbone=replace(root.backbone, attention="causal"))
    if group in ("loss", "schedule") and hasattr(root.schedule, "learned_variance"):
        learned = replace(root.schedule, learned_variance=True)
        if any(root.loss.accepts(root.schedule)) and not any(root.loss.accepts(learned)):
            return replace(root, schedule=learned)
    return root


@cache
def tiny_weights() -> str:
    """A file with weights of the tiny system."""
    from sandbox.storage import weight_files
    from sandbox.training.build import build_system

    path = Path(tempfile.mkdtemp(), "tiny.safetensors")
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    weight_files.write(build_system(wire(tiny())).trainable_state(), path)
    return str(path)


def with_role_weights(wiring: Wiring, folder: Path) -> Wiring:
    """The wiring with weights of its own sizes for the networks of roles."""
    from sandbox.storage import weight_files
    from sandbox.training.build import build_system

    root, path = wiring.root, folder / "role.safetensors"
    changed = {
        group: replace(cfg, **dict.fromkeys(cfg.files(), str(path)))
        for group in ("method", "guidance")
        if (cfg := getattr(root, group)).roles() and cfg.files()
    }
    if not changed:
        return wiring
    plain = {"method": "denoising", "guidance": "none"}
    own = replace(root, **{g: registry.default(g, name) for g, name in plain.items()})
    system = build_system(replace(wiring, root=own), folder)
    weight_files.write(system.trainable_state(), path)
    return replace(wiring, root=replace(root, **changed))


def wired_around(group: str, cfg: PluginConfig) -> Wiring:
    """A tiny system that has `cfg`; another component is exchanged where the default does not fit.

    Raises the ConfigError of the default system where no exchange helps.
    """
    root = with_part(tiny(), group, cfg)
    try:
        return wire(root)
    except ConfigError as e:
        for other in _exchanged(root, group):
            if getattr(other, group) == getattr(root, group) and (found := _wired(other)):
                return found
        raise e


def _exchanged(root: Root, group: str) -> Iterator[Root]:
    """`root` with pictures in place of clips, then with another component in one other group.

    Conditioning may want both another network and another first stage.
    """
    if group != "data":
        yield replace(root, data=replace(root.data, frames=1))
    for partner in (g for g in PARTNERS if g != group):
        for _, cfg in plugin_configs(partner):
            yield with_part(root, partner, cfg)
    if group == "conditioning":
        for (_, backbone), (_, vae) in product(plugin_configs("backbone"), plugin_configs("vae")):
            yield with_part(with_part(root, "backbone", backbone), "vae", vae)


def _wired(root: Root) -> Wiring | None:
    try:
        return wire(root)
    except ConfigError:
        return None


def presets() -> Iterator[tuple[str, str, Path]]:
    """(group, name, file) of every preset, of the project and of plugin folders."""
    discovery.setup()
    for folder in (CONF, *(f / "conf" for f in discovery.plugin_folders(()))):
        for path in sorted(folder.glob("*/*.yaml")):
            if path.parent.name in GROUPS:
                yield path.parent.name, path.stem, path


def preset(group: str, name: str) -> PluginConfig:
    """The Config of a preset, composed by Hydra."""
    found = getattr(_composed_presets(_names(group).index(name)), group)
    if isinstance(found, dict):
        (found,) = found.values()
    return found


@cache
def recipe(name: str) -> Root:
    """The configuration of a recipe, typed but not wired."""
    return composed(f"experiment={name}")


def words(name: str, *groups: str) -> list[str]:
    """The overrides that give `groups` the settings of a recipe."""
    found = []
    for group in groups:
        cfg = getattr(recipe(name), group)
        default = registry.default(*cfg.plugin.split("/"))
        found.append(f"{group}={cfg.plugin.partition('/')[2]}")
        for f in fields(cfg):
            value = getattr(cfg, f.name)
            if value != getattr(default, f.name):
                found.append(f"{group}.{f.name}={literal(to_container(value))}")
    return found


@cache
def _composed_presets(turn: int) -> Root:
    """One preset of each group, the `turn`-th, at once: each composition takes its time."""
    chosen = {g: _names(g)[turn : turn + 1] for g in GROUPS}
    return composed(*(
        f"{g}=[{name}]" if g in registry.SEVERAL else f"{g}={name}"
        for g, names in chosen.items() for name in names
    ))  # fmt: skip


@cache
def _names(group: str) -> list[str]:
    return [name for g, name, _ in presets() if g == group]


def plugin_configs(*groups: str) -> Iterator[tuple[str, PluginConfig]]:
    """("schedule/ddpm", its default Config) of every plugin that can be read, in these groups."""
    discovery.setup()
    for plugin in registry.plugins():
        if plugin.config and (not groups or plugin.group in groups):
            yield plugin.key, registry.default(plugin.group, plugin.name)


# --- training -------------------------------------------------------------------------------------


@dataclass
class Trained:
    """What a short training leaves: the system, its losses by step, and the folder of the run."""

    system: Any
    losses: list[float]
    folder: Path


def train(wiring: Wiring, out: Path) -> Trained:
    """Trains with the real engine in a new run folder below `out`; no scores and no page."""
    from sandbox.model.sharding import load_tensors
    from sandbox.runs.resume import open_run
    from sandbox.training.build import build_system
    from sandbox.training.loop import fit
    from sandbox.training.setup import start

    root = replace(wiring.root, out=str(out), cache=str(out / "cache"))
    wiring = replace(wiring, root=root)
    with open_run(out, "run", to_container(root), "never") as run:
        system = build_system(wiring, run.folder)
        with start(system, run) as training:
            fit(training)
            averages = training.optimizer_averages()  # what samples and weight files have
            named = dict(system.named_parameters())
            load_tensors({name: named[name] for name in averages}, averages)
        losses = [row["loss"] for row in run.metrics().values()]
    return Trained(system, losses, run.folder)


def sampled(system: Any, count: int = 2) -> Any:
    """`count` clips (count, 3, T, H, W) of the data's first prompts."""
    from sandbox.evaluation.prompts import data_batch

    root = system.root
    prompts = registry.create(root.data).prompts() or [""]
    is_told = root.conditioning.needs() & {"captions", "text"}
    captions = (prompts * count)[:count] if is_told else ()
    return system.eval().sample(data_batch(root, captions, count))
