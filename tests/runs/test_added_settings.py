"""Settings that join a Config later change no hash of older runs, and no comparison with them."""

import json
from pathlib import Path

import pytest
import yaml

from sandbox.config import discovery
from sandbox.config.added_settings import with_added, without_added
from sandbox.config.paths import CONF
from sandbox.config.root import Root, to_container
from sandbox.contracts import ConfigError
from sandbox.model.cached_latents import settings_of
from sandbox.runs.diff import compare_runs
from sandbox.runs.identity import differences, identity, identity_of_work
from sandbox.runs.lookup import read_root
from sandbox.runs.protocol import protocols
from sandbox.runs.resume import open_root, open_run, resumes
from tests.helpers import composed, recipe

RECORDED = json.loads(Path(__file__).with_name("identities.json").read_text())
PLUGIN = '''
from dataclasses import dataclass
from sandbox.contracts import Clip, FirstStageConfig, added
from sandbox.registry import register

@register("vae", "mine")
class Mine:
    """Pixels as they are."""

    @dataclass
    class Config(FirstStageConfig):
        channels: int = 3

        def latents(self, clip: Clip) -> Clip:
            return clip

        def fitted(self) -> str:
            return "none"
'''
ADDED = {  # the field, another value
    "slope: float = added(0.0)": "0.5",
    "tiled: bool = added(False)": "true",
    "limit: int | None = added(None)": "3",
    "sizes: tuple[int, ...] = added((1, 2))": "[1,3]",
    "rule: str = added('old')": "new",
}


def before(folder: Path) -> Root:
    write(folder, PLUGIN)
    return composed("vae=mine")


def write(folder: Path, text: str) -> None:
    path = folder / "vae" / "mine.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def after(folder: Path, field: str, *overrides: str) -> Root:
    write(folder, PLUGIN.replace("channels: int = 3", f"channels: int = 3\n        {field}"))
    return composed("vae=mine", *overrides)


def hashed(root: Root) -> list:
    """What names runs, plans and caches, and decides whether scores are comparable."""
    plain = to_container(root)
    clip = root.data.clips()[0]
    found = protocols(root, clip, 4, "ema", ["score"])
    return [identity(plain), identity_of_work(plain), settings_of(root), found]


@pytest.mark.parametrize(("field", "other"), ADDED.items())
def test_an_added_setting_counts_when_it_has_another_value(field, other, plugin_folder):
    old = hashed(before(plugin_folder))
    assert hashed(after(plugin_folder, field)) == old
    name = field.partition(":")[0]
    new = hashed(after(plugin_folder, field, f"vae.{name}={other}"))
    assert not any(a == b for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize(("field", "other"), ADDED.items())
def test_an_older_run_is_continued_at_the_default_only(field, other, plugin_folder, tmp_path):
    with open_run(tmp_path, "r", to_container(before(plugin_folder))) as run:
        folder = run.folder
    name = field.partition(":")[0]
    changed = to_container(after(plugin_folder, field, f"vae.{name}={other}"))
    with pytest.raises(ConfigError, match=rf"vae\.{name}: was .* in .*is .* now"):
        open_run(tmp_path, "r", changed, str(folder))
    same = to_container(after(plugin_folder, field))
    with open_run(tmp_path, "r", same) as run:
        assert run.folder == folder
        assert differences(run.config(), same) == []
    with open_run(tmp_path, "r", same, "never") as other_run:
        assert compare_runs(folder, other_run.folder).differences["settings"] == []


def test_a_setting_that_is_not_marked_counts_always(plugin_folder):
    old = hashed(before(plugin_folder))
    assert hashed(after(plugin_folder, "slope: float = 0.0")) != old


@pytest.mark.parametrize(
    ("timesteps", "was_rescaled"), [(1000, False), (500, True), (2000, True), (None, False)]
)
def test_an_older_run_keeps_its_times_and_is_not_continued_with_others(
    timesteps, was_rescaled, tmp_path
):
    """Version 0.1 rescaled the times of a schedule of other than 1000 times."""
    words = ["schedule=ddpm", *([f"schedule.timesteps={timesteps}"] if timesteps else [])]
    root = composed(*words, f"out={tmp_path}")
    old = to_container(root)
    del old["schedule"]["rescale_timesteps"], old["schedule"]["v_posterior"]
    with open_run(tmp_path, root.recipe, old) as run:
        folder = run.folder
    run.config_file.write_text(yaml.safe_dump(old))
    run.environment.unlink()  # it has the hash
    assert read_root(folder).schedule.rescale_timesteps is was_rescaled
    assert resumes(root) is not was_rescaled
    with open_root(root) as run:
        assert (run.folder != folder) is was_rescaled
    same = composed(*words, f"schedule.rescale_timesteps={was_rescaled}", f"out={tmp_path}")
    with open_run(tmp_path, "r", to_container(same), str(folder)) as run:
        assert run.resumed


def test_settings_of_the_run_and_of_nested_plugins_are_found(plugin_folder):
    after(plugin_folder, "slope: float = added(0.0)")
    new, old = {"plugin": "vae/mine", "slope": 0.0}, {"plugin": "vae/mine"}
    places = [lambda x: {"vae": x}, lambda x: {"stage": {"a": x}}, lambda x: {"stages": [x, (x,)]}]
    for place in places:
        assert json.dumps(without_added(place(new))) == json.dumps(place(old))
        assert json.dumps(with_added(place(old))) == json.dumps(place(new))
    gone = {"vae": {"plugin": "vae/of_someone", "slope": 0.0}}
    assert without_added(gone) == with_added(gone) == gone


def test_every_recipe_has_a_recorded_identity():
    names = {
        p.relative_to(CONF / "experiment").with_suffix("").as_posix()
        for p in CONF.glob("experiment/**/*.yaml")
    }
    assert RECORDED.keys() == {"default", *names}


def check(name: str) -> None:
    discovery.setup()
    root = composed() if name == "default" else recipe(name)
    got = identity(to_container(root))
    assert got == RECORDED[name], (
        f"runs of {name} change their name: want a new setting as `added(default)` "
        "(sandbox.contracts), and settings and defaults as they were"
    )


QUICK = ["default", "ldm_celebahq_vq4", "dynamicrafter_512", "cogvideox_2b_sft",
         "easyanimate_v2_stage1", "easyanimate_v2_vae_slice"]  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_a_run_keeps_its_identity(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECORDED.keys() - {*QUICK}))
def test_runs_of_every_recipe_keep_their_identity(name):
    check(name)
