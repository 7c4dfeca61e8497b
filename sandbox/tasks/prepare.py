"""task=prepare: turns a folder of raw videos into training clips."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, in_range, one_of

FORMATS = ("webdataset", "cogvideox_folder", "easyanimate", "webvid")
ENGINES = ("local", "ray")


@register("task", "prepare")
@dataclass
class Prepare:
    """Cuts, scores, filters, captions and splits the videos of a folder, and writes clips."""

    @dataclass
    class Config(TaskConfig):
        """data_root: folder of raw videos (not modified); to: output folder.

        format: layout of the clips, webdataset, cogvideox_folder, easyanimate or webvid; null
        writes only scores and the manifest. shard_mb: maximum size of a shard. engine: local
        (processes) or ray; workers: number of processes (null: cores, 0: this process only);
        ray_address: a cluster (null starts a local one). sheet: dropped clips shown per reason.
        Stages are the group `stage`, in order: 'stage=[scenes,motion,normalise]'.
        """

        needs_torch: ClassVar[bool] = False
        checks: ClassVar[tuple[str, ...]] = ("task", "stage")
        default_options: ClassVar[tuple[str, ...]] = (
            "stage=[scenes,motion,text_area,duplicates,captions,split,normalise]",
        )
        data_root: str | None = None
        to: str = "outputs/prepared"
        format: str | None = "webdataset"
        shard_mb: int = 1024
        engine: str = "local"
        workers: int | None = None
        ray_address: str | None = None
        sheet: int = 24

        def problems(self) -> Iterator[str]:
            if self.format is not None:
                yield from one_of("format", self.format, FORMATS)
            yield from in_range("shard_mb", self.shard_mb, 1)
            yield from one_of("engine", self.engine, ENGINES)
            yield from in_range("workers", self.workers, 0)
            yield from in_range("sheet", self.sheet, 0)

        def files(self) -> dict[str, str | None]:
            return {"data_root": self.data_root}

    cfg: Config

    def __call__(self, root: Any) -> dict[str, Any]:
        from sandbox.pipelines.prepare import prepare

        return prepare(root)
