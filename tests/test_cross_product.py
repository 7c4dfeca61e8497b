"""Every combination of components works or is refused with reasons: wired, trained, saved.

All combinations of plugins are wired within two overlapping sets of groups, DENOISER and NOISE.
A subset that covers every compatible pair of options trains for two steps in the real engine;
so do 200 configurations with random settings.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import combinations, cycle, product
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from sandbox.config import discovery, registry
from sandbox.config.root import Root
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import ConfigError, DataConfig, PluginConfig
from sandbox.model.components import build
from sandbox.training.build import load_system
from tests.helpers import (
    plugin_configs,
    preset,
    presets,
    sampled,
    tiny,
    train,
    wired_around,
    with_part,
    with_role_weights,
)
from tests.inputs import with_clips

pytestmark = pytest.mark.slow
GROUPS = (
    "data", "vae", "backbone", "conditioning", "schedule", "loss", "sampler", "guidance",
    "optimizer", "lr_schedule", "ema", "metric",
)  # fmt: skip
INDEPENDENT = ("optimizer", "lr_schedule", "ema")
DENOISER = ("data", "vae", "backbone", "conditioning", "schedule")
NOISE = ("conditioning", "schedule", "loss", "sampler", "guidance")
SCORED = ("data", "metric")
METHODS = ("vae", "backbone", "schedule", "method")  # a method brings its sampler and guidance
SMALL = 1_000_000  # parameters; other tests build larger presets on the meta device
LARGE = 2**14  # pixels of all frames; presets with larger clips get the size of their plugin
CALLS = 3  # sampling steps
Choice = dict[str, str]  # group -> option

discovery.setup()


# --- options and combinations ---------------------------------------------------------------------


SIZES = {
    "data": {"clips_per_epoch": 24, "batch_size": 2},
    "vae": {"fit_clips": 16},
    "backbone": {"width": 8, "num_blocks": 1, "num_heads": 2, "time_features": 8},
    "conditioning": {"width": 8, "buckets": 32},
    "sampler": {"steps": CALLS},
}


def shrunk(cfg: PluginConfig) -> PluginConfig:
    """The same component, cheaper to run and compatible with the same components (size apart)."""
    group, _, name = cfg.plugin.partition("/")
    sizes = SIZES.get(group, {})
    if isinstance(cfg, DataConfig) and cfg.frames * cfg.height * cfg.width > LARGE:
        default = registry.default(group, name)
        sizes = sizes | {k: getattr(default, k) for k in ("frames", "height", "width")}
    return replace(cfg, **{k: v for k, v in sizes.items() if k in vars(cfg)})


@cache
def options(group: str, with_presets: bool = False) -> dict[str, PluginConfig | None]:
    """Name -> Config of everything that `group=` takes."""
    found = {key.partition("/")[2]: cfg for key, cfg in plugin_configs(group)}
    if with_presets:
        found |= {name: preset(g, name) for g, name, _ in presets() if g == group}
    made: dict[str, PluginConfig | None] = {name: shrunk(cfg) for name, cfg in found.items()}
    if group == "data":  # and as images, which 2-D networks need
        made |= {f"{name} data.frames=1": replace(cfg, frames=1) for name, cfg in made.items()}
    return made | ({"null": None} if group == "metric" else {})


def rooted(choice: Choice) -> Root:
    root = tiny()
    for group, name in choice.items():
        root = with_part(root, group, options(group, True)[name])
    return root


def wired(choice: Choice) -> Wiring | None:
    return wired_root(rooted(choice))


def wired_root(root: Root) -> Wiring | None:
    """None if a ConfigError with reasons refuses it; no other error may be raised."""
    try:
        return wire(root)
    except ConfigError as e:
        assert e.problems
        assert all(isinstance(p, str) and ("=" in p or ":" in p) for p in e.problems)
        return None


def covering(valid: list[Choice], seed: int = 0) -> list[Choice]:
    """A small subset of `valid` that covers every pair of options in `valid` (greedy)."""
    names = {g: sorted({c[g] for c in valid}) for g in valid[0]}
    codes = np.array([[names[g].index(c[g]) for g in names] for c in valid])
    pairs = [
        codes[:, i] * 100 + codes[:, j] + 10_000 * n
        for n, (i, j) in enumerate(combinations(range(len(names)), 2))
    ]
    table = np.stack(pairs, 1)  # (combinations, pairs)
    missing = np.ones(table.max() + 1, bool)
    order = np.random.default_rng(seed).permutation(len(valid))
    chosen = []
    while (gain := missing[table[order]].sum(1)).any():
        best = order[gain.argmax()]
        chosen.append(valid[best])
        missing[table[best]] = False
    return chosen


@cache
def denoisers() -> tuple[list[Choice], list[Choice]]:
    """Every combination of options of DENOISER: (those that wire, those that are refused)."""
    found: tuple[list[Choice], list[Choice]] = [], []
    for names in product(*(options(g) for g in DENOISER)):
        choice = dict(zip(DENOISER, names, strict=True)) | {"metric": "null"}
        found[wired(choice) is None].append(choice)
    return found


@cache
def noises() -> tuple[list[Choice], list[Choice]]:
    """Every combination of options of NOISE, each completed with a denoiser that wires."""
    found: tuple[list[Choice], list[Choice]] = [], []
    networks = sorted(denoisers()[0], key=lambda c: c["backbone"] == "dit")  # it takes all samplers
    around = {shared(c): c for c in networks}
    for names in product(*(options(g) for g in NOISE)):
        choice = dict(zip(NOISE, names, strict=True))
        choice = around[shared(choice)] | choice
        found[wired(choice) is None].append(choice)
    return found


@cache
def scored() -> tuple[list[Choice], list[Choice]]:
    """Every metric with all data, each completed with a denoiser that wires."""
    found: tuple[list[Choice], list[Choice]] = [], []
    around = {c["data"]: c for c in denoisers()[0]}
    for data, metric in product(options("data"), options("metric")):
        choice = around[data] | {"metric": metric}
        found[wired(choice) is None].append(choice)
    return found


def shared(choice: Choice) -> tuple[str, ...]:
    """Options of the groups that are in both DENOISER and NOISE."""
    return tuple(choice[g] for g in DENOISER if g in NOISE)


def mixed(seed: int) -> Iterator[Choice]:
    """Every choice of `denoisers` with a random matching one of `noises`, and vice versa."""
    generator = random.Random(seed)
    networks, noise = denoisers()[0], [{g: c[g] for g in NOISE} for c in noises()[0]]
    independent = cycle(product(*(options(g) for g in INDEPENDENT)))
    metrics: dict[str, list[str]] = {}
    for choice in scored()[0]:
        metrics.setdefault(choice["data"], []).append(choice["metric"])
    for mine, others in ((networks, noise), (noise, networks)):
        fits: dict[tuple[str, ...], list[Choice]] = {}
        for choice in others:
            fits.setdefault(shared(choice), []).append(choice)
        for choice in mine:
            full = choice | generator.choice(fits[shared(choice)])
            full |= dict(zip(INDEPENDENT, next(independent), strict=True))
            yield full | {"metric": generator.choice(metrics[full["data"]])}


@cache
def all_choices() -> list[Choice]:
    """Combinations of all groups that wire.

    No wiring rule spans both DENOISER and NOISE (a test checks this), so a random match for each
    choice is enough. The options of INDEPENDENT, which depend on almost no other group, are cycled.
    """
    return [choice for choice in mixed(0) if wired(choice)]


def to_words(choice: Choice) -> str:
    return " ".join(f"{g}={n}" for g, n in choice.items())


# --- wiring ---------------------------------------------------------------------------------------


def test_every_combination_of_plugins_wires_or_is_refused_with_reasons():
    for (valid, refused), least in ((denoisers(), 100), (noises(), 100), (scored(), 10)):
        assert len(valid) > least and len(refused) > least


def test_denoisers_that_wire_fit_noises_that_wire():
    """So it is enough to test all combinations within DENOISER and within NOISE."""
    for choice in mixed(1):
        sampler, backbone = (options(g)[choice[g]] for g in ("sampler", "backbone"))
        fits = (
            (not sampler.frame_times() or backbone.takes_frame_times())
            and (not sampler.scalars() or backbone.takes_time_scalars())
            and not sampler.caches_frames()  # it needs other settings of the backbone
        )
        if fits and choice["optimizer"] == "adamw":  # muon needs a backbone with matrices
            assert wired(choice), to_words(choice)


def test_every_plugin_is_in_some_combination_that_wires():
    for group in GROUPS:
        assert {c[group] for c in all_choices()} == set(options(group)), group


def test_presets_wire_or_are_refused_with_reasons():
    generator = random.Random(0)
    for _ in range(1500):
        wired({g: generator.choice([*options(g, True)]) for g in (*DENOISER, *SCORED, *NOISE)})


# --- training -------------------------------------------------------------------------------------


def take_two_steps(wiring: Wiring, tmp_path, words: str) -> None:
    """Trains, samples, saves and reloads; a failure names the configuration."""
    data = with_clips(wiring.root.data, tmp_path, wiring.root)
    wiring = replace(wiring, root=replace(wiring.root, data=data))
    wiring = with_role_weights(wiring, tmp_path)
    try:
        trained = train(wiring, tmp_path / "runs")
        clips = sampled(trained.system)
        again = sampled(load_system(trained.folder, "live"))
    except Exception as e:
        e.add_note(words)
        raise
    size = wiring.clips[0]
    assert clips.shape == (2, size.channels, size.frames, size.height, size.width), words
    assert clips.isfinite().all(), words
    assert len(trained.losses) == 2, words
    assert np.isfinite(trained.losses).all(), words
    assert torch.equal(clips, again), words


def test_every_method_trains_with_each_component_that_fits(tmp_path):
    """Every pair of a method and a first stage, backbone or schedule; the others are refused."""
    found: tuple[list[Choice], list[Choice]] = [], []
    for names in product(*(options(g) for g in METHODS)):
        choice = dict(zip(METHODS, names, strict=True))
        found[wired(choice) is None].append(choice)
    assert {c["method"] for c in found[0]} == set(options("method")) and found[1]
    chosen, seen = [], set[tuple[str, str, str]]()
    for choice in found[0]:
        new = {(choice["method"], g, choice[g]) for g in METHODS[:3]} - seen
        if new:
            chosen.append(choice)
            seen |= new
    for i, choice in enumerate(chosen):
        (folder := tmp_path / str(i)).mkdir()
        take_two_steps(wired(choice), folder, to_words(choice))


@pytest.mark.exhaustive
def test_every_pair_of_plugins_that_fit_trains_samples_and_reloads(tmp_path):
    for choice in covering(all_choices()):
        take_two_steps(wired(choice), tmp_path, to_words(choice))


@pytest.mark.exhaustive
def test_small_presets_train_sample_and_reload(tmp_path):
    """Each at least once: in a random combination, else in a small compatible system.

    Excludes full-size presets and those that fit one published system only: its recipes test them.
    """
    generator, names = random.Random(0), small_options()
    missing = {(g, n) for g in GROUPS for n in names[g]}
    most, chosen = len(missing), []
    for _ in range(3000):
        if not missing:
            break
        wanted = generator.choice(sorted(missing))
        new = {g: [n for n in names[g] if (g, n) in missing] for g in GROUPS}
        choice = {
            g: generator.choice(new[g] if new[g] and generator.random() < 0.7 else names[g])
            for g in GROUPS
        } | dict([wanted])
        if wired(choice):
            chosen.append(choice)
            missing -= choice.items()
    for choice in chosen:
        take_two_steps(wired(choice), tmp_path, to_words(choice))
    apart = []
    for group, name in sorted(missing):
        try:
            wiring = wired_around(group, options(group, True)[name])
        except ConfigError:
            apart.append(f"{group}={name}")
        else:
            take_two_steps(wiring, tmp_path, f"{group}={name}")
    assert len(apart) < most / 9, apart


@pytest.mark.exhaustive
def test_every_pair_of_small_presets_that_fit_trains_samples_and_reloads(tmp_path):
    generator, names = random.Random(0), small_options()
    drawn = [{g: generator.choice(names[g]) for g in GROUPS} for _ in range(20_000)]
    for choice in covering([c for c in drawn if wired(c)]):
        take_two_steps(wired(choice), tmp_path, to_words(choice))


@cache
def small_options() -> dict[str, list[str]]:
    """Names of plugins and presets that are cheap to build and to run, by group."""
    return {g: [n for n in options(g, True) if is_small(g, n)] for g in GROUPS}


def is_small(group: str, name: str) -> bool:
    """Whether it reads no weights and is cheap to build and run in a small system."""
    if group == "conditioning":
        return getattr(options(group, True)[name], "weights", None) in (None, "random")
    if group not in ("vae", "backbone"):
        return True
    try:
        root = wired_around(group, options(group, True)[name]).root
    except ConfigError:
        return False  # it needs larger clips
    with torch.device("meta"):
        module = build(group, root)
    return sum(p.numel() for p in module.parameters()) < SMALL


# --- random settings ------------------------------------------------------------------------------

WIRED = ("in_channels", "out_channels", "context_dim", "vector_dim", "concat_channels")
COSTLY = {"clips_per_epoch", "num_workers", "timesteps", "val_clips"}
FIXED = {"plugin", "weights", "root", "steps", "include", "exclude", *COSTLY}
# Settings of data from files that the few files of a test do not support.
OF_FILES = {
    "batch_size", "image", "text", "val_root", "val_fraction", "train_list", "val_list", "media",
}  # fmt: skip
NUMBERS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 24)


def choices_of(cfg: PluginConfig, name: str) -> list[str]:
    """The allowed values of a string setting, parsed from the Config's error for a wrong one."""
    for problem in replace(cfg, **{name: "?"}).problems():
        if found := re.match(rf"{name}='\?': want one of (\[.*?\])", problem):
            return re.findall(r"'([^']*)'", found[1])
    return []


