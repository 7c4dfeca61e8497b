"""From a command line to typed Configs: the root of the configuration, composition with Hydra, and safety checks.

Hydra composes; nothing is instantiated by Hydra. Every error that it raises leaves here as a ConfigError of a few
lines that names the setting, what is allowed, and the cure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sandbox import registry
from sandbox.contracts import ConfigError, PluginConfig, above, in_range, one_of

HOME = Path(__file__).resolve().parent.parent  # the checkout
CONF = HOME / "conf"
PRECISIONS = ("fp32", "bf16", "fp16")
LAUNCHERS = ("hydra._internal.", "hydra_plugins.")  # the only _target_s that are followed, by Hydra itself

GROUPS = {  # every config group, with what it is; the order is that of --help
    "task": "what a run does",
    "data": "where clips come from",
    "vae": "first stage, between pixels and latents",
    "backbone": "the denoising network",
    "conditioning": "what the network is told",
    "schedule": "noise process and prediction target",
    "loss": "from a prediction to a number",
    "sampler": "from noise to latents",
    "guidance": "how sampling passes combine",
    "optimizer": "how gradients change parameters",
    "lr_schedule": "learning rate over a run",
    "ema": "moving average of the weights",
    "trainer": "devices, accumulation, clipping, threads",
    "checkpoint": "when to save and what to keep",
    "resume": "which earlier run a command continues",
    "logger": "where metrics go",
    "callbacks": "what else happens during training; several may be named",
    "metric": "scores of generated clips; null takes the one of the data",
    "reconstruction": "loss of a first stage (task=train_vae)",
    "kernels": "which implementation the hot operations use",
}


@dataclass
class Root:
    """The whole configuration of a run. Groups hold Configs of plugins; the rest belongs to the run."""

    recipe: str = "default"  # its name; part of the run folder's name
    lr: float | None = None  # peak learning rate; null: that of the task
    seed: int = 0
    steps: int | None = None  # optimizer steps; null: those of the task
    precision: str = "fp32"
    out: str = "outputs"  # where run folders go
    cache: str = "outputs/cache"  # where trained first stages are kept
    init_from: str | None = None  # weights to start from; the run itself starts at step 0
    plugins_path: str | None = None  # a folder of plugins of your own
    task: Any = None
    data: Any = None
    vae: Any = None
    backbone: Any = None
    conditioning: Any = None
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
    kernels: Any = None

    def problems(self) -> Iterator[str]:
        """Every bad top-level setting, one line each."""
        yield from above("lr", self.lr, -1e-300)
        yield from in_range("steps", self.steps, 1)
        yield from in_range("seed", self.seed, 0, 2**32 - 1)
        yield from one_of("precision", self.precision, PRECISIONS)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.recipe):
            yield f"recipe={self.recipe!r}: want letters, digits, '.', '_' and '-' (it names a folder)"

    def parts(self) -> Iterator[tuple[str, PluginConfig]]:
        """Every chosen plugin's Config with its path: ("vae", ...), ("callbacks.images", ...)."""
        for group in GROUPS:
            value = getattr(self, group)
            if isinstance(value, PluginConfig):
                yield group, value
            elif isinstance(value, dict):
                yield from ((f"{group}.{name}", v) for name, v in value.items() if v is not None)


# --- set-up -------------------------------------------------------------------------------------------------


def setup(overrides: Sequence[str] = ()) -> None:
    """Reads all plugins: the project's, those of entry points, `plugins_path=` and SANDBOX_PLUGINS. Cheap; repeatable."""
    from hydra.core.config_store import ConfigStore

    registry.discover(HOME / "sandbox" / "tasks", "sandbox.tasks", group="task")
    registry.discover(HOME / "plugins", "plugins")
    registry.discover_entry_points()
    for folder in plugin_folders(overrides):
        registry.discover(folder, None)
    ConfigStore.instance().store("root", Root)


