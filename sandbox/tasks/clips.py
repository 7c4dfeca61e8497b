"""task=clips: exports clips of any data in the layout of CogVideoX's fine-tuning data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, above, in_range


@register("task", "clips")
@dataclass
class Clips:
    """Writes clips of the data as mp4, with the lists that data=cogvideox_folder reads."""

    @dataclass
    class Config(TaskConfig):
        """to: output folder; count: number of training clips; save_fps: fps of the videos; images:
        also write first frames and images.txt.
        """

        to: str = "outputs/clips"
        count: int = 128
        save_fps: float = 8.0
        images: bool = False

        def problems(self) -> Iterator[str]:
            yield from in_range("count", self.count, 1)
            yield from above("save_fps", self.save_fps, 0, 1000)

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from pathlib import Path

        from sandbox.config import registry
        from sandbox.contracts import ConfigError
        from sandbox.evaluation.evaluate import training_clips
        from sandbox.reports import media
        from sandbox.storage.atomic import storage_errors, write_atomic

        cfg, root = self.cfg, wiring.root
        if not {"video", "captions"} <= root.data.provides():
            name = root.data.plugin.rpartition("/")[2]
            raise ConfigError(f"data={name}: has no clips with captions; choose other data")
        clips = training_clips(registry.create(root.data).split("train"), cfg.count, root.seed)
        assert clips.video is not None and clips.captions is not None  # checked by provides()
        folder = Path(cfg.to).expanduser()
        lists = {
            "prompts": [" ".join(c.split()) for c in clips.captions],
            "videos": [],
            "images": [],
        }
        with storage_errors(folder):
            for i, clip in enumerate(clips.video):
                lists["videos"].append(f"videos/{i:05}.mp4")
                media.write_video(folder / lists["videos"][-1], clip, cfg.save_fps)
                if cfg.images:
                    lists["images"].append(f"images/{i:05}.png")
                    media.write_image(folder / lists["images"][-1], clip[:, :1])
            for name, lines in lists.items():
                if lines:
                    write_atomic(folder / f"{name}.txt", "\n".join(lines) + "\n")
        frames, height, width = clips.video.shape[2:]
        print(f"{len(clips.captions)} clips of {frames}x{height}x{width} in {folder}")
        print(
            f"train with data=cogvideox_folder data.root={folder} data.frames={frames} "
            f"data.height={height} data.width={width}"
        )
        return {"folder": str(folder), "clips": len(clips.captions)}
