"""task=plugins: what is there, from which file, with which contract; broken plugins included."""

from __future__ import annotations

import pytest

from sandbox.cli.main import main
from sandbox.config import registry
from sandbox.config.root import GROUPS

BROKEN = {
    "syntax": ("def (:", "invalid syntax"),
    "no class": ("x = 1\n", "no class has the decorator"),
    "heavy config": (
        "import torch\nfrom dataclasses import dataclass\n"
        "from sandbox.contracts import LossConfig\nfrom sandbox.registry import register\n\n\n"
        '@register("loss", "bad")\nclass Bad:\n    @dataclass\n    class Config(LossConfig):\n'
        "        size: int = torch.iinfo(torch.int8).max\n",
        "Config uses torch",
    ),
    "a config that raises": (
        "from dataclasses import dataclass\n"
        "from sandbox.contracts import LossConfig\nfrom sandbox.registry import register\n\n\n"
        '@register("loss", "bad")\nclass Bad:\n    """Nothing."""\n\n    @dataclass\n'
        "    class Config(LossConfig):\n        def accepts(self, schedule):\n"
        "            raise RuntimeError('out of ideas')\n",
        "RuntimeError: out of ideas",
    ),
}


def listed(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        main(["task=plugins", *words])
    assert int(left.value.code or 0) == code


def test_every_plugin_is_there_with_its_file_and_what_it_is(capsys):
    listed()
    said = " ".join(capsys.readouterr().out.split())
    for plugin in registry.plugins():
        assert f"{plugin.name} (" in said
        assert plugin.path.name in said
        assert plugin.doc in said


def test_groups_come_in_the_order_of_help_with_what_they_are(capsys):
    listed()
    said = capsys.readouterr().out
    places = [said.index(f"\n{group}: {what}") for group, what in GROUPS.items()]
    assert places == sorted(places)


def test_one_group_alone(capsys):
    listed("only=vae")
    said = capsys.readouterr().out
    assert "clips of 3x9x16x16 become latents of 32x3x4x4" in said  # pca
    assert "is trained with reconstruction=codebook" in said  # vq
    assert "backbone" not in said


def test_contracts_are_those_of_the_data_that_were_chosen(capsys):
    listed("only=vae", "data.frames=1", "data.height=32")
    assert "clips of 3x1x32x16 become latents of 32x1x8x4" in capsys.readouterr().out


def test_an_unknown_group_is_named_with_the_nearest(capsys):
    listed("only=vaes", code=2)
    assert "task.only='vaes': no such group; did you mean 'vae'?" in capsys.readouterr().err


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_listed_with_its_error_beside_the_others(kind, plugin_folder, capsys):
    text, error = BROKEN[kind]
    (plugin_folder / "loss").mkdir()
    (plugin_folder / "loss" / "bad.py").write_text(text)
    listed("only=loss")
    said = " ".join(capsys.readouterr().out.split())
    assert "BROKEN" in said
    assert error in said
    assert "Mean squared error" in said
    assert "1 broken: loss/bad" in said
