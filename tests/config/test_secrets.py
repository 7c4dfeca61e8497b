"""What is masked, and what must not be."""

import html
import json
import sys
from urllib.parse import quote

import pytest

from sandbox.cli.main import main
from sandbox.config import discovery, secrets
from sandbox.config.secrets import (
    MASK,
    folder_name,
    mask,
    mask_text,
    masked_console,
    remember,
    without_secrets,
)
from sandbox.distributed.supervisor import in_this_process
from sandbox.reports.fonts import wrap
from tests.helpers import TINY

LONG = "a1b2c3d4e5f6a7b8c9d0"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("password", "x"),
        ("db_password", "x"),
        ("client_secret", "x"),
        ("credentials", "x"),
        ("api_key", "12345678"),
        ("apiKey", "12345678"),
        ("wandb.api-key", "12345678"),
        ("token", "12345678"),
        ("hf_token", "12345678"),
        ("key", LONG),
        ("anything", "hf_" + LONG),
        ("anything", "sk-" + LONG),
        ("anything", "before ghp_" + LONG),
    ],
)
def test_secret_is_masked(name, value):
    assert value[-8:] not in str(mask({name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_tokens", 77),
        ("token", 5),
        ("tokens", "one two"),
        ("key_dim", 64),
        ("first_stage_key", "image"),
        ("key", "video"),
        ("pad_token", "<pad>"),
        ("tokenizer", "some-tokenizer-name"),
        ("api_key", None),
        ("password", ""),
        ("author", "somebody"),
        ("url", "https://host/path"),
    ],
)
def test_setting_is_not(name, value):
    assert mask({name: value}) == {name: value}


def test_everything_below_a_secret_name_is_masked():
    assert mask({"secrets": {"a": "b", "c": ["d", 1]}}) == {"secrets": {"a": MASK, "c": [MASK, 1]}}


def test_values_of_secret_variables_are_masked_anywhere(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", LONG)
    monkeypatch.setenv("HOME_TOKEN", "short")
    assert mask({"a": [f"x{LONG}y", "short"]}) == {"a": [f"x{MASK}y", "short"]}


def test_password_in_an_address_is_masked():
    assert mask("https://me:pw@host/x") == f"https://me:{MASK}@host/x"


def test_command_line_is_masked_by_the_names_in_it():
    said = mask_text(f"run.py lr=1 logger.api_key={LONG} data.key=video password=x")
    assert said == f"run.py lr=1 logger.api_key={MASK} data.key=video password={MASK}"


def test_given_config_is_not_changed():
    config = {"api_key": LONG}
    mask(config)
    assert config == {"api_key": LONG}


# --- by origin ------------------------------------------------------------------------------------


@pytest.fixture
def remembered(monkeypatch):
    monkeypatch.setattr(secrets, "_remembered", set())


SECRETS = {7: "s3cr3tx", 24: "Abcdefghij0123456789ABCD", 60: "Q9z" * 20}
VARIABLES = [
    "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "DB_PASSWORD", "DB_PASS", "GITHUB_PAT",
    "AWS_SECRET_ACCESS_KEY", "CLIENT_SECRET", "SMTP_PWD", "SESSION_COOKIE", "PROXY_AUTH",
]  # fmt: skip


@pytest.mark.parametrize("length", SECRETS)
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_secret_variable_is_masked_whatever_its_length(monkeypatch, variable, length):
    secret = SECRETS[length]
    monkeypatch.setenv(variable, secret)
    for text in (
        secret,
        f"a-{secret}",
        f"/tmp/{secret}/x",
        f"note={secret}",
        f'{{"a": "{secret}"}}',
    ):
        assert secret not in mask_text(text)
        assert secret not in without_secrets(text)
        assert secret not in str(mask({"note": [text]}))


def test_a_secret_is_masked_as_pages_and_files_write_it(monkeypatch):
    secret = 'a&b"c<d>/\u00e4 e1'
    monkeypatch.setenv("API_TOKEN", secret)
    for text in (html.escape(secret), json.dumps({"x": secret}), quote(secret, safe="")):
        assert MASK in without_secrets(text)


@pytest.mark.parametrize(
    "name", ["api_key", "logger.api_key", "secret_key", "password", "hf_token"]
)
def test_a_value_under_the_name_of_a_secret_is_masked_everywhere_afterwards(remembered, name):
    remember({"logger": {name: "s3cr3tx"}, "vae": {"weights": "cached"}})
    assert mask_text("a s3cr3tx b") == f"a {MASK} b"
    assert mask({"weights": "cached", "note": "s3cr3tx"}) == {"weights": "cached", "note": MASK}


def test_an_interpolation_of_a_secret_variable_makes_even_a_short_word_a_secret(
    remembered, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "abc")
    assert mask_text("abc") == "abc"
    remember({"logger": {"project": "p-${oc.env:HF_TOKEN}"}})
    assert mask_text("p-abc abcdef") == f"p-{MASK} abcdef"


@pytest.mark.parametrize("value", ["cached", "digits", "offline", "moving_digits", "short", "1"])
def test_a_variable_with_a_word_of_the_program_masks_nothing(monkeypatch, value):
    discovery.setup()
    monkeypatch.setenv("HOME_TOKEN", value)
    assert mask({"weights": value}) == {"weights": value}


def test_the_folder_of_a_run_has_no_secret_in_its_name(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3tx")
    assert folder_name("s3cr3tx") == "run" and folder_name("my-s3cr3tx") == "my"


def test_nothing_that_is_printed_has_a_secret(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "s3cr3tx")
    with masked_console():
        print("a s3cr3tx")
        print("a s3cr3tx", file=sys.stderr)
        sys.stdout.writelines(["s3cr3tx\n"])
    assert "s3cr3tx" not in "".join(capsys.readouterr())


def test_text_that_is_drawn_has_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3tx")
    assert "s3cr3tx" not in "".join(wrap("a red s3cr3tx", 900, 18, most=2))
    assert "s3c" not in "".join(wrap("s3cr3tx", 40, 18, most=9))  # cut into lines after masking


def test_no_file_of_a_run_and_no_line_has_a_planted_secret(tmp_path, monkeypatch, capfd):
    """Every setting that takes text, and the tracker's own files."""
    monkeypatch.chdir(tmp_path)
    names = ("HF_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD")
    for name, value in zip(names, SECRETS.values(), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    every = "-".join(f"${{oc.env:{name}}}" for name in names)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "leak.yaml").write_text(
        f"# @package _global_\nrecipe: r-{every}\nlogger:\n  project: p-{every}\n"
        f"  entity: e-{every}\n  tags: ['{every}']\n"
    )
    words = ["-cd", "conf", "experiment=leak", *TINY, "logger=wandb", "task.score_clips=2"]
    words.remove("logger=null")
    typed = f"prompts=[a {SECRETS[7]}, {SECRETS[60]}]"
    with in_this_process():
        for line in (
            [*words, "--cfg", "job", "--resolve"],
            [*words, f"backbone={SECRETS[24]}"],
            [*words, "task.samples=1", "task.untrained=false"],
            ["task=sample", typed, "sampler.steps=1"],
        ):
            with pytest.raises(SystemExit):
                main(line)
    shown = "".join(capfd.readouterr())
    assert "page" in shown and "sheet.png" in shown and f"backbone={MASK}" in shown, shown
    for secret in SECRETS.values():
        assert secret not in shown
        for path in tmp_path.rglob("*"):
            assert secret not in str(path)
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
