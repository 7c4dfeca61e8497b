"""All tensors of a step or a sample are on the device of the system (tested without a GPU).

torch's fake tensors can have absent devices, and refuse to mix devices as real tensors do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sandbox.config import registry
from sandbox.config.wiring import Wiring
from sandbox.contracts import Batch
from sandbox.data.loader import batches
from sandbox.data.randomness import Keyed
from sandbox.evaluation.prompts import data_batch
from sandbox.training.build import build_system
from sandbox.training.first_stage import build_autoencoding
from sandbox.training.roles import add_networks
from tests.helpers import plugin_configs, wired_around
from tests.inputs import with_clips

GPU = torch.device("cuda", 0)
GROUPS = ("data", "vae", "backbone", "conditioning", "schedule", "loss", "method", "sampler",
          "guidance")  # fmt: skip
CONFIGS = {key: cfg for group in GROUPS for key, cfg in plugin_configs(group)}
LOSSES = dict(plugin_configs("reconstruction"))


class Answers(TorchDispatchMode):
    """Returns values for fake tensors: 0 for integers; 1/2, 2/3, ... for floats."""

    requests = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **kwargs or {})
        if not args[0].is_floating_point():
            return 0
        self.requests += 1
        return 1 - 1 / self.requests


@contextmanager
def on_a_gpu(system: Any) -> Iterator[None]:
    """Inside the block, weights and buffers of `system` are fake GPU tensors."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def on_gpu(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in known:
            form = tensor.shape, tensor.stride()
            made: Tensor = torch.empty_strided(*form, dtype=tensor.dtype, device=GPU)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            known[id(tensor)] = tensor, made
        return known[id(tensor)][1]

    with FakeTensorMode(allow_non_fake_inputs=True), Answers():
        for module in system.modules():
            for own in (module._parameters, module._buffers):
                own.update({name: on_gpu(tensor) for name, tensor in own.items()})
            if hasattr(module, "_device"):  # Lightning's attribute
                module._device = GPU
        yield


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast("cuda") for fake tensors; torch itself turns it off without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def with_data(wiring: Wiring, folder: Any) -> tuple[Wiring, Batch]:
    """The wiring with two clips of its data."""
    root = replace(wiring.root, data=with_clips(wiring.root.data, folder, wiring.root))
    batch = next(iter(batches(registry.create(root.data).split("train"), 2, 0)))
    return replace(wiring, root=root), batch


def draws(wiring: Wiring, batch: Batch) -> Keyed:
    assert batch.position is not None
    return Keyed(wiring.root.seed, batch.epoch, batch.position, 2, GPU)


@pytest.mark.parametrize("key", CONFIGS)
def test_a_step_and_a_sample_stay_on_the_device_of_their_system(key, tmp_path):
    wiring, batch = with_data(wired_around(key.partition("/")[0], CONFIGS[key]), tmp_path)
    system, keyed = build_system(wiring), draws(wiring, batch)
    add_networks(system)
    captions = ("a red 3", "a blue 4") if wiring.root.conditioning.needs() & {"captions"} else ()
    like = data_batch(wiring.root, captions, 2)
    with on_a_gpu(system):
        terms = system.step(system.transfer_batch_to_device(batch, GPU, 0), keyed)
        assert {t.device for t in (terms.total, terms.per_sample, *terms.log.values())} == {GPU}
        if "video" in wiring.root.data.provides():  # otherwise it reads its first stage now
            assert system.eval().sample(like).device == GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "key", [k for k in CONFIGS if k.startswith(("vae/", "backbone/", "cond", "method/"))]
)
def test_autocast_of_a_gpu_mixes_no_dtypes(key, dtype, tmp_path):
    """Autocast of a CPU hides what fails there, such as attention with one float32 operand."""
    wiring, batch = with_data(wired_around(key.partition("/")[0], CONFIGS[key]), tmp_path)
    system, keyed = build_system(wiring), draws(wiring, batch)
    add_networks(system)
    with on_a_gpu(system), cuda_autocast(dtype):
        terms = system.step(system.transfer_batch_to_device(batch, GPU, 0), keyed)
        assert terms.total.dtype == torch.float32


@pytest.mark.parametrize("key", LOSSES)
def test_a_step_of_a_first_stage_stays_on_its_device(key, tmp_path):
    loss = LOSSES[key]
    if hasattr(loss, "lpips"):
        loss = replace(loss, lpips="random")
    stages = [cfg for _, cfg in plugin_configs("vae") if cfg.fitted() == "trained"]
    first_stage = next(cfg for cfg in stages if not any(loss.accepts(cfg)))
    wiring = wired_around("vae", first_stage)
    wiring, batch = with_data(
        replace(wiring, root=replace(wiring.root, reconstruction=loss)), tmp_path
    )
    system, keyed = build_autoencoding(wiring.root), draws(wiring, batch)
    with on_a_gpu(system), torch.no_grad():  # autograd needs a driver
        terms = system.step(system.transfer_batch_to_device(batch, GPU, 0), keyed)
        assert {t.device for t in (terms.total, terms.per_sample, *terms.log.values())} == {GPU}


def test_mixed_devices_are_detected():
    """Shows that the other tests can fail."""
    layer = nn.Linear(2, 2)
    with on_a_gpu(layer), pytest.raises(RuntimeError, match="device"):
        layer(torch.zeros(1, 2, device="cpu"))
