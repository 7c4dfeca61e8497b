"""Scores stand beside real clips, the first stage's ceiling, baselines and an untrained model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import Batch
from sandbox.data.loader import batches
from sandbox.evaluation.evaluate import evaluate, first_clips, generate, slice_batch, training_clips
from sandbox.model.autoencoding import psnr
from sandbox.model.components import build
from sandbox.model.latent_diffusion import prompts_batch
from sandbox.training.build import build_system
from tests.training_sessions import differing, small

FRECHET = "frechet_video"


@pytest.fixture(scope="module")
def system():
    return build_system(wire(small("sampler.steps=1", "data.clips_per_epoch=64"))).eval()


def untouched(system):
    return [p.detach().clone() for p in system.parameters()]


def test_every_row_has_clips_and_scores(system):
    found = evaluate(system, 6)
    rows = ["model", "real clips", "real through first stage", "mean clip", "untrained model"]
    assert [*found.clips] == [*found.scores] == rows
    assert all(clips.shape == (6, 3, 9, 16, 16) for clips in found.clips.values())
    assert found.count == len(found.captions) == 6
    assert all(row.keys() <= found.meaning.keys() for row in found.scores.values())
    assert found.scores["real clips"]["colour"] == 1
    expected = psnr(found.clips["real through first stage"], found.clips["real clips"]).mean()
    assert found.first_stage_psnr == expected.item()


def test_an_untrained_system_is_its_own_floor(system):
    """Fresh weights depend on the seed alone, so that both rows are the same clips."""
    found = evaluate(system, 3)
    assert torch.equal(found.clips["model"], found.clips["untrained model"])


def test_the_floor_has_the_first_stage_of_the_run(system):
    changed = build_system(system.wiring).eval()
    changed.first_stage.first.mean.add_(0.5)
    found = evaluate(changed, 3)
    assert torch.equal(found.clips["model"], found.clips["untrained model"])
    assert not torch.equal(found.clips["model"], evaluate(system, 3).clips["model"])


def test_evaluation_changes_no_weight_and_no_mode(system):
    before = untouched(system)
    evaluate(system, 2, untrained=False)
    assert not system.training
    assert not differing(before, untouched(system))


def test_without_a_metric_there_are_clips_and_no_scores(system):
    root = system.root
    try:
        system.root = replace(root, metric=None)
        found = evaluate(system, 2)
    finally:
        system.root = root
    assert found.scores == found.meaning == {}
    assert {"model", "real clips", "untrained model"} <= found.clips.keys()


@pytest.mark.parametrize("name", ["frechet", "reconstruction"])
def test_every_row_is_scored_by_the_metric_that_is_chosen(system, name):
    root = system.root
    try:
        system.root = replace(root, metric=registry.default("metric", name))
        found = evaluate(system, 4, untrained=False)
    finally:
        system.root = root
    assert [*found.scores] == ["model", "real clips", "real through first stage"]
    assert all(row.keys() == found.meaning.keys() for row in found.scores.values())
    if name == "frechet":
        assert found.scores["model"][FRECHET] > found.scores["real clips"][FRECHET]
    else:
        ceiling, real = found.scores["real through first stage"], found.scores["real clips"]
        assert found.scores["model"]["psnr"] < ceiling["psnr"] < real["psnr"]
        assert real["ssim"] == pytest.approx(1)
        assert len(found.each["ssim"]) == 4


def test_more_clips_than_there_are_is_all_there_are(system):
    items = registry.create(system.root.data).split("val")
    assert first_clips(items, 10**6, 0).size == len(items)


def test_gathered_clips_are_the_first_of_the_split(system):
    items = registry.create(system.root.data).split("val")
    found = first_clips(items, len(items) - 1, 0)
    singly = list(batches(items, 1, 0))[: found.size]
    assert torch.equal(found.video, torch.cat([b.video for b in singly]))
    assert found.ids == [b.ids[0] for b in singly]
    assert found.captions == [b.captions[0] for b in singly]
    assert found.position.tolist() == list(range(found.size))


def test_a_part_of_a_batch_has_all_that_belongs_to_it():
    batch = Batch(
        video=torch.arange(4.0).view(4, 1, 1, 1, 1), captions=list("abcd"), negative=list("efgh"),
        text=torch.arange(8).view(4, 2), image=torch.arange(4.0).view(4, 1, 1, 1, 1),
        scalars={"fps": torch.arange(4.0)}, ids=list("ijkl"), epoch=3, position=torch.arange(4),
    )  # fmt: skip
    part = slice_batch(batch, 1, 3)
    assert part.size == 2 and part.epoch == 3 and part.stored is None
    assert (part.captions, part.negative, part.ids) == (["b", "c"], ["f", "g"], ["j", "k"])
    assert part.video.flatten().tolist() == part.image.flatten().tolist() == [1, 2]
    assert part.text.tolist() == [[2, 3], [4, 5]] and part.scalars["fps"].tolist() == [1, 2]
    assert part.position.tolist() == [1, 2]


def test_clips_do_not_depend_on_the_chunks_they_are_made_in(system, monkeypatch):
    """Sums may be taken in another order in a batch of another size: 1e-5 of values of 1."""
    like = prompts_batch(["a red 3 moving left"] * 5)
    whole = generate(system, like)
    monkeypatch.setattr("sandbox.evaluation.evaluate.CHUNK", 2)
    assert torch.allclose(generate(system, like), whole, atol=1e-5, rtol=0)


def test_the_progress_of_sampling_reaches_its_end(system, capsys):
    generate(system, prompts_batch([""] * 3), "making", steps=4)
    assert "making 4/4" in capsys.readouterr().out


def test_components_start_from_the_same_weights_beside_another_first_stage():
    first, other = small(), small("vae=identity", "backbone.patch=8")
    assert (
        differing(
            build("conditioning", first).state_dict(), build("conditioning", other).state_dict()
        )
        == []
    )


def test_a_metric_has_enough_training_clips_of_a_small_split(system):
    items = registry.create(replace(system.root.data, clips_per_epoch=5)).split("train")
    found = training_clips(items, 12, 0)
    assert found.size == 12 and found.position.tolist() == list(range(12))
    assert not torch.equal(found.video[:5], found.video[5:10])  # another epoch, drawn anew
