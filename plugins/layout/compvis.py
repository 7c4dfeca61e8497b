"""The checkpoint of a whole system as CompVis latent-diffusion and DynamiCrafter write it.

One state dict: `model.diffusion_model.` the network, `model_ema.` its average under names without
dots, `first_stage_model.`, the encoders of conditioning, and the schedule's tables at the top.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sandbox.contracts import LayoutConfig, StorageError, one_of
from sandbox.registry import register

DIALECTS = ("plain", "deepspeed", "256")
NETWORK, WRAPPED, AVERAGE = "model.diffusion_model.", "model.", "model_ema."
FIRST_STAGE = "first_stage_model."
CONDITIONING = ("cond_stage_model.", "embedder.", "image_proj_model.")
OF_A_LAUNCHER = ("_forward_module.", "module.")  # what DeepSpeed and DDP put in front of names
RATE, RATE_256 = "fps_embedding.", "framestride_embed."  # the 256 model's name for the same
COUNTERS = ("decay", "num_updates")  # of the average
TABLES = frozenset({
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "scale_arr",
})  # fmt: skip
LOGVAR = "logvar"  # of a loss that learns it
TOP = TABLES | {LOGVAR}
KNOWN = (NETWORK, AVERAGE, FIRST_STAGE, *CONDITIONING)
MEASURED = ("scale", "shift")  # tensors of a first stage whose Config leaves them to the data
ALONE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "loss.")

State = dict[str, Tensor]


@register("layout", "compvis")
class CompVis:
    """Whole checkpoints of CompVis latent-diffusion and DynamiCrafter, in all their dialects."""

    @dataclass
    class Config(LayoutConfig):
        """dialect: what is written; all of them are read.

        plain: {"state_dict": ...}; deepspeed: {"module": ...} with a prefix before each name; 256:
        plain, with the name that the 256 model of DynamiCrafter has for the frame rate's embedding.
        """

        dialect: str = "plain"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("dialect", self.dialect, DIALECTS)

        def recognises(self, names: frozenset[str]) -> bool:
            """A whole system, or a first stage alone."""
            network = tuple(prefix + NETWORK for prefix in ("", *OF_A_LAUNCHER))
            is_alone = all(name.startswith(ALONE) for name in names)
            return bool(names) and (is_alone or any(name.startswith(network) for name in names))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, state: State) -> dict[str, State]:
        """From published names to those of our parts, which are empty where the file has none.

        backbone, vae and conditioning have their own names; ema those of the backbone, with `decay`
        and `num_updates`; schedule the tables; loss what it learned. A first stage's own file is
        a state with vae alone; what its training needed is left out. Raises StorageError for names
        of another layout.
        """
        found: dict[str, State] = {name: {} for name in PARTS}
        state = {_current(name): tensor for name, tensor in state.items()}
        if all(name.startswith(ALONE) for name in state):
            own = {k: v for k, v in state.items() if not k.startswith("loss.")}
            return found | {"vae": own}
        dotted = {_flat(k): k.removeprefix(NETWORK) for k in state if k.startswith(NETWORK)}
        strange = []
        for name, tensor in state.items():
            place = _place(name, dotted)
            if place is None:
                strange.append(name)
            else:
                found[place[0]][place[1]] = tensor
        if strange:
            raise StorageError(
                f"{len(strange)} names are not those of layout=compvis: "
                f"{', '.join(sorted(strange)[:10])}"
            )
        return found

    def join(self, parts: dict[str, State]) -> State:
        """The inverse of `split`, in the chosen dialect.

        Raises StorageError for parts that the originals do not have.
        """
        if measured := [k for k in MEASURED if k in parts.get("vae", {})]:
            raise StorageError(
                f"vae.{' and '.join(measured)} of the latents: measured for each channel, and the "
                "originals have one number in their configuration: want vae.scale_factor=NUMBER "
                "vae.shift=0"
            )
        state = dict(parts.get("schedule", {}))
        state |= {NETWORK + k: v for k, v in parts.get("backbone", {}).items()}
        state |= {
            AVERAGE + (k if k in COUNTERS else _flat(NETWORK + k)): v
            for k, v in parts.get("ema", {}).items()
        }
        state |= {FIRST_STAGE + k: v for k, v in parts.get("vae", {}).items()}
        state |= parts.get("conditioning", {}) | parts.get("loss", {})
        if strange := [name for name in state if not name.startswith(KNOWN) and name not in TOP]:
            raise StorageError(
                f"layout=compvis has no place for {len(strange)} names of these components: "
                f"{', '.join(sorted(strange)[:10])}"
            )
        if self.cfg.dialect == "256":
            state = {_older(name): tensor for name, tensor in state.items()}
        if self.cfg.dialect == "deepspeed":
            state = {OF_A_LAUNCHER[0] + name: tensor for name, tensor in state.items()}
        return state

    def file(self, state: State, steps: int) -> dict[str, Any]:
        """What the original's loader unpickles: `state` of a model trained for `steps`."""
        where = "module" if self.cfg.dialect == "deepspeed" else "state_dict"
        return {where: state, "global_step": steps}


PARTS = ("backbone", "ema", "vae", "conditioning", "schedule", "loss")


def _current(name: str) -> str:
    """A name of any dialect, as the plain one of today has it."""
    for prefix in OF_A_LAUNCHER:
        name = name.removeprefix(prefix)
    old, new = NETWORK + RATE_256, NETWORK + RATE
    if name.startswith(old):
        return new + name.removeprefix(old)
    flat = AVERAGE + _flat(old)
    return AVERAGE + _flat(new) + name.removeprefix(flat) if name.startswith(flat) else name


def _older(name: str) -> str:
    """The plain name of today, as the 256 model has it."""
    for new, old in (
        (NETWORK + RATE, NETWORK + RATE_256),
        (AVERAGE + _flat(NETWORK + RATE), AVERAGE + _flat(NETWORK + RATE_256)),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _flat(name: str) -> str:
    """The name of an average: that inside `model`, without dots."""
    return name.removeprefix(WRAPPED).replace(".", "")


def _place(name: str, dotted: dict[str, str]) -> tuple[str, str] | None:
    """(part, name in it); None where the layout has no such name. `dotted`: of flat names."""
    if name.startswith(NETWORK):
        return "backbone", name.removeprefix(NETWORK)
    if name.startswith(AVERAGE):
        own = name.removeprefix(AVERAGE)
        own = own if own in COUNTERS else dotted.get(own)
        return ("ema", own) if own else None
    if name.startswith(FIRST_STAGE):
        return "vae", name.removeprefix(FIRST_STAGE)
    if name.startswith(CONDITIONING):
        return "conditioning", name
    if name in TABLES:
        return "schedule", name
    return ("loss", name) if name == LOGVAR else None
