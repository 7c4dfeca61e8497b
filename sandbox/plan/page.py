"""The page of a plan (`templates/plan.html.j2`), with a diagram of the data flow."""

from collections.abc import Iterator, Sequence
from typing import Any

from sandbox.plan import text
from sandbox.plan.plan import Plan
from sandbox.plan.strategies import GPU_SIZES
from sandbox.plan.wires import Box, Diagram
from sandbox.reports.charts import inline_svg
from sandbox.reports.pages import render
from sandbox.reports.tables import is_number

WIDTH, PITCH, BOX, HIGH, TOP, STEP = 1190, 258, 152, 66, 26, 190  # pixels of the diagram


def page(plan: Plan, overrides: Sequence[str] = ()) -> str:
    """The HTML page."""
    row, sizes = text.configured(plan), plan.sizes
    memory = text.memory_rows(plan)
    fits = memory[0].index("fits")
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
        components=text.component_rows(plan),
        costs=text.cost_rows(plan),
        bars=[*memory_bars(plan)],
        kinds=[*text.KINDS.values()],
        memory=[[c for i, c in enumerate(cells) if i != fits] for cells in memory],
        verdicts=verdict_rows(plan),
        unit=text.unit(plan),
        levels=text.level_rows(plan),
        numeric=lambda rows: [
            all(is_number(c) or c in ("", "fits", "tight") for c in column[1:])
            for column in zip(*rows, strict=True)
        ],
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


def draw_diagram(diagram: Diagram) -> Any:
    """Boxes and labelled arrows as a matplotlib figure, a point per pixel."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path

    height = TOP + STEP + HIGH + 20
    figure = Figure((WIDTH / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    boxes = {box.name: box for box in diagram.boxes}
    labels: dict[tuple[str, str], list[str]] = {}
    for arrow in diagram.arrows:
        labels.setdefault((arrow.source, arrow.target), []).append(arrow.label)
    for (source, target), texts in labels.items():
        points, (x, y) = _route(boxes[source], boxes[target])
        axes.add_patch(FancyArrowPatch(path=Path(points), arrowstyle="-|>", mutation_scale=9,
                                       color="#5d6770", shrinkA=0, shrinkB=0))  # fmt: skip
        lines = [line for t in texts for line in _lines(t, boxes[source], boxes[target])]
        axes.text(x, y, "\n".join(lines), ha="center", va="bottom", fontsize=11, color="#5c6269")
    for box in diagram.boxes:
        x, y = _corner(box)
        is_core = box.name == "backbone"
        axes.add_patch(FancyBboxPatch(
            (x, y), BOX, HIGH, boxstyle="round,pad=0,rounding_size=7", lw=2 if is_core else 1,
            fc="#f3f3ef" if box.is_frozen else "#ffffff", ls="--" if box.is_frozen else "-",
            ec="#0b6e62" if is_core else "#5c6269",
        ))  # fmt: skip
        axes.text(x + 10, y + 19, box.name, fontsize=13, weight="bold", color="#17191c")
        axes.text(x + 10, y + 57, "\n".join(box.lines), color="#5c6269", linespacing=1.3,
                  fontsize=min(11, 243 / max(map(len, box.lines))))  # fmt: skip
    return figure


def _corner(box: Box) -> tuple[int, int]:
    return 3 + box.column * PITCH, TOP + box.row * STEP


def _route(source: Box, target: Box) -> tuple[Sequence[tuple[float, float]], tuple[float, float]]:
    """Corners of the arrow between two boxes, and the bottom centre of its label."""
    (x, y), (u, v) = _corner(source), _corner(target)
    if source.row == target.row:  # right
        points = [(x + BOX, y + HIGH / 2), (u, v + HIGH / 2)]
        return points, ((x + BOX + u) / 2 - 4, y + HIGH / 2 - 5)
    if source.column == target.column:  # down
        return [(x + BOX / 2, y + HIGH), (u + BOX / 2, v)], (x + BOX / 2 + 66, (y + HIGH + v) / 2)
    if source.row < target.row and source.column == 0:  # down, then right
        points = [(x + 40, y + HIGH), (x + 40, v + HIGH / 2), (u, v + HIGH / 2)]
        return points, ((x + 40 + u) / 2, v + HIGH / 2 - 5)
    if source.row < target.row:  # down, right, down
        middle = (y + HIGH + v) / 2
        points = [(x + 90, y + HIGH), (x + 90, middle), (u + 76, middle), (u + 76, v)]
        return points, ((x + 90 + u + 76) / 2, middle - 5)
    points = [(x + BOX, y + HIGH / 2), (u + 76, y + HIGH / 2), (u + 76, v + HIGH)]  # right, then up
    return points, ((x + BOX + u + 76) / 2, y + HIGH / 2 - 5)


def _lines(label: str, source: Box, target: Box) -> list[str]:
    """Breaks a label into lines: between words on short arrows, at commas on long ones."""
    if target.column - source.column > 1 or source.row != target.row:
        return label.split(", ") if len(label) > 36 else [label]
    return label.split(" ")