def drawn(cfg: PluginConfig, name: str, hint: Any, generator: random.Random) -> Any:
    """A random value of a field's type, mostly plausible."""
    default = getattr(cfg, name)
    kinds = get_args(hint) or (hint,)
    if type(None) in kinds and generator.random() < 0.3:
        return None
    if bool in kinds and not isinstance(default, tuple):
        return generator.random() < 0.5
    if str in kinds:
        return generator.choice(choices_of(cfg, name) or [default])
    if isinstance(default, tuple):
        return drawn_tuple(cfg, name, default, generator)
    if int in kinds:
        return generator.choice((*NUMBERS, default if default is not None else 0))
    if float in kinds:
        base = default if default else 1.0
        return generator.choice(
            (0.0, 0.5, 1.0, round(generator.random(), 3), base, base / 2, base * 2)
        )
    return default


def drawn_tuple(cfg: PluginConfig, name: str, default: tuple, generator: random.Random) -> tuple:
    """A tuple with other entries and sometimes another length."""
    length = len(default) + generator.choice((-1, 0, 0, 0, 1))
    if name in ("scalars", "attn_resolutions"):
        return ()
    if all(isinstance(v, str) for v in default):
        return tuple(generator.choice(default) for _ in range(length)) if default else ()
    scale = generator.choice((0.5, 1, 1, 2))
    entries = [default[i % len(default)] * scale for i in range(max(length, 0))] if default else []
    return tuple(type(d)(v) for v, d in zip(entries, default * 2, strict=False))


