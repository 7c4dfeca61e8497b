"""Explains every problem of a command line that Hydra cannot compose.

Hydra stops at the first problem. This module checks each override separately, then composes and
wires the valid rest, so that users see every problem at once.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sandbox.config import discovery, hydra_compose, registry
from sandbox.config.moved_names import OLD_PRESETS
from sandbox.config.overrides import is_valid, key, parse, quote, top, value, with_quotes
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS, YAML_GROUPS, to_root
from sandbox.config.static_reader import first_line
from sandbox.config.wiring import REQUIRED, wire
from sandbox.contracts import ConfigError, PluginError

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def explain(
    error: Exception, overrides: Sequence[str], name: str, config_dir: str | None
) -> ConfigError:
    """Every problem of a command line for which Hydra raised `error`."""
    folders = discovery.conf_folders(overrides, config_dir)
    if not (CONF / f"{name}.yaml").is_file():
        near = registry.nearest(name, [p.stem for p in CONF.glob("*.yaml")])
        return ConfigError(f"--config-name {name}: no such file{near}")
    problems, groups, settings = [], [], []
    for override, problem in _parsed(overrides):
        problem = problem or _group_problem(override, folders)
        if problem:
            problems.append((top(override), problem))
        elif _is_group(override, folders) or top(override) == "plugins_path":
            groups.append(override)
        else:
            settings.append(override)
    invalid = {name for name, _ in problems}
    try:
        cfg = hydra_compose.compose_raw(groups, name, config_dir)
    except hydra_compose.errors() as e:  # a preset or recipe is invalid
        return ConfigError(*(p for _, p in problems), _file_problem(e, groups, folders))
    for override in settings:
        if top(override) not in invalid and (problem := _setting_problem(override, cfg)):
            problems.append((top(override), problem))
    if not problems:
        return ConfigError(first_line(str(error)))
    return ConfigError(*(p for _, p in problems), *_wiring_problems(cfg, {t for t, _ in problems}))


def explain_cycle(overrides: Sequence[str], config_dir: str | None) -> ConfigError:
    """The presets or recipes that include one another."""
    from sandbox.config.yaml_files import include_cycle

    folders = discovery.conf_folders(overrides, config_dir)
    chosen = [(key(o), n.strip()) for o in overrides for n in value(o).strip("[]").split(",")]
    found = include_cycle([c for c in chosen if c[0] in GROUPS | YAML_GROUPS], folders)
    what = found or "the presets or recipes of this command"
    return ConfigError(f"{what}: include one another; want a defaults list without a circle")


def explain_multirun(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Every syntax error in the overrides of a multirun."""
    problems = [p for _, p in _parsed(overrides, multirun=True) if p]
    if "does not support sweep type" in str(error):
        problems.append(
            "-m: the basic sweeper takes lists (1,2), choice(...), range(...) and glob(...) only"
        )
    return ConfigError(*(problems or [first_line(str(error))]))


def _wiring_problems(cfg: Any, invalid: set[str]) -> Sequence[str]:
    """Further problems of a configuration, without those of the `invalid` groups."""
    try:
        root = to_root(cfg)
        if root.task is not None and not root.task.uses_run():
            wire(root, frozenset(invalid))
    except ConfigError as e:
        return e.problems
    except PluginError as e:
        return [str(e)]
    return ()


# --- syntax ---------------------------------------------------------------------------------------


def _parsed(overrides: Sequence[str], multirun: bool = False) -> Iterator[tuple[str, str | None]]:
    """Each override with its syntax error; words that the shell split are joined again."""
    from hydra.errors import HydraException

    for text in _joined(overrides):
        problem = None
        try:
            is_sweep = parse(text).is_sweep_override()
        except HydraException:
            problem = _syntax_problem(text)
        else:
            if text not in overrides or not key(text):
                problem = _syntax_problem(text)
            elif is_sweep and not multirun:
                problem = (
                    f"{text}: several values need -m (a multirun); quote a string that contains "
                    f"a comma: {_with_one_string(key(text), value(text))}"
                )
        yield text, problem


def _joined(overrides: Sequence[str]) -> list[str]:
    """`a=[b`, `c]` -> `a=[b c]`, and `lr`, `=`, `3` -> `lr = 3`."""
    found: list[str] = []
    for word in overrides:
        is_open = bool(found) and (_is_open(found[-1]) or found[-1].endswith("="))
        if found and (word.startswith("=") or ("=" not in word and is_open)):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def _is_open(text: str) -> bool:
    """Whether `text` has an unclosed bracket or quote."""
    text = re.sub(r"(?<=\w)'(?=\w)", "", text)  # an apostrophe
    text = re.sub(r"\"[^\"]*\"|'[^']*'", "", text)
    pairs = any(text.count(a) > text.count(b) for a, b in ("[]", "{}", "()"))
    return pairs or text.count('"') % 2 == 1 or text.count("'") % 2 == 1


