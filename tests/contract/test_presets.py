"""Every preset composes, is described, and wires or reports the problem."""

from __future__ import annotations

import pytest

from sandbox import registry
from sandbox.contracts import ConfigError
from tests.helpers import preset, presets, wired_around

PRESETS = {f"{group}/{name}": path for group, name, path in presets()}
each_preset = pytest.mark.parametrize("key", PRESETS)


@each_preset
def test_it_starts_with_a_comment_that_describes_it(key):
    lines = [x for x in PRESETS[key].read_text().splitlines() if "@package" not in x]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 12


@each_preset
def test_it_does_not_hide_a_plugin(key):
    assert key not in {p.key for p in registry.plugins()}


@each_preset
def test_it_wires_or_reports_the_problem(key):
    group, _, name = key.partition("/")
    cfg = preset(group, name)
    assert cfg.plugin.startswith(f"{group}/")
    try:
        wired_around(group, cfg)
    except ConfigError as e:
        assert e.problems
        assert all(group in p for p in e.problems), "only the preset may be invalid"
