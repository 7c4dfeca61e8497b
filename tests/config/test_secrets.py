"""What is masked, and what must not be."""

import pytest

from sandbox.config.secrets import MASK, mask, mask_text

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