def _syntax_problem(text: str) -> str:
    name, equals, given = text.partition("=")
    if name != name.strip() or given != given.strip():
        return f"{text}: no spaces around '=': {name.strip()}={given.strip()}"
    if not equals or not name:
        return f"{text}: want NAME=VALUE; quote a value that contains spaces: 'NAME=a b'"
    if _is_open(text):
        texts = ",".join(quote(e.strip()) for e in given[1:-1].split(","))
        each = f", or quote each string: {shlex.quote(f'{name}=[{texts}]')}"
        is_list = given.startswith("[") and given.endswith("]")
        return f"{text}: unclosed bracket or quote; close it{each * is_list}"
    if given[:1] in ("[", "{"):
        if is_valid(found := with_quotes(text)):
            return f"{text}: quote it for the shell: {shlex.quote(found)}"
        found = shlex.quote(f"{name}=[{quote(given.strip('[]'))}]")
        return f"{text}: cannot be parsed; quote each string: {found}"
    if given[:1] == "(":
        return f"{text}: want a list in brackets: '{name}=[{given.strip('()')}]'"
    return (
        f"{text}: cannot be parsed; quote a string with special characters twice: "
        f"{_with_one_string(name, given)}"
    )


def _with_one_string(name: str, text: str) -> str:
    """What to type in a shell for a setting that is one string, or a list of one."""
    found = f"[{quote(text)}]" if _is_list(name) else quote(text)
    return shlex.quote(f"{name}={found}")


def _is_list(name: str) -> bool:
    """Whether plugins have a setting of this (dotted) name that is a list of strings."""
    group, _, field = name.rpartition(".")
    configs = [p.config for p in registry.plugins(group) if p.config]
    types = [registry.field_types(c).get(field, ()) for c in configs]
    return any(t == tuple[str, ...] for own in types for t in own)


# --- groups ---------------------------------------------------------------------------------------


def _is_group(override: str, folders: Sequence[Path]) -> bool:
    group = key(override).partition("@")[0]
    if value(override).startswith("{"):  # sets several settings of the group
        return False
    return group in GROUPS | YAML_GROUPS or (
        "/" in group and bool(discovery.options(group, folders))
    )


def _group_problem(override: str, folders: Sequence[Path]) -> str | None:
    """Why a choice of an option is invalid; None for a valid choice and for other overrides."""
    group, given = key(override), value(override)
    if "@" in group:
        return f"{override}: a group cannot be moved; write {group.partition('@')[0]}=NAME"
    if not _is_group(override, folders):
        near = registry.nearest(group, ["hydra/launcher", "hydra/sweeper"])
        return f"{override}: no such group{near}" if "/" in group else None
    if override.startswith("+"):
        return f"{override}: write it without +: {override.lstrip('+')}"
    if override.startswith("~"):
        return None
    known = discovery.options(group, folders)
    if given == "null":
        return f"{override}: cannot be empty; leave it out, or choose {', '.join(known)}"
    if hydra_compose.is_option_list(override) and group not in registry.SEVERAL:
        return f"{override}: want one option, not a list{registry.nearest('', known)}"
    names = [n.strip(" '\"") for n in given.strip("[]").split(",")] if given != "[]" else []
    for name in names:
        paths = [f / group / f"{name}.yaml" for f in folders]
        if path := next((p for p in paths if os.path.lexists(p) and not p.is_file()), None):
            return f"{path}: no regular file; want a YAML file"
        if problem := _option_problem(group, name, known):
            return problem
    return None


def _option_problem(group: str, name: str, known: list[str]) -> str | None:
    if name in known:
        return None
    if new := OLD_PRESETS.get(f"{group}/{name}"):
        return f"{group}={name}: this preset was removed; write {new}"
    broken = next((p for p in registry.plugins(group) if p.name == name and p.error), None)
    if broken:
        return f"{group}={name} is broken: {broken.error}"
    is_empty = name.lower() in ("none", "null", "") and group not in REQUIRED
    null = f"; write {group}=null to leave the group empty" if is_empty else ""
    return f"{group}={name}: no such option{registry.nearest(name, known)}{null}"


# --- settings -------------------------------------------------------------------------------------


