"""Folders of diffusers pipelines: transformer/, vae/ and text_encoder/, one model each."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

from sandbox.contracts import ConfigError, LayoutConfig, PluginConfig, State
from sandbox.registry import register

# Folder -> our component, and the prefix of its names there.
FOLDERS = {
    "transformer": ("backbone", ""),
    "vae": ("vae", ""),
    "text_encoder": ("conditioning", "encoder."),
}
PIPELINES = {  # by network: text-to-video, image-to-video
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
}
VERSION = "0.32.0"  # the first that has all of these classes
FILES = {"scheduler": "scheduler_config.json", "transformer": "config.json", "vae": "config.json"}
TEXT = {
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
}


@register("layout", "diffusers")
class Diffusers:
    """Folders of a diffusers pipeline; names such as "transformer/proj_out.weight"."""

    @dataclass
    class Config(LayoutConfig):
        def recognises(self, names: frozenset[str]) -> bool:
            return any(name.startswith("transformer/") for name in names)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, state: State) -> dict[str, State]:
        """States by component; raises ValueError for an unknown folder."""
        found: dict[str, State] = {}
        for name, tensor in state.items():
            folder, _, rest = name.partition("/")
            if folder not in FOLDERS:
                raise ValueError(f"{name}: want a name in one of {', '.join(FOLDERS)}")
            part, prefix = FOLDERS[folder]
            found.setdefault(part, {})[prefix + rest] = tensor
        return found

    def join(self, parts: dict[str, State]) -> State:
        """The inverse of `split`; raises ValueError for a component without a folder."""
        folders = {part: (folder, prefix) for folder, (part, prefix) in FOLDERS.items()}
        state: State = {}
        for part, tensors in parts.items():
            if part not in folders:
                raise ValueError(f"{part}: diffusers has no folder for it")
            folder, prefix = folders[part]
            state |= {f"{folder}/{k.removeprefix(prefix)}": v for k, v in tensors.items()}
        return state

    def described(
        self, configs: Mapping[str, PluginConfig], copied: Mapping[str, list[str] | None]
    ) -> dict[str, dict[str, Any]]:
        """The JSON files of a pipeline's folder, by path; model_index.json is the last.

        `configs`: Configs of a wired system by group; `copied`: copied text folders, with library
        and class if known. Raises ConfigError for everything without a class or setting in
        diffusers.
        """
        groups = ("backbone", "vae", "schedule", "sampler", "conditioning")
        found = {name: diffusers_config(name, configs[name]) for name in groups}
        if problems := [p for _, own in found.values() for p in own]:
            raise ConfigError(*problems)
        network, first_stage, noise, sampler, _ = (found[name][0] for name in groups)
        conditioning: Any = configs["conditioning"]
        has_image = bool(conditioning.images())
        if has_image:
            # the latents of an image are multiplied by scaling_factor, or divided by it
            scale, inverted = conditioning.image_latent_scale, first_stage["scaling_factor"] ** -2
            if not (isclose(scale, 1.0) or isclose(scale, inverted)):
                raise ConfigError(
                    f"conditioning.image_latent_scale={scale}: diffusers has 1.0, or {inverted} "
                    "(invert_scale_latents)"
                )
            first_stage["invert_scale_latents"] = not isclose(scale, 1.0)
        parts = {"scheduler": sampler | noise, "transformer": network, "vae": first_stage}
        classes = {name: ["diffusers", part["_class_name"]] for name, part in parts.items()}
        text = {k: (copied[k] or v) if k in copied else [None, None] for k, v in TEXT.items()}
        kind = PIPELINES[network["_class_name"]][has_image]
        version = {"_diffusers_version": VERSION}
        files = {f"{name}/{FILES[name]}": part | version for name, part in parts.items()}
        index = {"_class_name": kind, **version, **dict(sorted((classes | text).items()))}
        return files | {"model_index.json": index}


def diffusers_config(group: str, cfg: PluginConfig) -> tuple[dict[str, Any], list[str]]:
    """The Config's diffusers settings, or the problems that prevent an export."""
    try:
        settings = cfg.diffusers_config()
    except ConfigError as e:
        return {}, [f"{group}.{p}" for p in e.problems]
    name = cfg.plugin.rpartition("/")[2]
    problem = f"{group}={name}: has no class in diffusers; format=diffusers is for CogVideoX"
    return settings, [] if settings else [problem]
