"""task=sample: videos or pictures from a trained run, for prompts where it is told any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.contracts import TaskConfig, in_range, one_of
from sandbox.registry import register


@register("task", "sample")
class Sample:
    """Makes clips from a finished run (task.run, else the newest) for task.prompts, if any."""

    @dataclass
    class Config(TaskConfig):
        """prompts: captions, empty for the data's; count: how many of those, or without prompts.

        weights: ema or live; to: folder for the files; null is samples/prompts in the run folder.
        """

        prompts: tuple[str, ...] = ()
        count: int = 8
        weights: str = "ema"
        to: str | None = None

        def problems(self) -> Iterator[str]:
            yield from in_range("count", self.count, 1)
            yield from one_of("weights", self.weights, ("ema", "live"))

        def uses_run(self) -> bool:
            return True

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from pathlib import Path

        from sandbox.evaluation import generate
        from sandbox.latent_diffusion import prompts_batch
        from sandbox.outcome import captions_of, write_clips
        from sandbox.systems import load_system

        cfg, folder = self.cfg, Path(self.cfg.run or "")
        captions = captions_of(wiring.root, cfg.prompts, cfg.count)
        system = load_system(folder, cfg.weights, wiring)
        to = Path(cfg.to) if cfg.to else folder / "samples" / "prompts"
        write_clips(to, captions, generate(system, prompts_batch(captions)))
        kind = "pictures" if wiring.clips[0].frames == 1 else "videos"
        print(f"{len(captions)} {kind} and sheet.png in {to}")
        return {"folder": str(to), "captions": captions}
