"""Computes a plan from a Wiring: the data of the terminal text, the JSON and the page."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sandbox.config.root import Root
from sandbox.config.wiring import Wiring
from sandbox.plan import strategies
from sandbox.plan.build import (
    Count,
    Sizes,
    checkpointing_field,
    counts,
    dtype_of,
    ema_bytes,
    largest_unit,
    measure_encoding,
    measure_step,
    optimizer_bytes,
    parts_of,
)
from sandbox.plan.measure import Measured
from sandbox.plan.objective import Objective, objective
from sandbox.plan.parallel_map import parallel_map
from sandbox.plan.published import published
from sandbox.plan.strategies import Memory, Need, rows
from sandbox.plan.wiring_diagram import diagram

COSTS = ("forward", "backward", "repeated", "held", "peak", "total")  # of a Measured, in plan.json

NOT_MODELLED = (
    "Condition encoders (text, image, query transformers): weights, gradients and optimizer state "
    "are counted, operations and activations are not.",
    "Fused kernels (kernels=auto on a GPU) save fewer activations than the measured eager ones.",
    "Sampling, scoring, validation, and encoding of data; workspaces of libraries such as cuDNN; "
    "CUDA graphs and torch.compile.",
    "Time: operations are counted, not the speed of a device.",
    "Sharding is arithmetic. DDP: a bucket per gradient. FSDP2: two gathered blocks and one full "
    "gradient of a block. ZeRO: one full half-precision gradient and DeepSpeed's buckets.",
    f"Reserved memory is the total times {strategies.RESERVED} (allocator slack, fitted to "
    "published rows) plus 0.5 GiB for the CUDA context.",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    root: Root
    sizes: Sizes
    counts: tuple[Count, ...]
    checkpointing: bool | None  # as configured; None: not supported by the backbone
    costs: dict[bool, Measured]  # by activation checkpointing
    memory: tuple[Memory, ...]
    objective: Objective
    diagram: dict[str, list[Any]]  # boxes and arrows
    notes: tuple[str, ...]
    other_sizes: int
    published: dict[str, float]
    seconds: float

    @property
    def cost(self) -> Measured:
        """Cost as configured."""
        return self.costs[bool(self.checkpointing)]

    @property
    def chosen(self) -> str:
        """Name of the configured trainer's strategy."""
        trainer = self.root.trainer
        name = trainer.plugin.rpartition("/")[2]
        if not hasattr(trainer, "stage"):
            return name
        return f"{name}_zero{trainer.stage}" + ("_offload" if trainer.offload else "")

    def as_dict(self) -> dict[str, Any]:
        """The contents of plan.json."""
        from sandbox.config.root import to_container
        from sandbox.runs.identity import identity_of_work

        config, trainer = to_container(self.root), self.root.trainer
        return {
            "recipe": self.root.recipe,
            "work": identity_of_work(config),  # equal for runs with equal operations
            "flops_per_step": self.cost.total * trainer.accumulate * trainer.processes,
            "sizes": asdict(self.sizes) | {"slots": sorted(self.sizes.slots.names())},
            "components": [asdict(row) for row in self.counts],
            "checkpointing": self.checkpointing,
            "costs": {
                "checkpointed" if on else "plain": {name: getattr(cost, name) for name in COSTS}
                for on, cost in self.costs.items()
            },
            "memory": [row.as_dict() for row in self.memory],
            "published_gib": self.published,
            "objective": _plain(asdict(self.objective)),
            "wiring": {kind: [*map(asdict, found)] for kind, found in self.diagram.items()},
            "not_modelled": list(self.notes),
            "seconds": self.seconds,
            "config": config,
        }


def _plain(node: Any) -> Any:
    """Converts infinities, which JSON lacks, to text."""
    if isinstance(node, dict):
        return {k: _plain(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(v) for v in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def plan(wiring: Wiring, devices: int = 8) -> Plan:
    """Plans a training step on fake tensors: reads and downloads nothing."""
    started, root, sizes = time.perf_counter(), wiring.root, Sizes.of(wiring)
    parts = parts_of(root)
    table = counts(root, parts)
    name = checkpointing_field(root)
    is_on = None if name is None else bool(getattr(root.backbone, name))
    native, half = steps(root, sizes, is_on)
    devices = root.trainer.processes if root.trainer.processes > 1 else devices
    memory = tuple(rows(need_of(root, table, parts), devices, native, half))
    known = {m.strategy: published(root.recipe, m.strategy, m.devices) for m in memory}
    return Plan(
        root, sizes, tuple(table), is_on, native, memory, objective(root), diagram(root, sizes),
        notes=(*_caveats(root), *NOT_MODELLED),
        other_sizes=len(wiring.clips) - 1,
        published={k: v for k, v in known.items() if v is not None},
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _caveats(root: Root) -> Iterator[str]:
    """Parts of this configuration that are not planned."""
    method = root.method.plugin.rpartition("/")[2]
    if method != "denoising":
        yield (
            f"The formulas are those of method=denoising. method={method} has others; its calls "
            "and networks are counted."
        )
    if root.reconstruction is not None:
        name = root.reconstruction.plugin.rpartition("/")[2]
        yield (
            f"First-stage training (reconstruction={name}): this plan covers the diffusion model "
            "on its latents."
        )


def steps(
    root: Root, sizes: Sizes, is_on: bool | None
) -> tuple[dict[bool, Measured], dict[bool, Measured]]:
    """Measured steps by checkpointing: with native weights, and with half-precision ones.

    The latter (DeepSpeed) are empty with an adapter: DeepSpeed trains full networks only.
    """
    before = measure_encoding(root, sizes)

    def of(job: tuple[bool, bool]) -> Measured:
        return measure_step(root, sizes, *job, before)

    jobs = [(False, False)] if is_on is None else [(True, False), (False, False)]
    if root.adapter is None and root.precision != "fp32":
        jobs.append((bool(is_on), True))
    found = dict(zip(jobs, parallel_map(of, jobs), strict=True))
    native = {on: m for (on, is_half), m in found.items() if not is_half}
    if root.adapter is None and root.precision == "fp32":
        return native, native
    return native, {on: m for (on, is_half), m in found.items() if is_half}


def need_of(root: Root, table: Sequence[Count], parts: dict[str, Any]) -> Need:
    resident = [row for row in table if row.is_resident]
    return Need(
        trained=sum(row.trained for row in resident),
        trained_bytes=sum(row.bytes_trained for row in resident),
        fixed=sum(row.bytes_fixed for row in resident),
        optimizer=optimizer_bytes(root, parts),
        average=ema_bytes(root, parts),
        unit=largest_unit(parts),
        half=dtype_of(root).itemsize,
        accumulates=root.trainer.accumulate > 1,
    )
