"""Checks the values that plugins return against the interfaces in `sandbox.contracts`.

The registry wraps the methods of each plugin and of its Config. A wrong value raises a PluginError
that names the plugin's file and the interface, instead of an error where the value is used later.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import astuple, fields, is_dataclass
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin

from sandbox.contracts import Clip, PluginError, items, tensors

INTERFACES = {  # group -> its interface in sandbox.contracts
    "vae": "FirstStage", "backbone": "Backbone", "conditioning": "Conditioner",
    "schedule": "Schedule", "loss": "Loss", "method": "Method", "guidance": "Guidance",
    "sampler": "Sampler", "data": "DataSource", "metric": "Metric", "adapter": "Adapter",
    "layout": "Layout",
}  # fmt: skip
OTHERS = {("optimizer", "build"): "torch.optim.Optimizer"}  # methods without an interface
# Members that a value of these interfaces needs; the others are used by some tasks only.
MEMBERS = {"Posterior": ("is_random", "mean"), "Items": ("__len__", "id", "load")}
WIDTHS = ("context", "image_context", "concat", "vector")  # fields of Conditions and Slots


def interface(group: str) -> str:
    """The interface of a group, in words."""
    if name := INTERFACES.get(group):
        return f"{name} in sandbox.contracts"
    return f"that of the {group or 'other'} plugins"


def check_plugin(cls: type, group: str, name: str, place: str) -> None:
    """Wraps the methods of a plugin class that belong to the interface of its group."""
    module = items if group == "data" else tensors
    found = getattr(module, INTERFACES.get(group, ""), None)
    methods = {k: v for k, v in vars(found).items() if inspect.isfunction(v)} if found else {}
    for method, declared in methods.items():
        own = "forward" if method == "__call__" and hasattr(cls, "forward") else method
        want = declared.__annotations__.get("return", "Any")
        _wrap(cls, own, _Contract(f"{group}={name}", place, own, want, interface(group)), module)
    for (of, method), want in OTHERS.items():
        if of == group:
            _wrap(cls, method, _Contract(f"{group}={name}", place, method, want, interface(group)))


def check_config(cls: type, group: str, name: str, place: str) -> None:
    """Wraps the methods of a Config that override those of its base classes in the contracts."""
    own = [k for k, v in vars(cls).items() if inspect.isfunction(v) and not k.startswith("_")]
    for method in own:
        for base in cls.__mro__[1:]:
            declared = vars(base).get(method)
            if base.__module__.startswith("sandbox.contracts.") and inspect.isfunction(declared):
                want = declared.__annotations__.get("return", "Any")
                words = f"{base.__name__} in sandbox.contracts"
                contract = _Contract(f"{group}={name}", place, f"Config.{method}", want, words)
                _wrap(cls, method, contract, sys.modules[base.__module__])
                break


class _Contract:
    """What a method returns, and the words for it."""

    def __init__(self, plugin: str, place: str, method: str, want: Any, interface: str) -> None:
        self.plugin, self.place, self.method = plugin, place, method
        self.hint, self.interface = want, interface
        text = want if isinstance(want, str) else inspect.formatannotation(want)
        self.want = re.sub(r"\bsandbox\.[\w.]*\.", "", text)  # names without their modules

    def error(self, got: str, want: str = "") -> PluginError:
        return PluginError(
            f"{self.plugin}: {self.method} of {self.place} returned {got}: want "
            f"{want or self.want}; the interface is {self.interface}"
        )


def _wrap(cls: type, name: str, contract: _Contract, module: Any = tensors) -> None:
    """Replaces a method of a class by one that checks what it returns."""
    method = getattr(cls, name, None)
    if not inspect.isfunction(method) or getattr(method, "__isabstractmethod__", False):
        return
    if method.__qualname__.startswith("Module."):  # of torch: the class defines no `forward`
        return
    rule = SHAPES.get((contract.plugin.partition("=")[0], name))

    @wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = method(self, *args, **kwargs)
        if not fits(value, _hint(contract.hint, module)):
            raise contract.error(describe(value))
        if rule is not None and not kwargs and (problem := rule(self, args, value)):
            raise contract.error(*problem)
        if contract.want == "Items" and type(value).__module__ == cls.__module__:
            _check_items(type(value), contract)
        return value

    setattr(cls, name, checked)


def _check_items(cls: type, contract: _Contract) -> None:
    """Wraps `load` of the class of a split, once."""
    load = vars(cls).get("load")
    if load is not None and not hasattr(load, "__wrapped__"):  # not wrapped yet
        words = "Items in sandbox.contracts"
        loads = _Contract(contract.plugin, contract.place, "load", "Sample", words)
        _wrap(cls, "load", loads, items)


@cache
def _hint(text: Any, module: Any) -> Any:
    """The type that an annotation in a module means; `Any` for one that needs more imports."""
    if not isinstance(text, str):
        return text
    torch = sys.modules.get("torch")
    known = {"torch": torch, "Tensor": getattr(torch, "Tensor", Any)}
    try:
        return eval(text, {**vars(module), **known})
    except (NameError, AttributeError):
        return Any


def fits(value: Any, hint: Any) -> bool:
    """Whether a value can be used as one of this type; as lenient as the code that uses it."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, a) for a in args)
    if kind is Self:
        return is_dataclass(value)
    if kind in (int, float):
        return hasattr(value, "__float__")
    if kind is NoneType:
        return value is None
    if not isinstance(kind, type) or kind in (Any, bool):
        return True
    if kind is frozenset:
        return isinstance(value, Set)
    if kind is dict:
        is_mapping = isinstance(value, Mapping)
        return is_mapping and (not args or all(fits(v, args[1]) for v in value.values()))
    if kind in (tuple, list):
        return _fits_sequence(value, args)
    if kind is Iterator:
        return isinstance(value, Iterable) and not isinstance(value, str)
    if kind.__name__ in MEMBERS:
        return all(hasattr(value, m) for m in MEMBERS[kind.__name__])
    if is_dataclass(kind):
        return all(hasattr(value, f.name) for f in fields(kind))
    return isinstance(value, kind)


