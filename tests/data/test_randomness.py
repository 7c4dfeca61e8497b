"""Keyed randomness: a number belongs to its name and its sample, and to nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from sandbox.data.randomness import Keyed, Recorded, keyed, seed_dropout, seed_of

KINDS = ("normal", "uniform", "stratified", "integers")


def draws(positions, seed=3, epoch=2, group=8):
    return Keyed(seed, epoch, torch.as_tensor(positions), group)


def draw(source, kind, name="x", size=None):
    if kind == "normal":
        count = len(source.positions) if size is None else size
        return source.normal(name, torch.empty(count, 2, 3))
    if kind == "integers":
        return source.integers(name, 5, 1000)
    return getattr(source, kind)(name)


# --- what a number depends on ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_do_not_depend_on_the_micro_batch(kind):
    whole = draw(draws(range(16)), kind)
    parts = [draw(draws(range(i, i + 4)), kind) for i in range(0, 16, 4)]
    assert torch.equal(whole, torch.cat(parts))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(draws(order), kind), whole[order])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_do_not_depend_on_what_else_is_drawn(kind):
    quiet, busy = draws(range(8)), draws(range(8))
    for other in KINDS:
        draw(busy, other, "other")
    torch.rand(5)
    assert torch.equal(draw(quiet, kind), draw(busy, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 3}, {"positions": range(8, 16)}])
def test_another_seed_epoch_or_position_gives_other_numbers(kind, change):
    first = draw(draws(range(8)), kind)
    other = draw(draws(**{"positions": range(8), **change}), kind)
    assert not torch.isclose(first.double(), other.double()).any()


@pytest.mark.parametrize("kind", KINDS)
def test_another_name_gives_other_numbers(kind):
    source = draws(range(8))
    assert not torch.isclose(draw(source, kind).double(), draw(source, kind, "y").double()).any()


def test_numbers_are_the_same_in_another_process():
    """And with another hash seed of Python; recorded once, so that they stay as they are."""
    code = (
        "import torch; from sandbox.data.randomness import Keyed, keyed, seed_of\n"
        "k = Keyed(3, 2, torch.arange(2), 8)\n"
        "print([k.uniform('x').tolist(), k.integers('x', 0, 100).tolist(),"
        " k.stratified('x').tolist(), k.normal('x', torch.empty(2, 1)).flatten().tolist(),"
        " int(keyed(1, 'a').integers(1000)), seed_of(1, 'a')])"
    )
    env = {"PYTHONHASHSEED": "7", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    uniform, integers, stratified, normal, *whole = json.loads(done.stdout)
    assert uniform == [0.4880530834197998, 0.34969663619995117]
    assert integers == [14, 20]
    assert stratified == [0.311006635427475, 0.9187120795249939]
    # a normal draw takes log and cos, whose last bit differs between processors
    assert normal == pytest.approx([-0.5169534683227539, 0.2990691065788269], rel=1e-6)
    assert whole == [104, 4207620368297011618]


def test_a_generator_depends_on_every_part_of_its_key():
    keys = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 0), ("0", "a")]
    found = {keyed(*key).integers(2**62) for key in keys}
    assert len(found) == len({seed_of(*key) for key in keys}) == len(keys)
    assert keyed(0, "a").integers(2**62) in found


# --- distributions --------------------------------------------------------------------------------


def test_one_value_falls_in_each_part_of_an_optimizer_step():
    for step in range(4):
        values = draws(range(8 * step, 8 * step + 8)).stratified("t")
        assert sorted((values * 8).long().tolist()) == list(range(8))


def test_parts_of_a_step_are_the_same_however_it_is_cut():
    cut = torch.cat([draws(range(i, i + 2)).stratified("t") for i in range(0, 8, 2)])
    assert sorted((cut * 8).long().tolist()) == list(range(8))


def test_the_order_of_the_parts_changes_from_step_to_step():
    orders = {tuple((draws(range(8 * s, 8 * s + 8)).stratified("t") * 8).long().tolist())
              for s in range(6)}  # fmt: skip
    assert len(orders) == 6


def test_moments_are_those_of_the_distributions():
    """40,000 numbers; limits are five standard errors."""
    n = 40_000
    source = draws(range(n))
    normal = source.normal("a", torch.empty(n, 1)).double()
    assert abs(normal.mean()) < 5 / n**0.5
    assert abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    for values in (source.uniform("b"), source.stratified("c")):
        assert values.min() >= 0 and values.max() < 1
        assert abs(values.double().mean() - 0.5) < 5 / (12 * n) ** 0.5
        assert abs(values.double().var() - 1 / 12) < 5 / (180 * n) ** 0.5
    counts = torch.bincount(source.integers("d", 0, 10), minlength=10)
    assert ((counts - n / 10).abs() < 5 * (n * 0.1 * 0.9) ** 0.5).all()


def test_neighbours_and_names_are_uncorrelated():
    n = 40_000
    source = draws(range(n))
    a, b = source.uniform("a").double() - 0.5, source.uniform("b").double() - 0.5
    for x, y in ((a, b), (a[1:], a[:-1])):
        assert abs((x * y).mean() * 12) < 5 / n**0.5


def test_every_position_of_a_stratified_draw_is_uniform():
    """The third clip of 2,000 steps: its mean and variance."""
    values = torch.stack([draws([8 * s + 2]).stratified("t")[0] for s in range(2000)]).double()
    assert abs(values.mean() - 0.5) < 5 / (12 * 2000) ** 0.5
    assert abs(values.var() - 1 / 12) < 5 / (180 * 2000) ** 0.5


def test_integers_stay_in_their_range():
    values = draws(range(1000)).integers("i", -3, 2)
    assert set(values.tolist()) == {-3, -2, -1, 0, 1}
    assert values.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_has_shape_and_type_of_its_model(dtype):
    like = torch.empty(4, 2, 3, 5, 7, dtype=dtype)
    noise = draws(range(4)).normal("n", like)
    assert noise.shape == like.shape and noise.dtype == dtype


def test_noise_for_another_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="x: like has batch 3, the draws are for 4"):
        draw(draws(range(4)), "normal", size=3)


# --- one value for all, and replay ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shared_draws_are_those_of_the_first_sample(kind):
    source = draws(range(5, 9))
    shared = draw(source.shared(), kind, size=4)
    assert torch.equal(shared, draw(source, kind)[:1].expand_as(shared))
    assert torch.equal(draw(source.shared().shared(), kind, size=4), shared)


def test_a_recorded_step_replays_and_names_what_it_lacks():
    values = {"noise": torch.randn(2, 3), "t": torch.tensor([1, 2])}
    recorded = Recorded(values)
    assert torch.equal(recorded.normal("noise", torch.empty(2, 3)), values["noise"])
    assert torch.equal(recorded.integers("t", 0, 9), values["t"])
    assert torch.equal(recorded.shared().uniform("t"), values["t"])
    with pytest.raises(KeyError, match=r"draw 'u' was not recorded; there are \['noise', 't'\]"):
        recorded.uniform("u")


def test_dropout_is_seeded_without_another_source():
    first, second = [], []
    for found in (first, second):
        seed_dropout(torch.device("cpu"), 5)
        found.append(torch.nn.functional.dropout(torch.ones(100)))
        torch.rand(len(first))
    assert torch.equal(first[0], second[0])


def test_a_generator_is_numpys_philox_with_the_hash_as_its_key():
    state = keyed("a").bit_generator.state["state"]
    assert (state["key"] != 0).all() and (state["counter"] == 0).all()
    assert isinstance(keyed("a").bit_generator, np.random.Philox)
