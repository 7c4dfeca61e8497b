"""The training loop, its state, first stages, tracking, and what a finished run writes."""

from sandbox.config.moved_modules import forward

__getattr__ = forward("training")  # names of version 0.1
