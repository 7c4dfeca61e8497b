"""Batches: the loader, keyed random draws, video files."""

from sandbox.config.moved_modules import forward

__getattr__ = forward("data")  # names of version 0.1
