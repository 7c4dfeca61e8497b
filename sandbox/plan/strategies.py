"""Memory of a training step on one device, by kind, for each way to spread it over devices.

Weights, gradients, optimizer and average follow from counts; what the step itself needs is measured
(`sandbox.plan.measure`). Sharding is arithmetic on both: no process group is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sandbox.plan.measure import Measured

GIB = 2**30
CARDS = (16, 24, 40, 48, 80, 141)  # GiB of common GPUs
# The caching allocator reserves more than is used at any moment, and published peaks are reserved
# ones: the median of those over our sums, of CogVideoX's rows for LoRA and DDP but for one
# (benchmarks/results/memory.md). Those for DeepSpeed took no part in it.
RESERVED = 1.15
CONTEXT = GIB // 2  # CUDA's own, libraries included
# DeepSpeed's numbers in the published configurations of CogVideoX, in elements.
REDUCE_BUCKET, PREFETCH_BUCKET, LIVE = 500_000_000, 500_000_000, 1_000_000_000
OVERLAPPED = 2  # one bucket fills while the other is sent

SINGLE, DDP, FSDP2 = "single", "ddp", "fsdp2"
ZERO2, ZERO2_OFFLOAD = "deepspeed_zero2", "deepspeed_zero2_offload"
ZERO3, ZERO3_OFFLOAD = "deepspeed_zero3", "deepspeed_zero3_offload"
ZERO = (ZERO2, ZERO2_OFFLOAD, ZERO3, ZERO3_OFFLOAD)


@dataclass(frozen=True)
class Need:
    """What a configuration keeps, in bytes, whatever the strategy.

    trained: numbers that are trained; fixed: frozen weights and buffers on the device; unit:
    numbers of the largest block; half: bytes of a number in the precision of training.
    """

    trained: int
    trained_bytes: int
    fixed: int
    optimizer: int
    average: int
    unit: int
    half: int
    accumulates: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `total` may be less than the sum: gradients come as activations go.

    activations: the most that comes and goes in a step, copies in half precision included;
    communication: buckets, and weights that are gathered; host: on the CPU, for each device.
    """

    strategy: str
    devices: int
    checkpointing: bool
    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    communication: float
    host: float
    total: float

    @property
    def reserved(self) -> float:
        """What a tool such as nvidia-smi may show: with the allocator's slack and CUDA's own."""
        return self.total * RESERVED + CONTEXT

    def verdicts(self) -> dict[int, str]:
        """GiB of a card -> "fits", "tight" (only with little slack of the allocator), or "no"."""
        return {card: self._verdict(card * GIB) for card in CARDS}

    def _verdict(self, size: int) -> str:
        if self.reserved <= size:
            return "fits"
        return "tight" if self.total + CONTEXT <= size else "no"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"reserved": self.reserved, "verdicts": self.verdicts()}


def rows(
    need: Need, devices: int, native: dict[bool, Measured], half: dict[bool, Measured]
) -> Iterator[Memory]:
    """A row for each strategy and setting of checkpointing that was measured.

    `native`: weights as this project trains them; `half`: in half precision, as DeepSpeed does.
    """
    for is_on, found in native.items():
        yield plain(SINGLE, need, 1, is_on, found)
        yield plain(DDP, need, devices, is_on, found)
        yield plain(FSDP2, need, devices, is_on, found)
    for is_on, found in half.items():
        yield zero(ZERO2, need, devices, is_on, found)
        yield zero(ZERO2_OFFLOAD, need, 1, is_on, found)
        yield zero(ZERO3, need, devices, is_on, found)
        yield zero(ZERO3_OFFLOAD, need, devices, is_on, found)


def plain(name: str, need: Need, devices: int, is_on: bool, found: Measured) -> Memory:
    """One device, DDP or FSDP2, which train float32 weights under autocast."""
    cut = devices if name == FSDP2 else 1
    own = need.trained_bytes / cut
    static = own + need.fixed + (need.optimizer + need.average) / cut
    each = need.trained_bytes / max(need.trained, 1)
    communication = 0.0
    if devices > 1:
        # DDP copies each gradient into a bucket; FSDP2 has a block whole, the next one, and the
        # gradient of one.
        communication = need.trained_bytes if name == DDP else 3 * need.unit * each
    working = found.largest(1 / cut)
    if need.accumulates:  # then the gradients of earlier micro-batches are there all the time
        working = found.peak + own
    return Memory(
        name, devices, is_on,
        weights=own + need.fixed, gradients=own, optimizer=need.optimizer / cut,
        average=need.average / cut, activations=found.peak, communication=communication, host=0.0,
        total=static + max(working, own) + communication,
    )  # fmt: skip


def zero(name: str, need: Need, devices: int, is_on: bool, found: Measured) -> Memory:
    """DeepSpeed's ZeRO: weights in half precision, their float32 originals with the optimizer.

    One whole gradient counts on each device, whatever the stage: the published peaks of CogVideoX
    only add up with it. DeepSpeed's papers promise less.
    """
    stage3, is_offloaded = name in (ZERO3, ZERO3_OFFLOAD), name in (ZERO2_OFFLOAD, ZERO3_OFFLOAD)
    narrow = need.trained * need.half
    originals = 4 * need.trained if need.half < 4 else 0
    optimizer = (need.optimizer + originals) / devices
    weights = narrow / devices if stage3 else narrow
    buckets = OVERLAPPED * min(REDUCE_BUCKET, need.trained) * need.half
    gathered = min(LIVE + PREFETCH_BUCKET, need.trained) * need.half if stage3 else 0
    host = 0.0
    if is_offloaded:
        host, optimizer = optimizer + narrow / devices, 0.0  # the gradient goes there, too
    if name == ZERO3_OFFLOAD:
        host, weights = host + weights, 0.0
    kinds = {
        "weights": weights + need.fixed, "gradients": narrow, "optimizer": optimizer,
        "average": need.average, "activations": found.peak, "communication": buckets + gathered,
    }  # fmt: skip
    return Memory(name, devices, is_on, **kinds, host=host, total=sum(kinds.values()))
