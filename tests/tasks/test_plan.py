"""task=plan: what it counts equals what a real run allocates and computes."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import sdpa_flop_count

from sandbox.cli.jobs import check_and_wire, perform
from sandbox.config import registry
from sandbox.config.root import to_container
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError
from sandbox.model.ema import EMA
from sandbox.plan.build import (
    Sizes,
    counts,
    from_shallow,
    measure_encoding,
    measure_step,
    optimizer_bytes,
    parts_of,
    step_of,
    training_step,
)  # fmt: skip
from sandbox.plan.depth import extrapolate
from sandbox.plan.measure import OWN, Measured, measure, on_fake_device
from sandbox.plan.objective import objective, per_x0, times
from sandbox.plan.page import page
from sandbox.plan.parallel_map import parallel_map
from sandbox.plan.plan import need_of, plan
from sandbox.plan.published import MISSES, ROWS, WITHIN
from sandbox.plan.step_inputs import conditions
from sandbox.plan.strategies import GIB, RESERVED, ZERO, Memory, Need, plain, zero
from sandbox.plan.text import count, flops, plan_text
from sandbox.runs.identity import identity_of_work
from tests.helpers import TINY, composed, tiny_weights

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "memory.json"
ANY = tuple(w for w in TINY if not w.startswith(("backbone.", "conditioning.")))
SYSTEMS = {
    "dit": TINY,
    "dit checkpointed": (*TINY, "backbone.gradient_checkpointing=true"),
    "dit bf16": (*TINY, "precision=bf16"),
    "cogvideox": (*ANY, "backbone=cogvideox", "conditioning=t5"),
}


def wired(*overrides: str):
    return check_and_wire(composed(*overrides, "task=plan", "trainer.accelerator=cpu"))


def real_parts(root):
    """The same components with numbers."""
    parts = parts_of(root)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.to_empty(device="cpu")
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data.zero_()
    return parts


# --- memory against a real run --------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_optimizer_and_average_are_those_of_a_real_run(optimizer):
    root = wired(*TINY, f"optimizer={optimizer}").root
    parts = parts_of(root)
    need = need_of(root, counts(root, parts), parts)
    real = real_parts(root)
    system = nn.ModuleList(p for p in real.values() if isinstance(p, nn.Module))
    trained = {n: p for n, p in system.named_parameters() if p.requires_grad}
    built = registry.create(root.optimizer).build(trained.items(), 1e-3)
    for p in trained.values():
        p.grad = torch.ones_like(p)
    built.step()
    kept = [x for s in built.state.values() for x in s.values() if torch.is_tensor(x) and x.ndim]
    average = EMA.of(system, registry.create(root.ema))
    assert average is not None
    assert need.trained_bytes == sum(p.grad.nbytes for p in trained.values() if p.grad is not None)
    assert need.optimizer == sum(x.nbytes for x in kept)
    assert need.average == sum(x.nbytes for x in average.average.values())
    others = [*system.parameters(), *system.buffers()]
    assert need.fixed == sum(x.nbytes for x in others if not x.requires_grad)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_without_numbers_holds_and_frees_what_a_real_one_does(name):
    """Bytes at the end of the forward pass and at the most, and operations, to the last one."""
    wiring = wired(*SYSTEMS[name])
    root, sizes = wiring.root, Sizes.of(wiring)
    found = measure_step(root, sizes)
    parts = real_parts(root)
    modules = [p for p in parts.values() if isinstance(p, nn.Module)]
    cond = conditions(sizes, any(p.requires_grad for p in parts["conditioning"].parameters()))
    step, inputs = training_step(root, parts, sizes, cond)
    held = [*inputs, *(x for _, x in cond.tensors())]
    narrow = torch.bfloat16 if root.precision == "bf16" else None
    real = measure(step, modules, held, narrow, is_cuda=False)
    assert (found.forward, found.backward, found.repeated) == (
        real.forward, real.backward, real.repeated,
    )  # fmt: skip
    # Fused norms of a CPU keep their statistics in bfloat16, others in float32.
    rel = 0.03 if narrow else 1e-6
    assert found.held == pytest.approx(real.held, rel=rel)
    assert found.peak == pytest.approx(real.peak, rel=rel)


DEEP = {
    "cogvideox": (*ANY, "backbone=cogvideox", "conditioning=t5", "precision=bf16"),
    "long skips": (*TINY, "backbone.skips=uvit"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointing"), [("cogvideox", True), ("long skips", False)])
def test_a_deep_network_takes_what_shallow_ones_foretell(name, checkpointing):
    """To the last byte and operation, at every moment."""
    wiring = wired(*DEEP[name])
    root, sizes = wiring.root, Sizes.of(wiring)
    before = measure_encoding(root, sizes)

    def at(backbone):
        return step_of(replace(root, backbone=backbone), sizes, checkpointing, False, before)

    layers, period = root.backbone.layers()
    deep = replace(root.backbone, **{layers: 10 if period == 1 else 20})
    assert from_shallow(deep, at) == at(deep)


def of_depth(layers: int) -> Measured:
    """A layer leaves 3 bytes in the forward pass, and frees them for 2 of gradients."""
    forward = [(10 + 3 * i, 0) for i in range(layers)]
    most = forward[-1][0]
    backward = [(most - 3 * i, 2 * (i + 1)) for i in range(layers)]
    return Measured(7 * layers, 14 * layers, 0, most, most, forward + backward, layers)


def test_no_extrapolation_if_the_third_depth_disagrees():
    assert extrapolate([of_depth(n) for n in (2, 3, 4)], 8) == of_depth(10)
    assert extrapolate([of_depth(n) for n in (2, 3, 5)], 8) is None
    more = replace(of_depth(4), forward=29)
    assert extrapolate([of_depth(2), of_depth(3), more], 8) is None


def test_what_is_kept_is_what_autograd_saves():
    wiring = wired(*TINY)
    root, sizes = wiring.root, Sizes.of(wiring)
    parts = real_parts(root)
    modules = [p for p in parts.values() if isinstance(p, nn.Module)]
    cond = conditions(sizes, requires_grad=True)
    step, inputs = training_step(root, parts, sizes, cond)
    inputs_and_weights = [x for m in modules for x in (*m.parameters(), *m.buffers())]
    inputs_and_weights += [*inputs, *(x for _, x in cond.tensors())]
    known = {x.untyped_storage()._cdata for x in inputs_and_weights}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes(), x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step()
    assert loss.requires_grad
    total = sum(size for size, _ in saved.values())
    assert measure_step(root, sizes).held == pytest.approx(total, rel=0.01)


# --- operations -----------------------------------------------------------------------------------


def test_operations_of_a_linear_layer_and_of_attention_are_the_formulas():
    layer = nn.Linear(32, 48, bias=False)
    with on_fake_device(layer):
        x = torch.empty(5, 32)
        found = measure(lambda: layer(x).sum(), [layer], [x])
    assert (found.forward, found.backward) == (2 * 5 * 32 * 48, 2 * 5 * 32 * 48)  # x needs none
    with on_fake_device(layer):
        q = torch.empty(2, 3, 64, 32, requires_grad=True)
        found = measure(lambda: F.scaled_dot_product_attention(q, q, layer(q)[..., :32]).sum(),
                        [layer], [q])  # fmt: skip
    scores = 2 * 2 * 3 * 64 * 64 * 32
    assert found.forward == 2 * scores + 2 * 2 * 3 * 64 * 32 * 48


def test_checkpointing_repeats_the_forward_pass_and_keeps_its_input_alone():
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    kept = {}
    for is_on in (False, True):
        with on_fake_device(net):
            x = torch.empty(8, 16, requires_grad=True)

            def step(x=x, is_on=is_on):
                return (checkpoint(net, x, use_reentrant=False) if is_on else net(x)).sum()

            kept[is_on] = measure(step, [net], [x])
    assert kept[False].repeated == 0
    assert 0 < kept[True].repeated <= kept[True].forward == kept[False].forward
    assert kept[True].backward == kept[False].backward
    assert kept[True].held < kept[False].held


def test_as_on_a_gpu_attention_keeps_no_scores_and_norms_stay_wide():
    norm, length = nn.LayerNorm(32), 512
    with on_fake_device(norm):
        q = torch.empty(1, 2, length, 32, requires_grad=True)
        seen = []

        def step():
            y = norm(q.bfloat16())
            seen.append(y.dtype)
            return F.scaled_dot_product_attention(y, y, y).sum()

        found = measure(step, [norm], [q], torch.bfloat16)
    assert seen == [torch.float32]
    assert found.peak < 2 * length * length * 2 * 2  # bytes of the scores in half precision


def test_fused_temporal_attention_counts_as_plain_attention_at_each_place():
    b, t, s, h, d = 2, 5, 6, 3, 8
    q = torch.empty(b, t, s, h, d, device="meta")
    forward = OWN["sandbox_kernels::temporal_attention"](q, q, q, None, False, 1.0)
    assert forward == sdpa_flop_count((b * s, h, t, d), (b * s, h, t, d), (b * s, h, t, d))
    backward = OWN["sandbox_kernels::temporal_attention_backward"](q, q, q, q, None, False, 1.0)
    assert backward > 2 * forward


def test_tied_weights_have_one_gradient():
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    net[1].weight = net[0].weight
    with on_fake_device(net):
        x = torch.empty(8, 16)
        found = measure(lambda: net(x).square().sum(), [net], [x])
    assert max(own for _, own in found.moments) <= 16 * 16 * 4


# --- strategies -----------------------------------------------------------------------------------

NEED = Need(trained=1000, trained_bytes=4000, fixed=100, optimizer=8000, average=4000, unit=50,
            half=2)  # fmt: skip
STEP = Measured(held=300, peak=500, moments=[(500, 0), (200, 3000)])


def test_one_device_holds_everything_and_sharding_a_part_of_what_is_trained():
    one, ddp, sharded = (plain(n, NEED, 4, False, STEP) for n in ("single", "ddp", "fsdp2"))
    static = 4000 + 100 + 8000 + 4000
    assert one.total - one.communication == static + 4000  # the full gradient, no activations
    assert ddp.total == ddp.communication + static + 4000 == 4000 + static + 4000
    assert (sharded.weights, sharded.gradients) == (1100, 1000)
    assert (sharded.optimizer, sharded.average) == (2000, 1000)


def test_accumulation_adds_the_gradient_to_the_activations():
    gathers = replace(NEED, accumulates=True)
    before, after = (plain("single", n, 1, False, STEP).total for n in (NEED, gathers))
    assert after == before + 500


def test_offloading_moves_the_optimizer_to_the_host_and_keeps_the_rest():
    near, far = (
        zero(n, NEED, 4, True, STEP) for n in ("deepspeed_zero2", "deepspeed_zero2_offload")
    )
    assert near.optimizer == (8000 + 4000) / 4 and near.host == 0
    assert far.optimizer == 0 and far.host > near.optimizer
    assert far.total == near.total - near.optimizer


def test_a_card_fits_or_is_tight_or_does_not_fit():
    def memory(total: float) -> Memory:
        return Memory("single", 1, False, 0, 0, 0, 0, 0, 0, 0, total)

    said = memory(14.5 * GIB).verdicts()
    assert (said[16], said[24]) == ("tight", "fits")
    assert memory(200 * GIB).verdicts()[141] == "no"


def test_published_rows_of_cogvideox_are_met_or_explained():
    found = json.loads(TABLE.read_text())
    assert [(r["recipe"], r["strategy"], r["devices"], r["gib"]) for r in found["rows"]] == [
        (*names, *numbers) for names, numbers in ROWS.items()
    ]
    near = 0
    for row in found["rows"]:
        recipe = found["recipes"][row["recipe"]]
        is_zero = row["strategy"] in ZERO
        if is_zero:  # what is committed is what the sums of today say
            step = Measured(peak=recipe["steps"]["half"]["peak"])
            memory = zero(row["strategy"], Need(**recipe["need"]), row["devices"], True, step)
            assert memory.total / GIB == pytest.approx(row["sum_gib"])
        is_near = abs(row["sum_gib"] * RESERVED / row["gib"] - 1) <= WITHIN
        assert is_near or (row["recipe"], row["strategy"]) in MISSES
        near += is_near
    assert near >= 12


# --- the objective --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [("schedule=flow",), ("schedule=ddpm", "schedule.prediction=eps", "sampler=ddim"),
     ("schedule=ddpm", "schedule.prediction=v", "schedule.zero_terminal_snr=true", "sampler=ddim"),
     ("schedule=ddpm", "schedule.prediction=x0", "sampler=ddim")],
    ids=["velocity", "eps", "v", "x0"],
)  # fmt: skip
def test_checks_hold_and_the_weight_per_error_of_z0_is_that_of_random_predictions(overrides):
    root = wired(*TINY, *overrides).root
    result = objective(root)
    assert [c.what for c in result.checks if not c.holds] == []
    assert any("SNR(T) = 0" in c.what for c in result.checks) == root.schedule.ends_in_noise()
    schedule = registry.create(root.schedule)
    t = times(root.schedule, 5)[1:-1]
    z0, eps, error = (torch.randn(len(t), 4, 1, 4, 4) for _ in range(3))
    z_t, target = schedule.noised(z0, eps, t), schedule.target(z0, eps, t)
    off = (schedule.denoised(target + error, z_t, t).z0 - z0).square().flatten(1).mean(1)
    for i in range(len(t)):
        alpha, sigma = schedule.alpha(t)[i].item(), schedule.sigma(t)[i].item()
        want = error[i].square().mean() / off[i]
        assert per_x0(root.schedule.predicts(), alpha, sigma) == pytest.approx(
            want.item(), rel=1e-3
        )


# --- the command ----------------------------------------------------------------------------------


def test_the_plan_of_a_system_is_printed_and_written(tmp_path, capsys):
    root = composed(*TINY, "task=plan", f"task.to={tmp_path}")
    perform(root, ["task=plan", "recipe=<b>"])
    said = capsys.readouterr().out
    for title in ("Data flow", "Components", "Memory per device", "Objective",
                  "Not modelled"):  # fmt: skip
        assert f"\n{title}" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    assert {m["strategy"] for m in found["memory"]} == {"single", "ddp", "fsdp2", *ZERO}
    assert found["components"][-1]["trained"] > 0
    html = (tmp_path / "plan.html").read_text()
    assert "<svg" in html and "<script" not in html and "src=" not in html
    assert "recipe=&lt;b&gt;" in html


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (999_600, "1 M"), (391_712, "392 k"),
     (1.69e9, "1.69 B"), (2.5e12, "2.5 T")],
)  # fmt: skip
def test_counts_have_three_digits_and_a_prefix(number, shown):
    assert count(number) == shown
    assert flops(number) == f"{shown.replace('B', 'G')}{'' if ' ' in shown else ' '}FLOP"


def test_a_configuration_that_does_not_wire_is_refused_with_every_problem():
    with pytest.raises(ConfigError, match=r"data\.height=18.*") as raised:
        check_and_wire(composed(*TINY, "task=plan", "data.height=18", "task.devices=1"))
    assert any("task.devices=1" in p for p in raised.value.problems)


def test_an_adapter_is_planned_without_weights_to_begin_from():
    wiring = wired(*TINY, "adapter=lora")
    made = plan(wiring)
    backbone = next(c for c in made.counts if c.group == "backbone")
    assert 0 < backbone.trained < backbone.frozen
    assert {m.strategy for m in made.memory} == {"single", "ddp", "fsdp2"}
    assert "lora" in plan_text(made) and "lora" in page(made)
    with pytest.raises(ConfigError, match="init_from"):
        check_and_wire(composed(*TINY, "adapter=lora"))


def test_a_report_finds_the_operations_of_a_run_by_its_settings():
    trained = check_and_wire(composed(*TINY, "task=train", "steps=7")).root
    other = check_and_wire(composed(*TINY, "backbone.num_heads=1", "task=train")).root
    planned = plan(wired(*TINY, "lr=1e-3"), 2).as_dict()
    assert planned["work"] == identity_of_work(to_container(trained))
    assert planned["work"] != identity_of_work(to_container(other))
    assert planned["flops_per_step"] > 0


# --- several at once ------------------------------------------------------------------------------


def of_process(item: int) -> tuple[int, int]:
    time.sleep(0.2)  # longer than the start of a process
    return item, os.getpid()


@pytest.mark.parametrize("cores", [1, 2])
def test_several_are_measured_at_once_where_there_are_cores(monkeypatch, cores):
    monkeypatch.setattr("sandbox.plan.parallel_map.cores", lambda: cores)
    found = parallel_map(of_process, [3, 1, 2])
    assert [item for item, _ in found] == [3, 1, 2]
    assert len({process for _, process in found}) == (3 if cores > 1 else 1)


def test_what_goes_wrong_in_another_process_is_raised_as_it_is(monkeypatch):
    monkeypatch.setattr("sandbox.plan.parallel_map.cores", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda item: 1 // item, [1, 0])


# --- the training method --------------------------------------------------------------------------


def test_a_plan_counts_every_call_of_a_method():
    def forward(*words: str) -> int:
        wiring = wired(*TINY, *words)
        return measure_step(wiring.root, Sizes.of(wiring)).forward

    encoding = forward()
    call = (forward("method=shortcut") - encoding) / 2  # two further calls, without gradients
    assert call > 0
    # A Jacobian-vector product counts as two calls.
    assert forward("method=mean_flow") - encoding == pytest.approx(2 * call, rel=0.05)


def test_a_plan_counts_the_networks_of_a_method():
    words = ("guidance=none", f"method.teacher={tiny_weights()}")
    few = wire(composed(*TINY, "method=guidance_distillation", *words)).root
    rows = {row.plugin: row for row in counts(few, parts_of(few)) if row.group == "method"}
    plain = counts(few, parts_of(few))
    student = sum(r.trained for r in plain if r.group in ("backbone", "conditioning"))
    assert rows["teacher"].frozen == student and not rows["teacher"].trained
    given = [w for w in TINY if not w.startswith("sampler.steps")]
    many = wire(composed(*given, "method=dmd", "sampler=lcm", "sampler.steps=4", *words)).root
    rows = {row.plugin: row for row in counts(many, parts_of(many)) if row.group == "method"}
    assert rows["critic"].trained == student and rows["teacher"].frozen == student
    assert optimizer_bytes(many, parts_of(many)) == 2 * optimizer_bytes(few, parts_of(few))
    cheap = wire(replace(many, method=replace(many.method, turns=1)))
    dear = wire(replace(many, method=replace(many.method, turns=3)))
    costs = [measure_step(w.root, Sizes.of(w)) for w in (cheap, dear)]
    assert costs[1].backward > 1.5 * costs[0].backward
