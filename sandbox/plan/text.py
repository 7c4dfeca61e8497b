"""A plan as text for a terminal, and its table rows."""

from collections.abc import Iterator, Sequence

from sandbox.plan.plan import Plan
from sandbox.plan.strategies import GIB, GPU_SIZES, Memory
from sandbox.reports.tables import text_table

LABELS = {
    "single": "one device",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "deepspeed_zero2": "ZeRO-2",
    "deepspeed_zero2_offload": "ZeRO-2, optimizer offloaded",
    "deepspeed_zero3": "ZeRO-3",
    "deepspeed_zero3_offload": "ZeRO-3, all offloaded",
}
KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "average": "EMA",
    "activations": "activations",
    "communication": "communication",
}  # field -> name


def plan_text(plan: Plan) -> str:
    """The full plan, about 110 columns wide."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    yield f"{plan.root.recipe}: {headline(plan)}"
    yield from _titled("Data flow", _wires(plan))
    yield from _titled("Components", _table(component_rows(plan)))
    yield from _titled("Operations per micro-batch and device", _table(cost_rows(plan)))
    yield from _titled(f"Memory per device, {unit(plan)}", _table(memory_rows(plan)))
    yield f"  * as configured. reserved: as in nvidia-smi. fits: GPUs of {_gpu_sizes()} GiB:"
    yield "  + fits, ~ fits only with little allocator slack, . does not fit"
    yield from _titled("Objective", objective_lines(plan))
    yield from _titled("Not modelled", [f"- {note}" for note in plan.notes])


def headline(plan: Plan) -> str:
    trained = sum(row.trained for row in plan.counts)
    total = sum(row.trained + row.frozen for row in plan.counts)
    row = configured(plan)
    return (
        f"{count(trained)} of {count(total)} parameters are trained, {flops(plan.cost.total)} per "
        f"micro-batch, {bytes_of(row.total, plan)} ({LABELS[row.strategy]})"
    )


def configured(plan: Plan) -> Memory:
    """The configured strategy; one device where the trainer has no row."""
    own = [m for m in plan.memory if m.checkpointing == bool(plan.checkpointing)]
    named = [m for m in own if m.strategy == plan.chosen]
    return (named or own)[0]


def _titled(title: str, lines: Sequence[str] | Iterator[str]) -> Iterator[str]:
    yield from ("", title, *(f"  {line}".rstrip() for line in lines))


def _table(rows: list[list[str]]) -> list[str]:
    return text_table(rows).splitlines()


def _gpu_sizes() -> str:
    return ", ".join(map(str, GPU_SIZES))


# --- numbers --------------------------------------------------------------------------------------


def count(number: float) -> str:
    """1.69 B, 326 k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e6:.3g} MFLOP"


def unit(plan: Plan) -> str:
    """GiB or MiB, the same for all numbers of a plan."""
    return "GiB" if max(m.total for m in plan.memory) >= GIB else "MiB"


def size(number: float, unit: str) -> str:
    """Three digits without the unit; a dash for 0."""
    if not number:
        return "-"
    value = number / (GIB if unit == "GiB" else 2**20)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bytes_of(number: float, plan: Plan) -> str:
    return f"{size(number, unit(plan))} {unit(plan)}"


# --- table rows, also used by the page ------------------------------------------------------------


def component_rows(plan: Plan) -> list[list[str]]:
    rows = [["component", "plugin", "trained", "frozen", "buffers", "on device"]]
    for c in plan.counts:
        size_shown = bytes_of(c.bytes_trained + c.bytes_fixed, plan) if c.is_resident else "no"
        rows.append([c.group, c.plugin, *_numbers(c.trained, c.frozen, c.buffers), size_shown])
    total = [sum(getattr(c, k) for c in plan.counts) for k in ("trained", "frozen", "buffers")]
    resident = sum(c.bytes_trained + c.bytes_fixed for c in plan.counts if c.is_resident)
    return [*rows, ["all", "", *_numbers(*total), bytes_of(resident, plan)]]


def _numbers(*values: int) -> list[str]:
    return [f"{v:,}" if v else "-" for v in values]


def cost_rows(plan: Plan) -> list[list[str]]:
    head = ["activations", "forward", "backward", "recomputed", "total", "saved", "peak"]
    rows = [head]
    for is_on, cost in plan.costs.items():
        star = " *" if is_on == bool(plan.checkpointing) else ""
        repeated = flops(cost.repeated) if cost.repeated else "-"
        rows.append([
            ("checkpointed" if is_on else "stored") + star, flops(cost.forward),
            flops(cost.backward), repeated, flops(cost.total), bytes_of(cost.held, plan),
            bytes_of(cost.peak, plan),
        ])  # fmt: skip
    return rows


def memory_rows(plan: Plan) -> list[list[str]]:
    heads = ["weights", "grads", "optim.", "EMA", "activ.", "comm.", "total", "reserved", "host"]
    rows = [["strategy", "devices", "activations", *heads, "fits"]]
    shown = unit(plan)
    if plan.published:
        rows[0].append("published")
    for m in plan.memory:
        is_own = m.strategy == plan.chosen and m.checkpointing == bool(plan.checkpointing)
        marks = "".join({"fits": "+", "tight": "~", "no": "."}[v] for v in m.verdicts().values())
        row = [
            LABELS[m.strategy] + (" *" if is_own else ""), str(m.devices),
            "checkpointed" if m.checkpointing else "stored",
            *(size(getattr(m, kind), shown) for kind in (*KINDS, "total", "reserved", "host")),
            marks,
        ]  # fmt: skip
        if plan.published:
            known = plan.published.get(m.strategy) if m.checkpointing else None
            row.append(f"{known:g}" if known else "")
        rows.append(row)
    return rows


def objective_lines(plan: Plan) -> Iterator[str]:
    width = max(map(len, plan.objective.formulas))
    for name, formula in plan.objective.formulas.items():
        yield f"{name:{width}}  {formula}"
    yield ""
    yield from _table(level_rows(plan))
    yield ""
    for check in plan.objective.checks:
        yield f"{'ok ' if check.holds else 'NOT'}  {check.what}: {check.found}"


def level_rows(plan: Plan) -> list[list[str]]:
    rows = [["t", "alpha", "sigma", "SNR", "weight", "weight of the z0 error"]]
    for x in plan.objective.levels:
        values = (x.t, x.alpha, x.sigma, x.snr, x.weight, x.of_x0)
        rows.append([f"{v:.4g}" for v in values])
    return rows


def _wires(plan: Plan) -> Iterator[str]:
    width = max(len(b.name) for b in plan.diagram.boxes)
    for box in plan.diagram.boxes:
        frozen = "  (frozen)" if box.is_frozen else ""
        yield f"[{box.name:^{width}}]  {', '.join(box.lines)}{frozen}"
        for arrow in plan.diagram.arrows:
            if arrow.source == box.name:
                yield f" {'':{width}}   `-- {arrow.label} --> [{arrow.target}]"
