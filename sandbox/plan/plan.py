"""A whole plan, from a Wiring: everything that the terminal, the JSON and the page show."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sandbox.config.root import Root
from sandbox.config.wiring import Wiring
from sandbox.plan import strategies
from sandbox.plan.build import (
    Count,
    Sizes,
    average_bytes,
    checkpointing_field,
    counts,
    dtype_of,
    encoded,
    largest_unit,
    measured,
    optimizer_bytes,
    parts_of,
)
from sandbox.plan.measure import Measured
from sandbox.plan.objective import Objective, objective
from sandbox.plan.published import published
from sandbox.plan.side_by_side import side_by_side
from sandbox.plan.strategies import Memory, Need, rows
from sandbox.plan.wires import Diagram, diagram

NOT_MODELLED = (
    "What makes the conditions (text and image encoders, query transformers): their weights, "
    "gradients and optimizer are counted, their operations and activations are not.",
    "Fused kernels (kernels=auto on a GPU) keep less than the plain ones that are measured here.",
    "Sampling, scoring and validation during a run, and the encoding of data before it; workspaces "
    "of libraries such as cuDNN; CUDA graphs and torch.compile.",
    "Time: operations are counted, not how fast a device is at them.",
    "Sharding is arithmetic. DDP: a bucket for each gradient. FSDP2: two blocks and one gradient "
    "whole. ZeRO: one whole gradient in half precision and DeepSpeed's buckets.",
    f"Reserved memory is the sum times {strategies.RESERVED} (the slack of torch's allocator, "
    "fitted to published rows) and 0.5 GiB of CUDA's own.",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Operations of one micro-batch on one device, without and with activation checkpointing."""

    forward: int
    backward: int
    repeated: int
    held: int  # bytes that the forward pass leaves for the backward one
    peak: int

    @classmethod
    def of(cls, found: Measured) -> Cost:
        return cls(found.forward, found.backward, found.repeated, found.held, found.peak)

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.repeated


@dataclass(frozen=True)
class Plan:
    root: Root
    sizes: Sizes
    counts: tuple[Count, ...]
    checkpointing: bool | None  # as configured; None: this backbone has none
    costs: dict[bool, Cost]  # by whether activations are checkpointed
    need: Need
    memory: tuple[Memory, ...]
    objective: Objective
    diagram: Diagram
    notes: tuple[str, ...]
    other_sizes: int = 0
    seconds: float = 0.0
    published: dict[str, float] = field(default_factory=dict)

    @property
    def cost(self) -> Cost:
        """As configured."""
        return self.costs[bool(self.checkpointing)]

    @property
    def chosen(self) -> str:
        """The strategy of the configured trainer, by its name."""
        trainer = self.root.trainer
        name = trainer.plugin.rpartition("/")[2]
        if not hasattr(trainer, "stage"):
            return name
        return f"{name}_zero{trainer.stage}" + ("_offload" if trainer.offload else "")

    def as_dict(self) -> dict[str, Any]:
        """Plain containers."""
        from sandbox.config.root import to_container
        from sandbox.runs.run import identity_of_work, leaves

        config, trainer = to_container(self.root), self.root.trainer
        return {
            "recipe": self.root.recipe,
            "work": identity_of_work(leaves(config)),  # runs of the same have the same operations
            "flops_per_step": self.cost.total * trainer.accumulate * trainer.processes,
            "sizes": asdict(self.sizes) | {"slots": sorted(self.sizes.slots.names())},
            "components": [asdict(row) for row in self.counts],
            "checkpointing": self.checkpointing,
            "costs": {
                "checkpointed" if on else "plain": asdict(cost) | {"total": cost.total}
                for on, cost in self.costs.items()
            },
            "memory": [row.as_dict() for row in self.memory],
            "published_gib": self.published,
            "objective": _plain(asdict(self.objective)),
            "wiring": asdict(self.diagram),
            "not_modelled": list(self.notes),
            "seconds": self.seconds,
            "config": config,
        }


def _plain(node: Any) -> Any:
    """JSON has no infinity: it becomes text."""
    if isinstance(node, dict):
        return {k: _plain(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(v) for v in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def plan(wiring: Wiring, devices: int = 8) -> Plan:
    """Everything but numbers of weights and data: nothing is read, nothing is downloaded."""
    started, root, sizes = time.perf_counter(), wiring.root, Sizes.of(wiring)
    parts = parts_of(root)
    table = counts(root, parts)
    name = checkpointing_field(root)
    is_on = None if name is None else bool(getattr(root.backbone, name))
    native, half = steps(root, sizes, is_on)
    need = need_of(root, table, parts)
    devices = root.trainer.processes if root.trainer.processes > 1 else devices
    memory = tuple(rows(need, devices, native, half))
    known = {m.strategy: published(root.recipe, m.strategy, m.devices) for m in memory}
    return Plan(
        root, sizes, tuple(table), is_on,
        {on: Cost.of(found) for on, found in native.items()},
        need, memory, objective(root), diagram(root, sizes), (*_first(root), *NOT_MODELLED),
        other_sizes=len(wiring.clips) - 1,
        seconds=time.perf_counter() - started,
        published={k: v for k, v in known.items() if v is not None},
    )  # fmt: skip


def _first(root: Root) -> Iterator[str]:
    """What this configuration has that no step of it shows."""
    if root.reconstruction is not None:
        name = root.reconstruction.plugin.rpartition("/")[2]
        yield (
            f"The training of the first stage (reconstruction={name}): this is the plan of a "
            "diffusion model on its latents, of the other settings."
        )


def steps(
    root: Root, sizes: Sizes, is_on: bool | None
) -> tuple[dict[bool, Measured], dict[bool, Measured]]:
    """Steps by checkpointing: with weights as they are trained here, and as DeepSpeed keeps them.

    DeepSpeed trains whole networks: none where an adapter trains.
    """
    is_cuda = root.trainer.accelerator != "cpu"
    settings = [False] if is_on is None else [True, False]

    before = encoded(root, sizes, is_cuda)

    def of(job: tuple[bool, bool]) -> Measured:
        on, is_half = job
        return measured(root, sizes, None if is_on is None else on, is_half, is_cuda, before)

    jobs = [(on, False) for on in settings]
    if root.adapter is None and root.precision != "fp32":
        jobs.append((bool(is_on), True))
    found = dict(zip(jobs, side_by_side(of, jobs), strict=True))
    native = {on: found[on, False] for on in settings}
    if root.adapter is not None:
        return native, {}
    if root.precision == "fp32":
        return native, native
    return native, {bool(is_on): found[bool(is_on), True]}


def need_of(root: Root, table: Sequence[Count], parts: dict[str, Any]) -> Need:
    here = [row for row in table if row.is_resident]
    return Need(
        trained=sum(row.trained for row in here),
        trained_bytes=sum(row.bytes_trained for row in here),
        fixed=sum(row.bytes_fixed for row in here),
        optimizer=optimizer_bytes(root, parts),
        average=average_bytes(root, parts),
        unit=largest_unit(parts),
        half=dtype_of(root).itemsize,
        accumulates=root.trainer.accumulate > 1,
    )
