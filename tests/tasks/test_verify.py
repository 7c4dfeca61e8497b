"""task=verify: its table says what is not as published, and the exit code does."""

import json
from dataclasses import replace

import pytest

from sandbox import compose
from sandbox.cli.jobs import check_and_wire, perform
from sandbox.config.paths import CONF
from sandbox.contracts import ConfigError, SandboxError
from sandbox.tasks import verify
from sandbox.tasks.verify import GOLDEN, Row, outputs, read_evidence, same
from sandbox.tasks.verify import settings as settings_rows
from tests.helpers import composed, tiny

PUBLISHED = sorted(GOLDEN.glob("*/published/*.json"))


def failing(rows) -> list[str]:
    return [row.what for row in rows if not row.is_same]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_recipe_has_every_published_name_shape_and_setting(path, capsys):
    """0 missing, 0 unexpected: on the meta device, without data and without weights."""
    perform(composed("task=verify", "task.golden=false", f"experiment={path.stem}"))
    said = capsys.readouterr().out
    assert "NOT" not in said
    assert "rows as published" in said


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_evidence_names_files_that_are_there(path):
    evidence = read_evidence(path.stem)
    home = GOLDEN.parents[1]
    assert evidence["source"]
    assert all((home / name).is_file() for name in evidence.get("tests", ()))
    assert all(source for _, source in evidence["settings"].values())


def test_what_differs_is_named_in_the_table_and_in_the_error(capsys):
    root = composed(
        "task=verify", "task.golden=false", "experiment=ldm_celebahq_vq4", "ema.decay=0.999",
        "backbone.model_channels=32",
    )  # fmt: skip
    with pytest.raises(SandboxError, match=r"backbone: numbers.*ema\.decay") as raised:
        perform(root)
    assert raised.value.exit_code != 0
    (row,) = (x for x in capsys.readouterr().out.splitlines() if "ema.decay" in x)
    assert row.split()[:5] == ["NOT", "ema.decay", "0.999", "published:", "0.9999"]


def test_every_recipe_of_the_four_systems_has_evidence():
    """The tiny siblings have none: their sizes are not published."""
    systems = ("ldm", "dynamicrafter", "easyanimate", "cogvideox")
    recipes = {p.stem for s in systems for p in CONF.glob(f"experiment/{s}_*.yaml")}
    assert {p.stem for p in PUBLISHED} == {n for n in recipes if not n.endswith("_tiny")}


@pytest.mark.parametrize(
    ("recipe", "override", "rows"),
    [
        ("2b_sft", "backbone.num_layers=29", ["backbone: numbers", "backbone: names",
         "backbone: names: missing", "backbone.num_layers"]),
        ("2b_sft", "backbone.use_rotary_positional_embeddings=true",
         ["backbone.use_rotary_positional_embeddings"]),
        ("2b_sft", "vae.layers_per_block=2", ["vae: numbers", "vae: names", "vae: names: missing",
         "vae.layers_per_block"]),
        ("2b_sft", "conditioning.d_ff=5120", ["conditioning: shapes: differing",
         "conditioning.d_ff"]),
        ("2b_sft", "schedule.snr_shift=1", ["schedule.snr_shift"]),
        ("2b_lora", "adapter.rank=64", ["adapter: numbers", "adapter: shapes: differing",
         "adapter.rank"]),
        ("5b_lora", "adapter.targets=[to_q]", ["adapter: numbers", "adapter: tensors"]),
        ("5b_lora", "sampler=ddim", ["sampler.plugin"]),
    ],
)  # fmt: skip
def test_what_differs_from_cogvideox_is_named(recipe, override, rows):
    recipe = f"cogvideox_{recipe}"
    wiring = check_and_wire(composed("task=verify", f"experiment={recipe}", override))
    evidence = read_evidence(recipe)
    found = [*verify.weights(wiring, evidence), *settings_rows(wiring.root, evidence)]
    assert failing(found) == rows


def test_folders_of_the_user_are_not_read(tmp_path):
    """Cached latents and released weights are often named on the command line."""
    words = ("experiment=cogvideox_2b_sft", f"data.root={tmp_path}", f"init_from={tmp_path}")
    wiring = check_and_wire(composed("task=verify", *words))
    assert failing(verify.weights(wiring, read_evidence("cogvideox_2b_sft"))) == []


@pytest.mark.parametrize("words", ["layout=diffusers", "layout=null"])
def test_a_layout_that_cannot_write_the_system_fails_its_row(words):
    wiring = check_and_wire(composed("task=verify", "experiment=ldm_celebahq_vq4", words))
    assert failing(verify.weights(wiring, read_evidence("ldm_celebahq_vq4"))) == ["layout"]


