"""Full-system checkpoints of CompVis latent-diffusion and DynamiCrafter.

One state dict: `model.diffusion_model.` the network, `model_ema.` its EMA under names without dots,
`first_stage_model.`, the encoders of conditioning, and the tables of the schedule at the top level.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sandbox.contracts import LayoutConfig, State, StorageError, one_of
from sandbox.registry import register

DIALECTS = ("plain", "deepspeed", "256")
NETWORK, WRAPPED, EMA = "model.diffusion_model.", "model.", "model_ema."
FIRST_STAGE = "first_stage_model."
CONDITIONING = ("cond_stage_model.", "embedder.", "image_proj_model.")
LAUNCHER_PREFIXES = ("_forward_module.", "module.")  # added by DeepSpeed and DDP
FPS, FPS_256 = "fps_embedding.", "framestride_embed."  # the latter in the 256 model
COUNTERS = ("decay", "num_updates")  # of the EMA
TABLES = frozenset({
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "scale_arr",
})  # fmt: skip
LOGVAR = "logvar"  # of a loss with learn_logvar
TOP = TABLES | {LOGVAR}
KNOWN = (NETWORK, EMA, FIRST_STAGE, *CONDITIONING)
MEASURED = ("scale", "shift")  # tensors of a first stage that measures them on the data
ALONE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "loss.")


@register("layout", "compvis")
class CompVis:
    """Full-system checkpoints of CompVis latent-diffusion and DynamiCrafter, in all dialects."""

    @dataclass
    class Config(LayoutConfig):
        """dialect: the dialect to write; all are read.

        plain: {"state_dict": ...}; deepspeed: {"module": ...} with a prefix before each name; 256:
        plain, with the fps embedding's name in the 256 model of DynamiCrafter.
        """

        dialect: str = "plain"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("dialect", self.dialect, DIALECTS)

        def recognises(self, names: frozenset[str]) -> bool:
            """A full system, or a first stage alone."""
            network = tuple(prefix + NETWORK for prefix in ("", *LAUNCHER_PREFIXES))
            is_alone = all(name.startswith(ALONE) for name in names)
            return bool(names) and (is_alone or any(name.startswith(network) for name in names))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, state: State) -> dict[str, State]:
        """States by component, under our names; components that the file lacks are empty.

        ema has the names of the backbone, with `decay` and `num_updates`; schedule holds the
        tables, loss a learned logvar. For a file of a first stage alone, only vae is set, without
        the weights of its loss. Raises StorageError for names of another layout.
        """
        found: dict[str, State] = {name: {} for name in PARTS}
        state = {_plain_name(name): tensor for name, tensor in state.items()}
        if all(name.startswith(ALONE) for name in state):
            return found | {"vae": {k: v for k, v in state.items() if not k.startswith("loss.")}}
        dotted = {_flat(k): k.removeprefix(NETWORK) for k in state if k.startswith(NETWORK)}
        unknown = []
        for name, tensor in state.items():
            place = _place(name, dotted)
            if place is None:
                unknown.append(name)
            else:
                found[place[0]][place[1]] = tensor
        if unknown:
            raise StorageError(
                f"{len(unknown)} names are not those of layout=compvis: "
                f"{', '.join(sorted(unknown)[:10])}"
            )
        return found

    def join(self, parts: dict[str, State]) -> State:
        """The inverse of `split`, in the chosen dialect.

        Raises StorageError for names that the published checkpoints do not have.
        """
        if measured := [k for k in MEASURED if k in parts.get("vae", {})]:
            raise StorageError(
                f"vae.{' and '.join(measured)}: measured per channel, but the published "
                "configurations have one number: want vae.scale_factor=NUMBER vae.shift=0"
            )
        state = dict(parts.get("schedule", {}))
        state |= {NETWORK + k: v for k, v in parts.get("backbone", {}).items()}
        state |= {
            EMA + (k if k in COUNTERS else _flat(NETWORK + k)): v
            for k, v in parts.get("ema", {}).items()
        }
        state |= {FIRST_STAGE + k: v for k, v in parts.get("vae", {}).items()}
        state |= parts.get("conditioning", {}) | parts.get("loss", {})
        if unknown := [name for name in state if not name.startswith(KNOWN) and name not in TOP]:
            raise StorageError(
                f"layout=compvis cannot store {len(unknown)} names of these components: "
                f"{', '.join(sorted(unknown)[:10])}"
            )
        if self.cfg.dialect == "256":
            state = {_name_256(name): tensor for name, tensor in state.items()}
        if self.cfg.dialect == "deepspeed":
            state = {LAUNCHER_PREFIXES[0] + name: tensor for name, tensor in state.items()}
        return state

    def file(self, state: State, steps: int) -> dict[str, Any]:
        """The object that the original code unpickles, for a model trained for `steps`."""
        where = "module" if self.cfg.dialect == "deepspeed" else "state_dict"
        return {where: state, "global_step": steps}


PARTS = ("backbone", "ema", "vae", "conditioning", "schedule", "loss")


def _plain_name(name: str) -> str:
    """A name of any dialect in the plain dialect."""
    for prefix in LAUNCHER_PREFIXES:
        name = name.removeprefix(prefix)
    old, new = NETWORK + FPS_256, NETWORK + FPS
    if name.startswith(old):
        return new + name.removeprefix(old)
    flat = EMA + _flat(old)
    return EMA + _flat(new) + name.removeprefix(flat) if name.startswith(flat) else name


def _name_256(name: str) -> str:
    """A name of the plain dialect in the 256 dialect."""
    for new, old in (
        (NETWORK + FPS, NETWORK + FPS_256),
        (EMA + _flat(NETWORK + FPS), EMA + _flat(NETWORK + FPS_256)),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _flat(name: str) -> str:
    """The name of an EMA weight: the name inside `model`, without dots."""
    return name.removeprefix(WRAPPED).replace(".", "")


def _place(name: str, dotted: dict[str, str]) -> tuple[str, str] | None:
    """(component, name in it), or None for an unknown name. `dotted`: flat name -> dotted name."""
    if name.startswith(NETWORK):
        return "backbone", name.removeprefix(NETWORK)
    if name.startswith(EMA):
        own = name.removeprefix(EMA)
        own = own if own in COUNTERS else dotted.get(own)
        return ("ema", own) if own else None
    if name.startswith(FIRST_STAGE):
        return "vae", name.removeprefix(FIRST_STAGE)
    if name.startswith(CONDITIONING):
        return "conditioning", name
    if name in TABLES:
        return "schedule", name
    return ("loss", name) if name == LOGVAR else None
