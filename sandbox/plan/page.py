"""The page of a plan (`templates/plan.html.j2`), with a diagram of the data flow."""

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from sandbox.plan import text
from sandbox.plan.plan import Plan
from sandbox.plan.strategies import GPU_SIZES
from sandbox.reports.charts import inline_svg
from sandbox.reports.pages import render
from sandbox.reports.tables import is_number

WIDTH, PITCH, BOX, HIGH, TOP, STEP = 1190, 258, 152, 66, 26, 190  # pixels of the diagram


def page(plan: Plan, overrides: Sequence[str] = ()) -> str:
    """The HTML page."""
    row, sizes = text.configured(plan), plan.sizes
    tables = text.tables(plan)
    fits = tables["memory"][0].index("fits")
    tables["memory"] = [[*cells[:fits], *cells[fits + 1 :]] for cells in tables["memory"]]
    return render(
        "plan.html",
        kind="Plan",
        title=plan.root.recipe,
        summary=f"{text.headline(plan)}. Computed from one training step on fake tensors: nothing "
        "was trained, read or downloaded.",
        command=" ".join(["python run.py", *overrides]),
        facts={
            "clip": str(sizes.clip),
            "latents": str(sizes.grid),
            "clips per micro-batch": sizes.batch,
            "trained parameters": text.count(sum(c.trained for c in plan.counts)),
            "operations per micro-batch": text.flops(plan.cost.total),
            f"memory, {text.LABELS[row.strategy]}": text.bytes_of(row.total, plan),
            "smallest GPU": next(
                (f"{gpu} GB" for gpu, verdict in row.verdicts().items() if verdict == "fits"),
                f"more than {GPU_SIZES[-1]} GB",
            ),
        },
        notes=(),
        plan=plan,
        diagram=inline_svg(draw_diagram, plan.diagram),
        bars=[*memory_bars(plan)],
        kinds=[*text.KINDS.values()],
        verdicts=verdict_rows(plan),
        unit=text.unit(plan),
        numeric=lambda rows: [
            all(is_number(c) or c in ("", "fits", "tight") for c in column[1:])
            for column in zip(*rows, strict=True)
        ],
        **tables,
    )


def memory_bars(plan: Plan) -> Iterator[dict[str, Any]]:
    """A stacked bar for each strategy, with the configured activation checkpointing."""
    own = [m for m in plan.memory if m.checkpointing == bool(plan.checkpointing)]
    longest = max(sum(getattr(m, kind) for kind in text.KINDS) for m in own)
    for m in own:
        devices = f", {m.devices}" if m.devices > 1 else ""
        numbers = {name: getattr(m, kind) for kind, name in text.KINDS.items()}
        yield {
            "name": f"{text.LABELS[m.strategy]}{devices}",
            "is_own": m.strategy == plan.chosen,
            "parts": [(k, v / longest, text.bytes_of(v, plan)) for k, v in numbers.items()],
            "total": text.size(m.total, text.unit(plan)),
        }


def verdict_rows(plan: Plan) -> list[list[str]]:
    """A row for each strategy: whether it fits each GPU."""
    rows = [["strategy", "devices", "activations", *(f"{gpu} GB" for gpu in GPU_SIZES)]]
    for memory, row in zip(plan.memory, text.memory_rows(plan)[1:], strict=True):
        rows.append([*row[:3], *memory.verdicts().values()])
    return rows


# --- the diagram ----------------------------------------------------------------------------------


def draw_diagram(diagram: dict[str, list[Any]]) -> Any:
    """Boxes and labelled arrows as a matplotlib figure, a point per pixel."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    height = TOP + STEP + HIGH + 20
    figure = Figure((WIDTH / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    boxes = {}
    for box in diagram["boxes"]:
        x, y = 3 + box.column * PITCH, TOP + box.row * STEP
        is_core = box.name == "backbone"
        boxes[box.name] = axes.add_patch(FancyBboxPatch(
            (x, y), BOX, HIGH, boxstyle="round,pad=0,rounding_size=7", lw=2 if is_core else 1,
            fc="#f3f3ef" if box.is_frozen else "#ffffff", ls="--" if box.is_frozen else "-",
            ec="#0b6e62" if is_core else "#5c6269", zorder=2,
        ))  # fmt: skip
        axes.text(x + 10, y + 19, box.name, fontsize=13, weight="bold", color="#17191c")
        axes.text(x + 10, y + 57, "\n".join(box.lines), color="#5c6269", linespacing=1.3,
                  fontsize=min(11, 243 / max(map(len, box.lines))))  # fmt: skip
    labels = defaultdict(list)
    for arrow in diagram["arrows"]:
        labels[boxes[arrow.source], boxes[arrow.target]].append(arrow.label)
    for (source, target), lines in labels.items():
        (x, y), (u, v) = ((p.get_x() + BOX / 2, p.get_y() + HIGH / 2) for p in (source, target))
        axes.add_patch(FancyArrowPatch(
            (x, y), (u, v), patchA=source, patchB=target, arrowstyle="-|>", mutation_scale=9,
            color="#5d6770",
        ))  # fmt: skip
        width = 14 if u - x == PITCH and v == y else 36
        wrapped = [textwrap.fill(line, width) for line in lines]
        axes.text((x + u) / 2, (y + v) / 2 - 5, "\n".join(wrapped), ha="center", va="bottom",
                  fontsize=11, color="#5c6269",
                  bbox={"fc": "#ffffff", "ec": "none", "pad": 1})  # fmt: skip
    return figure
