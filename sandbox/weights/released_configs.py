"""Components from the configuration of a published model: config.json of diffusers, YAML of others.

Published names are accepted as they are: each layout has a table of published classes
(`LayoutConfig.published_classes`). What has no counterpart here is an error, unless it has no
effect.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sandbox.config import registry
from sandbox.contracts import ConfigError, PluginConfig, ReleasedClass, StorageError

NAMES = ("config.json", "scheduler_config.json")  # in the folder of a model
LARGEST = 1_000_000  # bytes of a configuration
MOST, DEEPEST = 2000, 20  # settings of a file, and how deep they are nested
PRIVATE = (  # entries of a file that are no settings
    "_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "architectures",
    "transformers_version", "torch_dtype", "dtype",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass
class _Found:
    """What the files say of one component, under our names."""

    plugin: str
    defaults: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def components(*paths: Path | str) -> dict[str, PluginConfig]:
    """The Configs by group, such as "backbone", that published configurations describe.

    `paths`: config.json, scheduler_config.json, YAML, or the folder of a model or pipeline; later
    ones add to earlier ones. Settings that the wiring fills stay None. Raises StorageError for
    files that cannot be read, ConfigError with every setting that has no counterpart here.
    """
    found: dict[str, _Found] = {}
    problems: list[str] = []
    others: list[str] = []
    for path in (file for name in paths for file in _files(Path(name))):
        document, table = _read(path), _table()
        known = False
        for name, settings in _sections(document, table):
            rows = next((rows for key, rows in table.items() if _is(name, key)), None)
            if rows is None:
                others.append(name)
                continue
            known = True
            problems += [f"{path}: {p}" for p in _translate(name, settings, rows, found)]
        if not known:
            raise ConfigError(
                f"{path}: describes no component that is known here "
                f"({', '.join(others) or 'no class is named'}); want one of {', '.join(table)}"
            )
    if problems:
        raise ConfigError(*problems)
    if others:
        log.info("not translated: %s", ", ".join(dict.fromkeys(others)))
    return {group: _config(f) for group, f in found.items() if not f.plugin.endswith("/*")}


def _table() -> dict[str, tuple[ReleasedClass, ...]]:
    """The published classes of all layouts."""
    layouts = (registry.default("layout", plugin.name) for plugin in registry.plugins("layout"))
    return {k: v for layout in layouts for k, v in layout.published_classes().items()}  # type: ignore[attr-defined]


def _is(name: str, key: str) -> bool:
    return name == key or name.endswith(f".{key}")


def _files(path: Path) -> Iterator[Path]:
    """The configurations of a model's folder, or of the models in a pipeline's folder."""
    if not path.exists():
        raise StorageError(f"{path}: no such file or folder")
    if path.is_file():
        yield path
        return
    own = [path / name for name in NAMES if (path / name).is_file()]
    parts = [f for part in sorted(path.iterdir()) if part.is_dir() for f in _own(part)]
    if not (own or parts):
        raise StorageError(f"{path}: want a folder with {' or '.join(NAMES)}, or their folders")
    yield from own or parts


def _own(folder: Path) -> list[Path]:
    return [folder / name for name in NAMES if (folder / name).is_file()]


def _read(path: Path) -> Mapping[str, Any]:
    """The content of a JSON or YAML file. Raises StorageError."""
    try:
        if path.stat().st_size > LARGEST:
            raise StorageError(f"{path}: {path.stat().st_size} bytes are no configuration")
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as e:
        line = " ".join(str(e).split())[:120]
        raise StorageError(f"{path}: cannot be read as a configuration ({line})") from e
    if not isinstance(found, Mapping):
        raise StorageError(f"{path}: cannot be read as a configuration (no settings by name)")
    return found


def _sections(
    node: Mapping[str, Any], table: Mapping[str, Any], depth: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(class or section, its settings without those of other components), in the file's order."""
    if depth > DEEPEST:
        return
    if isinstance(node.get("_class_name"), str):
        yield node["_class_name"], node
        return
    if isinstance(kinds := node.get("architectures"), list) and kinds:
        yield str(kinds[0]), node
        return
    if isinstance(node.get("target"), str):
        settings = node.get("params") or {}
        if isinstance(settings, Mapping):
            yield node["target"], {k: v for k, v in settings.items() if not _is_component(v)}
            node = settings
    for key, value in node.items():
        if key in table and isinstance(value, Mapping):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _sections(value, table, depth + 1)


def _is_component(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("target"), str)