def plugin_folders(overrides: Sequence[str]) -> list[Path]:
    """Folders of plugins outside the project, from `plugins_path=DIR` and SANDBOX_PLUGINS (os.pathsep between)."""
    said = [o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("plugins_path=")]
    named = [("plugins_path", v) for v in said if v and v != "null"]
    named += [("SANDBOX_PLUGINS", v) for v in os.environ.get("SANDBOX_PLUGINS", "").split(os.pathsep) if v]
    for name, value in named:
        if not Path(value).expanduser().is_dir():
            raise ConfigError(f"{name}={value}: no such folder; name a folder that holds GROUP/NAME.py files")
    return [Path(v).expanduser().resolve() for _, v in named]


def expand(overrides: Sequence[str]) -> list[str]:
    """Two shorthands of ours, in Hydra's words.

    A setting of the chosen task may be given without `task.`: `task=new group=vae` is `task=new task.group=vae`.
    `logger=null` leaves a group empty, which Hydra writes `~logger`.
    """
    overrides = [f"~{o[:-5]}" if o.endswith("=null") and o[:-5] in GROUPS else o for o in overrides]
    chosen = next((o.partition("=")[2] for o in overrides if o.startswith("task=")), "train")
    plugin = next((p for p in registry.plugins("task") if p.name == chosen and p.config), None)
    own = {f.name for f in fields(plugin.config)} - {f.name for f in fields(Root)} if plugin and plugin.config else set()
    return [f"task.{o}" if o.partition("=")[0] in own else o for o in overrides]


# --- composition --------------------------------------------------------------------------------------------


def compose(overrides: Sequence[str] = (), config: str = "config", config_dir: str | None = None) -> Any:
    """The composed DictConfig of one job, checked for safety. Raises ConfigError or PluginError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    overrides = [*overrides, *search_path(overrides, config_dir)]
    _refuse_code(overrides)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), job_name="sandbox", version_base="1.3"), _plain_errors(overrides):
        cfg = hydra_compose(config, overrides, return_hydra_config=True)
    _check_hydra(cfg)
    return cfg


def search_path(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The override that adds `conf/` of plugin folders and `--config-dir` to Hydra's search path."""
    found = [folder / "conf" for folder in plugin_folders(overrides) if (folder / "conf").is_dir()]
    if config_dir:
        found.append(Path(config_dir).resolve())
    return ["hydra.searchpath=[" + ",".join(f"'file://{p}'" for p in found) + "]"] if found else []


def to_root(cfg: Any) -> Root:
    """Typed Configs of a composed DictConfig; interpolations are resolved. Raises ConfigError."""
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    if "hydra" in cfg:
        cfg = cfg.copy()
        with open_dict(cfg):
            del cfg["hydra"]
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        made = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{e.full_key or 'configuration'}: {_first(e.msg or str(e))}") from e
    assert isinstance(made, Root)  # conf/config.yaml starts from it
    added = list(_added(plain, made))
    if added:
        raise ConfigError(*added)
    return registry.tuples(made)


def _added(plain: Any, made: Any, path: str = "") -> Iterator[str]:
    """Settings that `+name=value` added although nothing reads them."""
    if isinstance(made, dict):
        for key, value in made.items():
            yield from _added(plain[key], value, f"{path}{key}.")
    elif hasattr(made, "__dataclass_fields__"):
        names = [f.name for f in fields(made)]
        for key in plain:
            if key not in names:
                yield f"{path}{key}: no such setting{registry.nearest(key, names)}"
            else:
                yield from _added(plain[key], getattr(made, key), f"{path}{key}.")


def from_container(node: dict[str, Any]) -> Root:
    """A Root from plain containers (a run folder's config.yaml). Raises ConfigError for what it does not know."""
    known = [f.name for f in fields(Root)]
    unknown = [k for k in node if k not in known]
    if unknown:
        raise ConfigError(*(f"{k}: no such setting{registry.nearest(k, known)}" for k in unknown))
    return Root(**{k: registry.typed(v) for k, v in node.items()})


