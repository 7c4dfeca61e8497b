"""A plan as one self-contained page, in the looks of a run's report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import Template

from sandbox.plan import text
from sandbox.plan.plan import Plan
from sandbox.plan.strategies import CARDS, Memory
from sandbox.plan.wires import Box, Diagram
from sandbox.reports.markup import Markup, el, join
from sandbox.reports.run_page import TEMPLATE

STYLE = """
.wide { width: 100%; font-size: 13.5px; }
.wide th, .wide td { padding: 6px 8px; border-bottom: 1px solid var(--line); text-align: left;
  font-weight: 450; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide thead th { color: var(--soft); font-size: 12.5px; font-weight: 550; vertical-align: bottom; }
.wide .n { text-align: right; }
.wide tr.own { background: var(--accent-wash); }
.wide tr.own th, .wide tr.own td { font-weight: 650; }
.wide tr.last th, .wide tr.last td { border-bottom: 0; font-weight: 620; }
.formulas { width: 100%; }
.formulas th { width: 7em; color: var(--soft); font-weight: 450; text-align: left;
  vertical-align: top; padding: 5px 12px 5px 0; }
.formulas td { font: 13px/1.5 var(--mono); padding: 5px 0; overflow-wrap: anywhere; }
.bar-row { display: grid; grid-template-columns: 15.5em 1fr 5em; gap: 12px; align-items: center;
  margin: 5px 0; font-size: 13.5px; }
.bar-row.own { font-weight: 650; }
.bar-row .stack { background: var(--wash); }
.bar-row b { text-align: right; }
.yes { color: var(--accent); font-weight: 650; }
.maybe { color: var(--c1); }
.no { color: var(--soft); opacity: .55; }
.wires rect { fill: var(--card); stroke: var(--line); }
.wires rect.frozen { fill: var(--wash); stroke: var(--soft); stroke-dasharray: 4 3; }
.wires rect.core { stroke: var(--accent); stroke-width: 2; }
.wires text.name { font-weight: 650; fill: var(--ink); font-size: 13px; }
.wires text.label { font-family: var(--mono); font-size: 10.5px; }
.wires path { stroke: var(--c5); stroke-width: 1.3; }
.wires path.head { fill: var(--c5); stroke: none; }
.apart { margin-top: 24px; }
.bad { color: var(--c1); font-weight: 650; }
"""
KEYS = text.KINDS
WORDS = {"average": "EMA"}
WIDTH, PITCH, BOX, HIGH, TOP, STEP = 1190, 258, 152, 66, 26, 190


def page(plan: Plan, overrides: Sequence[str] = ()) -> str:
    """The whole HTML page."""
    sections = join(
        el("style", Markup(STYLE)),
        _section("What feeds what", drawing(plan.diagram), _sizes_note(plan)),
        _section("Components", _table(text.component_rows(plan), last=True)),
        _section("Operations of one micro-batch", _table(text.cost_rows(plan)), _cost_note()),
        _section("Memory of one device", *_memory(plan)),
        _section("Objective", *_objective(plan)),
        _section("Not modelled", el("ul", *(el("li", n) for n in plan.notes), class_="notes")),
    )
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    title = join(f"{plan.root.recipe} - plan")
    return template.substitute(title=title, header=_header(plan, overrides), sections=sections)


def _section(heading: str, *content: object) -> Markup:
    return el("section", el("h2", heading), *content)


def _header(plan: Plan, overrides: Sequence[str]) -> Markup:
    row, sizes = text.configured(plan), plan.sizes
    facts = {
        "clip": str(sizes.clip),
        "latents": str(sizes.grid),
        "clips a micro-batch": str(sizes.batch),
        "parameters that train": text.count(sum(c.trained for c in plan.counts)),
        "operations a micro-batch": text.flops(plan.cost.total),
        f"memory, {text.LABELS[row.strategy]}": text.bytes_of(row.total, plan),
        "smallest card": _smallest(row),
    }
    shown = [el("div", el("dt", k), el("dd", v)) for k, v in facts.items()]
    return el(
        "header",
        el("p", "Plan", class_="eyebrow"),
        el("h1", plan.root.recipe),
        el("p", f"{text.headline(plan)}. Nothing was trained, read or downloaded for this page: "
           "a step ran without numbers.", class_="summary"),
        el("pre", el("code", " ".join(["python run.py", *overrides])), class_="command"),
        el("dl", *shown, class_="facts"),
    )  # fmt: skip


def _smallest(row: Memory) -> str:
    verdicts = row.verdicts()
    fits = [card for card, verdict in verdicts.items() if verdict == "fits"]
    return f"{fits[0]} GB" if fits else f"more than {CARDS[-1]} GB"


def _sizes_note(plan: Plan) -> Markup:
    more = f" The largest of {plan.other_sizes + 1} sizes." if plan.other_sizes else ""
    said = f"Sizes are batch x channels x frames x height x width. Dashed boxes are frozen.{more}"
    return el("p", said, class_="quiet small")


def _cost_note() -> Markup:
    said = (
        "Counted on the real step: multiplications and additions of matrix products, convolutions "
        "and attention. Repeated: what activation checkpointing computes again. Kept: what the "
        "forward pass leaves for the backward one; at most: all that comes and goes, gradients "
        "apart."
    )
    return el("p", said, class_="quiet small")


def _table(rows: Sequence[Sequence[str]], last: bool = False) -> Markup:
    head = el("tr", *(el("th", c, class_=_side(rows, i)) for i, c in enumerate(rows[0])))
    body = []
    for row in rows[1:]:
        cells = [
            el("td" if i else "th", c.removesuffix(" *"), class_=_side(rows, i))
            for i, c in enumerate(row)
        ]
        mark = "last" if last and row is rows[-1] else None
        own = any(c.endswith(" *") for c in row)
        body.append(el("tr", *cells, class_="own" if own else mark))
    table = el("table", el("thead", head), el("tbody", *body), class_="wide")
    return el("div", table, class_="scroll")


def _side(rows: Sequence[Sequence[str]], column: int) -> str | None:
    values = [row[column] for row in rows[1:]]
    return "n" if all(v[:1].isdigit() or v in ("-", "", "inf", "no") for v in values) else None


# --- memory ---------------------------------------------------------------------------------------


def _memory(plan: Plan) -> Iterator[Markup]:
    """Stacked bars as configured, then every number with a verdict for each card."""
    own = [m for m in plan.memory if m.checkpointing == bool(plan.checkpointing)]
    longest = max(sum(getattr(m, k) for k in KEYS) for m in own)
    for m in own:
        parts = [
            el("i", style=f"width:{100 * getattr(m, k) / longest:.2f}%;background:var(--c{i % 6})",
               title=f"{WORDS.get(k, k)}: {text.bytes_of(getattr(m, k), plan)}")
            for i, k in enumerate(KEYS) if getattr(m, k)
        ]  # fmt: skip
        mark = "bar-row own" if m.strategy == plan.chosen else "bar-row"
        name = (
            f"{text.LABELS[m.strategy]}, {m.devices}" if m.devices > 1 else text.LABELS[m.strategy]
        )
        yield el("div", el("span", name), el("div", *parts, class_="stack"),
                 el("b", text.size(m.total, text.unit(plan))), class_=mark)  # fmt: skip
    keys = [
        el("li", el("i", class_="swatch", style=f"background:var(--c{i % 6})"), WORDS.get(k, k))
        for i, k in enumerate(KEYS)
    ]
    yield el("ul", *keys, class_="keys")
    yield el("div", _memory_table(plan), class_="apart")
    yield el("div", _verdict_table(plan), class_="apart")
    said = (
        f"{text.unit(plan)} of one device. Activations and gradients are not there at the same "
        "time, so the total may be less than the sum. Reserved is what a tool shows. A card fits, "
        "fits with little slack of the allocator (tight), or does not."
    )
    if plan.published:
        said += " Published: the peaks of CogVideoX's authors, in GB, beside our reserved ones."
    yield el("p", said, class_="quiet small")


def _memory_table(plan: Plan) -> Markup:
    rows = text.memory_rows(plan)
    where = rows[0].index("fits")
    return _table([[c for i, c in enumerate(row) if i != where] for row in rows])


def _verdict_table(plan: Plan) -> Markup:
    """A row for each strategy: whether it fits each card."""
    heads = ["strategy", "devices", "activations", *(f"{card} GB" for card in CARDS)]
    body = []
    for memory, row in zip(plan.memory, text.memory_rows(plan)[1:], strict=True):
        cells = [
            el("th", row[0].removesuffix(" *")),
            el("td", row[1], class_="n"),
            el("td", row[2]),
        ]
        for verdict in memory.verdicts().values():
            kind = {"fits": "yes", "tight": "maybe", "no": "no"}[verdict]
            cells.append(el("td", verdict, class_=f"n {kind}"))
        body.append(el("tr", *cells, class_="own" if row[0].endswith(" *") else None))
    sides = [None, "n", None, *("n" for _ in CARDS)]
    head = [el("th", c, class_=side) for c, side in zip(heads, sides, strict=True)]
    table = el("table", el("thead", el("tr", *head)), el("tbody", *body), class_="wide")
    return el("div", table, class_="scroll")


def _objective(plan: Plan) -> Iterator[Markup]:
    told = plan.objective
    rows = [el("tr", el("th", name), el("td", said)) for name, said in told.formulas.items()]
    yield el("table", el("tbody", *rows), class_="formulas")
    yield el("div", _table(text.level_rows(plan)), class_="apart")
    checks = [
        el("tr", el("th", "ok" if c.holds else "NOT", class_=None if c.holds else "bad"),
           el("td", f"{c.what}: {c.found}"))
        for c in told.checks
    ]  # fmt: skip
    yield el("table", el("tbody", *checks), class_="formulas apart")


# --- the drawing ----------------------------------------------------------------------------------


def drawing(diagram: Diagram) -> Markup:
    """Boxes and arrows as SVG."""
    boxes = {box.name: box for box in diagram.boxes}
    lines: dict[tuple[str, str], list[str]] = {}
    for arrow in diagram.arrows:
        lines.setdefault((arrow.source, arrow.target), []).append(arrow.label)
    arrows = [_arrow(boxes[a], boxes[b], labels) for (a, b), labels in lines.items()]
    shapes = [_box(box) for box in diagram.boxes]
    height = TOP + STEP + HIGH + 20
    return el("svg", *arrows, *shapes, viewBox=f"0 0 {WIDTH} {height}", class_="wires", role="img")


def _corner(box: Box) -> tuple[int, int]:
    return 3 + box.column * PITCH, TOP + box.row * STEP


def _box(box: Box) -> Markup:
    x, y = _corner(box)
    kind = "core" if box.name == "backbone" else "frozen" if box.is_frozen else None
    words = [el("text", box.name, x=x + 10, y=y + 19, class_="name")]
    words += [
        el("text", line, x=x + 10, y=y + 37 + 16 * i, **_squeezed(line, BOX - 18))
        for i, line in enumerate(box.lines)
    ]
    return join(el("rect", x=x, y=y, width=BOX, height=HIGH, rx=7, class_=kind), *words)


def _squeezed(line: str, room: float) -> dict[str, object]:
    """Letters closer together where a line is too long for its box."""
    return (
        {"textLength": room, "lengthAdjust": "spacingAndGlyphs"} if 5.9 * len(line) > room else {}
    )


def _arrow(source: Box, target: Box, labels: Sequence[str]) -> Markup:
    """A path from box to box, with its labels where it is free."""
    (x, y), (u, v) = _corner(source), _corner(target)
    if source.row == target.row:  # straight to the right
        points = [(x + BOX, y + HIGH / 2), (u, v + HIGH / 2)]
        at = ((x + BOX + u) / 2 - 4, y + HIGH / 2 - 7)
    elif source.column == target.column:  # down
        points = [(x + BOX / 2, y + HIGH), (u + BOX / 2, v)]
        at = (x + BOX / 2 + 66, (y + HIGH + v) / 2)
    elif source.row < target.row and source.column == 0:  # down, then right
        points = [(x + 40, y + HIGH), (x + 40, v + HIGH / 2), (u, v + HIGH / 2)]
        at = ((x + 40 + u) / 2, v + HIGH / 2 - 7)
    elif source.row < target.row:  # down, right, down
        middle = (y + HIGH + v) / 2
        points = [(x + 90, y + HIGH), (x + 90, middle), (u + 76, middle), (u + 76, v)]
        at = ((x + 90 + u + 76) / 2, middle - 7)
    else:  # right, then up
        points = [(x + BOX, y + HIGH / 2), (u + 76, y + HIGH / 2), (u + 76, v + HIGH)]
        at = ((x + BOX + u + 76) / 2, y + HIGH / 2 - 7)
    (a, b), (c, d) = points[-2:]
    way = "M" + " L".join(f"{px:g} {py:g}" for px, py in points)
    if a == c:
        sign = 1 if d > b else -1
        head = f"M{c:g} {d:g} l-4 {-8 * sign} l8 0 z"
    else:
        head = f"M{c:g} {d:g} l-8 -4 l0 8 z"
    said = [piece for label in labels for piece in _pieces(label, source, target)]
    words = [
        el("text", piece, x=f"{at[0]:g}", y=f"{at[1] - 13 * (len(said) - 1 - i):g}",
           text_anchor="middle", class_="label")
        for i, piece in enumerate(said)
    ]  # fmt: skip
    return join(el("path", d=way), el("path", d=head, class_="head"), *words)


def _pieces(label: str, source: Box, target: Box) -> list[str]:
    """Lines of a label: one where there is room, else a line for each word."""
    if target.column - source.column > 1 or source.row != target.row:
        return label.split(", ") if len(label) > 36 else [label]
    return label.split(" ")
