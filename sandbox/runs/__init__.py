"""Run folders: creating and resuming them, finding earlier ones, comparing two."""

from sandbox.config.moved_modules import forward

__getattr__ = forward("runs")  # names of version 0.1
