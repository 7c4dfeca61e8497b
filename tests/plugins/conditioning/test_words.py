"""Learned embeddings of caption words."""

import logging

import pytest
import torch

from plugins.conditioning.words import Words, row
from sandbox.contracts import Batch, Clip, Conditions, Slots, Tokens
from sandbox.randomness import Keyed

CLIP = Clip(3, 9, 16, 16)
DIGIT_WORDS = "a moving red yellow green cyan blue magenta left right up down 0 1 2 3 4 5 6 7 8 9"


def words(**settings) -> Words:
    torch.manual_seed(0)
    return Words(Words.Config(**{"width": 8} | settings))


def conditions(model: Words, captions: list[str], drop=None, negative=None) -> Conditions:
    batch = Batch(captions=captions, negative=negative)
    drop = {} if drop is None else {"text": torch.tensor(drop)}
    return model(batch, CLIP, drop, None, None, None)


def test_the_words_of_moving_digits_do_not_collide():
    rows = {row(word, Words.Config().buckets) for word in DIGIT_WORDS.split()}
    assert len(rows) == 22 and 0 not in rows  # row 0 is the 23rd: no word


def test_a_word_has_the_same_row_on_every_machine():
    assert [row("red", 1024), row("left", 1024), row("3", 1024)] == [164, 388, 514]


def test_a_vector_is_the_sum_of_the_words():
    model = words()
    rows = torch.tensor([row(w, 1024) for w in ("a", "red", "3", "moving", "left")])
    want = model.table.weight[rows].sum(0)
    torch.testing.assert_close(conditions(model, ["a red 3 moving left"]).vector[0], want)


@pytest.mark.parametrize("captions", [[""], ["?!"]])
def test_a_caption_without_words_is_padding_only(captions):
    model = words()
    torch.testing.assert_close(conditions(model, captions).vector[0], 5 * model.table.weight[0])


def test_a_dropped_caption_equals_an_empty_one():
    model = words()
    cond = conditions(model, ["a red 3", "a red 3"], drop=[True, False])
    torch.testing.assert_close(cond.vector, conditions(model, ["", "a red 3"]).vector)


def test_dropped_text_becomes_the_negative_prompt():
    model = words()
    cond = conditions(model, ["a red 3", "a red 3"], [True, False], negative=["blue", "blue"])
    torch.testing.assert_close(cond.vector, conditions(model, ["blue", "a red 3"]).vector)


def test_case_and_punctuation_do_not_matter():
    model = words()
    a, b = conditions(model, ["A RED 3, moving left.", "a red 3 moving left"]).vector
    assert torch.equal(a, b)


def test_short_captions_are_padded_and_long_ones_truncated():
    model = words(offer="tokens")
    cond = conditions(model, ["red", "one two three four five six"])
    assert cond.context.shape == (2, 5, 8)
    assert torch.equal(cond.context[0, 1:], model.table.weight[:1].expand(4, -1))
    assert torch.equal(cond.context[1], conditions(model, ["one two three four five"]).context[0])


def test_truncation_is_reported_once(caplog):
    model = words(max_words=2)
    with caplog.at_level(logging.WARNING):
        conditions(model, ["a red 3", "a blue 4"])
        conditions(model, ["a red 3"])
    assert [r.getMessage() for r in caplog.records] == [
        "captions are cut after conditioning.max_words=2 words, such as 'a red 3' (3 words)"
    ]


@pytest.mark.parametrize(
    ("offer", "slots"),
    [
        ("vector", Slots(vector=8)),
        ("tokens", Slots(context=Tokens(8, 5))),
        ("both", Slots(vector=8, context=Tokens(8, 5))),
    ],
)
def test_conditions_have_the_offered_slots(offer, slots):
    model = words(offer=offer)
    assert model.cfg.offers(CLIP, CLIP) == slots
    given = {name: tuple(x.shape) for name, x in conditions(model, ["a", "b c"]).tensors()}
    want = {"vector": (2, 8)} if slots.vector else {}
    assert given == want | ({"context": (2, 5, 8)} if slots.context else {})


def test_a_tenth_of_the_captions_is_dropped_by_a_keyed_draw():
    model = words()
    draws = Keyed(0, 0, torch.arange(2000), 32)
    dropped = model.drop(draws)["text"]
    assert 0.08 < dropped.float().mean() < 0.12  # three standard errors of 2,000 draws
    assert torch.equal(dropped, draws.uniform("drop_text") < 0.1)


def test_probabilities_zero_and_one_drop_nothing_and_all():
    draws = Keyed(0, 0, torch.arange(50), 32)
    assert not words(drop_text=0.0).drop(draws)["text"].any()
    assert words(drop_text=1.0).drop(draws)["text"].all()


def test_only_used_embeddings_get_gradients():
    model = words()
    conditions(model, ["red"]).vector.square().sum().backward()
    used = model.table.weight.grad.any(1).nonzero().flatten().tolist()
    assert used == [0, row("red", 1024)]


def test_bfloat16_tables_give_bfloat16_conditions():
    assert conditions(words().bfloat16(), ["a red 3"]).vector.dtype == torch.bfloat16


def test_it_needs_captions():
    assert Words.Config().needs() == {"captions"}
    with pytest.raises(ValueError, match="needs captions"):
        conditions(words(), None)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"offer": "sum"}, "offer='sum': want one of ['vector', 'tokens', 'both']"),
        ({"width": 0}, "width=0: want >= 1"),
        ({"buckets": 0}, "buckets=0: want >= 1"),
        ({"max_words": 0}, "max_words=0: want >= 1"),
        ({"drop_text": 1.5}, "drop_text=1.5: want 0 to 1"),
        ({"drop_text": float("nan")}, "drop_text=nan: want 0 to 1"),
    ],
)
def test_bad_settings_are_reported(settings, problem):
    assert list(Words.Config(**settings).problems()) == [problem]
