"""Text tables through rich, for terminals and Markdown."""

from collections.abc import Sequence
from io import StringIO


def text_table(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """The first row is the header. In plain text, columns of numbers are right-aligned."""
    from rich import box, console, table

    page = console.Console(file=StringIO(), width=100_000, markup=False, emoji=False,
                           highlight=False, color_system=None)  # fmt: skip
    plain = box.Box("".join(f"{line:4}\n" for line in ("", "", " -- ", *[""] * 5)))
    style = box.MARKDOWN if markdown else plain
    grid = table.Table(box=style, show_edge=markdown, pad_edge=markdown)
    for header, *cells in zip(*rows, strict=True):
        is_text = markdown or any(cell and not is_number(cell) for cell in cells)
        grid.add_column(header, justify="left" if is_text else "right", no_wrap=True)
    for row in rows[1:]:
        grid.add_row(*row)
    page.print(grid)
    return "\n".join(line.rstrip() for line in page.file.getvalue().splitlines())  # type: ignore[attr-defined]


def is_number(text: str) -> bool:
    return text[:1].isdigit() or text in ("-", "inf", "nan", "no")


def format_number(value: float) -> str:
    """Three significant digits: 0, 0.473, 1.2k, 4e-05."""
    if 1000 <= abs(value) < 1e6:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"