def _flat(node: Mapping[str, Any], front: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Settings by their names joined with dots; lists are values."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value and depth < DEEPEST:
            yield from _flat(value, f"{front}{key}.", depth + 1)
        else:
            yield f"{front}{key}", value


def _translate(
    name: str,
    settings: Mapping[str, Any],
    rows: tuple[ReleasedClass, ...],
    found: dict[str, _Found],
) -> Iterator[str]:
    """Adds the settings of one class to `found`; yields its problems."""
    flat: dict[str, Any] = {}
    for key, value in _flat(settings):
        flat[key] = value
        if len(flat) > MOST:
            yield f"{name} has more than {MOST} settings"
            return
    claimed = {key for key in flat if key.partition(".")[0] in PRIVATE}
    for row in rows:
        group = row.plugin.partition("/")[0]
        plugin = _variant(row, flat)
        if plugin is None:
            key, known = row.variants or ("", {})
            yield f"{name}.{key}={flat[key]}: want one of {list(known)}"
            continue
        own = found.setdefault(group, _Found(plugin))
        if own.plugin.endswith("/*"):
            own.plugin = plugin
        fields = _fields(plugin)
        off = {s for k, names in row.switches.items() if not flat.get(k) for s in names}
        claimed |= off | set(row.switches) | ({row.variants[0]} if row.variants else set())
        for key, value in {**row.defaults, **flat}.items():
            into = own.settings if key in flat else own.defaults
            if key in off:
                continue
            if key in row.fixed and key not in fields:
                claimed.add(key)
                if not _equal(value, row.fixed[key]):
                    yield f"{name}.{key}={value}: want {row.fixed[key]}, the only one supported"
            elif any(key == k or key.startswith(f"{k}.") for k in row.ignored):
                claimed.add(key)
            elif key in row.names or key in fields:
                claimed.add(key)
                known = row.values.get(key, {})
                if known and value not in known:
                    yield f"{name}.{key}={value}: want one of {list(known)}"
                    continue
                if key in row.single:
                    if any(len(x) > 1 for x in value):
                        yield f"{name}.{key}={value}: want at most one number per level"
                    value = [x[0] if x else 0 for x in value]
                _put(into, row.names.get(key, key), known.get(value, value) if known else value)
        own.defaults = {**dict(row.sets), **own.defaults}
        if row.rest_ignored:
            claimed |= flat.keys()
    plugins = " and ".join(row.plugin for row in rows)
    for key in flat.keys() - claimed:
        yield f"{name}.{key}={flat[key]}: has no counterpart in {plugins}"


def _variant(row: ReleasedClass, flat: Mapping[str, Any]) -> str | None:
    """The plugin of a row, which a setting may choose; None for an unknown value."""
    if row.variants is None or row.variants[0] not in flat:
        return row.plugin
    return row.variants[1].get(flat[row.variants[0]])


def _fields(plugin: str) -> frozenset[str]:
    if plugin.endswith("/*"):
        return frozenset()
    found = registry.find(plugin)
    assert found.config  # find raises for a plugin without one
    return frozenset(found.config.__dataclass_fields__) - {"plugin"}


def _put(into: dict[str, Any], name: str, value: Any) -> None:
    """Sets `name`, an element of it ("betas.0"), or the length of a list ("count#")."""
    front, _, index = name.partition(".")
    if index.isdigit():
        into.setdefault(front, {})[int(index)] = value
    elif name.endswith("#"):
        into[name[:-1]] = len(value)
    else:
        into[name] = value


def _equal(value: Any, want: Any) -> bool:
    if isinstance(value, list | tuple) and not isinstance(want, list | tuple):
        return all(x == want for x in value)  # the same block at every level
    return value == want or (value is None and want in (False, 0))


def _config(found: _Found) -> PluginConfig:
    """The typed Config. Raises ConfigError for values that it refuses."""
    settings: dict[str, Any] = dict(found.defaults)
    for name, value in found.settings.items():
        before = settings.get(name)
        both = isinstance(value, dict) and isinstance(before, dict)
        settings[name] = {**before, **value} if both else value  # type: ignore[dict-item]
    for name, value in settings.items():
        if isinstance(value, dict) and all(isinstance(k, int) for k in value):
            settings[name] = [value[i] for i in sorted(value)]
    plugin = registry.find(found.plugin)
    assert plugin.config
    for field_ in fields(plugin.config):  # a name for all levels
        if isinstance(settings.get(field_.name), str) and "tuple[str" in str(field_.type):
            settings[field_.name] = [settings[field_.name]]
    config = registry.typed({"plugin": found.plugin, **settings})
    group = found.plugin.partition("/")[0]
    if problems := [f"{group}.{p}" for p in config.problems()]:
        raise ConfigError(*problems)
    return config
