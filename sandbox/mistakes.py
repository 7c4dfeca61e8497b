"""What is wrong with a command line that Hydra cannot compose, in our words and all of it.

Hydra stops at the first problem. Here each override is looked at on its own, and what is left is
composed and wired, so that a user sees every problem at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sandbox import config, registry
from sandbox.config import GROUPS
from sandbox.contracts import ConfigError, PluginError
from sandbox.moved_names import OLD_PRESETS
from sandbox.reading import first_line
from sandbox.wiring import REQUIRED, wire

PRESETS = ("experiment", "debug")  # groups that hold YAML files only
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def explain(
    error: Exception, overrides: Sequence[str], name: str, config_dir: str | None
) -> ConfigError:
    """Every problem of a command line that Hydra refused with `error`."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    folders = config.conf_folders(overrides, config_dir)
    if not (config.CONF / f"{name}.yaml").is_file():
        there = [p.stem for p in config.CONF.glob("*.yaml")]
        return ConfigError(f"--config-name {name}: no such file{registry.nearest(name, there)}")
    problems, groups, values = [], [], []
    for words, problem in _readable(overrides):
        problem = problem or _group_problem(words, folders)
        if problem:
            problems.append((_top(words), problem))
        elif _is_group(words, folders) or _top(words) == "plugins_path":
            groups.append(words)
        else:
            values.append(words)
    wrong = {top for top, _ in problems}
    try:
        cfg = config.raw(groups, name, config_dir)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as e:
        # a preset or recipe is at fault
        return ConfigError(*(p for _, p in problems), _in_file(e, groups, folders))
    for override in values:
        if _top(override) not in wrong and (problem := _value_problem(override, cfg)):
            problems.append((_top(override), problem))
    if not problems:
        return ConfigError(first_line(str(error)))
    return ConfigError(*(p for _, p in problems), *_further(cfg, {top for top, _ in problems}))


