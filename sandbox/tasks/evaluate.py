"""task=evaluate: scores a trained run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, in_range, one_of


@register("task", "evaluate")
@dataclass
class Evaluate:
    """Scores a finished run (task.run, else the newest), real clips and other baselines."""

    @dataclass
    class Config(TaskConfig):
        """clips: number of scored clips; weights: ema or live; samples: clips on the sheet.

        untrained: also score an untrained model.
        """

        clips: int = 192
        weights: str = "ema"
        untrained: bool = True
        samples: int = 12

        def problems(self) -> Iterator[str]:
            yield from in_range("clips", self.clips, 1)
            yield from in_range("samples", self.samples, 0)
            yield from one_of("weights", self.weights, ("ema", "live"))

        def uses_run(self) -> bool:
            return True

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        import itertools
        from pathlib import Path

        from sandbox.config.secrets import mask_text
        from sandbox.contracts import Clip
        from sandbox.data.batching import summary
        from sandbox.evaluation.evaluate import evaluate
        from sandbox.runs import records
        from sandbox.runs.protocol import protocols
        from sandbox.storage.atomic import check_writable, reserve_path, storage_errors
        from sandbox.training.build import load_system
        from sandbox.training.finish import print_scores, spread, write_sheet

        folder = Path(self.cfg.run or "")
        check_writable(folder / "evaluations", "task.run")
        weights = self.cfg.weights if wiring.root.ema.keeps_ema() else "live"
        system = load_system(folder, weights, wiring)
        found = evaluate(system, self.cfg.clips, self.cfg.untrained)
        clip = Clip(*found.clips["model"].shape[1:])
        to = folder / "evaluations"
        record = reserve_path(to / f"evaluation-{n:02}.json" for n in itertools.count(1))
        sheet = record.with_suffix(".png")
        scores = {
            "overrides": [mask_text(o) for o in overrides],
            "weights": weights,
            "clips": found.count,
            "scores": found.scores,
            "meaning": found.meaning,
            "first_stage_psnr_db": found.first_stage_psnr,
            "skipped": found.skipped,
            "protocols": protocols(wiring.root, clip, found.count, weights, [*found.meaning]),
        }
        with storage_errors(to):
            write_sheet(sheet, found, spread(found.captions, self.cfg.samples) or [0])
        records.write_dict(folder, f"evaluations/{record.name}", scores)
        print_scores(wiring.root, found)
        print(f"scores  {record}\nsheet   {sheet}")
        if found.skipped:
            print(f'data    {summary(found.skipped)}; all are in {record}, under "skipped"')
        return {"folder": str(folder), "scores": found.scores.get("model", {})}
