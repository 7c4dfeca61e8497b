"""The same configuration and the same results as the command, for notebooks and tests.

A notebook begins with

    from sandbox import compose, build, train, sample

    cfg = compose("backbone=dit", "vae=pca", "steps=200")
    run = train(cfg)  # a finished run folder, as the command makes it
    video = sample(run, ["a red 3 moving left"])  # (B, 3, T, H, W) in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox import config, registry
from sandbox.config import Root
from sandbox.wiring import Wiring, wire

if TYPE_CHECKING:
    from torch import Tensor

    from sandbox.latent_diffusion import LatentDiffusion


def compose(*overrides: str) -> Root:
    """Typed and complete configuration of a command line; a task that works on an earlier run has
    that run's. Raises ConfigError with all problems.
    """
    from sandbox.earlier import choices
    from sandbox.main import settled

    config.setup(overrides)
    expanded = config.expand(overrides)
    cfg = config.compose([*choices(expanded), *expanded])
    return wire(settled(config.to_root(cfg), expanded)).root


def build(cfg: Root | Wiring | Path | str, weights: str = "ema") -> LatentDiffusion:
    """The system of a configuration, with fresh weights, or of a run folder, with trained ones.

    `weights` of a run folder: "ema" or "live" of its newest checkpoint; the live ones where the run
    has no average.
    """
    from sandbox.systems import build_system, load_system

    config.setup()
    if isinstance(cfg, Path | str):
        return load_system(Path(cfg), weights)
    return build_system(cfg if isinstance(cfg, Wiring) else wire(cfg))


def train(cfg: Root) -> Path:
    """Runs the task of `cfg` as the command does, and returns the run folder.

    One process is this one (`trainer.processes`); several are started beside it.
    """
    from sandbox.launch import in_this_process
    from sandbox.main import perform

    with in_this_process():
        return Path(perform(cfg)["folder"])


def sample(
    run: Path | str | LatentDiffusion,
    captions: Sequence[str],
    steps: int | None = None,
    images: Sequence[Path | str] = (),
    end_images: Sequence[Path | str] = (),
    **scalars: float,
) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] on the CPU, equal to those of `task=sample`.

    images, end_images: files, one for all captions or one for each; scalars: such as fps=24. Raises
    ConfigError where the conditioning wants others.
    """
    from sandbox.evaluation import generate
    from sandbox.prompts import given

    system = build(run) if isinstance(run, Path | str) else run
    batch = given(system.root, captions, images, end_images, count=len(captions) or 8, **scalars)
    return generate(system.eval(), batch, steps=steps)


__all__ = ["build", "compose", "registry", "sample", "train"]