def to_container(root: Any) -> Any:
    """Plain containers of a Root (tuples become lists): what is saved, hashed and handed to processes."""
    if hasattr(root, "__dataclass_fields__"):
        return {f.name: to_container(getattr(root, f.name)) for f in fields(root)}
    if isinstance(root, dict):
        return {k: to_container(v) for k, v in root.items()}
    if isinstance(root, list | tuple):
        return [to_container(v) for v in root]
    return root


def overridden(saved: Root, composed: Root, overrides: Sequence[str]) -> Root:
    """An earlier run's configuration with what this command line names: whole groups, or settings within them.

    The task, where things go and how they are watched are always those of this command.
    """
    ours = {"task", "out", "cache", "plugins_path", "resume", "logger"}
    for name in ("task", "out", "cache", "plugins_path", "resume", "logger"):
        saved = replace(saved, **{name: getattr(composed, name)})
    for override in overrides:
        path = override.partition("=")[0].lstrip("+~")
        top, _, rest = path.partition(".")
        if top in ours or top not in {f.name for f in fields(Root)}:
            continue
        if not rest:
            saved = replace(saved, **{top: getattr(composed, top)})
            continue
        was, now = getattr(saved, top), getattr(composed, top)
        if type(was) is not type(now):
            raise ConfigError(f"{override}: the run has {top}={was.plugin.split('/')[1]}, which this does not set")
        saved = replace(saved, **{top: _with(was, now, rest.split("."))})
    return saved


def _with(was: Any, now: Any, path: list[str]) -> Any:
    """`was` with the setting at `path` taken from `now`."""
    name, *rest = path
    if isinstance(was, dict):
        return was | {name: _with(was.get(name), now[name], rest) if rest else now[name]}
    return replace(was, **{name: _with(getattr(was, name), getattr(now, name), rest) if rest else getattr(now, name)})


# --- safety -------------------------------------------------------------------------------------------------


def _refuse_code(overrides: Sequence[str]) -> None:
    for override in overrides:
        name = override.partition("=")[0]
        if "_target_" in override and not name.lstrip("+~").startswith(("hydra.launcher", "hydra.sweeper")):
            raise ConfigError(f"{name}: _target_ runs code and is not used here; choose a plugin by its name instead")


def _check_hydra(cfg: Any) -> None:
    """Refuses code in what was composed, and anything under `hydra` in a recipe, before Hydra itself starts."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    hydra = plain.pop("hydra", {})
    bad = [f"{p}: _target_ runs code and is not used here; choose a plugin by its name" for p in _targets(plain)]
    for name in ("launcher", "sweeper"):
        target = str((hydra.get(name) or {}).get("_target_", ""))
        if target and not target.startswith(LAUNCHERS):
            bad.append(f"hydra.{name}._target_={target}: want one of Hydra's own, such as hydra/{name}=basic")
    if hydra.get("callbacks"):
        bad.append("hydra.callbacks: Hydra would run them as code; use the group callbacks instead")
    for name, path in _chosen_files(hydra):
        bad += _hydra_in_recipe(name, path)
    if bad:
        raise ConfigError(*bad)


def _targets(node: Any, path: str = "") -> Iterator[str]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield here
        yield from _targets(value, here)


def _chosen_files(hydra: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """The YAML files of the chosen recipes (experiment, debug): they are the ones that may be somebody else's."""
    folders = [s["path"].removeprefix("file://") for s in hydra["runtime"]["config_sources"] if s["schema"] == "file"]
    for group in ("experiment", "debug"):
        chosen = hydra["runtime"]["choices"].get(group)
        for name in [chosen] if isinstance(chosen, str) else chosen or ():
            for folder in folders:
                path = Path(folder, group, f"{name}.yaml")
                if path.is_file():
                    yield f"{group}={name}", path


