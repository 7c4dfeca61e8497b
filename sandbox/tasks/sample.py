"""task=sample: samples videos or images from a trained run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, above, in_range, weights_file, weights_problems


@register("task", "sample")
@dataclass
class Sample:
    """Samples clips for task.prompts from a run (task.run, else the newest) or init_from."""

    @dataclass
    class Config(TaskConfig):
        """prompts: captions; images, end_images: conditioning images (first, last frame), one
        for all prompts or one for each, cropped to the clip's aspect ratio; videos: files with the
        known frames of conditioning=inpaint_frames; fps, frame_stride: conditioning values, null
        for the network's default.

        prompts_file: a UTF-8 text file with one prompt a line, for many or long ones.
        Without prompts and images, prompts come from the data, images and scalars from validation
        clips; count: number of these. weights: ema, live, or a .safetensors file of all weights
        of the run (task=ema); init_from uses the weights that training would start from. step:
        checkpoint of the run (null: newest). to: output folder (null: samples/prompts in the run
        folder, or samples/RECIPE in `out` without a run; later calls append -2, ...). samples.json
        records the settings. save_fps: fps of videos.
        """

        prompts: tuple[str, ...] = ()
        prompts_file: str | None = None
        images: tuple[str, ...] = ()
        end_images: tuple[str, ...] = ()
        videos: tuple[str, ...] = ()
        fps: float | None = None
        frame_stride: float | None = None
        count: int = 8
        weights: str = "ema"
        step: int | None = None
        to: str | None = None
        save_fps: float = 8.0

        def problems(self) -> Iterator[str]:
            yield from in_range("count", self.count, 1)
            yield from weights_problems(self.weights)
            if self.prompts and self.prompts_file:
                yield f"prompts_file={self.prompts_file}: set prompts as well; keep one of them"
            for name in ("fps", "frame_stride"):
                yield from above(name, getattr(self, name), 0)
            yield from above("save_fps", self.save_fps, 0, 1000)

        def files(self) -> dict[str, str | None]:
            named = {"images": self.images, "end_images": self.end_images, "videos": self.videos}
            found = {f"{k}[{i}]": file for k, v in named.items() for i, file in enumerate(v)}
            of_prompts = {"prompts_file": self.prompts_file} if self.prompts_file else {}
            return found | of_prompts | weights_file(self.weights)  # type: ignore[return-value]

        def uses_run(self) -> bool:
            return True

        def accepts_init_from(self) -> bool:
            return True

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        paths, captions = self.make(wiring)
        kind = "image" if wiring.clips[0].frames == 1 else "video"
        to = paths[-1].parent
        print(f"{len(captions)} {kind}{'s' * (len(captions) > 1)} and sheet.png in {to}")
        return {"folder": str(to), "captions": captions}

    def make(self, wiring: Any, watch: Any = None) -> tuple[list[Path], list[str]]:
        """Files of the clips, the sheet last, and captions; calls watch(done, total)."""
        from sandbox.config.root import to_container
        from sandbox.config.secrets import folder_name
        from sandbox.evaluation.prompt_checks import check, read_prompts

        cfg, root = self.cfg, wiring.root
        scalars = {"fps": cfg.fps, "frame_stride": cfg.frame_stride}
        prompts = read_prompts(cfg.prompts_file) if cfg.prompts_file else cfg.prompts
        # before importing torch
        check(root, prompts, cfg.images, cfg.end_images, scalars, cfg.videos)

        from sandbox.evaluation.evaluate import generate
        from sandbox.evaluation.prompts import user_batch
        from sandbox.reports.sample_files import write_samples
        from sandbox.storage.atomic import check_writable
        from sandbox.training.build import initialised_system, load_system

        files = cfg.images, cfg.end_images
        batch = user_batch(root, prompts, *files, cfg.count, cfg.videos, **scalars)
        captions = batch.captions or []
        to = Path(root.out, "samples", folder_name(root.recipe))
        to = to if cfg.run is None else Path(cfg.run, "samples", "prompts")
        folder = Path(cfg.to or to)
        check_writable(folder, "task.to")
        if cfg.run is None:
            system = initialised_system(wiring)
        else:
            system = load_system(Path(cfg.run), cfg.weights, wiring, cfg.step)
        video = generate(system, batch, watch=watch)
        parts = ("seed", "init_from", "task", "sampler", "guidance")
        made_by = {name: to_container(getattr(root, name)) for name in parts}
        made_by["step"] = system.finished_steps
        paths = write_samples(folder, captions, video, cfg.save_fps, made_by, batch.image)
        return paths, captions
