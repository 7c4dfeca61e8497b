"""A plan as text for a terminal, and its table rows."""

from sandbox.plan.plan import Plan
from sandbox.plan.strategies import GIB, GPU_SIZES, Memory
from sandbox.reports.pages import render
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
    shown = {name: text_table(rows) for name, rows in tables(plan).items()}
    return render("plan.txt", plan=plan, headline=headline(plan), unit=unit(plan),
                       gpu_sizes=GPU_SIZES, **shown)  # fmt: skip


def tables(plan: Plan) -> dict[str, list[list[str]]]:
    """The tables of the text and of the page, by their names in the templates."""
    return {
        "components": component_rows(plan),
        "costs": cost_rows(plan),
        "memory": memory_rows(plan),
        "levels": level_rows(plan),
    }


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


# --- numbers --------------------------------------------------------------------------------------


def count(number: float) -> str:
    """1.69 B, 326 k."""
    return _short(number).replace("G", "B")


def flops(number: float) -> str:
    return _short(number, "FLOP")


def _short(number: float, unit: str = "") -> str:
    """Three digits with a prefix: 2.14 GFLOP."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit)(float(f"{number:.3g}"))


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


# --- table rows -----------------------------------------------------------------------------------


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


def level_rows(plan: Plan) -> list[list[str]]:
    rows = [["t", "alpha", "sigma", "SNR", "weight", "weight of the z0 error"]]
    for x in plan.objective.levels:
        values = (x.t, x.alpha, x.sigma, x.snr, x.weight, x.of_x0)
        rows.append([f"{v:.4g}" for v in values])
    return rows
