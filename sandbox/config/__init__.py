"""Configuration: Root, plugin registry, composition with Hydra, wiring, and error messages."""

from sandbox.config.moved_modules import forward

__getattr__ = forward("config")  # names of the module of version 0.1
