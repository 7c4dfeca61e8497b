"""From a command line to typed Configs: the root of the configuration, and composition with Hydra.

Hydra composes; nothing is instantiated by Hydra (`sandbox.safety`). Every error that it raises
leaves here as a ConfigError in our words (`sandbox.mistakes`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from sandbox import registry, selection
from sandbox.contracts import ConfigError, PluginConfig, PluginError, above, in_range, one_of
from sandbox.reading import first_line
from sandbox.registry import SEVERAL

HOME = Path(__file__).resolve().parent.parent  # the checkout
CONF = HOME / "conf"
PRECISIONS = ("fp32", "bf16", "fp16")
# Settings that are always those of the command, also where it works on an earlier run.
OF_THE_COMMAND = ("task", "out", "cache", "plugins_path", "resume", "logger")
# Settings that training or task=prepare alone reads: on top of a run they would do nothing.
OF_TRAINING = ("lr", "base_lr", "steps", "trainable", "optimizer", "lr_schedule", "loss",
               "reconstruction", "checkpoint", "callbacks", "stage")  # fmt: skip
AT_HOME = re.compile(r"""(?<=[=,:'"(\[])~(?=/)""")  # of an override: where a value starts with ~/

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
        yield from selection.problems(self.trainable)
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


# --- set-up ---------------------------------------------------------------------------------------


def setup(overrides: Sequence[str] = ()) -> None:
    """Reads all plugins: the project's, those of entry points, `plugins_path=` and SANDBOX_PLUGINS.

    Cheap, and repeatable. Raises PluginError for two plugins or presets of one name.
    """
    from hydra.core.config_store import ConfigStore

    registry.discover(HOME / "sandbox" / "tasks", "sandbox.tasks", group="task")
    registry.discover(HOME / "plugins", "plugins")
    registry.discover_entry_points()
    for folder in plugin_folders(overrides):
        registry.discover(folder, None)
    ConfigStore.instance().store("root", Root)
    _check_presets(conf_folders(overrides))


def plugin_folders(overrides: Sequence[str]) -> list[Path]:
    """Folders of plugins outside the project: `plugins_path=DIR`, SANDBOX_PLUGINS (A:B)."""
    said = [o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("plugins_path=")]
    named = [("plugins_path", v) for v in said if v and v != "null"]
    listed = os.environ.get("SANDBOX_PLUGINS", "").split(os.pathsep)
    named += [("SANDBOX_PLUGINS", v) for v in listed if v]
    for name, value in named:
        if not Path(value).expanduser().is_dir():
            raise ConfigError(
                f"{name}={value}: no such folder; name one that holds GROUP/NAME.py files"
            )
    return list(dict.fromkeys(Path(v).expanduser().resolve() for _, v in named))


def conf_folders(overrides: Sequence[str], config_dir: str | None = None) -> list[Path]:
    """Where YAML files are looked for.

    The project's conf/, those of plugin folders, --config-dir.
    """
    found = [CONF, *(f / "conf" for f in plugin_folders(overrides) if (f / "conf").is_dir())]
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    return found + ([Path(config_dir).resolve()] if config_dir else [])


def _check_presets(folders: Sequence[Path]) -> None:
    """Raises PluginError for a preset that would hide a plugin, or another preset."""
    seen: dict[Path, Path] = {}
    keys = {plugin.key for plugin in registry.plugins()}
    for path in (p for folder in folders for p in sorted(folder.glob("*/**/*.yaml"))):
        folder = next(f for f in folders if path.is_relative_to(f))
        key = path.relative_to(folder)
        if key.with_suffix("").as_posix() in keys:
            raise PluginError(f"{path}: has the name of a plugin and would hide it; rename it")
        if key in seen:
            raise PluginError(
                f"preset {key.with_suffix('')} is there twice: in {seen[key]} and in {path}; "
                "rename or remove one"
            )
        seen[key] = path


def options(group: str, folders: Sequence[Path] = (CONF,)) -> list[str]:
    """Names that `group=` takes: plugins, and presets of `folders` and of Hydra itself."""
    from hydra.core.config_store import ConfigStore

    node: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        node = node.get(part, {}) if isinstance(node, dict) else {}
    names = {str(k).removesuffix(".yaml") for k, v in node.items() if not isinstance(v, dict)}
    return sorted(names | {p.stem for f in folders for p in (f / group).glob("*.yaml")})


def chosen_plugin(group: str, name: str) -> registry.Plugin | None:
    """The plugin that `group=name` stands for, through presets of the project."""
    import yaml

    preset = CONF / group / f"{name}.yaml"
    if preset.is_file():
        defaults = yaml.safe_load(preset.read_text()).get("defaults", ())
        name = next((d for d in defaults if isinstance(d, str) and d != "_self_"), name)
    return next((p for p in registry.plugins(group) if p.name == name), None)


def expand(overrides: Sequence[str]) -> list[str]:
    """Shorthands of ours, in Hydra's words.

    A setting of the chosen task may be given without `task.`: `task=new group=vae` is
    `task=new task.group=vae`. `logger=null` leaves a group empty, which Hydra writes `~logger`. A
    task that brings options of a group brings them where the line names none. A value that starts
    with `~/` is below the home folder, which a shell says of `name=~/file` only in an assignment.
    """
    overrides = [AT_HOME.sub(lambda _: os.path.expanduser("~"), o) for o in overrides]
    empty = {f"{group}=null": f"~{group}" for group in GROUPS}
    for group in SEVERAL:
        empty |= dict.fromkeys((f"{group}=null", f"~{group}"), f"{group}=[]")
    overrides = [empty.get(o, o) for o in overrides]
    chosen = next((o.partition("=")[2] for o in overrides if o.startswith("task=")), "train")
    plugin = chosen_plugin("task", chosen)
    if plugin is None or plugin.config is None:
        return overrides
    own = {f.name for f in fields(plugin.config)} - {f.name for f in fields(Root)}
    named = {o.partition("=")[0] for o in overrides}
    brought = [b for b in plugin.config.brings if b.partition("=")[0] not in named]  # type: ignore[attr-defined]
    return [f"task.{o}" if o.partition("=")[0] in own else o for o in overrides] + brought


# --- composition ----------------------------------------------------------------------------------


def compose(
    overrides: Sequence[str] = (), config: str = "config", config_dir: str | None = None
) -> Any:
    """The composed DictConfig of one job, checked for safety.

    Raises ConfigError or PluginError; where Hydra cannot compose, with every problem that can be
    found without it, those of the wiring included.
    """
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sandbox import safety

    safety.refuse_code(overrides)
    try:
        if any(is_list(o) and o.partition("=")[0] not in SEVERAL for o in overrides):
            raise ValueError("a list of options")  # Hydra would merge them into one
        cfg = raw(overrides, config, config_dir, report=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as e:
        from sandbox.mistakes import explain

        raise explain(e, overrides, config, config_dir) from e
    safety.check(cfg, overrides, config, config_dir)
    return cfg


def is_list(override: str) -> bool:
    """Whether it gives a group a list of options."""
    group, _, value = override.partition("=")
    return group in GROUPS and value.startswith("[")


def raw(
    overrides: Sequence[str],
    config: str = "config",
    config_dir: str | None = None,
    report: bool = False,
) -> Any:
    """What Hydra composes, with its own errors; with `report`, logs what a recipe leaves out."""
    from hydra.types import RunMode

    from sandbox import recipes

    hydra = recipes.hydra(CONF, GROUPS)
    overrides = [*overrides, *search_path(overrides, config_dir)]
    cfg = hydra.compose_config(config, overrides, RunMode.RUN, from_shell=False)
    if report:
        hydra.config_loader.report()  # type: ignore[attr-defined]
    return cfg


def search_path(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The override that adds further folders of YAML files to Hydra's search path."""
    found = conf_folders(overrides, config_dir)[1:]
    return ["hydra.searchpath=[" + ",".join(f"'file://{p}'" for p in found) + "]"] if found else []


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


def received(node: dict[str, Any]) -> Root:
    """A Root from another process; plugins, also those of its `plugins_path`, are read first."""
    folder = node.get("plugins_path")
    setup([f"plugins_path={folder}"] if folder else ())
    return from_container(node)


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
