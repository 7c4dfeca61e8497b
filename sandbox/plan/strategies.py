"""Memory of a training step per device, by kind, for each distribution strategy.

Weights, gradients, optimizer and EMA follow from parameter counts; activations are measured
(`sandbox.plan.measure`). Sharding is arithmetic on both, without process groups.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sandbox.plan.measure import Measured

GIB = 2**30
GPU_SIZES = (16, 24, 40, 48, 80, 141)  # GiB of common GPUs
# Published peaks are reserved memory, which exceeds the memory in use: the median ratio of
# published to computed values over CogVideoX's rows for LoRA and DDP, except one
# (benchmarks/results/memory.md). DeepSpeed rows are not part of the fit.
RESERVED = 1.15
CONTEXT = GIB // 2  # CUDA context and libraries
# DeepSpeed bucket sizes in CogVideoX's published configurations, in elements.
REDUCE_BUCKET, PREFETCH_BUCKET, LIVE = 500_000_000, 500_000_000, 1_000_000_000
OVERLAPPED = 2  # one bucket fills while the other is sent

SINGLE, DDP, FSDP2 = "single", "ddp", "fsdp2"
ZERO2, ZERO2_OFFLOAD = "deepspeed_zero2", "deepspeed_zero2_offload"
ZERO3, ZERO3_OFFLOAD = "deepspeed_zero3", "deepspeed_zero3_offload"
ZERO = (ZERO2, ZERO2_OFFLOAD, ZERO3, ZERO3_OFFLOAD)


@dataclass(frozen=True)
class Need:
    """Strategy-independent memory of a configuration, in bytes unless noted.

    trained: number of trained parameters; fixed: frozen weights and buffers on the device; unit:
    parameters of the largest block; half: bytes per element in the training precision.
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
    """Bytes per device. `total` may be less than the sum: gradients and activations do not peak
    together.

    activations: peak of temporary tensors in a step, with half-precision copies; communication:
    buckets and gathered weights; host: CPU memory per device.
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
        """As in nvidia-smi: with allocator slack and the CUDA context."""
        return self.total * RESERVED + CONTEXT

    def verdicts(self) -> dict[int, str]:
        """GiB of a GPU -> "fits", "tight" (fits with little allocator slack), or "no"."""
        return {gpu: self._verdict(gpu * GIB) for gpu in GPU_SIZES}

    def _verdict(self, size: int) -> str:
        if self.reserved <= size:
            return "fits"
        return "tight" if self.total + CONTEXT <= size else "no"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"reserved": self.reserved, "verdicts": self.verdicts()}


def rows(
    need: Need, devices: int, native: dict[bool, Measured], half: dict[bool, Measured]
) -> Iterator[Memory]:
    """A row for each strategy and measured checkpointing setting.

    `native`: measured with this project's weights; `half`: with half-precision weights (DeepSpeed).
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
    """One device, DDP or FSDP2, with float32 weights under autocast."""
    cut = devices if name == FSDP2 else 1
    own = need.trained_bytes / cut
    static = own + need.fixed + (need.optimizer + need.average) / cut
    each = need.trained_bytes / max(need.trained, 1)
    communication = 0.0
    if devices > 1:
        # DDP copies each gradient into a bucket; FSDP2 gathers a block, prefetches the next, and
        # holds the gradient of one.
        communication = need.trained_bytes if name == DDP else 3 * need.unit * each
    working = found.largest(1 / cut)
    if need.accumulates:  # gradients of earlier micro-batches persist
        working = found.peak + own
    return Memory(
        name, devices, is_on,
        weights=own + need.fixed, gradients=own, optimizer=need.optimizer / cut,
        average=need.average / cut, activations=found.peak, communication=communication, host=0.0,
        total=static + max(working, own) + communication,
    )  # fmt: skip


def zero(name: str, need: Need, devices: int, is_on: bool, found: Measured) -> Memory:
    """DeepSpeed ZeRO: half-precision weights; float32 master weights belong to the optimizer.

    Every stage counts one full gradient per device: CogVideoX's published peaks require it,
    although DeepSpeed's papers claim less.
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
        host, optimizer = optimizer + narrow / devices, 0.0  # with the gradient
    if name == ZERO3_OFFLOAD:
        host, weights = host + weights, 0.0
    kinds = {
        "weights": weights + need.fixed, "gradients": narrow, "optimizer": optimizer,
        "average": need.average, "activations": found.peak, "communication": buckets + gathered,
    }  # fmt: skip
    return Memory(name, devices, is_on, **kinds, host=host, total=sum(kinds.values()))
