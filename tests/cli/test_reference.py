"""docs/reference: what stands there is what the Configs say."""

from __future__ import annotations

from functools import cache

import pytest

from sandbox.cli.main import main
from sandbox.cli.reference import pages
from sandbox.config import discovery, registry
from sandbox.config.paths import CHECKOUT
from sandbox.config.root import GROUPS

MAKE = "python run.py task=plugins to=docs/reference"


@cache
def made() -> dict[str, str]:
    discovery.setup()
    return pages()


def test_the_reference_in_the_docs_is_up_to_date():
    there = {p.name: p.read_text(encoding="utf-8") for p in (CHECKOUT / "docs/reference").glob("*")}
    assert [n for n in sorted({*there, *made()}) if there.get(n) != made().get(n)] == [], MAKE


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_and_preset_of_a_group_is_there(group):
    discovery.setup()
    page = made()[f"{group}.md"]
    ours = [p for p in registry.plugins(group) if p.path and p.path.is_relative_to(CHECKOUT)]
    assert [p.name for p in ours if f"\n## {p.name}\n" not in page] == []
    presets = [p.stem for p in (CHECKOUT / "conf" / group).glob("*.yaml")]
    assert [name for name in presets if f"\n- `{name}`: " not in page] == []


def test_settings_have_type_default_and_the_comment_beside_or_above_them():
    assert "| `components` | `int` | `32` | latent channels |" in made()["vae.md"]
    assert (
        "| `lr` | `float \\| None` | `null` | peak learning rate; null: that of"
        in (made()["README.md"])
    )
    above = "| `run` | `str \\| None` | `null` | Folder of an earlier run to use, with its"
    assert above in made()["task.md"]


def test_a_preset_shows_what_differs_from_its_plugin():
    (line,) = [x for x in made()["backbone.md"].splitlines() if x.startswith("- `dit_s2`")]
    assert line.endswith("`width=384 num_blocks=12 num_heads=6 patch=2 time_features=256`")


def test_a_folder_of_plugins_gets_a_reference_of_its_own(plugin_folder, tmp_path):
    for words in (["task=new", "group=vae", "name=mine"], ["task=plugins", f"to={tmp_path}/ref"]):
        with pytest.raises(SystemExit) as left:
            main([*words, f"plugins_path={plugin_folder}"])
        assert not left.value.code
    page = (tmp_path / "ref" / "vae.md").read_text()
    assert "## mine" in page
    assert "- `mine_p8`: Patches of 8 pixels" in page
