"""Every plugin's Config: read without import, typed, checked by itself, saved and read again."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from types import ModuleType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from omegaconf import OmegaConf

from sandbox import contracts
from sandbox.config import discovery, registry
from sandbox.config.root import to_container
from sandbox.contracts import PluginConfig
from sandbox.contracts import __name__ as CONTRACTS
from tests.helpers import plugin_configs

discovery.setup()
PLUGINS = registry.plugins()
CONFIGS = dict(plugin_configs())
each_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.key)
each_config = pytest.mark.parametrize("key", CONFIGS)
PLAIN = (int, float, bool, str, NoneType)
NUMBERS = {int: (-1, 0, 2**31), float: (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300)}


@each_plugin
def test_it_can_be_read(plugin):
    assert plugin.error is None


@each_plugin
def test_it_has_a_one_line_description(plugin):
    assert 10 <= len(plugin.doc) <= 160
    assert plugin.doc.endswith(".")


@each_plugin
def test_importing_it_gives_its_class(plugin):
    cls = registry.plugin_class(plugin.key)
    assert cls.Config is plugin.config


@each_plugin
def test_its_config_derives_from_the_base_of_its_group(plugin):
    """All Configs of a group derive from one base in sandbox.contracts."""
    assert {base_config(p.config) for p in registry.plugins(plugin.group)} == {
        base_config(plugin.config)
    }


def test_may_differ_names_settings():
    for plugin in PLUGINS:
        assert {*plugin.config.may_differ} <= {f.name for f in fields(plugin.config)}, plugin.key


def test_former_names_of_interfaces_are_importable():
    for old, new in {
        "Beside": "PairedMetric", "ByClip": "PerClipMetric", "Cuts": "CuttingStage",
        "Footage": "VideoClip", "Judges": "DecidingStage", "Looks": "ScoringStage",
        "Misfit": "SizeError", "Renders": "RenderingStage",
    }.items():  # fmt: skip
        assert getattr(contracts, old) is getattr(contracts, new)


def base_config(config: type) -> type:
    return next(kind for kind in config.__mro__ if kind.__module__.startswith(CONTRACTS))


@each_plugin
def test_the_config_that_was_read_equals_the_one_of_the_imported_file(plugin):
    if plugin.path is None:
        pytest.skip("registered by live code")
    with _imported_config(plugin) as imported:
        assert _described(plugin.config) == _described(imported)
        assert _methods(plugin.config) == _methods(imported)


@each_config
def test_its_fields_are_of_types_that_a_command_line_can_set(key):
    cfg = CONFIGS[key]
    for name, hint in get_type_hints(type(cfg)).items():
        if name in {f.name for f in fields(cfg)}:
            assert _plain(hint), f"{name}: {hint}"


@each_config
def test_its_defaults_are_accepted(key):
    incomplete = {"task/new", "task/diff", "task/replay", "task/prepare"}  # need a name or run
    assert list(CONFIGS[key].problems()) == [] or key in incomplete


@each_config
def test_it_round_trips_through_omegaconf_and_plain_containers(key):
    cfg = CONFIGS[key]
    assert registry.tuples(OmegaConf.to_object(OmegaConf.structured(cfg))) == cfg
    assert registry.typed(to_container(cfg)) == cfg


@each_config
def test_wrong_numbers_are_named_and_never_crash(key):
    cfg = CONFIGS[key]
    names = [f.name for f in fields(cfg)]
    for name, values in _wrong_numbers(cfg):
        for value in values:
            problems = list(replace(cfg, **{name: value}).problems())
            assert all(isinstance(p, str) for p in problems)
            strange = [p for p in problems if not p.startswith(tuple(names))]
            assert not strange, f"{name}={value}: {strange}"


@each_config
def test_nan_is_refused(key):
    cfg = CONFIGS[key]
    for name, values in _wrong_numbers(cfg):
        for value in values:
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(v, float) and math.isnan(v) for v in numbers):
                problems = list(replace(cfg, **{name: value}).problems())
                assert any(p.startswith(name) for p in problems), f"{name}={value} is accepted"


def _wrong_numbers(cfg: PluginConfig) -> list[tuple[str, list[Any]]]:
    """(field, invalid values): negative, zero, huge, NaN."""
    found = []
    for name, hint in get_type_hints(type(cfg)).items():
        default = getattr(cfg, name, None)
        kind = next((k for k in (int, float) if k in (hint, *get_args(hint))), None)
        if name == "plugin" or kind is None or get_origin(hint) is dict:
            continue
        values: list[Any] = list(NUMBERS[kind])
        if isinstance(default, tuple):
            values = [(v, *default[1:]) for v in values] + [(), (*default, *default[:1])]
        found.append((name, values))
    return found


def _plain(hint: Any) -> bool:
    if get_origin(hint) in (tuple, dict, Union, UnionType):
        return all(_plain(a) for a in get_args(hint) if a is not Ellipsis)
    return hint in PLAIN


@contextmanager
def _imported_config(plugin: registry.Plugin) -> Iterator[type]:
    """The Config from executing the complete file, without registering it."""
    tree, name = ast.parse(plugin.path.read_text()), ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            kept = [d for d in node.decorator_list if "register" not in ast.unparse(d)]
            if len(kept) < len(node.decorator_list):
                node.decorator_list, name = kept, node.name
    module = ModuleType("plain_copy_of_a_plugin")
    module.__file__ = str(plugin.path)
    sys.modules[module.__name__] = module  # dataclasses and type hints resolve names there
    try:
        exec(compile(tree, str(plugin.path), "exec", dont_inherit=True), vars(module))
        yield vars(module)[name].Config
    finally:
        del sys.modules[module.__name__]


def _described(cls: type) -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(cls)
    return [
        (f.name, hints[f.name], f.default_factory() if f.default is MISSING else f.default)
        for f in fields(cls)
    ]


def _methods(cls: type) -> dict[str, bytes]:
    found = {n: inspect.unwrap(m) for n, m in vars(cls).items() if hasattr(m, "__code__")}
    return {n: m.__code__.co_code for n, m in found.items()}
