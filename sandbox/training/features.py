"""Fits the encoder of the group `features` before the first step."""

from typing import Any

from sandbox.config import registry
from sandbox.evaluation.evaluate import first_clips


def fit_features(system: Any) -> None:
    """Fits it on training clips, if it has a `fit`; its weights are in checkpoints.

    Each process does the same; data-parallel training then takes the weights of rank 0.
    """
    root = system.root
    if getattr(system, "features", None) is None or not (count := root.features.fit_clips()):
        return
    clips = first_clips(registry.create(root.data.all_clips()).split("train"), count, root.seed)
    print(f"fitting features={root.features.plugin.rpartition('/')[2]} on {clips.size} clips")
    system.features.fit(clips.video, clips.captions or [])
    system.forget_hashes()