def test_a_group_with_another_plugin_inherits_no_settings():
    base = {"sampler.plugin": ["sampler/ddim", ""], "sampler.eta": [0, ""], "adapter": [None, ""],
            "lr": [1, ""], "callbacks.images.every": [5, ""]}  # fmt: skip
    own = {"sampler.plugin": ["sampler/euler", ""], "adapter.plugin": ["adapter/lora", ""],
           "callbacks.images.plugin": ["callbacks/images", ""]}  # fmt: skip
    assert verify.inherited_settings(base, own).keys() == {*own, "lr", "callbacks.images.every"}
    assert verify.inherited_settings(base, {"sampler.plugin": ["sampler/ddim", ""]}) == base


def test_missing_and_unexpected_names_are_counted(tmp_path, monkeypatch):
    whole = json.loads((GOLDEN / "systems/ldm_celebahq_vq4.json").read_text())
    del whole["betas"]
    (tmp_path / "less.json").write_text(json.dumps(whole | {"strange": [[1], "float32"]}))
    monkeypatch.setattr(verify, "GOLDEN", tmp_path)
    wiring = check_and_wire(composed("task=verify", "experiment=ldm_celebahq_vq4"))
    rows = {row.what: row for row in verify.weights(wiring, {"manifest": "less.json"})}
    assert rows["names: missing"].here == "1: strange"
    assert rows["names: unexpected"].here == "1: betas"
    assert not rows["numbers"].is_same


def test_a_recipe_without_evidence_is_refused():
    with pytest.raises(ConfigError, match=r"recipe=default: .*experiment=ldm_celebahq_vq4"):
        perform(compose("task=verify"))


def test_a_setting_that_is_not_there_fails_its_row():
    rows = settings_rows(tiny(), {"settings": {"ema.strange": [1, "x"], "seed": [0, "x"]}})
    assert failing(rows) == ["ema.strange"]


def test_evidence_of_a_base_holds_where_a_file_is_silent(tmp_path, monkeypatch):
    folder = tmp_path / "system/published"
    folder.mkdir(parents=True)
    base = {"source": "s", "manifest": "m", "settings": {"a": [1, ""], "b": [2, ""]}}
    (folder / "large.json").write_text(json.dumps(base))
    (folder / "small.json").write_text(
        json.dumps({"base": "large", "manifest": None, "settings": {"b": [3, ""]}})
    )
    monkeypatch.setattr(verify, "GOLDEN", tmp_path)
    found = read_evidence("small")
    assert found["settings"] == {"a": [1, ""], "b": [3, ""]}
    assert (found["source"], found["manifest"]) == ("s", None)


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        (48 * 2e-6, 9.6e-5, True),  # a product, rounded
        ([1, [2]], (1, (2,)), True),
        ([1], [1, 2], False),
        (True, 1, False),
        (None, 0, False),
        (200, 200.0, True),
    ],
)
def test_numbers_are_the_same_up_to_rounding(a, b, want):
    assert same(a, b) is want


def test_tests_that_fail_fail_their_row(tmp_path, monkeypatch):
    """Files of tests are run as they are."""
    home = tmp_path / "home"
    (home / "tests/golden").mkdir(parents=True)
    (home / "tests/test_one.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    (home / "tests/test_two.py").write_text("def test_a(): pass\n")
    skip = "import pytest\n@pytest.mark.skip\ndef test_b(): assert 0\n"
    (home / "tests/test_two_of.py").write_text(f"{skip}def test_a(): pass\n")
    (home / "tests/test_skipped.py").write_text(skip)
    monkeypatch.setattr(verify, "GOLDEN", home / "tests/golden")
    rows = [*outputs(["tests/test_one.py", "tests/test_two.py", "tests/test_none.py"])]
    assert "tests/test_one.py" in failing(rows) or "tests" in failing(rows)
    names = ["tests/test_two.py", "tests/test_two_of.py", "tests/test_skipped.py"]
    two, two_of, skipped = outputs(names)
    assert (two.here, two.is_same, two.source) == ("1 passed", True, "")
    assert (two_of.here, two_of.is_same, two_of.source[:9]) == ("1 passed", True, "1 skipped")
    assert (skipped.here, skipped.is_same) == ("0 passed", False)  # nothing was compared


def test_a_row_shows_the_published_value_only_where_it_differs():
    rows = [Row("a", 1, 1), Row("b", None, [2])]
    assert verify.table(rows).splitlines() == ["ok   a  1", "NOT  b  null  published: [2]"]


def test_a_system_without_an_average_has_none_in_its_manifest():
    from sandbox.config import registry
    from sandbox.config.wiring import wire

    wiring = wire(tiny())
    without = wire(replace(tiny(), ema=registry.default("ema", "none")))
    assert verify.on_meta(wiring)["ema"]
    assert not verify.on_meta(without)["ema"]
