"""Numbers of known frames, and the pixel frames of each latent frame."""

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


def groups_of(frames: int, latent_frames: int) -> tuple[int, int]:
    """How pixel frames become latent frames: (1 if the first is alone, frames of the others each).

    (0, 1): a latent frame for each; (1, 4): 9 frames become 3; (0, 4): 8 become 2. Where both forms
    are possible, it is the one whose number is a power of two. Raises ConfigError for other sizes.
    """
    alone = divmod(frames - 1, latent_frames - 1) if latent_frames > 1 else (0, 1)
    even = divmod(frames, latent_frames)
    found = [(0, even[0])] if not even[1] else []
    found += [(1, alone[0])] if not alone[1] and alone[0] else []
    if not found:
        raise ConfigError(
            f"known frames: {frames} frames become {latent_frames} latent frames, which are no "
            "groups of equal size; want another data.frames, or a backbone without padding"
        )
    return next((g for g in found if not g[1] & (g[1] - 1)), found[0])
