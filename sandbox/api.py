"""The same configuration and the same results as the command, for notebooks and tests.

    from sandbox import compose, build, train, sample

    cfg = compose("backbone=dit", "vae=pca", "steps=200")
    run = train(cfg)                                # a finished run folder, as `python run.py ...` makes it
    video = sample(run, ["a red 3 moving left"])    # (B, 3, T, H, W) in [-1, 1]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sandbox import config, registry
from sandbox.config import Root
from sandbox.wiring import Wiring, wire

if TYPE_CHECKING:
    from torch import Tensor

    from sandbox.latent_diffusion import LatentDiffusion


def compose(*overrides: str) -> Root:
    """Typed configuration of a command line's overrides. Raises ConfigError with everything that is wrong."""
    config.setup(overrides)
    expanded = config.expand(overrides)
    return wire(config.to_root(config.compose(expanded))).root


def build(cfg: Root | Wiring | Path | str, weights: str = "ema") -> LatentDiffusion:
    """The system of a configuration (fresh weights), or of a run folder with the weights of its newest checkpoint.

    `weights`: "ema" or "live"; ema falls to live only where the run has no average, which it says.
    """
    from sandbox.systems import build_system, load_system

    config.setup()
    if isinstance(cfg, Path | str):
        return load_system(Path(cfg), weights)
    return build_system(cfg if isinstance(cfg, Wiring) else wire(cfg))


def train(cfg: Root) -> Path:
    """Runs `task=train` (or the task of `cfg`) and returns the run folder."""
    from sandbox.main import perform

    return Path(perform(cfg)["folder"])


def sample(run: Path | str | LatentDiffusion, captions: list[str], steps: int | None = None) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1], equal to those of `task=sample` for the same captions."""
    from sandbox.latent_diffusion import prompts_batch

    system = build(run) if isinstance(run, Path | str) else run
    system.eval()
    return system.sample(prompts_batch(captions, system.device), steps=steps)


__all__ = ["build", "compose", "registry", "sample", "train"]
