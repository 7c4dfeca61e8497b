"""The weights in checkpoints of other programs: which of several are taken, and under which names.

EMA weights are preferred to live ones. Prefixes that wrappers add to names are removed.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from sandbox.contracts import State
from sandbox.storage.weight_check import first_components, shown

# Keys of the weights in a checkpoint, and of the weights inside such an entry.
LIVE = ("state_dict", "module", "model", "model_state_dict", "model_state", "params", "net",
        "network", "weights", "unet", "transformer", "dit", "generator")  # fmt: skip
EMA_WORD = r"(ema|swa|averaged?|shadow|polyak)"
OWNER = r"(model|module|net|network|params?|weights|state|dict|unet|transformer|dit|g|generator)"
EMA_KEY = re.compile(rf"({OWNER}_)*{EMA_WORD}(_{OWNER})*(_?[\d.]+)?")
LISTS = ("shadow_params", "averaged_params", "shadow")  # EMA weights without names
COUNTERS = frozenset({"decay", "num_updates", "initted", "step", "n_averaged", "updates",
                      "num_batches_averaged", "optimization_step"})  # fmt: skip
BUFFERS = re.compile(r"(running_mean|running_var|num_batches_tracked|position_ids)$")

# Components that DDP, FSDP, DeepSpeed, torch.compile, Lightning and Opacus add to names.
WRAPPERS = frozenset({"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
                      "_checkpoint_wrapped_module", "_module"})  # fmt: skip
EMA_HOLDERS = ("model_ema", "ema_model", "module_ema", "ema_module", "net_ema", "ema_net", "ema",
               "averaged_model")  # fmt: skip
# Attributes under which training programs keep a network.
HOLDERS = ("diffusion_model", "model", "transformer", "unet", "net", "network", "backbone",
           "denoiser", "dit", "generator", "first_stage_model", "first_stage", "vae", "autoencoder",
           "online_model", "base_model", "student", "pipe")  # fmt: skip


def weights_in(found: Any) -> tuple[State, str]:
    """The weights of an unpickled checkpoint, and what they are: "", "EMA (ema)", "state_dict".

    Raises ValueError if its EMA weights cannot be identified or do not match its live weights.
    """
    if not isinstance(found, Mapping):
        return {}, ""
    key = next((k for k in LIVE if isinstance(found.get(k), Mapping) and _state(found[k])), None)
    live = plain_names(_state(found[key] if key else found))
    averages = dict(_averages(found, live))
    inner = next((found[k] for k in LIVE if isinstance(found.get(k), Mapping)), None)
    if inner is not None and not (averages or live):  # {"model": {"state_dict": ...}}
        return weights_in(inner)
    if len(averages) > 1:
        raise ValueError(
            f"it has several sets of EMA weights ({', '.join(averages)}); save one alone"
        )
    for name, ema in averages.items():
        return _with_live_buffers(live, ema, key, name), f"EMA ({name})"
    return _state(found[key] if key else found), key or ""


def _averages(found: Mapping[Any, Any], live: State) -> Iterator[tuple[str, State]]:
    """EMA weights by the path of their key."""
    callbacks = found.get("callbacks")
    inside = callbacks.items() if isinstance(callbacks, Mapping) else ()
    places = [("", found), *((f"callbacks.{k}.", v) for k, v in inside if isinstance(v, Mapping))]
    for prefix, place in places:
        for key, value in place.items():
            is_ema = isinstance(key, str) and EMA_KEY.fullmatch(key.lower())
            if is_ema and isinstance(value, Mapping | list | tuple):
                state = _average(value, live, prefix + key)
                if state:
                    yield prefix + key, state


def _average(value: Any, live: State, where: str) -> State:
    """The weights of an entry of EMA weights; empty where it has none."""
    if isinstance(value, list | tuple):
        return _named(value, live, where) if any(isinstance(x, Tensor) for x in value) else {}
    for key in (*LISTS, *LIVE, "average", "ema", "ema_state_dict"):
        inner = value.get(key)
        if isinstance(inner, list | tuple) and any(isinstance(x, Tensor) for x in inner):
            return _named(inner, live, f"{where}.{key}")
        if isinstance(inner, Mapping) and _state(inner):
            return plain_names(_without_counters(_state(inner)))
    state = _without_counters(_state(value))
    for holder in EMA_HOLDERS:
        below = {k: v for k, v in state.items() if k.startswith(f"{holder}.")}
        if below:
            return plain_names({k.partition(".")[2]: v for k, v in below.items()})
    return plain_names(state)


def _named(values: Any, live: State, where: str) -> State:
    """A list of EMA weights with the names of the live ones, which have the same order."""
    parameters = {k: v for k, v in live.items() if not BUFFERS.search(k)}
    for state in (live, parameters, {k: v for k, v in live.items() if v.is_floating_point()}):
        if [x.shape for x in state.values()] == [x.shape for x in values]:
            return dict(zip(state, values, strict=True))
    raise ValueError(
        f"its EMA weights ({where}: {len(values)} tensors without names) do not match its "
        f"{len(live)} live ones; save the weights that you want alone, by name"
    )


def _with_live_buffers(live: State, ema: State, key: str | None, name: str) -> State:
    """The EMA weights, and the buffers that only the live ones have."""
    flat = {k.replace(".", ""): k for k in live}
    if not any("." in k for k in ema) and ema.keys() <= flat.keys():
        ema = {flat[k]: v for k, v in ema.items()}
    if key is None or live.keys() <= ema.keys():
        return ema
    if other := sorted(ema.keys() - live.keys()):
        raise ValueError(
            f"its EMA weights ({name}) have {len(other)} names that its live ones ({key}) lack: "
            f"{shown(other)}; save the weights that you want alone"
        )
    return live | ema


def _state(found: Mapping[Any, Any]) -> State:
    return {str(k): v.detach() for k, v in found.items() if isinstance(v, Tensor)}


def _without_counters(state: State) -> State:
    return {k: v for k, v in state.items() if k not in COUNTERS or v.numel() > 1}


def plain_name(name: str) -> str:
    """A name without the components of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(state: State) -> State:
    """`state` without wrappers in its names, unless two names would become equal."""
    plain = {plain_name(k): v for k, v in state.items()}
    return plain if len(plain) == len(state) else state


