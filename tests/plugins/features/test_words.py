"""features=words: fitted to name the words of captions."""

import pytest
import torch

from sandbox.config import registry
from sandbox.evaluation.evaluate import first_clips
from tests.helpers import composed


def test_its_features_tell_digits_that_it_has_not_seen():
    """A linear classifier on them names more digits than on pixels of the same grid."""
    from sklearn.linear_model import LogisticRegression

    root = composed("method=repa", "features=words", "features.width=32", "features.steps=300")
    source = registry.create(root.data)
    encoder = registry.create(root.features)
    train = first_clips(source.split("train"), 1024, 0)
    encoder.fit(train.video, train.captions)

    def rows(clips):
        frame = clips.video[:, :, 4]
        found = encoder(frame), torch.nn.functional.avg_pool2d(frame, 4)
        return [x.relu().amax((2, 3)) if x is found[0] else x.flatten(1) for x in found]

    val = first_clips(source.split("val"), 192, 0)
    digits = [[c.split()[2] for c in clips.captions] for clips in (train, val)]
    scores = [
        LogisticRegression(max_iter=300).fit(x, digits[0]).score(y, digits[1])
        for x, y in zip(rows(train), rows(val), strict=True)
    ]
    assert scores[0] > scores[1] + 0.2, scores


def test_a_fit_is_deterministic_and_needs_two_words():
    cfg = composed("method=repa", "features=words", "features.steps=3", "features.width=4").features
    video, captions = torch.rand(8, 3, 2, 8, 8), ["a b", "c d"] * 4
    encoders = [registry.create(cfg) for _ in range(2)]
    for encoder in encoders:
        encoder.fit(video, captions)
    one, two = (e(video[:, :, 0]) for e in encoders)
    assert torch.equal(one, two) and one.shape == (8, 4, 2, 2)
    with pytest.raises(ValueError, match="fewer than two different words"):
        encoders[0].fit(video, ["a"] * 8)
