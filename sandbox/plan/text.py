"""A plan for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sandbox.plan.plan import Plan
from sandbox.plan.strategies import CARDS, GIB, Memory

LABELS = {
    "single": "one device",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "deepspeed_zero2": "ZeRO-2",
    "deepspeed_zero2_offload": "ZeRO-2, optimizer on the CPU",
    "deepspeed_zero3": "ZeRO-3",
    "deepspeed_zero3_offload": "ZeRO-3, all on the CPU",
}
KINDS = ("weights", "gradients", "optimizer", "average", "activations", "communication")


def written(plan: Plan) -> str:
    """All of it, as plain text of about 110 columns."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    yield f"{plan.root.recipe}: {headline(plan)}"
    yield from _titled("What feeds what", _wires(plan))
    yield from _titled("Components", table(component_rows(plan)))
    yield from _titled("Operations of one micro-batch on one device", table(cost_rows(plan)))
    yield from _titled(f"Memory of one device, {unit(plan)}", table(memory_rows(plan)))
    yield f"  * as configured. reserved: what a tool shows; cards of {_cards()} GiB:"
    yield "  + fits, ~ only with little slack of the allocator, . does not fit"
    yield from _titled("Objective", objective_lines(plan))
    yield from _titled("Not modelled", [f"- {note}" for note in plan.notes])


def headline(plan: Plan) -> str:
    trained = sum(row.trained for row in plan.counts)
    total = sum(row.trained + row.frozen for row in plan.counts)
    row = configured(plan)
    return (
        f"{count(trained)} of {count(total)} parameters train, {flops(plan.cost.total)} a "
        f"micro-batch, {bytes_of(row.total, plan)} ({LABELS[row.strategy]})"
    )


def configured(plan: Plan) -> Memory:
    """The row of the configuration; that of one device where its trainer has none."""
    own = [m for m in plan.memory if m.checkpointing == bool(plan.checkpointing)]
    named = [m for m in own if m.strategy == plan.chosen]
    return (named or own)[0]


def _titled(title: str, lines: Sequence[str] | Iterator[str]) -> Iterator[str]:
    yield from ("", title, *(f"  {line}".rstrip() for line in lines))


def _cards() -> str:
    return ", ".join(map(str, CARDS))


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
    """The unit of memory of a whole plan, so that its numbers compare."""
    return "GiB" if max(m.total for m in plan.memory) >= GIB else "MiB"


def size(number: float, unit: str) -> str:
    """Three digits without the unit; a dash for nothing."""
    if not number:
        return "-"
    value = number / (GIB if unit == "GiB" else 2**20)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bytes_of(number: float, plan: Plan) -> str:
    """The same with the unit."""
    return f"{size(number, unit(plan))} {unit(plan)}"


# --- rows of tables, which the page shows, too ----------------------------------------------------


def component_rows(plan: Plan) -> list[list[str]]:
    rows = [["component", "plugin", "trained", "frozen", "buffers", "on the device"]]
    for c in plan.counts:
        there = bytes_of(c.bytes_trained + c.bytes_fixed, plan) if c.is_resident else "no"
        rows.append([c.group, c.plugin, *_numbers(c.trained, c.frozen, c.buffers), there])
    total = [sum(getattr(c, k) for c in plan.counts) for k in ("trained", "frozen", "buffers")]
    here = sum(c.bytes_trained + c.bytes_fixed for c in plan.counts if c.is_resident)
    return [*rows, ["all", "", *_numbers(*total), bytes_of(here, plan)]]


def _numbers(*values: int) -> list[str]:
    return [f"{v:,}" if v else "-" for v in values]


def cost_rows(plan: Plan) -> list[list[str]]:
    head = ["activations", "forward", "backward", "repeated", "together", "kept", "at most"]
    rows = [head]
    for is_on, cost in plan.costs.items():
        star = " *" if is_on == bool(plan.checkpointing) else ""
        repeated = flops(cost.repeated) if cost.repeated else "-"
        rows.append([
            ("checkpointed" if is_on else "all kept") + star, flops(cost.forward),
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
            "checkpointed" if m.checkpointing else "all kept",
            *(size(getattr(m, kind), shown) for kind in (*KINDS, "total", "reserved", "host")),
            marks,
        ]  # fmt: skip
        if plan.published:
            known = plan.published.get(m.strategy) if m.checkpointing else None
            row.append(f"{known:g}" if known else "")
        rows.append(row)
    return rows


def objective_lines(plan: Plan) -> Iterator[str]:
    told = plan.objective
    width = max(map(len, told.formulas))
    for name, formula in told.formulas.items():
        yield f"{name:{width}}  {formula}"
    yield ""
    yield from table(level_rows(plan))
    yield ""
    for check in told.checks:
        yield f"{'ok ' if check.holds else 'NOT'}  {check.what}: {check.found}"


def level_rows(plan: Plan) -> list[list[str]]:
    rows = [["t", "alpha", "sigma", "SNR", "weight", "weight of the error of z0"]]
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


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns: words to the left, numbers to the right; a rule below the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [any(c and not _is_number(c) for c in column[1:]) for column in
             zip(*rows, strict=True)]  # fmt: skip

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if is_word else cell.rjust(w)
            for cell, w, is_word in zip(row, widths, words, strict=True)
        ]
        return "  ".join(cells).rstrip()

    return [line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])]


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text in ("-", "inf", "nan", "no")
