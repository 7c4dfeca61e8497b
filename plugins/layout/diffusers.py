"""The folders of diffusers pipelines: transformer/ or unet/, vae/, text_encoder/, each a model."""

from dataclasses import dataclass

from sandbox.contracts import LayoutConfig, State
from sandbox.registry import register

# Folder -> our part, and what the part calls it inside.
FOLDERS = {
    "transformer": ("backbone", ""),
    "vae": ("vae", ""),
    "text_encoder": ("conditioning", "encoder."),
}


@register("layout", "diffusers")
class Diffusers:
    """Folders of a diffusers pipeline; a name is "transformer/proj_out.weight"."""

    @dataclass
    class Config(LayoutConfig):
        def recognises(self, names: frozenset[str]) -> bool:
            return any(name.startswith("transformer/") for name in names)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def parts(self, state: State) -> dict[str, State]:
        """Raises ValueError for a folder that is not known."""
        found: dict[str, State] = {}
        for name, tensor in state.items():
            folder, _, rest = name.partition("/")
            if folder not in FOLDERS:
                raise ValueError(f"{name}: want a name in one of {', '.join(FOLDERS)}")
            part, prefix = FOLDERS[folder]
            found.setdefault(part, {})[prefix + rest] = tensor
        return found

    def whole(self, parts: dict[str, State]) -> State:
        """The inverse of `parts`. Raises ValueError for a part that no folder has."""
        folders = {part: (folder, prefix) for folder, (part, prefix) in FOLDERS.items()}
        state: State = {}
        for part, tensors in parts.items():
            if part not in folders:
                raise ValueError(f"{part}: diffusers has no folder for it")
            folder, prefix = folders[part]
            state |= {f"{folder}/{k.removeprefix(prefix)}": v for k, v in tensors.items()}
        return state
