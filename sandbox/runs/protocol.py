"""What a run records so that its numbers can be compared: protocols, costs, data.

A score means little without the way it was computed. Each score has its protocol, a dict of plain
settings; reports compare scores of equal protocols only.
"""

import hashlib
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from sandbox.config.added_settings import without_added
from sandbox.config.root import Root, to_container
from sandbox.contracts import BadItem, Clip, Hashed, Items
from sandbox.storage.atomic import digest_of

HASHED = 256  # clips whose content is hashed, spread over a split


def protocols(
    root: Root, clip: Clip, clips: int, weights: str, scores: list[str]
) -> dict[str, dict[str, Any]]:
    """The protocol of each score, by name. `clip`: size that was scored; `weights`: ema or live.

    Losses are those of the live weights on training clips; settings that define the loss belong to
    its protocol.
    """
    scored = {
        "data": root.data.plugin,
        "split": "val",
        "clips": clips,
        "frames": clip.frames,
        "height": clip.height,
        "width": clip.width,
    }
    found = {name: {**scored, "weights": weights, "metric": _contents(root.metric)}
             for name in scores}  # fmt: skip
    loss = {
        "data": scored | {"split": "train", "clips": "last tenth of the steps"},
        "weights": "live",
        "loss": without_added(to_container(root.loss)),
        "schedule": without_added(to_container(root.schedule)),
        "latents": _contents(root.vae),
    }
    return found | {"loss": loss, "first_stage_psnr_db": scored}


def _contents(cfg: Any) -> Any:
    """Settings, with the hash of a file's contents instead of its path."""
    found = without_added(to_container(cfg))
    for name, path in cfg.files().items() if cfg else ():
        if path and Path(path).is_file():
            found[name] = f"sha256 {digest_of(Path(path))[:16]}"
    return found


def cost(system: Any, seconds: dict[str, float]) -> dict[str, Any]:
    """Parameters (all and trained), seconds, and peak memory in MiB since `reset_peak_memory`.

    Memory is that of the GPU, or of this process with all its libraries.
    """
    parameters = list(system.parameters())
    device = system.device
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "training_seconds": round(seconds["training"], 2),
        "seconds": round(sum(seconds.values()), 2),
        "peak_memory_mib": round(peak_memory(device), 1),
        "memory_of": device.type,
    }


def peak_memory(device: Any) -> float:
    """MiB of the GPU, or of this process on other devices."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak_memory(device: Any) -> None:
    """Resets the peak, which an earlier run or a first stage of this process may have set.

    For the memory of a process this works on Linux only, where it is allowed.
    """
    if device.type == "cuda":
        import torch

        if torch.cuda.is_initialized():  # else torch raises
            torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def fingerprint(items: Items) -> dict[str, Any]:
    """The number of clips of a split, a hash of all ids, and one of the contents of some clips.

    Items that are not `contracts.Hashed` have no content hash.
    """
    ids = hashlib.sha256("\n".join(items.id(i) for i in range(len(items))).encode())
    found = {"clips": len(items), "ids": ids.hexdigest()[:16]}
    if isinstance(items, Hashed):
        content = hashlib.sha256()
        for index in range(0, len(items), max(1, len(items) // HASHED)):
            try:
                content.update(items.content(index).encode())
            except BadItem as e:
                content.update(str(e).encode())
        found["content"] = content.hexdigest()[:16]
    return found
