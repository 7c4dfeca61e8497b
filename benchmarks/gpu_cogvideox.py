"""Time and memory of full-size CogVideoX fine-tuning steps, against diffusers and peft.

    python benchmarks/gpu_cogvideox.py           # writes benchmarks/results/cogvideox.{json,md}
    python benchmarks/gpu_cogvideox.py --tiny    # tiny recipes on a CPU, to test the script

Weights, latents and embeddings are random. Both sides checkpoint activations of each block, keep
frozen weights in half precision and trained weights in float32, and use AdamW.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import installed, listed, write
from sandbox.config import composition, discovery, registry
from sandbox.config.root import to_root
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import Batch
from sandbox.model.components import DTYPES, Parts, use_kernels
from sandbox.model.latent_diffusion import LatentDiffusion

ROWS = {"cogvideox_2b_lora": 16, "cogvideox_5b_lora": 24, "cogvideox_2b_sft": 36}  # published GB
PACKAGES = ("torch", "diffusers", "peft")


def wired(recipe: str) -> Wiring:
    overrides = [f"experiment={recipe}", "init_from=random", "data.root=random", "logger=null"]
    discovery.setup(overrides)
    return wire(to_root(composition.compose(composition.expand_shorthands(overrides))))


def filled(network: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """Materialises a network that was built on the meta device, with random weights in `dtype`."""
    network = network.to(dtype).to_empty(device=device)
    for tensor in network.state_dict().values():
        tensor.normal_(std=0.02)
    return network


class CachedLatents(nn.Module):
    """Replaces a first stage when latents are cached: two of its methods and no weights."""

    def __init__(self, first_stage: Any) -> None:
        super().__init__()
        self.posterior, self.scaled = first_stage.posterior, first_stage.scaled


def ours(wiring: Wiring, dtype: torch.dtype, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The trained network and the loss of a step: our training step on cached latents."""
    root = wiring.root
    use_kernels(root)
    with torch.device("meta"):
        first_stage, backbone = (registry.create(getattr(root, g)) for g in ("vae", "backbone"))
    adapter = registry.create(root.adapter) if root.adapter is not None else None
    backbone = filled(backbone, dtype if adapter else torch.float32, device)
    if adapter is not None:
        adapter.apply(backbone, root.backbone.adapter_targets(), dtype)
    others = (
        registry.create(getattr(root, group))
        for group in ("schedule", "loss", "method", "sampler", "guidance")
    )
    conditioner = registry.create(root.conditioning).requires_grad_(False)
    parts = Parts(CachedLatents(first_stage), conditioner, backbone, *others, adapter)  # type: ignore
    system = LatentDiffusion(wiring, parts, 1).to(device).train()
    z, (text, mask) = wiring.latents[0], embeddings(wiring, device)
    batch = Batch(
        stored=torch.randn(1, 2 * z.channels, z.frames, z.height, z.width, device=device),
        text=text, text_mask=mask, ids=["0"], position=torch.zeros(1, dtype=torch.long),
    )  # fmt: skip
    return backbone, lambda: system.step(batch, system.draws(batch)).total


def embeddings(wiring: Wiring, device: str) -> tuple[Tensor, Tensor]:
    (slots,) = wiring.slots
    assert slots.context is not None
    text = torch.randn(1, slots.context.length, slots.context.width, device=device)
    return text, torch.ones(text.shape[:2], dtype=torch.bool, device=device)


def theirs(
    wiring: Wiring, dtype: torch.dtype, device: str
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The same for diffusers' network with the same settings and peft's adapter."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from peft import LoraConfig

    transformers = import_module("diffusers.models.transformers.cogvideox_transformer_3d")
    root = wiring.root
    settings = {k: v for k, v in root.backbone.diffusers_config().items() if not k.startswith("_")}
    with torch.device("meta"):
        network: Any = transformers.CogVideoXTransformer3DModel(**settings)
    frozen = root.adapter is not None
    if not settings["use_rotary_positional_embeddings"]:
        network.patch_embed.pos_embedding = None  # not in its state dict: rebuilt below
    network = filled(network, dtype if frozen else torch.float32, device)
    z, (text, _) = wiring.grids[0], embeddings(wiring, device)
    if not settings["use_rotary_positional_embeddings"]:
        table = network.patch_embed._get_positional_embeddings(z.height, z.width, root.data.frames)
        network.patch_embed.pos_embedding = table.to(device)
    network.enable_gradient_checkpointing()
    if frozen:
        network.requires_grad_(False)
        targets = list(root.backbone.adapter_targets())
        rank, alpha = root.adapter.rank, root.adapter.alpha
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    rope = None
    if settings["use_rotary_positional_embeddings"]:
        patch = settings["patch_size"]
        grid = z.height // patch, z.width // patch
        rope = get_3d_rotary_pos_embed(
            settings["attention_head_dim"], ((0, 0), grid), grid, z.frames,
            device=torch.device(device),
        )  # fmt: skip
    schedule = registry.create(root.schedule)
    z0 = torch.randn(1, z.channels, z.frames, z.height, z.width, device=device)

    def loss() -> Tensor:
        t, eps = torch.randint(0, 1000, (1,), device=device), torch.randn_like(z0)
        noised = schedule.noised(z0, eps, t).transpose(1, 2)
        out = network(noised, text, t, image_rotary_emb=rope, return_dict=False)[0]
        return (out.transpose(1, 2).float() - schedule.target(z0, eps, t)).square().mean()

    return network.train(), loss


def measure(make: Any, wiring: Wiring, dtype: torch.dtype, device: str, steps: int) -> dict:
    """Median seconds per step, and peak GPU memory in GB."""
    torch.manual_seed(0)
    network, loss = make(wiring, dtype, device)
    root = wiring.root
    trained = [p for p in network.parameters() if p.requires_grad]
    cfg = root.optimizer
    assert root.lr is not None
    optimizer = torch.optim.AdamW(
        trained, root.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay
    )
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    is_cuda, seconds = device == "cuda", []
    for step in range(steps + 1):
        if is_cuda and step == 1:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, root.trainer.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak: dict[str, float | None] = {"allocated_gb": None, "reserved_gb": None}
    if is_cuda:
        peak["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        peak["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    count = sum(p.numel() for p in trained)
    return {"seconds": round(statistics.median(seconds[1:]), 4), **peak, "trained": count}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| recipe | of | s per step | GB allocated | GB reserved | published GB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    names = ("recipe", "of", "seconds", "allocated_gb", "reserved_gb", "published_gb")
    return "\n".join([*lines, *("| " + " | ".join(str(r[n]) for n in names) + " |" for r in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("needs a CUDA device; use --tiny to run tiny recipes on a CPU")
    rows = []
    for recipe, published in ROWS.items():
        wiring = wired(f"{recipe}_tiny" if args.tiny else recipe)
        for name, make in (("ours", ours), ("diffusers + peft", theirs)):
            found = measure(make, wiring, DTYPES[wiring.root.precision], device, args.steps)
            rows.append({"recipe": recipe, "of": name, "published_gb": published, **found})
            print(rows[-1], flush=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    if args.tiny:
        print(table(rows))
        return
    machine = {"device": torch.cuda.get_device_name()} | installed(*PACKAGES)
    lines = ["# CogVideoX", "", f"{machine['device']}, {listed(machine)}", "", table(rows)]
    write("cogvideox", {"machine": machine, "rows": rows}, lines)


if __name__ == "__main__":
    main()