def explain_words(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Every override of a multirun that cannot be read."""
    problems = [p for _, p in _readable(overrides, multirun=True) if p]
    if "does not support sweep type" in str(error):
        problems.append("-m: the basic sweeper takes lists (1,2), choice(...) and range(...) only")
    return ConfigError(*(problems or [first_line(str(error))]))


def _further(cfg: Any, wrong: set[str]) -> Sequence[str]:
    """Problems of what is left; nothing is asked of the groups in `wrong`."""
    try:
        root = config.to_root(cfg)
        if root.task is not None and not root.task.uses_run():
            wire(root, frozenset(wrong))
    except ConfigError as e:
        return e.problems
    except PluginError as e:
        return [str(e)]
    return ()


# --- the words of the command line ----------------------------------------------------------------


def _top(override: str) -> str:
    """The group or setting that an override is about: "backbone" for `+backbone.width=3`."""
    return re.split(r"[=.@/]", override.lstrip("+~"))[0]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _value(override: str) -> str:
    return override.partition("=")[2]


def _readable(overrides: Sequence[str], multirun: bool = False) -> list[tuple[str, str | None]]:
    """Each override with what is wrong with its spelling; words that a shell split are joined."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found: list[tuple[str, str | None]] = []
    for words in _joined(overrides):
        problem = None
        try:
            parsed = OverridesParser.create().parse_override(words)
        except HydraException:
            problem = _spelling(words)
        else:
            if words not in overrides or not _key(words):
                problem = _spelling(words)
            elif parsed.is_sweep_override() and not multirun:
                quoted = f"'{_key(words)}=\"{_value(words)}\"'"
                problem = (
                    f"{words}: several values need -m (a multirun); a text with a comma goes in "
                    f"quotes: {quoted}"
                )
        found.append((words, problem))
    return found


def _joined(overrides: Sequence[str]) -> list[str]:
    """`a=[b`, `c]` -> `a=[b c]`, and `lr`, `=`, `3` -> `lr = 3`."""
    found: list[str] = []
    for word in overrides:
        if found and (word.startswith("=") or ("=" not in word and _goes_on(found[-1]))):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def _goes_on(word: str) -> bool:
    return _open(word) or word.endswith("=")


def _open(text: str) -> bool:
    """Whether a bracket or a quote is left open."""
    text = re.sub(r"\"[^\"]*\"|'[^']*'", "", text)
    pairs = any(text.count(a) > text.count(b) for a, b in ("[]", "{}", "()"))
    return pairs or text.count('"') % 2 == 1 or text.count("'") % 2 == 1


def _spelling(words: str) -> str:
    key, equals, value = words.partition("=")
    if key != key.strip() or value != value.strip():
        return f"{words}: no spaces around '=': {key.strip()}={value.strip()}"
    if not equals or not key:
        return f"{words}: want NAME=VALUE; a value with spaces goes in quotes: 'NAME=a b'"
    if _open(words):
        return f"{words}: a bracket or quote is left open; close it"
    if value[:1] in ("[", "{"):
        return f"{words}: quote it, so that the shell leaves it in one piece: '{words}'"
    if value[:1] == "(":
        return f"{words}: lists are written in brackets: '{key}=[{value.strip('()')}]'"
    return (
        f"{words}: cannot be read; a text with special characters goes in quotes twice: "
        f"'{key}=\"{value}\"'"
    )


# --- groups ---------------------------------------------------------------------------------------


def _is_group(override: str, folders: Sequence[Path]) -> bool:
    key = _key(override).partition("@")[0]
    if _value(override).startswith("{"):  # sets several of its numbers at once
        return False
    return key in (*GROUPS, *PRESETS) or ("/" in key and bool(config.options(key, folders)))


def _group_problem(override: str, folders: Sequence[Path]) -> str | None:
    """What is wrong with the choice of an option; None where nothing is, or this is no choice."""
    key, value = _key(override), _value(override)
    if "@" in key:
        return f"{override}: groups have one place each; write {key.partition('@')[0]}=NAME"
    if not _is_group(override, folders):
        names = [*GROUPS, *PRESETS] if "/" not in key else ["hydra/launcher", "hydra/sweeper"]
        return f"{override}: no such group{registry.nearest(key, names)}" if "/" in key else None
    if override.startswith("+"):
        return f"{override}: write it without +: {override.lstrip('+')}"
    if override.startswith("~"):
        return None
    known = config.options(key, folders)
    if value == "null":
        return f"{override}: in a multirun a group cannot be emptied; want {', '.join(known)}"
    if config.is_list(override) and key not in registry.SEVERAL:
        return f"{override}: want one option, not a list{registry.nearest('', known)}"
    names = [n.strip(" '\"") for n in value.strip("[]").split(",")] if value != "[]" else []
    return next((p for n in names if (p := _option_problem(key, n, known))), None)


def _option_problem(group: str, name: str, known: list[str]) -> str | None:
    if name in known:
        return None
    if now := OLD_PRESETS.get(f"{group}/{name}"):
        return f"{group}={name}: this preset is gone; write {now}"
    broken = next((p for p in registry.plugins(group) if p.name == name and p.error), None)
    if broken:
        return f"{group}={name} is broken: {broken.error}"
    null = ""
    if name.lower() in ("none", "null", "") and group not in REQUIRED:
        null = f"; for none at all write {group}=null"
    return f"{group}={name}: no such option{registry.nearest(name, known)}{null}"


# --- settings -------------------------------------------------------------------------------------


def _value_problem(override: str, cfg: Any) -> str | None:
    """What is wrong with a setting, found by setting it in `cfg`; None where nothing is."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    parsed = OverridesParser.create().parse_override(override)
    if parsed.is_delete():
        if _top(override) == "hydra":
            return None
        return f"{override}: a setting cannot be taken away; leave it out, or give it another value"
    problem = _path_problem(override, cfg)
    if problem:
        return problem
    OmegaConf.set_readonly(cfg.hydra, False)
    try:
        ConfigLoaderImpl._apply_overrides_to_config([parsed], cfg)
    except HydraException as e:
        return _type_problem(override, cfg, first_line(str(e.__cause__ or e)))
    return None


def _path_problem(override: str, cfg: Any) -> str | None:
    """Where the path of a setting leaves what there is; None where it does not."""
    from omegaconf import OmegaConf

    node, *parts = cfg, *_key(override).split(".")
    if parts[0] == "hydra":
        return None
    for i, name in enumerate(parts):
        path, kind = ".".join(parts[:i]), OmegaConf.get_type(node)
        if node is None:
            return f"{override}: {_empty(path)}"
        if not OmegaConf.is_dict(node):
            return f"{override}: {path} has no settings of its own"
        if is_dataclass(kind) and name not in node:
            names = [f.name for f in fields(kind) if f.name != "plugin"]
            if path:
                chosen = f"{path}={str(node.get('plugin', '?')).rpartition('/')[2]}"
                near = registry.nearest(name, names)
                return f"{path}.{name}: {chosen} has no such setting{near}"
            if len(parts) > 1:
                return f"{override}: no such group{registry.nearest(name, GROUPS)}"
            return f"{name}: no such setting{_elsewhere(name, cfg, names)}"
        if path in registry.SEVERAL and name not in node:
            known = config.options(path)
            return _option_problem(path, name, known) or (
                f"{override}: {path}.{name} is not chosen; add '{path}=[{name}]'"
            )
        node = node.get(name)
    return None


def _empty(path: str) -> str:
    known = config.options(path)
    return f"{path}=null has no settings; choose one: {path}={'|'.join(known)}"


def _type_problem(override: str, cfg: Any, reason: str) -> str:
    """Why a value cannot be that of its setting."""
    from omegaconf import OmegaConf

    path, _, name = _key(override).rpartition(".")
    if _top(override) == "hydra":
        return f"{override}: Hydra has no such setting with these options ({reason})"
    if override.startswith("+"):
        return f"{override}: it is a setting already; write it without +"
    kind = OmegaConf.get_type(OmegaConf.select(cfg, path) if path else cfg)
    chosen = OmegaConf.get_type(OmegaConf.select(cfg, _key(override)))
    if is_dataclass(kind) and name in registry.kinds(kind) and name not in GROUPS:
        return f"{override}: want {_wanted(kind, name, override)}{_none(override)}"
    if is_dataclass(chosen) and (m := re.search(r"Key '(\w+)' not in", reason)):
        names = [f.name for f in fields(chosen) if f.name != "plugin"]
        return f"{override}: it has no setting {m[1]!r}{registry.nearest(m[1], names)}"
    return f"{override}: {reason}"


def _elsewhere(name: str, cfg: Any, names: list[str]) -> str:
    """The groups in which a setting of this name is, else the nearest name, also of the task's
    settings, which need no `task.` before them.
    """
    known = [g for g in GROUPS if cfg.get(g) is not None and name in cfg[g]]
    if known:
        return f" of the run; did you mean {' or '.join(f'{g}.{name}' for g in known[:4])}?"
    near = registry.nearest(name, [*names, *PRESETS, *(cfg.get("task") or ())])
    return near if "did you mean" in near else registry.nearest(name, set(names) - set(GROUPS))


def _wanted(config_class: type, name: str, override: str) -> str:
    """A field's type in words."""
    key, value = _key(override), _value(override)
    said = []
    for k in registry.kinds(config_class)[name]:
        if k is type(None):
            said.append("null")
        elif k in WORDS:
            said.append(WORDS[k])
        elif "dict" in str(k):
            said.append(f"a dict, such as '{key}={{a: 1}}'")
        else:
            said.append(f"a list: '{key}=[{value}]'" if value[:1] not in ("[", "{") else "a list")
    return " or ".join(said)


def _none(override: str) -> str:
    return "; an empty value is written null" if _value(override) == "None" else ""


# --- files ----------------------------------------------------------------------------------------


def _in_file(error: Exception, groups: Sequence[str], folders: Sequence[Path]) -> str:
    """What is wrong in a preset or recipe that `groups` choose, with its file."""
    import yaml
    from hydra.errors import MissingConfigException

    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not YAML: {error.problem}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        said = _option_problem(group, name, config.options(group, folders)) or first_line(text)
        return f"{_chosen_file(name, groups, folders)}{said}"
    if m := re.search(r"In '([^']+)': .*?\n(.+)", text):
        key = re.search(r"full_key: (\S+)", text)
        path = next((p for f in folders if (p := f / f"{m[1]}.yaml").is_file()), m[1])
        return f"{path}: {key[1] + ': ' if key else ''}{m[2].strip()}"
    if m := re.search(r"Could not override '([^']+)'", text):
        group = m[1].lstrip("/")
        near = registry.nearest(group, [*GROUPS, *PRESETS])
        return f"{_chosen_file(group, groups, folders)}{group}: no such group{near}"
    return first_line(text)


def _chosen_file(word: str, groups: Sequence[str], folders: Sequence[Path]) -> str:
    """The chosen file in which `word` is, and a colon; empty where it is in none."""
    for override in groups:
        for path in (f / _key(override) / f"{_value(override)}.yaml" for f in folders):
            if path.is_file() and word in path.read_text(encoding="utf-8"):
                return f"{path}: "
    return ""
