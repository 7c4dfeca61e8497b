"""The root of the configuration: groups and top-level settings, to and from plain containers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from sandbox.config import param_groups, registry
from sandbox.config.overrides import key
from sandbox.config.registry import SEVERAL
from sandbox.config.secrets import MASK
from sandbox.config.static_reader import first_line
from sandbox.contracts import ConfigError, PluginConfig, above, in_range, one_of

PRECISIONS = ("fp32", "bf16", "fp16")
# A task on an earlier run takes these settings from the command, not from the run.
OF_THE_COMMAND = ("task", "out", "cache", "plugins_path", "resume", "logger")
# Only training and task=prepare read these settings: tasks on an earlier run ignore them.
OF_TRAINING = ("lr", "base_lr", "steps", "trainable", "optimizer", "lr_schedule", "loss", "method",
               "reconstruction", "checkpoint", "callbacks", "stage")  # fmt: skip
GROUPS = {  # every config group with its description, in the order of --help
    "task": "what a run does",
    "data": "training and evaluation clips",
    "vae": "first stage: encodes pixels to latents and decodes them",
    "backbone": "the denoising network",
    "conditioning": "what the network is conditioned on",
    "adapter": "a few weights trained instead of the backbone's; null trains all",
    "schedule": "noise schedule and prediction target",
    "loss": "training loss of the denoiser",
    "method": "training method: the model calls of a training step",
    "features": "frozen encoder of clean frames, for methods that align with it",
    "sampler": "from noise to latents",
    "guidance": "how sampling combines conditional and unconditional predictions",
    "optimizer": "how gradients update parameters",
    "lr_schedule": "learning rate over a run",
    "ema": "exponential moving average of the weights",
    "trainer": "devices, gradient accumulation, clipping, threads",
    "checkpoint": "when to save and what to keep",
    "resume": "which earlier run a command continues",
    "logger": "where metrics are sent",
    "callbacks": "what else happens during training; several may be chosen",
    "metric": "metrics of generated clips; null takes the one of the data",
    "reconstruction": "loss of a first stage (task=train_vae)",
    "layout": "published file formats; init_from detects the one of its file or folder",
    "kernels": "implementations of the most expensive operations",
    "stage": "steps of task=prepare, in this order; several may be chosen",
}
# option of groups that older runs do not record
ADDED_GROUPS = {"method": "denoising", "features": None}
YAML_GROUPS = {  # groups without plugins
    "experiment": "recipes, one page each",
    "debug": "quick checks of any recipe",
}


@dataclass
class Root:
    """The configuration of a run: groups with the Configs of plugins, and settings of the run."""

    recipe: str = "default"  # name of the recipe; part of the run folder's name
    lr: float | None = None  # peak learning rate; null: that of the task
    # lr for one clip: lr = base_lr x trainer.accumulate x trainer.processes x data.batch_size, as
    # CompVis latent-diffusion scales it (scale_lr); null: lr is not scaled
    base_lr: float | None = None
    seed: int = 0
    steps: int | None = None  # optimizer steps; null: those of the task
    precision: str = "fp32"
    out: str = "outputs"  # folder of run folders
    cache: str = "outputs/cache"  # folder of trained first stages
    init_from: str | None = None  # weights to start from; the run itself starts at step 0
    # patterns of parameter names, with factors of lr: [transformer_blocks, pos_embed@0.1]; null:
    # all that are not frozen
    trainable: tuple[str, ...] | None = None
    plugins_path: str | None = None  # a folder with your own plugins
    task: Any = None
    data: Any = None
    vae: Any = None
    backbone: Any = None
    conditioning: Any = None
    adapter: Any = None
    schedule: Any = None
    loss: Any = None
    method: Any = None
    features: Any = None
    sampler: Any = None
    guidance: Any = None
    optimizer: Any = None
    lr_schedule: Any = None
    ema: Any = None
    trainer: Any = None
    checkpoint: Any = None
    resume: Any = None
    logger: Any = None
    callbacks: dict[str, Any] = field(default_factory=dict)
    metric: Any = None
    reconstruction: Any = None
    layout: Any = None
    kernels: Any = None
    stage: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterator[str]:
        """One line per invalid top-level setting."""
        if self.lr is not None and not 0 <= self.lr < float("inf"):
            yield f"lr={self.lr}: want a number >= 0 (0 trains nothing)"
        yield from above("base_lr", self.base_lr, 0)
        yield from in_range("steps", self.steps, 1)
        yield from in_range("seed", self.seed, 0, 2**32 - 1)
        yield from one_of("precision", self.precision, PRECISIONS)
        yield from param_groups.problems(self.trainable)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.recipe.replace(MASK, "x")):
            yield f"recipe={self.recipe!r}: want letters, digits, '.', '_', '-' (it names a folder)"
        yield from registry.type_problems(self)

    def files(self) -> dict[str, str | None]:
        """Like `PluginConfig.files`."""
        return {} if self.init_from is None else {"init_from": self.init_from}

    def parts(self) -> Iterator[tuple[str, PluginConfig]]:
        """(path, Config) of every chosen plugin, nested ones included: ("vae", ...)."""
        for group in GROUPS:
            yield from _parts(group, getattr(self, group))


def _parts(path: str, value: Any) -> Iterator[tuple[str, PluginConfig]]:
    if isinstance(value, PluginConfig):
        yield path, value
        for f in fields(value):
            yield from _parts(f"{path}.{f.name}", getattr(value, f.name))
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _parts(f"{path}.{name}", part)


def to_root(cfg: Any) -> Root:
    """A Root from a composed DictConfig; resolves interpolations and the `~` of files.

    Raises ConfigError.
    """
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    if "hydra" in cfg:
        cfg = cfg.copy()
        with open_dict(cfg):
            del cfg["hydra"]
    if OmegaConf.get_type(cfg) is not Root:
        raise ConfigError(
            "the configuration lacks the root schema: its defaults list must begin with '- root'"
        )
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        root = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as e:
        text = first_line(e.msg or str(e))
        escape = "; write \\${...} for the text itself" if "nterpolation" in text else ""
        if "Recursive" in text:
            text, escape = "its value refers to itself through ${...}; want a value", ""
        raise ConfigError(f"{e.full_key or 'configuration'}: {text}{escape}") from e
    assert isinstance(root, Root)
    if problems := [*_unknown_settings(plain, root), *_not_configs(root)]:
        raise ConfigError(*problems)
    return _with_files(registry.tuples(root), os.path.expanduser)


def _unknown_settings(plain: Any, typed: Any, path: str = "") -> Iterator[str]:
    """Settings that `+name=value` added and nothing reads."""
    if not isinstance(typed, dict) and not is_dataclass(typed):
        return
    known = typed if isinstance(typed, dict) else {f.name: f for f in fields(typed)}
    for name, value in plain.items():
        if name in known:
            child = typed[name] if isinstance(typed, dict) else getattr(typed, name)
            yield from _unknown_settings(value, child, f"{path}{name}.")
        else:
            names = [n for n in known if n not in (*GROUPS, "plugin")]
            yield f"{path}{name}: no such setting{registry.nearest(name, names)}"


def _not_configs(root: Root) -> Iterator[str]:
    """Groups with a value other than the Config of a plugin."""
    for group in GROUPS:
        value = getattr(root, group)
        is_several = isinstance(value, dict) and group in SEVERAL
        options = {f"{group}.{k}": v for k, v in value.items()} if is_several else {group: value}
        for path, option in options.items():
            if option is not None and not isinstance(option, PluginConfig):
                yield f"{path}={option}: want the name of an option of {group}"


def from_container(node: dict[str, Any]) -> Root:
    """A Root from plain containers (a run folder's config.yaml).

    Raises ConfigError for unknown settings and wrong types.
    """
    known = [f.name for f in fields(Root)]
    unknown = [k for k in node if k not in known]
    if unknown:
        raise ConfigError(*(f"{k}: no such setting{registry.nearest(k, known)}" for k in unknown))
    root = Root(**{k: registry.typed(v) for k, v in node.items()})
    registry.check_types(root)
    return root


def resolve_paths(root: Root, folder: Path) -> Root:
    """Resolves the relative paths in a Root that exist below `folder`."""
    return _with_files(root, lambda name: str(folder / name) if (folder / name).exists() else name)


def _with_files(part: Any, change: Callable[[str], str]) -> Any:
    """A copy of a Root, or of a part of it, with `change` applied to the names of files."""
    if isinstance(part, dict):
        return {name: _with_files(value, change) for name, value in part.items()}
    if not isinstance(part, Root | PluginConfig):
        return part
    own = {f.name: _with_files(getattr(part, f.name), change) for f in fields(part)}
    for name in own.keys() & part.files().keys():
        if isinstance(own[name], str):
            own[name] = change(own[name])
    return replace(part, **own)


def to_container(root: Any) -> Any:
    """Plain containers of a Root (tuples become lists), for files, hashes and other processes."""
    if is_dataclass(root):
        return {f.name: to_container(getattr(root, f.name)) for f in fields(root)}
    if isinstance(root, dict):
        return {k: to_container(v) for k, v in root.items()}
    if isinstance(root, list | tuple):
        return [to_container(v) for v in root]
    return root


# --- tasks on an earlier run ----------------------------------------------------------------------


def override_run(saved: Root, composed: Root, overrides: Sequence[str]) -> Root:
    """An earlier run's configuration with the groups and settings that `overrides` name.

    `composed` is the command's own configuration; OF_THE_COMMAND always comes from it. Raises
    ConfigError for overrides that do not apply to a run.
    """
    result = replace(saved, **{name: getattr(composed, name) for name in OF_THE_COMMAND})
    problems = []
    for override in overrides:
        top, _, path = key(override).partition(".")
        if top in YAML_GROUPS:
            problems.append(
                f"{override}: this task uses the configuration of an earlier run; "
                "override single settings instead"
            )
        elif top in OF_TRAINING:
            other = ", or give sampler.steps" if top == "steps" else ""
            task = composed.task.plugin.partition("/")[2]
            problems.append(f"{override}: has no effect on task={task}; leave it out{other}")
        elif top not in OF_THE_COMMAND and not top.startswith("hydra"):
            old, new = getattr(result, top), getattr(composed, top)
            if path and type(old) is not type(new):
                chosen = old.plugin.partition("/")[2] if old else "null"
                problems.append(
                    f"{override}: the run has {top}={chosen}, which has no such setting"
                )
            else:
                result = _copy_setting(result, composed, [top, *filter(None, path.split("."))])
    if problems:
        raise ConfigError(*problems)
    return result


def _copy_setting(old: Any, new: Any, path: list[str]) -> Any:
    """`old` with the setting at `path` taken from `new`."""
    name, *rest = path
    value = getattr(new, name)
    return replace(old, **{name: _copy_setting(getattr(old, name), value, rest) if rest else value})


def clips_per_step(root: Root) -> int:
    """Clips in one optimizer step over all processes."""
    return root.data.batch_size * root.trainer.processes * root.trainer.accumulate