def _fits_sequence(value: Any, args: Sequence[Any]) -> bool:
    is_sized = hasattr(value, "__len__") and hasattr(value, "__iter__")
    if not is_sized or isinstance(value, str | Mapping):
        return False
    if len(args) == 1 or args[-1:] == (...,):
        return all(fits(v, args[0]) for v in value)
    if hasattr(value, "shape"):  # an array or tensor of that length
        return False
    return len(value) == len(args) and all(map(fits, value, args))


def describe(value: Any) -> str:
    """A value in a few words: its type, and the shape of a tensor or length of a sequence."""
    if value is None:
        return "None"
    kind = type(value).__name__
    if hasattr(value, "shape"):
        return f"a {kind} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        inner = ", ".join(type(v).__name__ for v in value[:4])
        return f"a {kind} of {len(value)} ({inner}{', ...' * (len(value) > 4)})"
    if isinstance(value, Mapping):
        return f"a {kind} with {', '.join(map(repr, [*value][:4])) or 'nothing'}"
    return f"a value of type {kind}"


# --- shapes ---------------------------------------------------------------------------------------

Problem = tuple[str, str] | None  # (what was returned, what is wanted)


def _like(value: Any, other: Any, channels: int | None = None) -> Problem:
    """A problem unless `value` has the shape of `other`, with this number of channels."""
    want = [*other.shape]
    want[1] = channels or want[1]
    if [*value.shape] == want:
        return None
    return describe(value), f"shape {tuple(want)}"


def _backbone(self: Any, args: tuple[Any, ...], out: Any) -> Problem:
    z_t = args[0]
    outputs = getattr(self, "_outputs", None)  # sandbox.model.components sets it
    if outputs is None:
        return None
    problem = _like(out, z_t, outputs * z_t.shape[1])
    return problem and (problem[0], f"{problem[1]} (B, outputs * C, T, H, W)")


def _terms(self: Any, args: tuple[Any, ...], terms: Any) -> Problem:
    size = args[2].shape[0]
    named = {"total": terms.total, **{f"log[{k!r}]": v for k, v in terms.log.items()}}
    for name, value in named.items():
        if getattr(value, "shape", None) is None or value.numel() != 1:
            return f"Terms with {name}, {describe(value)}", "a Tensor of shape ()"
    if getattr(terms.per_sample, "shape", None) != (size,):
        return f"Terms with per_sample, {describe(terms.per_sample)}", f"shape ({size},)"
    return None


def _conditions(self: Any, args: tuple[Any, ...], cond: Any) -> Problem:
    slots = getattr(self, "_slots", None)  # sandbox.model.components sets it
    for name in WIDTHS if slots is not None else ():
        offered, value = getattr(slots, name), getattr(cond, name)
        width = getattr(offered, "width", offered) or 0
        if not width:  # the backbone refuses what it does not take
            continue
        shape = getattr(value, "shape", (0, 0))
        if shape[1 if name == "concat" else -1] != width:
            return f"Conditions with {name}, {describe(value)}", (
                f"width {width}, which Config.offers names"
            )
    return None


def _posterior(self: Any, args: tuple[Any, ...], posterior: Any) -> Problem:
    x = args[0]
    # sandbox.model.components sets it; other sizes are tiles or parts of a clip
    size = getattr(self, "_latents", {}).get(Clip(*x.shape[1:]))
    if size is None:
        return None
    mean, want = posterior.mean, (x.shape[0], *astuple(size))
    if getattr(mean, "shape", None) == want:
        return None
    return f"a posterior with mean {describe(mean)}", f"shape {want}, which Config.latents names"


def _video(self: Any, args: tuple[Any, ...], video: Any) -> Problem:
    if video.ndim == 5 and video.shape[0] == args[0].shape[0] and video.shape[1] == 3:
        return None
    return describe(video), f"pixels ({args[0].shape[0]}, 3, T, H, W)"


SHAPES: dict[tuple[str, str], Callable[[Any, tuple[Any, ...], Any], Problem]] = {
    ("backbone", "forward"): _backbone,
    ("loss", "__call__"): _terms,
    ("loss", "forward"): _terms,
    ("conditioning", "forward"): _conditions,
    ("vae", "encode"): _posterior,
    ("vae", "decode"): _video,
    ("sampler", "__call__"): lambda self, args, z: _like(z, args[2]),
    ("schedule", "noised"): lambda self, args, z_t: _like(z_t, args[0]),
    ("guidance", "combine"): lambda self, args, out: _like(out, args[0][0], out.shape[1]),
}
