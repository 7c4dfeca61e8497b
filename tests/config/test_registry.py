"""Plugins are read without being imported, break alone, and come from three kinds of places."""

import copy
import linecache
import pickle
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from sandbox import compose
from sandbox.config import discovery, registry
from sandbox.config.paths import CHECKOUT
from sandbox.config.root import to_container
from sandbox.contracts import ConfigError, PluginConfig, PluginError, SandboxError

HOME = CHECKOUT
GOOD = '''
"""A first stage for tests."""
from dataclasses import dataclass
from sandbox.contracts import Clip, FirstStageConfig
from sandbox.registry import register

CHANNELS = 3

@register("vae", "mine")
class Mine:
    """Pixels as they are."""

    @dataclass
    class Config(FirstStageConfig):
        channels: int = CHANNELS

        def latents(self, clip: Clip) -> Clip:
            return clip

        def fitted(self) -> str:
            return "none"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
'''


def write(folder: Path, text: str = GOOD, place: str = "vae/mine.py") -> Path:
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
    return path


def line_of(text: str, words: str) -> int:
    return next(i for i, line in enumerate(textwrap.dedent(text).splitlines(), 1) if words in line)


# --- broken ones ----------------------------------------------------------------------------------

BROKEN = {  # what is changed, what the error says, the line that it names
    "syntax": (("class Mine:", "class Mine"), "expected ':'", "class Mine"),
    "torch in Config": (
        ("CHANNELS = 3", "import torch\nCHANNELS = torch.zeros(1)"),
        "comes from torch; a Config may use the standard library",
        "import torch",
    ),
    "relative import in Config": (
        ("CHANNELS = 3", "from ._common import CHANNELS"), "comes from ._common;", "._common",
    ),
    "no decorator": (('@register("vae", "mine")', ""), "no class has the decorator", None),
    "wrong name": (('"mine")', '"yours")'), "registers ('vae', 'yours')", "class Mine"),
    "wrong group": (('("vae",', '("bae",'), "registers ('bae', 'mine')", "class Mine"),
    "no Config": (("class Config", "class Settings"), "needs a nested dataclass", "class Mine"),
    "no base": (("Config(FirstStageConfig)", "Config"), "derived from a Config of", "class Config"),
    "no default": (("int = CHANNELS", "int"), "non-default argument", None),
    "unknown type": (("int = CHANNELS", "set[int] | None = None"), "Config cannot be used", None),
    "undefined name": (("int = CHANNELS", "int = CHANEL"), "name 'CHANEL' is not", "CHANEL"),
    "no size of latents": (
        ("def latents", "def latent"), "abstract class Config with", "class Config"),
    "error in the class body": (("int = CHANNELS", "int = 1 // 0"), "ZeroDivisionError", "1 // 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_breaks_itself_alone_and_says_where(plugin_folder, kind):
    (old, new), words, place = BROKEN[kind]
    text = GOOD.replace(old, new)
    assert text != GOOD
    path = write(plugin_folder, text)
    assert compose().vae.plugin == "vae/pca"
    with pytest.raises(ConfigError, match="vae=mine is broken") as e:
        compose("vae=mine")
    line = f":{line_of(text, place)}:" if place else ":"
    assert f"{path}{line}" in str(e.value) and words in str(e.value)


def test_a_file_that_is_not_text_breaks_itself_alone(plugin_folder):
    write(plugin_folder, b"\xff\xfe\x00 = 3")
    with pytest.raises(ConfigError, match=r"vae=mine is broken: .*cannot be read"):
        compose("vae=mine")


@pytest.mark.parametrize(
    ("added", "words"),
    [("import nothing_of_this_name", "ModuleNotFoundError"), ("1 / 0", "ZeroDivisionError")],
)
def test_an_error_at_import_is_that_plugins_own_when_it_is_built(plugin_folder, added, words):
    path = write(plugin_folder, GOOD + added + "\n")
    cfg = compose("vae=mine").vae
    with pytest.raises(PluginError, match=words) as e:
        registry.create(cfg)
    assert f"{path}:{line_of(GOOD + added, added)}" in str(e.value)
    assert e.value.exit_code == 2


def test_the_list_of_plugins_shows_a_broken_one_with_its_error(plugin_folder, capsys):
    from sandbox.cli.main import _main

    path = write(plugin_folder, GOOD.replace("class Mine:", "class Mine"))
    assert _main(["task=plugins", "task.only=vae"]) == 0
    assert str(path) in capsys.readouterr().out
    assert _main(["--help", "vae"]) == 0
    assert "(broken)" in capsys.readouterr().out


def test_a_file_that_was_mended_is_read_again(plugin_folder):
    write(plugin_folder, GOOD.replace("class Mine:", "class Mine"))
    with pytest.raises(ConfigError):
        compose("vae=mine")
    write(plugin_folder)
    assert registry.create(compose("vae=mine").vae).cfg.channels == 3
    write(plugin_folder, GOOD.replace("CHANNELS = 3", "CHANNELS = 33"))
    made = registry.create(compose("vae=mine").vae)
    assert made.cfg.channels == 33
    write(plugin_folder, "broken again")
    with pytest.raises(ConfigError, match="is broken"):
        compose("vae=mine")


# --- reading --------------------------------------------------------------------------------------


def test_reading_takes_every_statement_about_a_name_that_the_config_uses(plugin_folder):
    text = GOOD.replace("CHANNELS = 3", "CHANNELS = 3\nCHANNELS += 4\nunused = open('nowhere')")
    write(plugin_folder, text)
    assert compose("vae=mine").vae.channels == 7


def test_reading_takes_a_name_of_the_file_before_a_builtin_one(plugin_folder):
    text = GOOD.replace("CHANNELS = 3", "def len(x):\n    return 5\nCHANNELS = len('')")
    write(plugin_folder, text)
    assert compose("vae=mine").vae.channels == 5


def test_reading_imports_nothing(plugin_folder):
    write(plugin_folder, GOOD + "raise RuntimeError('imported')\n")
    assert compose("vae=mine").vae.channels == 3


def test_the_class_that_was_read_is_the_class_of_the_imported_file(plugin_folder):
    text = GOOD.replace(
        "CHANNELS = 3",
        "@dataclass(frozen=True)\nclass Part:\n    n: int = 3\n\nCHANNELS = Part().n",
    )
    write(plugin_folder, text)
    cfg = compose("vae=mine").vae
    made = registry.create(cfg)
    assert type(made).Config is type(cfg)
    module = sys.modules[type(made).__module__]
    assert module.Part in registry.find("vae/mine").helpers


def test_a_plugin_outside_the_checkout_may_have_a_helper_file(plugin_folder):
    write(plugin_folder, GOOD + "from ._common import ANSWER\n")
    write(plugin_folder, "ANSWER = 42\n", "vae/_common.py")
    made = registry.create(compose("vae=mine").vae)
    assert sys.modules[type(made).__module__].ANSWER == 42


def test_folders_that_hold_no_plugins_are_passed_over(plugin_folder):
    write(plugin_folder, "syntax error", "tests/vae/test_mine.py")
    write(plugin_folder, "syntax error", "vae/_blocks.py")
    write(plugin_folder, "syntax error", "setup.py")
    discovery.setup()
    assert not [p for p in registry.plugins() if str(plugin_folder) in p.place]


# --- where plugins come from ----------------------------------------------------------------------


def test_plugins_path_brings_plugins_and_presets(plugin_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("SANDBOX_PLUGINS")
    folder = tmp_path / "more plugins"
    write(folder)
    write(folder, "# Five.\ndefaults: [mine, _self_]\nchannels: 5\n", "conf/vae/mine_five.yaml")
    with pytest.raises(ConfigError, match="vae=mine: no such option"):
        compose("vae=mine")
    assert compose(f"plugins_path={folder}", "vae=mine_five").vae.channels == 5
    with pytest.raises(ConfigError) as e:
        compose(f"plugins_path={folder}", "vae=mine_five", "vae.channel=3")
    assert e.value.args == ("vae.channel: vae=mine has no such setting; did you mean 'channels'?",)


def test_several_folders_may_be_named(plugin_folder, tmp_path, monkeypatch):
    write(plugin_folder)
    write(tmp_path / "b", GOOD.replace("mine", "other"), "vae/other.py")
    monkeypatch.setenv("SANDBOX_PLUGINS", f"{plugin_folder}:{tmp_path / 'b'}")
    assert compose("vae=mine").vae.plugin == "vae/mine"
    assert compose("vae=other").vae.plugin == "vae/other"


@pytest.mark.parametrize("how", ["plugins_path", "SANDBOX_PLUGINS"])
def test_a_folder_that_is_not_there_is_named(plugin_folder, monkeypatch, how):
    said = ["plugins_path=/nowhere"] if how == "plugins_path" else []
    if not said:
        monkeypatch.setenv(how, "/nowhere")
    with pytest.raises(ConfigError, match=f"{how}=/nowhere: no such folder"):
        compose(*said)


def distribution(folder: Path, value: str, monkeypatch) -> None:
    """An installed distribution that declares plugins."""
    info = folder / "their_plugins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sandbox.plugins]\ntheirs = {value}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_an_installed_distribution_brings_plugins(plugin_folder, tmp_path, monkeypatch):
    site = tmp_path / "site"
    path = write(site / "their_package" / "plugins", GOOD + "LOADED = True\n")
    (site / "their_package" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    distribution(site, "their_package.plugins", monkeypatch)
    assert compose("vae=mine").vae.plugin == "vae/mine"
    assert registry.find("vae/mine").path == path.resolve()
    assert "their_package" not in sys.modules


@pytest.mark.parametrize("value", ["no_such_package.plugins", "sandbox.no_such_folder"])
def test_a_distribution_without_its_folder_harms_nobody(
    plugin_folder, tmp_path, monkeypatch, caplog, value
):
    distribution(tmp_path / "site", value, monkeypatch)
    assert compose().vae.plugin == "vae/pca"
    assert f"theirs={value}" in caplog.text


def test_two_plugins_of_one_name_are_an_error_with_both_files(plugin_folder):
    path = write(plugin_folder, GOOD.replace("mine", "pca"), "vae/pca.py")
    with pytest.raises(PluginError, match="vae/pca exists twice") as e:
        compose()
    assert str(path) in str(e.value) and str(HOME / "plugins/vae/pca.py") in str(e.value)
    assert e.value.exit_code == 2


def test_a_preset_with_the_name_of_a_plugin_is_an_error(plugin_folder):
    path = write(plugin_folder, "channels: 5\n", "conf/vae/pca.yaml")
    with pytest.raises(PluginError, match="would hide it") as e:
        compose()
    assert str(path) in str(e.value)


def test_two_presets_of_one_name_are_an_error_with_both_files(plugin_folder):
    path = write(plugin_folder, "defaults: [kl]\n", "conf/vae/kl_f8.yaml")
    with pytest.raises(PluginError, match="vae/kl_f8 exists twice") as e:
        compose()
    assert str(path) in str(e.value) and str(HOME / "conf/vae/kl_f8.yaml") in str(e.value)


# --- live code ------------------------------------------------------------------------------------


def notebook(text: str = GOOD, name: str = "a_notebook") -> ModuleType:
    """Runs a cell as Jupyter does: a module without a file, and lines under a name of their own."""
    module = sys.modules.setdefault(name, ModuleType(name))
    text, file = textwrap.dedent(text), f"/tmp/ipykernel_1/{len(linecache.cache)}.py"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def test_a_class_of_a_notebook_is_a_plugin_at_once(plugin_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_notebook", ModuleType("a_notebook"))
    module = notebook()
    cfg = compose("vae=mine", "vae.channels=4").vae
    made = registry.create(cfg)
    assert type(made) is module.Mine and made.cfg.channels == 4
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_a_cell_that_is_run_again_replaces_its_plugin(plugin_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_notebook", ModuleType("a_notebook"))
    notebook()
    module = notebook(GOOD.replace("CHANNELS = 3", "CHANNELS = 6"))
    made = registry.create(compose("vae=mine").vae)
    assert type(made) is module.Mine and made.cfg.channels == 6


def test_the_code_of_a_cell_is_all_of_it(plugin_folder, monkeypatch, tmp_path):
    """Else what an edited cell makes is taken for what it made before: runs, first stages."""
    monkeypatch.setitem(sys.modules, "a_notebook", ModuleType("a_notebook"))
    notebook()
    assert registry.source(registry.find("vae/mine")).decode() == GOOD
    edited = GOOD.replace("CHANNELS = 3", "CHANNELS = 6")
    notebook(edited)
    assert edited.encode() in registry.plugin_sources(CHECKOUT)


def test_a_notebook_cannot_take_the_name_of_a_plugin(plugin_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_notebook", ModuleType("a_notebook"))
    with pytest.raises(PluginError, match=r"vae/pca exists twice.*a_notebook"):
        notebook(GOOD.replace("mine", "pca"))


def test_a_class_without_a_config_is_refused(plugin_folder):
    with pytest.raises(PluginError, match="needs a nested dataclass named Config"):
        registry.register("vae", "bare")(type("Bare", (), {}))


# --- Configs --------------------------------------------------------------------------------------


def every_config() -> list[PluginConfig]:
    discovery.setup()
    return [p.config(plugin=p.key) for p in registry.plugins() if p.config]


@pytest.mark.parametrize("key", [c.plugin for c in every_config()])
def test_a_config_survives_yaml_and_copy(key):
    cfg = registry.default(*key.rsplit("/", 1))
    text = yaml.safe_dump(to_container(cfg))
    assert registry.typed(yaml.safe_load(text)) == cfg
    assert type(registry.typed(yaml.safe_load(text))) is type(cfg)
    assert copy.copy(cfg) == cfg == copy.deepcopy(cfg)


def test_every_config_survives_pickle_into_another_process(plugin_folder, tmp_path):
    """In a process that knows the plugins but has imported none; one from outside is among them."""
    write(plugin_folder)
    discovery.setup()
    file = tmp_path / "configs.pickle"
    cheap = [c for c in every_config() if c.plugin in ("vae/mine", "task/train", "ema/none")]
    file.write_bytes(pickle.dumps(cheap))
    code = (
        "import pickle, sys; from sandbox import registry;"
        "from sandbox.config import discovery; discovery.setup();"
        f"found = pickle.load(open({str(file)!r}, 'rb'));"
        "assert found == [registry.default(*c.plugin.split('/')) for c in found], found;"
        "print(len(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("3", "")


def test_create_goes_by_the_name_in_the_config(plugin_folder):
    write(plugin_folder)
    write(plugin_folder, GOOD.replace("mine", "other").replace("Mine", "Other"), "vae/other.py")
    cfg = compose("vae=mine").vae
    cfg.plugin = "vae/other"
    assert type(registry.create(cfg)).__name__ == "Other"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"plugin": "vae/pcaa"}, "vae=pcaa: no such plugin; did you mean 'pca'?"),
        ({"plugin": "bae/pca"}, "bae/pca: no such plugin; did you mean 'vae/pca'?"),
        ({"plugin": "vae/pca", "pach": 3}, "vae.pach: vae/pca has no such setting; did you mean"),
    ],
)
def test_a_saved_configuration_that_does_not_fit_says_where(node, words):
    discovery.setup()
    with pytest.raises(SandboxError) as e:
        registry.typed(node)
    assert words in str(e.value) and e.value.exit_code == 2


@dataclass
class Shapes(PluginConfig):
    pair: tuple[float, float] = (0.0, 1.0)
    maybe: tuple[int, int] | None = None
    many: tuple[int, ...] = ()
    word: str = ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pair": (1.0,)}, "pair=[1.0]: want 2 entries"),
        ({"maybe": (1, 2, 3)}, "maybe=[1, 2, 3]: want 2 entries"),
        (
            {"word": "None"},
            "word='None': want null for an empty value; None is a plain string here",
        ),
        ({"many": (1, 2, 3), "maybe": (1, 2)}, None),
    ],
)
def test_what_types_let_pass_is_found(changes, words):
    assert list(registry.type_problems(Shapes(**changes))) == ([words] if words else [])


def test_the_names_of_a_message_are_few():
    assert registry.nearest("zz", [f"n{i:02}" for i in range(30)]).endswith("and 18 more (--help)")
    assert registry.nearest("widht", ["width", "height"]) == "; did you mean 'width'?"