def _setting_problem(override: str, cfg: Any) -> str | None:
    """Why `cfg` rejects a setting; sets it where it does not."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    parsed = parse(override)
    if parsed.is_delete():
        if top(override) == "hydra":
            return None
        return f"{override}: a setting cannot be removed; omit it, or give it another value"
    if problem := _path_problem(override, cfg):
        return problem
    OmegaConf.set_readonly(cfg.hydra, False)
    try:
        ConfigLoaderImpl._apply_overrides_to_config([parsed], cfg)
    except HydraException as e:
        return _type_problem(override, cfg, first_line(str(e.__cause__ or e)))
    return None


def _path_problem(override: str, cfg: Any) -> str | None:
    """Why the path of a setting does not exist in `cfg`; None where it does."""
    from omegaconf import OmegaConf

    node, *parts = cfg, *key(override).split(".")
    if parts[0] == "hydra":
        return None
    for i, name in enumerate(parts):
        path, kind = ".".join(parts[:i]), OmegaConf.get_type(node)
        if node is None:
            known = "|".join(discovery.options(path))
            return f"{override}: {path}=null has no settings; choose one: {path}={known}"
        if not OmegaConf.is_dict(node):
            return f"{override}: {path} is a value and has no settings"
        if is_dataclass(kind) and name not in node:
            names = [f.name for f in fields(kind) if f.name != "plugin"]
            if path:
                chosen = f"{path}={str(node.get('plugin', '?')).rpartition('/')[2]}"
                near = registry.nearest(name, names)
                return f"{path}.{name}: {chosen} has no such setting{near}"
            if len(parts) > 1:
                return f"{override}: no such group{registry.nearest(name, GROUPS)}"
            return f"{name}: no such setting{_suggestion(name, cfg, names)}"
        if path in registry.SEVERAL and name not in node:
            return _option_problem(path, name, discovery.options(path)) or (
                f"{override}: {path}.{name} is not chosen; add '{path}=[{name}]'"
            )
        node = node.get(name)
    return None


def _type_problem(override: str, cfg: Any, reason: str) -> str:
    """Why a setting cannot hold a value."""
    from omegaconf import OmegaConf

    path, _, name = key(override).rpartition(".")
    if top(override) == "hydra":
        return f"{override}: Hydra has no such setting with these options ({reason})"
    if override.startswith("+"):
        return f"{override}: this setting exists; write it without +"
    kind = OmegaConf.get_type(OmegaConf.select(cfg, path) if path else cfg)
    chosen = OmegaConf.get_type(OmegaConf.select(cfg, key(override)))
    if is_dataclass(kind) and name in registry.field_types(kind) and name not in GROUPS:
        null = "; write null for an empty value" if value(override) == "None" else ""
        return f"{override}: want {_type_names(kind, name, override)}{null}"
    if is_dataclass(chosen) and (m := re.search(r"Key '(\w+)' not in", reason)):
        names = [f.name for f in fields(chosen) if f.name != "plugin"]
        return f"{override}: no such setting {m[1]!r}{registry.nearest(m[1], names)}"
    return f"{override}: {reason}"


def _suggestion(name: str, cfg: Any, names: list[str]) -> str:
    """The groups that have a setting of this name, else the nearest setting of run or task."""
    known = [g for g in GROUPS if cfg.get(g) is not None and name in cfg[g]]
    if known:
        return f" of the run; did you mean {' or '.join(f'{g}.{name}' for g in known[:4])}?"
    near = registry.nearest(name, [*names, *YAML_GROUPS, *(cfg.get("task") or ())])
    return near if "did you mean" in near else registry.nearest(name, set(names) - set(GROUPS))


def _type_names(config_class: type, name: str, override: str) -> str:
    """The types that a field accepts, in words."""
    given, accepted = value(override), []
    for kind in registry.field_types(config_class)[name]:
        if kind is type(None):
            accepted.append("null")
        elif kind in TYPE_NAMES:
            accepted.append(TYPE_NAMES[kind])
        elif "dict" in str(kind):
            accepted.append(f"a dict, such as '{key(override)}={{a: 1}}'")
        elif given[:1] == "[" and kind == tuple[str, ...]:
            texts = ",".join(quote(e.strip("\"'")) for e in given[1:-1].split(","))
            accepted.append(f"a list of strings: {shlex.quote(f'{key(override)}=[{texts}]')}")
        elif given[:1] in ("[", "{"):
            accepted.append("a list")
        else:
            accepted.append(f"a list: {shlex.quote(f'{key(override)}=[{given}]')}")
    return " or ".join(accepted)


# --- files ----------------------------------------------------------------------------------------


def _file_problem(error: Exception, groups: Sequence[str], folders: Sequence[Path]) -> str:
    """What is wrong in a preset or recipe that `groups` choose, with its path."""
    import yaml
    from hydra.errors import MissingConfigException

    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not YAML: {error.problem}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        problem = _option_problem(group, name, discovery.options(group, folders))
        return f"{_file_with(name, groups, folders)}{problem or first_line(text)}"
    if m := re.search(r"In '([^']+)': .*?\n(.+)", text):
        full_key = re.search(r"full_key: (\S+)", text)
        path = next((p for f in folders if (p := f / f"{m[1]}.yaml").is_file()), m[1])
        return f"{path}: {full_key[1] + ': ' if full_key else ''}{m[2].strip()}"
    if m := re.search(r"Could not override '([^']+)'", text):
        group = m[1].lstrip("/")
        near = registry.nearest(group, [*GROUPS, *YAML_GROUPS])
        return f"{_file_with(group, groups, folders)}{group}: no such group{near}"
    return first_line(text)


def _file_with(word: str, groups: Sequence[str], folders: Sequence[Path]) -> str:
    """The chosen YAML file that contains `word`, and a colon; empty where none does."""
    paths = (f / key(o) / f"{value(o)}.yaml" for o in groups for f in folders)
    return next(
        (f"{p}: " for p in paths if p.is_file() and word in p.read_text(encoding="utf-8")), ""
    )
