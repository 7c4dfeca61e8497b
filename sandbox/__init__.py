"""A research sandbox for latent diffusion of images and video.

`from sandbox import compose, build, train, sample`; `sandbox.api` documents all functions.
"""

from typing import Any

from sandbox.config import moved_modules

__all__ = [
    "build",
    "build_parts",
    "clips",
    "compare",
    "components",
    "compose",
    "curve",
    "movie",
    "results",
    "sample",
    "sheet",
    "sweep",
    "train",
]

moved_modules.install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sandbox' has no attribute {name!r}")
    from sandbox import api

    return getattr(api, name)
