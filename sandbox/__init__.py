"""A research sandbox for latent diffusion of images and video: `from sandbox import compose, build,
train, sample`; `sandbox.api` has the rest.
"""

from typing import Any

__all__ = [
    "build",
    "clips",
    "compare",
    "compose",
    "curve",
    "movie",
    "results",
    "sample",
    "sheet",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sandbox' has no attribute {name!r}")
    from sandbox import api

    return getattr(api, name)