def without_shared_prefix(state: State) -> State:
    """`state` without wrappers and without holders that all its names share."""
    state = plain_names(state)
    holders = {*HOLDERS, *EMA_HOLDERS}
    while len(tops := {k.partition(".")[0] for k in state}) == 1 and tops <= holders:
        state = {k.partition(".")[2]: v for k, v in state.items()}
    return state


def match_names(
    state: State, own: Collection[str], log: Callable[[str], None] = lambda text: None
) -> State:
    """`state` under the names `own`, without wrappers and prefixes that hide them.

    Wrappers (`module.`, `_orig_mod.`) are removed anywhere, holders (`model.`, `transformer.`)
    in front. Of EMA and live weights in one state the EMA weights are taken. Names below other
    prefixes are left out. `log` receives what was done; a state that does not match is unchanged.
    """
    ours = {plain_name(name): name for name in own}
    if ours.keys() == state.keys():
        return state
    plain = plain_names({k: v for k, v in state.items() if k in own or k not in COUNTERS})
    views = dict(_views(plain))
    path = max(views, key=lambda p: (len(ours.keys() & views[p].keys()), _is_ema(p), -len(p)))
    if not ours.keys() & views[path].keys():
        return state
    ema_path, ema = _ema_view(views, path, ours)
    wrappers = sorted({f"{part}." for k in state for part in k.split(".") if part in WRAPPERS})
    is_wrapped = wrappers and not plain.keys() <= state.keys()
    notes = [f"wrappers {', '.join(wrappers)} removed"] if is_wrapped else []
    if path:
        notes.append(f"prefix {path} removed")
    if ema or _is_ema(path):
        notes.append(f"EMA weights ({ema_path or path}) taken")
    held = tuple(p for p in (path, ema_path) if p)
    others = [k for k in plain if not k.startswith(held)] if path else []
    if others:
        tops = ", ".join(f"{top} {n}" for top, n in first_components(others).items())
        notes.append(f"{len(others)} other names left out ({tops})")
    if notes:
        log("; ".join(notes))
    live = {k: v for k, v in views[path].items() if not (ema and (path + k).startswith(ema_path))}
    return {ours.get(k, k): v for k, v in (live | ema).items()}


def _views(state: State, path: str = "") -> Iterator[tuple[str, State]]:
    """`state`, and what is below each chain of holders, without these."""
    yield path, state
    for holder in (*EMA_HOLDERS, *HOLDERS):
        front = f"{holder}."
        if below := {k.removeprefix(front): v for k, v in state.items() if k.startswith(front)}:
            yield from _views(below, f"{path}{holder}.")


def _is_ema(path: str) -> bool:
    return any(part in EMA_HOLDERS for part in path.split("."))


def _ema_view(views: Mapping[str, State], path: str, ours: Mapping[str, str]) -> tuple[str, State]:
    """Path and weights of the EMA weights that belong to the live ones at `path`."""
    if _is_ema(path):
        return "", {}
    flat = {k.replace(".", ""): k for k in ours}
    flat |= {f"{path}{k}".replace(".", ""): k for k in ours}
    for ema_path, view in views.items():
        if _is_ema(ema_path) and not any(k.startswith(ema_path) for k in ours):
            # latent-diffusion writes names without dots
            named = {k if k in ours else flat.get(k, ""): v for k, v in view.items()}
            if found := {k: v for k, v in named.items() if k in ours}:
                return ema_path, found
    return "", {}
