"""The moving average: published numbers, exact swapping, exact resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from plugins.ema.none import NoAverage
from plugins.ema.warmup import Warmup
from sandbox.contracts import StorageError
from sandbox.model.ema import EMA

GOLDEN = Path(__file__).parents[1] / "golden" / "ldm"


class Net(nn.Module):
    """The parameters of the golden fixture; `frozen` is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def trained(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def average(net: nn.Module, **settings) -> EMA:
    return EMA.of(net, Warmup(Warmup.Config(**settings)))


@torch.no_grad()
def move(net: nn.Module, step: int) -> None:
    made = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.add_(torch.randn(p.shape, generator=made).to(p.dtype))


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_six_updates_with_warm_up_equal_the_published_average():
    said, stored = (
        json.loads((GOLDEN / "ema.json").read_text()),
        load_file(GOLDEN / "ema.safetensors"),
    )
    net = Net()

    def put(prefix: str) -> None:
        net.load_state_dict({n: stored[f"in/{prefix}/{n}"] for n in net.state_dict()})

    put("init")
    ema = average(net, decay=said["decay"])
    for step in range(6):
        put(f"step{step}")
        ema.update()
        assert ema.updates == stored[f"out/step{step}/num_updates"]
        for name, found in ema.average.items():
            expected = stored[f"out/step{step}/{name.replace('.', '')}"]
            torch.testing.assert_close(
                found, expected, **said["tolerance"], msg=lambda m, n=name: f"{n}: {m}"
            )


def test_decay_grows_to_its_final_value():
    rule = Warmup(Warmup.Config(decay=0.995))
    assert [rule.decay(1), rule.decay(90), rule.decay(10**6)] == [2 / 11, 91 / 100, 0.995]
    assert Warmup(Warmup.Config(decay=0.5, warmup=False)).decay(1) == 0.5


def test_only_trainable_parameters_are_averaged():
    assert "frozen" not in average(trained()).average


def test_small_changes_of_bfloat16_weights_are_not_lost():
    net = trained(dtype=torch.bfloat16)
    ema = average(net, decay=0.999, warmup=False)
    before = {n: a.clone() for n, a in ema.average.items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    ema.update()
    for name, found in ema.average.items():
        # 1e-3 of a step of 1 (or of its bfloat16 rounding, 2 ** -8): absent if averaged in bfloat16
        torch.testing.assert_close(
            found - before[name], torch.full_like(found, 1e-3), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_stand_in_inside_the_block_and_never_after_it(dtype):
    net = trained(dtype=dtype)
    ema = average(net)
    move(net, 1)
    ema.update()
    live, averages = weights(net), {n: a.clone() for n, a in ema.average.items()}
    with pytest.raises(KeyError), ema.applied():
        assert all(
            torch.equal(p, averages[n].to(dtype))
            for n, p in net.named_parameters()
            if n != "frozen"
        )
        raise KeyError
    assert same(weights(net), live) and same(ema.average, averages)


def test_update_inside_the_block_is_refused():
    net = trained()
    ema = average(net)
    with ema.applied(), pytest.raises(RuntimeError, match="applied"):
        ema.update()


def test_parameters_stay_the_same_objects():
    net = trained()
    before = list(net.parameters())
    with average(net).applied():
        pass
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resumed_average_equals_the_uninterrupted_one_bit_for_bit(stop):
    net = trained()
    ema = average(net)
    for step in range(12):
        if step == stop:
            saved, live = ema.state_dict(), net.state_dict()
            net = trained(seed=9)
            ema = average(net)
            net.load_state_dict(live)
            ema.load_state_dict(saved)
        move(net, step)
        ema.update()
    straight = trained()
    expected = average(straight)
    for step in range(12):
        move(straight, step)
        expected.update()
    assert ema.updates == 12 and same(ema.average, expected.average)


def test_state_is_a_copy():
    net = trained()
    ema = average(net)
    saved = ema.state_dict()
    move(net, 1)
    ema.update()
    assert saved["updates"] == 0 and not same(saved["average"], ema.average)


@pytest.mark.parametrize(
    "other", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))]
)
def test_state_of_another_model_is_refused_by_name(other):
    with pytest.raises(StorageError, match="weight"):
        average(trained()).load_state_dict(average(other).state_dict())


def test_state_of_other_shapes_is_refused_by_name():
    with pytest.raises(StorageError, match=r"other shape \(1\): weight"):
        average(nn.Linear(3, 4)).load_state_dict(average(nn.Linear(2, 4)).state_dict())


def test_no_ema_by_the_rule_none():
    assert EMA.of(trained(), NoAverage(NoAverage.Config())) is None


def test_sharded_averages_are_saved_in_full_and_restored(tmp_path):
    """FSDP2 in one process: parameters are DTensors, the state holds plain tensors."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        net = fully_shard(trained().block, mesh=mesh)
        ema = average(net)
        move_sharded = list(net.parameters())
        with torch.no_grad():
            for p in move_sharded:
                p.mul_(2)
        ema.update()
        saved = ema.state_dict()
        assert all(type(t) is torch.Tensor for t in saved["average"].values())
        again = average(fully_shard(trained(seed=5).block, mesh=mesh))
        again.load_state_dict(saved)
        assert all(isinstance(a, DTensor) for a in again.average.values())
        assert same(again.state_dict()["average"], saved["average"])
    finally:
        dist.destroy_process_group()
