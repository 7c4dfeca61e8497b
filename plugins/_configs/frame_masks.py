"""Places of known frames, and the pixel frames of each latent frame."""

from collections.abc import Sequence

from sandbox.contracts import ConfigError


def places(known: Sequence[int], frames: int) -> tuple[int, ...]:
    """`known`, from 0 or negative from the last frame, as increasing places in [0, frames).

    Raises ConfigError for a place outside, one that is named twice, or no unknown frame.
    """
    if wrong := [p for p in known if not -frames <= p < frames]:
        raise ConfigError(
            f"known={wrong}: a clip has {frames} frames; want {-frames} to {frames - 1}"
        )
    found = sorted({p % frames for p in known})
    if len(found) < len(known):
        raise ConfigError(f"known={list(known)}: names a frame twice, of {frames}")
    if len(found) == frames:
        raise ConfigError(f"known={list(known)}: all of {frames} frames are known; want fewer")
    return tuple(found)


def frames_per_latent(frames: int, latent_frames: int) -> int:
    """Pixel frames for each latent frame, where the first may be alone, as in causal first stages.

    9 frames that become 9: 1; 8 that become 2: 4; 9 that become 3: 4, with the first alone. Where
    both forms are possible, it is the one that gives a power of two.
    """
    even = frames // latent_frames if frames % latent_frames == 0 else 0
    alone = 0
    if latent_frames > 1 and (frames - 1) % (latent_frames - 1) == 0:
        alone = (frames - 1) // (latent_frames - 1)
    found = [n for n in (even, alone) if n]
    powers = [n for n in found if not n & (n - 1)]
    return next(iter(powers or found), -(-frames // latent_frames))
