"""Contract rules that the Configs of several backbones share.

Fields are not shared: each Config lists them in the order and with the defaults of its publication.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from sandbox.contracts import BackboneConfig, ConfigError, Hidden, in_range, one_of

MOTION_MODULES = ("none", "vanilla", "grid")
GROUPS = 32  # of every group norm of the UNets and of motion modules, as published


class Motion(Protocol):
    """The settings of a motion module that all backbones have."""

    motion_module: str
    motion_block_size: int
    motion_heads: int


class Levels(Protocol):
    """The published hyper-parameters of a UNet's levels."""

    model_channels: int
    attention_resolutions: tuple[int, ...]  # downsampling factors
    channel_mult: tuple[int, ...]


def middle_block(cfg: Levels) -> Hidden:
    """The output of the middle block of a UNet."""
    factor = 2 ** (len(cfg.channel_mult) - 1)
    channels = cfg.model_channels * cfg.channel_mult[-1]
    return Hidden("(b t) d h w", channels, (1, factor, factor))


def block_at(backbone: BackboneConfig, place: float, setting: str) -> str:
    """The name of the block at `place` of the depth, 0 to 1; ConfigError without blocks."""
    if not (names := backbone.blocks()):
        raise ConfigError(f"{setting}=null: this backbone names no blocks; want names of modules")
    return names[int(place * len(names))]


def check_blocks(names: Sequence[str], backbone: BackboneConfig, setting: str) -> None:
    """Raises ConfigError for names like those of the backbone's blocks that are none of them.

    Other modules are known once the backbone is built, which checks all names.
    """
    blocks = backbone.blocks()
    stem = blocks[0].rpartition(".")[0] if blocks else ""
    unknown = [n for n in names if stem and n.rpartition(".")[0] == stem and n not in blocks]
    if unknown:
        raise ConfigError(f"{setting}={unknown}: want blocks from {blocks[0]} to {blocks[-1]}")


def slots_taken(**slots: bool) -> frozenset[str]:
    """Names of the slots that are true."""
    return frozenset(name for name, is_taken in slots.items() if is_taken)


def motion_setting_problems(cfg: Motion) -> Iterator[str]:
    yield from one_of("motion_module", cfg.motion_module, MOTION_MODULES)
    yield from in_range("motion_block_size", cfg.motion_block_size, 1)
    yield from in_range("motion_heads", cfg.motion_heads, 1)


def motion_width_problems(width: int, heads: int, divisor: int = 1) -> Iterator[str]:
    """A motion module's inner width must be even: its positions are pairs of sine and cosine."""
    inner = width // heads // divisor * heads
    if width > 0 and (inner < 2 or inner % 2):
        yield (
            f"motion_heads={heads}: the motion module on {width} channels is {inner} wide; want an "
            "even width"
        )


def has_levels(cfg: Levels) -> bool:
    return bool(cfg.channel_mult) and min(cfg.channel_mult) >= 1


def level_problems(cfg: Levels) -> Iterator[str]:
    if cfg.model_channels < 1 or cfg.model_channels % GROUPS:
        yield f"model_channels={cfg.model_channels}: want a multiple of {GROUPS}"
    if not has_levels(cfg):
        yield f"channel_mult={list(cfg.channel_mult)}: want at least one level, each >= 1"
        return
    factors = [2**i for i in range(len(cfg.channel_mult))]
    if unknown := set(cfg.attention_resolutions) - set(factors):
        yield f"attention_resolutions={sorted(unknown)}: want some of {factors}, by factor"


def attention_widths(cfg: Levels) -> list[int]:
    """Channels of all blocks with attention; the middle block always has it."""
    levels = enumerate(cfg.channel_mult)
    mults = [m for i, m in levels if 2**i in cfg.attention_resolutions] + [cfg.channel_mult[-1]]
    return sorted({cfg.model_channels * m for m in mults})


def divisor_problems(name: str, value: int, widths: Sequence[int]) -> Iterator[str]:
    if value < 1 or any(width % value for width in widths):
        yield f"{name}={value}: want a divisor of all widths with attention, {list(widths)}"