def _hydra_in_recipe(name: str, path: Path) -> Iterator[str]:
    import yaml

    node = yaml.safe_load(path.read_text()) or {}
    defaults = [k for d in node.get("defaults", ()) if isinstance(d, dict) for k in d]
    if "hydra" in node or any("hydra/" in str(k) for k in defaults):
        yield f"{name}: it sets something under hydra, which a recipe may not; give it on the command line ({path})"


# --- Hydra's errors in our words ----------------------------------------------------------------------------


class _plain_errors:
    """Turns Hydra's and OmegaConf's errors into ConfigError, with the nearest name and the cure."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = overrides

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(error, HydraException | OmegaConfBaseException):
            raise _translate(error, self.overrides) from error


def _translate(error: BaseException, overrides: Sequence[str]) -> ConfigError:
    from hydra.errors import MissingConfigException

    text, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing(error.missing_cfg_file)
    if m := re.search(r"[Kk]ey '([^']+)' (?:is )?not in '(.+?)'", str(cause) + text):
        return _unknown_key(text + str(cause), m[1], overrides)
    if m := re.search(r"Could not override '([^']+)'", text):
        group, names = m[1].lstrip("/"), [*GROUPS, "experiment", "debug"]
        if "No match in the defaults list" in text:
            return ConfigError(f"{group}: no such group{registry.nearest(group, names)}")
    if m := re.search(r"Error merging override (\S+)", text):
        name, _, value = m[1].partition("=")
        detail = _first(str(cause)) if cause else _first(text.partition("\n")[2])
        return ConfigError(f"{name}={value}: {detail}")
    if "mismatched input" in text or "extraneous input" in text or "no viable alternative" in text or "token recognition" in text:
        return ConfigError(
            f"{_first(text)}; quote values with special characters: 'name=\"a, b\"', and write dicts as {{a: 1}}"
        )
    return ConfigError(_first(text))


def _missing(key: str) -> ConfigError:
    """`group/name` that Hydra did not find: broken, misspelt, or an unknown group."""
    group, _, name = key.rpartition("/")
    broken = [p for p in registry.plugins(group) if p.name == name and p.error]
    if broken:
        return ConfigError(f"{group}={name} is broken: {broken[0].error}")
    return ConfigError(f"{group}={name}: no such option{registry.nearest(name, options(group))}")


def _unknown_key(text: str, key: str, overrides: Sequence[str]) -> ConfigError:
    m = re.search(r"full_key: (\S+)", text) or re.search(r"override ([^\s=]+)", text)
    full = m[1] if m else key
    group = full.split(".")[0]
    if "." not in full:
        known = [f.name for f in fields(Root)]
        return ConfigError(f"{full}: no such setting{registry.nearest(full, known)}")
    plugin = _chosen_plugin(group, overrides)
    names = sorted(f.name for f in fields(plugin.config) if f.name != "plugin") if plugin and plugin.config else []
    return ConfigError(f"{full}: {group}={plugin.name if plugin else '?'} has no such setting{registry.nearest(key, names)}")


def _chosen_plugin(group: str, overrides: Sequence[str]) -> registry.Plugin | None:
    """The plugin that `group` stands for on this command line, through presets, as far as it can be told."""
    import yaml

    name = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith(f"{group}=")), None)
    if name is None:
        defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
        name = next((d[group] for d in defaults if isinstance(d, dict) and group in d), None)
    preset = CONF / group / f"{name}.yaml"
    if preset.is_file():
        name = next((d for d in yaml.safe_load(preset.read_text()).get("defaults", ()) if d != "_self_"), name)
    return next((p for p in registry.plugins(group) if p.name == name), None)


def options(group: str) -> list[str]:
    """Names that `group=` takes: plugins and presets of the project and of ConfigStore."""
    from hydra.core.config_store import ConfigStore

    node: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        node = node.get(part, {}) if isinstance(node, dict) else {}
    names = {str(k).removesuffix(".yaml") for k, v in node.items() if not isinstance(v, dict)}
    return sorted(names | {p.stem for p in (CONF / group).glob("*.yaml")})


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "cannot be read"
