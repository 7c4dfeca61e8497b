"""LoRA files in the dialects of peft, diffusers, kohya-ss, LyCORIS and ComfyUI.

A layer has A (rank, in), B (out, rank) and a strength: its update is strength * B A. Dialects
differ in names, prefixes and in where the strength is: a tensor `alpha` per layer, the header of
the file, or an adapter_config.json next to it.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from plugins._blocks.state_dicts import (
    check_values,
    plain_name,
    read_file,
    read_header,
    what_weights,
)
from sandbox.contracts import State, StorageError

METADATA = "lora_adapter_metadata"  # header entry in which diffusers has the settings of peft
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
PLAIN_KEYS = {  # of a header without the entry of diffusers -> names of peft
    "r": "r", "rank": "r", "lora_alpha": "lora_alpha", "alpha": "lora_alpha",
    "use_rslora": "use_rslora", "use_dora": "use_dora", "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}  # fmt: skip
PREFIXES = frozenset({"base_model", "model", "transformer", "unet", "diffusion_model", "net", "dit",
                      "network", "backbone", "denoiser", "pipe"})  # fmt: skip
FLAT = re.compile(r"^(lora_(unet|transformer|dit|net|denoiser)|lycoris)_+")
SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
FACTOR = (  # names of factors: layer, side; the first that matches counts
    re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))??(\.weight)?"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(lora|lora_linear_layer)\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.processor\.(?P<own>to_\w+)_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<own>to_\w+)_lora\.(?P<side>down|up)\.weight"),
)
ALPHA = re.compile(r"(?P<layer>.+)\.(alpha|lora_alpha|network_alpha)")
OTHERS = (  # methods that are no plain LoRA, by their names
    (r"lora_magnitude_vector|dora_scale", "a DoRA"),
    (r"[._]hada_", "a LoHa of LyCORIS"),
    (r"[._]lokr_", "a LoKr of LyCORIS"),
    (r"[._](oft|boft)_|oft_blocks", "an OFT"),
    (r"[._]ia3_|\.on_input$", "an IA3"),
    (r"vera_lambda", "a VeRA"),
    (r"\.lora_E\b|ranknum", "an AdaLoRA"),
    (r"\.lora_mid\.", "a LoCon with a Tucker decomposition (lora_mid)"),
    (r"lora_embedding_", "a LoRA of an embedding"),
    (r"modules_to_save", "a LoRA with full weights of other layers (modules_to_save)"),
    (r"\.lora_(B|up)(\.[^.]+)?\.bias$", "a LoRA with biases (lora_bias)"),
    (r"\.diff(_b)?$|\.set_weight$", "full differences of weights (diff)"),
    (r"\.(w|b)_norm$|norm.*\.diff", "a LoRA with norms"),
    (r"^lora_te\d*_|^text_encoder", "a LoRA with layers of a text encoder"),
    (r"\.reshape_weight$|lora_controlnet", "a LoRA for another architecture"),
)
UNSUPPORTED = {  # settings of peft that change the update, with what they are
    "use_dora": "a DoRA (use_dora)",
    "lora_bias": "a LoRA with biases (lora_bias)",
    "modules_to_save": "a LoRA with full weights of other layers (modules_to_save)",
    "layer_replication": "a LoRA on repeated layers (layer_replication)",
    "use_qalora": "a QALoRA (use_qalora)",
    "use_bdlora": "a BD-LoRA (use_bdlora)",
    "alora_invocation_tokens": "an aLoRA (alora_invocation_tokens)",
    "trainable_token_indices": "a LoRA with trained tokens (trainable_token_indices)",
    "target_parameters": "a LoRA of single parameters (target_parameters)",
    "arrow_config": "an Arrow router (arrow_config)",
    "kasa_config": "a KaSA (kasa_config)",
    "monteclora_config": "a MonteCLoRA (monteclora_config)",
}
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they change the base weights, too


@dataclass
class Update:
    """The update of one layer: strength * B A."""

    factors: dict[str, Tensor] = field(default_factory=dict)  # "A" (rank, in), "B" (out, rank)
    alpha: float | None = None  # of the file, for this layer
    strength: float = 1.0

    @property
    def rank(self) -> int:
        return self.factors["A"].shape[0]


def read_lora(
    path: Path, layers: Collection[str], prefix: str
) -> tuple[dict[str, Update], list[str]]:
    """Updates by layer, and what was found in the file, for the log.

    `layers`: names of the network's adapted layers; those of the file that are none of them keep
    their names. `prefix`: of a pipeline's network in names and settings. Raises StorageError for
    files that are no plain LoRA, which names what they are.
    """
    where = f"adapter.weights={path}"
    path = _file(path)
    state = read_file(path, "adapter.weights")
    check_values(where, state)
    for rule, what in OTHERS:
        if found := [name for name in state if re.search(rule, name)]:
            raise StorageError(f"{where}: it is {what}: {found[0]}; want a plain LoRA")
    settings = _settings(path, prefix, where)
    updates, said, other = _updates(state, layers, prefix)
    if not updates:
        kind = what_weights(state)
        raise StorageError(
            f"{where}: not a LoRA file" + (f": it seems to be {kind}" if kind else "")
        )
    other += [f"{k}.{side}" for k, u in updates.items() for side in "AB" if side not in u.factors]
    if other:
        raise StorageError(
            f"{where}: {len(other)} of its names are not those of a plain LoRA, or lack their "
            f"partner: {', '.join(sorted(other)[:5])}"
        )
    for layer, update in updates.items():
        update.strength = _strength(layer, update, settings, where)
    strengths = sorted({round(u.strength, 6) for u in updates.values()})
    shown = f"{strengths[0]:g}" if len(strengths) == 1 else f"{strengths[0]:g} to {strengths[-1]:g}"
    rule = " (rsLoRA)" if settings.get("use_rslora") else ""
    return updates, [*said, f"{len(updates)} layers", f"strength {shown}{rule}"]


def _file(path: Path) -> Path:
    """The file of a folder that peft or diffusers wrote."""
    if not path.is_dir():
        return path
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        raise StorageError(f"adapter.weights={path}: none of {', '.join(FILES)} is in this folder")
    return found


def _settings(path: Path, prefix: str, where: str) -> dict[str, Any]:
    """The settings of peft in the header or in the adapter_config.json; empty without any.

    Raises StorageError for settings that are no plain LoRA.
    """
    header = read_header(path, "adapter.weights")
    try:
        found = json.loads(header.get(METADATA, "{}"))
        plain = {own: _value(header[k]) for k, own in PLAIN_KEYS.items() if k in header}
        settings = path.parent / "adapter_config.json"
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except (ValueError, OSError, RecursionError) as e:
        raise StorageError(f"{where}: its settings are not readable JSON ({e})") from e
    if not isinstance(found, dict) or not isinstance(config, dict):
        raise StorageError(f"{where}: its settings are not readable JSON (no object)")
    inside = {k.removeprefix(f"{prefix}."): v for k, v in found.items()}
    if found and not inside.keys() & {*PLAIN_KEYS, "target_modules"}:  # of another prefix
        inside = {k.partition(".")[2]: v for k, v in found.items()}
    settings = config if path.name.startswith("adapter_model") or not inside else {}
    settings = settings | plain | inside
    kind = str(settings.get("peft_type") or "LORA").rpartition(".")[2]
    if kind != "LORA":
        raise StorageError(f"{where}: its peft_type is {kind}; want a plain LoRA")
    if wrong := next((what for k, what in UNSUPPORTED.items() if settings.get(k)), None):
        raise StorageError(f"{where}: it is {wrong}; want a plain LoRA")
    if settings.get("bias", "none") not in ("none", None):
        raise StorageError(f"{where}: it trains biases (bias={settings['bias']}); want bias=none")
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_BASE):
        raise StorageError(
            f"{where}: init_lora_weights={start} also changed the base weights; convert it with "
            "peft (path_initial_model_for_weight_conversion) to a plain LoRA"
        )
    return settings


def _value(text: str) -> Any:
    """A value of JSON, or of Python ("True", "None")."""
    names = {"True": True, "False": False, "None": None}
    return names[text] if text in names else json.loads(text)


def _updates(
    state: State, layers: Collection[str], prefix: str
) -> tuple[dict[str, Update], list[str], list[str]]:
    """Updates by layer, what was removed from names, and the names that are not understood."""
    flat: dict[str, str] = {}
    for layer in layers:
        key = layer.replace(".", "_")
        flat[key] = "" if key in flat else layer  # two layers may have one flat name
    updates: dict[str, Update] = {}
    removed: set[str] = set()
    unknown: list[str] = []
    for name, tensor in state.items():
        match = next((m for rule in FACTOR if (m := rule.fullmatch(name))), None)
        alpha = None if match else ALPHA.fullmatch(name)
        if not (match or alpha):
            unknown.append(name)
            continue
        parts = (match or alpha).groupdict()  # type: ignore[union-attr]
        theirs = parts["layer"]
        if parts.get("own"):  # of an attention processor
            theirs += f".{parts['own']}" + (".0" if parts["own"] == "to_out" else "")
        if parts.get("adapter"):
            removed.add(f".{parts['adapter']}")
        layer, front = _layer(theirs, layers, flat, prefix)
        removed |= {front} if front else set()
        update = updates.setdefault(layer, Update())
        if alpha:
            update.alpha = float(tensor)
        elif SIDES[parts["side"]] in update.factors:
            unknown.append(name)  # two adapters in one file
        else:
            update.factors[SIDES[parts["side"]]] = tensor.flatten(1) if tensor.ndim > 2 else tensor
    said = [f"{', '.join(sorted(removed))} removed from names"] if removed else []
    return updates, said, unknown


def _layer(
    name: str, layers: Collection[str], flat: Mapping[str, str], prefix: str
) -> tuple[str, str]:
    """The layer of this name in the network, and the prefix that was removed."""
    if name in layers:
        return name, ""
    if front := FLAT.match(name):
        return flat.get(name[front.end() :]) or name, front[0]
    rest = plain_name(name)
    while rest not in layers:
        top, dot, below = rest.partition(".")
        if not dot or top not in PREFIXES | {prefix}:
            return name, ""
        rest = below
    return rest, name.removesuffix(rest) if name.endswith(rest) else "wrappers"


def _strength(layer: str, update: Update, settings: Mapping[str, Any], where: str) -> float:
    """alpha / rank as in peft, or alpha / sqrt(rank) for rsLoRA; 1 where the file has no alpha."""
    from peft.utils.other import get_pattern_key

    def of(name: str, default: Any) -> Any:
        patterns = settings.get(f"{name}_pattern") or {}
        return patterns.get(get_pattern_key([*patterns], layer), default)

    rank = update.rank
    if (said := of("rank", settings.get("r"))) not in (None, rank):
        raise StorageError(f"{where}: {layer} has rank {rank}, but its settings say r={said}")
    alpha = update.alpha
    if settings.get("r") is not None or "lora_alpha" in settings or "use_rslora" in settings:
        alpha = float(of("alpha", settings.get("lora_alpha", 8)))  # 8: the default of peft
        if update.alpha not in (None, alpha):
            raise StorageError(
                f"{where}: {layer}.alpha is {update.alpha:g}, but its settings say "
                f"lora_alpha={alpha:g}; want one of them"
            )
    if alpha is None:
        return 1.0
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
