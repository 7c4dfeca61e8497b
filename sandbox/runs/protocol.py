"""What a run writes down so that its numbers can be compared: protocols, costs, and its data.

A score says little without how it was computed. Each carries its protocol, plain settings; reports
compare numbers of equal protocols only.
"""

from __future__ import annotations

import hashlib
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from sandbox.config.root import Root, to_container
from sandbox.contracts import BadItem, Clip, Hashed, Items
from sandbox.storage.atomic import digest_of

HASHED = 256  # clips whose content is hashed, spread over a split


def protocols(
    root: Root, clip: Clip, clips: int, weights: str, scores: list[str]
) -> dict[str, dict[str, Any]]:
    """By name of a number, how it was computed. `clip`: size that was judged; `weights`: of what.

    Losses are those of the live weights on training clips; what they are a loss of belongs to them.
    """
    judged = {
        "data": root.data.plugin,
        "split": "val",
        "clips": clips,
        "frames": clip.frames,
        "height": clip.height,
        "width": clip.width,
    }
    found = {name: {**judged, "weights": weights, "metric": _contents(root.metric)}
             for name in scores}  # fmt: skip
    loss = {
        "data": judged | {"split": "train", "clips": "last tenth of the steps"},
        "weights": "live",
        "loss": to_container(root.loss),
        "schedule": to_container(root.schedule),
        "latents": _contents(root.vae),
    }
    return found | {"loss": loss, "first_stage_psnr_db": judged}


def _contents(cfg: Any) -> Any:
    """Its settings; of a file what is in it, wherever it lies."""
    found = to_container(cfg)
    for name, path in cfg.files().items() if cfg else ():
        if path and Path(path).is_file():
            found[name] = f"sha256 {digest_of(Path(path))[:16]}"
    return found


def cost(system: Any, seconds: dict[str, float]) -> dict[str, Any]:
    """Parameters of the parts that sample, trained ones, seconds, and peak memory in MiB.

    Memory is that of the GPU, else of this process with all its libraries, since `forget_peak`.
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
    """MiB of a GPU, else of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak(device: Any) -> None:
    """Begins anew: a first stage that was made before, or an earlier run of a notebook, may have
    taken more. Of a process only Linux can do it, where that is allowed; else both count.
    """
    if device.type == "cuda":
        import torch

        if torch.cuda.is_initialized():  # else there is none, and torch refuses to forget it
            torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def fingerprint(items: Items) -> dict[str, Any]:
    """Number of clips of a split, a hash of all their ids, and one of what some are made from.

    The latter is left out where items do not know it (`contracts.Hashed`).
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