def settings(seed: int) -> tuple[Root, str]:
    """A combination of plugins with one to three random settings in four groups."""
    generator = random.Random(seed)
    choice = generator.choice(all_choices())  # refused ones would stay refused
    root, words = rooted(choice), [to_words(choice)]
    for group in generator.sample(GROUPS, 4):
        cfg = getattr(root, group)
        is_read = group == "data" and cfg.plugin != "data/moving_digits"
        free = (
            [
                f.name
                for f in fields(cfg)
                if f.name not in {*FIXED, *WIRED, *(OF_FILES if is_read else ())}
            ]
            if cfg
            else []
        )
        for name in generator.sample(free, min(len(free), generator.choice((1, 1, 2, 3)))):
            value = drawn(cfg, name, get_type_hints(type(cfg))[name], generator)
            cfg = replace(cfg, **{name: value})
            words.append(f"{group}.{name}={value!r}")
        root = replace(root, **{group: cfg})
    root = replace(root, precision=generator.choice(("fp32", "fp32", "bf16")))
    return root, " ".join([*words, f"precision={root.precision}"])


def accepted(seeds: range) -> Iterator[tuple[Wiring, str]]:
    for seed in seeds:
        root, words = settings(seed)
        wiring = wired_root(root)
        if wiring is not None:
            yield wiring, f"seed {seed}: {words}"


def test_some_random_settings_that_are_accepted_train(tmp_path):
    for wiring, words in accepted(range(40)):
        take_two_steps(wiring, tmp_path, words)


@pytest.mark.exhaustive
def test_two_hundred_random_settings_that_are_accepted_train(tmp_path):
    for wiring, words in accepted(range(40, 240)):
        take_two_steps(wiring, tmp_path, words)


def test_enough_random_settings_are_accepted_and_enough_refused():
    share = len(list(accepted(range(240)))) / 240
    assert 0.25 < share < 0.9
