"""Comparison of weights with a model: names, shapes and values; messages say what differs.

All checks take state dicts, also those on the meta device.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from sandbox.contracts import StorageError

State = Mapping[str, Tensor]
SHOWN = 5  # names of each class
MOST_RENAMED = 20  # names of a class among which renamed ones are searched
ALIKE = 0.6  # smallest share of equal characters of a renamed name
LORA = re.compile(r"\.?lora[._](A|B|up|down|E|magnitude)\b|lora_(A|B|up|down)\b|\.(hada|lokr|oft)_")
# What weights are, by a name that only they have; the first that matches counts.
KINDS = (
    (LORA.pattern, "a LoRA file: use adapter=lora adapter.weights=FILE"),
    (r"^(controlnet_|control_model\.|input_hint_block\.)", "a ControlNet"),
    (r"(^|\.)SelfAttention\.q\.weight$", "a T5 text encoder: use conditioning.weights=FOLDER"),
    (r"^(text_model|vision_model)\.encoder\.layers\.", "a CLIP of transformers"),
    (r"(^|\.)transformer\.resblocks\.", "an OpenCLIP model: use conditioning.weights=FILE"),
    (r"exp_avg|^param_groups", "the state of an optimizer"),
    (r"^model\.diffusion_model\.mixins\.", "a CogVideoX checkpoint of SAT: want that of diffusers"),
    (r"^model\.diffusion_model\.", "a full system of latent-diffusion or DynamiCrafter"),
    (r"(^|\.)attn1\.norm_q\.|(^|\.)patch_embed\.text_proj\.", "a CogVideoX: backbone=cogvideox"),
    (r"(^|\.)blocks\.0\.self_attn\.q\.", "a Wan transformer"),
    (r"(^|\.)double_blocks\.0\.", "a Flux or HunyuanVideo transformer"),
    (
        r"(^|\.)(joint_blocks\.0\.|transformer_blocks\.0\.norm1_context\.)",
        "a Stable Diffusion 3 transformer: backbone=mmdit",
    ),
    (r"motion_modules\.\d", "AnimateDiff's motion modules"),
    (r"(^|\.)caption_projection\.|(^|\.)adaln_single\.", "a PixArt or EasyAnimate of diffusers"),
    (r"(^|\.)y_embedder\.|(^|\.)x_embedder\.", "a DiT, PixArt or EasyAnimate transformer"),
    (r"temopral_conv|(^|\.)init_attn\.0", "the network of DynamiCrafter: backbone=unet3d"),
    (r"(^|\.)input_blocks\.0\.0\.", "a UNet of latent-diffusion: backbone=unet2d"),
    (r"(^|\.)down_blocks\.0\.(resnets|attentions)\..*temporal", "a video UNet of diffusers"),
    (r"^encoder\.down_blocks\.|^decoder\.up_blocks\.", "a first stage of diffusers: vae.weights"),
    (r"(^|\.)(down_blocks\.0\.(resnets|attentions)|mid_block)\.", "a UNet of diffusers"),
    (r"^(encoder|decoder|quantize|post_quant_conv)\.", "a first stage: use vae.weights=FILE"),
    (r"(^|\.)_?flat_param", "flattened weights of FSDP: save a full state dict"),
    (r"\.(absmax|quant_map|qweight|qzeros|scale_weight|weight_scale)(\.|$)", "quantised weights"),
)
CHECKING: ContextVar[bool] = ContextVar("CHECKING", default=False)


@contextmanager
def checking_weight_files() -> Iterator[None]:
    """Weight files are also read for models on the meta device, to find wrong ones early."""
    token = CHECKING.set(True)
    try:
        yield
    finally:
        CHECKING.reset(token)


def is_checking_weight_files() -> bool:
    return CHECKING.get()


@dataclass(frozen=True)
class Differences:
    """`count` names and shapes that differ; `lines` shows the first of each class, one per line."""

    count: int
    lines: str


def differences(
    own: State,
    given: State,
    place: str = "this model",
    shape: Callable[[Tensor], Sequence[int]] = lambda tensor: tensor.shape,
) -> Differences | None:
    """What differs in names and shapes, with a hint at what `given` is; None where nothing does."""
    missing = sorted(own.keys() - given.keys())
    unknown = sorted(given.keys() - own.keys())
    shapes = {k: [tuple(shape(s[k])) for s in (given, own)] for k in own.keys() & given.keys()}
    sizes = [f"{k} is {_x(a)} and {_x(b)} here" for k, (a, b) in sorted(shapes.items()) if a != b]
    lines = [
        f"{name} ({len(found)}): {shown(found)}"
        for name, found in (
            ("missing", missing), (f"not in {place}", unknown), ("other shape", sizes),
        )
        if found
    ]  # fmt: skip
    if not lines:
        return None
    lines += hints(own, given, missing, unknown)
    return Differences(len(missing) + len(unknown) + len(sizes), "\n  ".join(["", *lines]))


def hints(own: State, given: State, missing: list[str], unknown: list[str]) -> list[str]:
    """Lines that say what the file seems to be, and which names may have been renamed."""
    lines = []
    kind = kind_of(given)
    if kind and (kind != kind_of(own) or len(missing) == len(own)):
        lines.append(f"the file seems to be {kind}")
    if len(missing) == len(own):
        if prefix := extra_prefix(own, given):
            lines.append(f"all its names begin with {prefix!r}; save it without this prefix")
        elif not kind and len(tops := first_components(given)) > 1:
            lines.append(f"its names begin with {', '.join(f'{k} ({n})' for k, n in tops.items())}")
    if pairs := renamed(own, given, missing, unknown):
        lines.append(f"perhaps renamed: {shown([f'{a} -> {b}' for a, b in pairs])}")
    return lines


def shown(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def kind_of(names: Iterable[str]) -> str | None:
    """What weights with these names are; None where they are unknown."""
    names = list(names)
    return next((what for rule, what in KINDS if any(re.search(rule, n) for n in names)), None)


def extra_prefix(own: Iterable[str], given: Iterable[str]) -> str:
    """Components that all names of `given` begin with and that hide names of `own`; "" for none."""
    own, given = set(own), list(given)
    prefix = ""
    for part in given[0].split(".")[:-1] if given else ():
        prefix += f"{part}."
        if not all(name.startswith(prefix) for name in given):
            return ""
        if any(name.removeprefix(prefix) in own for name in given):
            return prefix
    return ""


def first_components(names: Iterable[str]) -> dict[str, int]:
    """How many names have each first component, at most SHOWN of these."""
    counts: dict[str, int] = {}
    for name in names:
        top = name.partition(".")[0] + ("." if "." in name else "")
        counts[top] = counts.get(top, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:SHOWN])


def renamed(
    own: State, given: State, missing: list[str], unknown: list[str]
) -> list[tuple[str, str]]:
    """(name in the file, name here) of equal shape and a similar name."""
    if max(len(missing), len(unknown)) > MOST_RENAMED:
        return []
    scores = [
        (SequenceMatcher(None, there, here).ratio(), there, here)
        for there in unknown
        for here in missing
        if given[there].shape == own[here].shape
    ]
    pairs: dict[str, str] = {}
    for score, there, here in sorted(scores, reverse=True):
        if score >= ALIKE and there not in pairs and here not in pairs.values():
            pairs[there] = here
    return sorted(pairs.items())


def check_values(where: str, weights: State, own: State | None = None) -> None:
    """Raises StorageError for a tensor with NaN or infinite values, or not of numbers.

    `where`: setting and file; `own`: the model's tensors, whose floats must be floats in the file.
    """
    for name, tensor in weights.items():
        target = None if own is None else own.get(name)
        if target is not None and target.is_floating_point() and not tensor.is_floating_point():
            raise StorageError(
                f"{where}: its tensor {name} is {_dtype(tensor)}, not floating point (quantised?); "
                f"want weights in float32, bfloat16 or float16"
            )
    bad = [name for name, tensor in weights.items() if not is_finite(tensor)]
    if bad:
        nan = int((~weights[bad[0]].float().isfinite()).sum())
        raise StorageError(
            f"{where}: {len(bad)} of its {len(weights)} tensors have values that are NaN or "
            f"infinite: {shown(bad)} ({nan} of {weights[bad[0]].numel()} values of {bad[0]}); want "
            "a file whose values are finite"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; True for integers and for tensors on the meta device."""
    if (
        tensor.is_meta
        or not tensor.numel()
        or not (tensor.is_floating_point() or tensor.is_complex())
    ):
        return True
    if tensor.dtype.itemsize < 2 or tensor.is_complex():
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.float()
    # A sum is much faster than a check of each number, which only an overflow makes necessary.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _x(size: Sequence[int]) -> str:
    return "x".join(map(str, size)) or "a number"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
