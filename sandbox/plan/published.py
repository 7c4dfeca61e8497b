"""Published fine-tuning memory of CogVideoX, to compare with computed values.

From the official repository (finetune/README): reserved GPU memory in GB, one clip per step. Rows
of 5b and 1.5 hold for text- and image-to-video.
"""

from dataclasses import dataclass

from sandbox.plan.strategies import DDP, ZERO2, ZERO2_OFFLOAD, ZERO3, ZERO3_OFFLOAD

WITHIN = 0.2  # relative tolerance


@dataclass(frozen=True)
class Row:
    recipe: str
    strategy: str
    devices: int
    gib: float


ROWS = (
    Row("cogvideox_2b_lora", DDP, 1, 16),
    Row("cogvideox_5b_lora", DDP, 1, 24),
    Row("cogvideox_1_5_5b_lora", DDP, 1, 35),
    Row("cogvideox_2b_sft", DDP, 8, 36),
    Row("cogvideox_2b_sft", ZERO2_OFFLOAD, 1, 17),
    Row("cogvideox_2b_sft", ZERO2, 8, 17),
    Row("cogvideox_2b_sft", ZERO3, 8, 19),
    Row("cogvideox_2b_sft", ZERO3_OFFLOAD, 8, 14),
    Row("cogvideox_5b_sft", ZERO2_OFFLOAD, 1, 42),
    Row("cogvideox_5b_sft", ZERO2, 8, 42),
    Row("cogvideox_5b_sft", ZERO3, 8, 43),
    Row("cogvideox_5b_sft", ZERO3_OFFLOAD, 8, 28),
    Row("cogvideox_1_5_5b_sft", ZERO2_OFFLOAD, 1, 56),
    Row("cogvideox_1_5_5b_sft", ZERO2, 8, 55),
    Row("cogvideox_1_5_5b_sft", ZERO3, 8, 55),
    Row("cogvideox_1_5_5b_sft", ZERO3_OFFLOAD, 8, 40),
)
# Reasons for deviations above WITHIN.
MISSES = {
    ("cogvideox_2b_lora", DDP): (
        "the published peak is not that of a training step, whose parts sum to about half of it: "
        "the text encoder (4.76 billion parameters, 8.9 GiB in half precision) encodes captions "
        "before training and in each validation, and today's official trainer also loads this "
        "transformer in float32"
    ),
}


def published(recipe: str, strategy: str, devices: int) -> float | None:
    """The published GB of a recipe and strategy; None if there is no matching row."""
    name = recipe.replace("_i2v", "")
    for row in ROWS:
        if row.recipe == name and row.strategy == strategy:
            is_lora = name.endswith("_lora")  # published without a number of devices
            if is_lora or row.devices == devices:
                return row.gib
    return None
