"""task=evaluate: scores a trained run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, in_range, weights_file, weights_problems


@register("task", "evaluate")
@dataclass
class Evaluate:
    """Scores a finished run (task.run, else the newest), real clips and other baselines."""

    @dataclass
    class Config(TaskConfig):
        """clips: number of scored clips; weights: ema, live, or a .safetensors file of all
        weights of the run (task=ema); samples: clips on the sheet.

        untrained: also score an untrained model.
        """

        clips: int = 192
        weights: str = "ema"
        untrained: bool = True
        samples: int = 12

        def problems(self) -> Iterator[str]:
            yield from in_range("clips", self.clips, 1)
            yield from in_range("samples", self.samples, 0)
            yield from weights_problems(self.weights)

        def files(self) -> dict[str, str | None]:
            return weights_file(self.weights)

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
        from sandbox.storage.weight_files import content_hash
        from sandbox.training.build import load_system
        from sandbox.training.finish import print_scores, spread, write_sheet

        folder = Path(self.cfg.run or "")
        check_writable(folder / "evaluations", "task.run")
        is_missing = self.cfg.weights == "ema" and not wiring.root.ema.keeps_ema()
        weights = "live" if is_missing else self.cfg.weights
        system = load_system(folder, weights, wiring)
        found = evaluate(system, self.cfg.clips, self.cfg.untrained)
        # scores of two files are comparable only where the files are equal
        compared = content_hash(Path(weights)) if weights_file(weights) else weights
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
            "protocols": protocols(wiring.root, clip, found.count, compared, [*found.meaning]),
        }
        with storage_errors(to):
            write_sheet(sheet, found, spread(found.captions, self.cfg.samples) or [0])
        records.write_dict(folder, f"evaluations/{record.name}", scores)
        print_scores(wiring.root, found)
        print(f"scores  {record}\nsheet   {sheet}")
        if found.skipped:
            print(f'data    {summary(found.skipped)}; all are in {record}, under "skipped"')
        return {"folder": str(folder), "scores": found.scores.get("model", {})}
