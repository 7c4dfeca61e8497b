"""The root of the configuration: groups and top-level settings, to and from plain containers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from sandbox.config import param_groups, registry
from sandbox.config.registry import SEVERAL
from sandbox.config.static_reader import first_line
from sandbox.contracts import ConfigError, PluginConfig, above, in_range, one_of

PRECISIONS = ("fp32", "bf16", "fp16")
# Settings that are always those of the command, also where it works on an earlier run.
OF_THE_COMMAND = ("task", "out", "cache", "plugins_path", "resume", "logger")
# Settings that training or task=prepare alone reads: on top of a run they would do nothing.
OF_TRAINING = ("lr", "base_lr", "steps", "trainable", "optimizer", "lr_schedule", "loss",
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


@dataclass
class Root:
    """The whole configuration of a run.

    Groups hold Configs of plugins; the rest belongs to the run.
    """

    recipe: str = "default"  # its name; part of the run folder's name
    lr: float | None = None  # peak learning rate; null: that of the task
    # lr for one clip: lr = base_lr x trainer.accumulate x trainer.processes x data.batch_size, as
    # CompVis latent-diffusion scales it (scale_lr); null: lr is what it says
    base_lr: float | None = None
    seed: int = 0
    steps: int | None = None  # optimizer steps; null: those of the task
    precision: str = "fp32"
    out: str = "outputs"  # where run folders go
    cache: str = "outputs/cache"  # where trained first stages are kept
    init_from: str | None = None  # weights to start from; the run itself starts at step 0
    # names of weights, with factors of lr: [transformer_blocks, pos_embed@0.1] (`selection`); null:
    # all that are not frozen
    trainable: tuple[str, ...] | None = None
    plugins_path: str | None = None  # a folder of plugins of your own
    task: Any = None
    data: Any = None
    vae: Any = None
    backbone: Any = None
    conditioning: Any = None
    adapter: Any = None
    schedule: Any = None
    loss: Any = None
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
        """Every bad top-level setting, one line each."""
        if self.lr is not None and not 0 <= self.lr < float("inf"):
            yield f"lr={self.lr}: want a number >= 0 (0 trains nothing)"
        yield from above("base_lr", self.base_lr, 0)
        yield from in_range("steps", self.steps, 1)
        yield from in_range("seed", self.seed, 0, 2**32 - 1)
        yield from one_of("precision", self.precision, PRECISIONS)
        yield from param_groups.problems(self.trainable)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.recipe):
            yield f"recipe={self.recipe!r}: want letters, digits, '.', '_', '-' (it names a folder)"
        yield from registry.misshapen(self)

    def files(self) -> dict[str, str | None]:
        """As `PluginConfig.files`."""
        return {} if self.init_from is None else {"init_from": self.init_from}

    def parts(self) -> Iterator[tuple[str, PluginConfig]]:
        """Every chosen plugin's Config with its path, those inside others too: ("vae", ...)."""
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
    """Typed Configs of a composed DictConfig; interpolations and the `~` of files are resolved.

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
            "the configuration does not start from ours: let its defaults list begin with '- root'"
        )
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        made = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{e.full_key or 'configuration'}: {first_line(e.msg or str(e))}") from e
    assert isinstance(made, Root)
    added = [*_added(plain, made), *_shapeless(made)]
    if added:
        raise ConfigError(*added)
    return _with_files(registry.tuples(made), os.path.expanduser)


def _added(plain: Any, made: Any, path: str = "") -> Iterator[str]:
    """Settings that `+name=value` added although nothing reads them."""
    if isinstance(made, dict):
        for key, value in made.items():
            yield from _added(plain[key], value, f"{path}{key}.")
    elif is_dataclass(made):
        names = [f.name for f in fields(made)]
        for key in plain:
            if key in names:
                yield from _added(plain[key], getattr(made, key), f"{path}{key}.")
            else:
                here = [n for n in names if n not in (*GROUPS, "plugin")]
                yield f"{path}{key}: no such setting{registry.nearest(key, here)}"


def _shapeless(root: Root) -> Iterator[str]:
    """Groups that hold something else than the Config of a plugin."""
    for group in GROUPS:
        value = getattr(root, group)
        places = value if isinstance(value, dict) and group in SEVERAL else {"": value}
        for name, part in places.items():
            if part is not None and not isinstance(part, PluginConfig):
                where = f"{group}.{name}" if name else group
                yield f"{where}={part}: want the name of an option of {group}"


def from_container(node: dict[str, Any]) -> Root:
    """A Root from plain containers (a run folder's config.yaml).

    Raises ConfigError for what it does not know.
    """
    known = [f.name for f in fields(Root)]
    unknown = [k for k in node if k not in known]
    if unknown:
        raise ConfigError(*(f"{k}: no such setting{registry.nearest(k, known)}" for k in unknown))
    root = Root(**{k: registry.typed(v) for k, v in node.items()})
    registry.check_types(root)
    return root


def placed(root: Root, folder: Path) -> Root:
    """A Root where files that it names by relative paths are those below `folder`, if there."""
    return _with_files(root, lambda name: str(folder / name) if (folder / name).exists() else name)


def _with_files(part: Any, change: Callable[[str], str]) -> Any:
    """A Root or a part of it where `change` was made to the names of files."""
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
    """Plain containers of a Root (tuples become lists): what is saved, hashed and handed over."""
    if is_dataclass(root):
        return {f.name: to_container(getattr(root, f.name)) for f in fields(root)}
    if isinstance(root, dict):
        return {k: to_container(v) for k, v in root.items()}
    if isinstance(root, list | tuple):
        return [to_container(v) for v in root]
    return root


# --- on top of an earlier run ---------------------------------------------------------------------


def overridden(saved: Root, composed: Root, overrides: Sequence[str]) -> Root:
    """An earlier run's configuration with what this command line names: groups, or settings.

    The task, where things go and how they are watched are always those of this command. Raises
    ConfigError for what cannot be put on top of a run.
    """
    result = replace(saved, **{name: getattr(composed, name) for name in OF_THE_COMMAND})
    problems = []
    for override in overrides:
        path = override.partition("=")[0].lstrip("+~")
        top, _, rest = path.partition(".")
        if top in ("experiment", "debug"):
            problems.append(
                f"{override}: this task works on a run with a configuration of its own; "
                "name the settings that shall differ"
            )
        elif top in OF_TRAINING:
            other = ", or give sampler.steps" if path == "steps" else ""
            task = composed.task.plugin.partition("/")[2]
            problems.append(f"{override}: has no effect on task={task}; leave it out{other}")
        elif top not in OF_THE_COMMAND and not top.startswith("hydra"):
            was, now = getattr(result, top), getattr(composed, top)
            if rest and type(was) is not type(now):
                chosen = was.plugin.partition("/")[2] if was else "null"
                problems.append(
                    f"{override}: the run has {top}={chosen}, which has no such setting"
                )
            else:
                result = replace(result, **{top: _with(was, now, rest.split(".")) if rest else now})
    if problems:
        raise ConfigError(*problems)
    return result


def _with(was: Any, now: Any, path: list[str]) -> Any:
    """`was` with the setting at `path` taken from `now`."""
    name, *rest = path
    value = _with(getattr(was, name), getattr(now, name), rest) if rest else getattr(now, name)
    return replace(was, **{name: value})


def clips_per_step(root: Root) -> int:
    """Clips in one optimizer step over all processes."""
    return root.data.batch_size * root.trainer.processes * root.trainer.accumulate
