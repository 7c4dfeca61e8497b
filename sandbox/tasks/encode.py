"""task=encode: caches latents and caption embeddings of a data set, for data=latents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, in_range, one_of
from sandbox.distributed.rank import Rank

SPLITS = ("train", "val")


@register("task", "encode")
@dataclass
class Encode:
    """Caches latents and caption embeddings in shards, which data=latents trains from."""

    @dataclass
    class Config(TaskConfig):
        """to: folder of the shards; valid entries are reused.

        splits: splits to encode; shard_mb: maximum size of a shard in MB; prompts: additional
        captions to embed, for sampling; prune: delete entries that are no longer referenced. Random
        choices of the data (start, crop, caption dropout) are cached as in epoch 0.
        """

        to: str = "outputs/latents"
        splits: tuple[str, ...] = SPLITS
        shard_mb: int = 1024
        prompts: tuple[str, ...] = ()
        prune: bool = False

        def problems(self) -> Iterator[str]:
            yield from in_range("shard_mb", self.shard_mb, 1)
            for name in self.splits:
                yield from one_of("splits", name, SPLITS)
            if not self.splits:
                yield "splits=[]: want train, val or both"

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from sandbox.distributed.supervisor import launch_run

        return launch_run("sandbox.tasks.encode:encode", wiring.root, overrides, group)


def encode(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """Encodes one rank's share; `settings`: from `launch_run`."""
    from sandbox.config.composition import receive_root
    from sandbox.config.wiring import wire
    from sandbox.pipelines.encode import encode_all

    return encode_all(wire(receive_root(settings["root"])).root, rank)
