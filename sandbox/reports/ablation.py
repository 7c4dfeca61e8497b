"""Compares finished runs: finds the varying settings, groups seeds, and tests against a baseline.

`ablation_runs.read` finds runs, `compare` builds the `Ablation`, `ablation_page` writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sandbox.contracts import LOADING, ConfigError
from sandbox.reports.ablation_runs import COSTS, MOST_NAMED, Entry, Found
from sandbox.reports.statistics import (
    LEAST_PROMPTS,
    LEAST_SEEDS,
    Estimate,
    holm,
    of_prompts,
    of_seeds,
)
from sandbox.runs.run import IGNORED, matches

EXCLUDED = (*IGNORED, "seed", "task")  # settings that do not define a variant
MOST_REASONS = 3  # reasons in the error if no metric is comparable


# --- variants -------------------------------------------------------------------------------------


@dataclass
class Variant:
    """One combination of the varying settings, with a run per seed."""

    label: str  # A, B, ...
    settings: dict[str, str]  # of the columns, as typed on the command line
    runs: dict[int, Entry]

    @property
    def title(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.settings.items()) or "all runs"


def varying(entries: Sequence[Entry]) -> tuple[dict[str, list[str]], list[str]]:
    """Columns (name -> a value per entry) that distinguish the entries, and dependent settings.

    A swapped component is one column; its settings are columns only where they differ within one
    component. Typed settings come first. Of the others, a setting that the columns before it
    determine (a width that wiring fills) is dependent: not a column.
    """
    names = dict.fromkeys(n for e in entries for n in e.settings if not matches(n, EXCLUDED))
    table = {n: [e.settings.get(n, "") for e in entries] for n in names}
    differing = {n: v for n, v in table.items() if len(set(v)) > 1}
    swapped = [n.removesuffix(".plugin") for n in differing if n.endswith(".plugin")]
    columns: dict[str, list[str]] = {}
    for name, values in differing.items():
        group = next((g for g in swapped if name.startswith(f"{g}.")), None)
        if group is None:
            columns[name] = values
        elif name == f"{group}.plugin":  # "backbone/dit" -> "dit"
            columns[group] = [
                json.dumps(json.loads(v).rpartition("/")[2]) if v else v for v in values
            ]
        elif _differs_within(values, table[f"{group}.plugin"]):
            columns[name] = values
    typed = _typed(entries)
    order = sorted(columns, key=lambda n: (typed.get(n, len(typed)), n.count(".")))
    kept: dict[str, list[str]] = {}
    dependent = []
    for name in order:
        if name not in typed and _determined(columns[name], kept):
            dependent.append(name)
        else:
            kept[name] = columns[name]
    return {n: [typed_value(v) for v in values] for n, values in kept.items()}, dependent


def _typed(entries: Sequence[Entry]) -> dict[str, int]:
    """Names of settings typed on the command line -> position."""
    words = dict.fromkeys(w for e in entries for w in e.metrics.get("overrides", ()))
    names = dict.fromkeys(w.partition("=")[0].lstrip("+~") for w in words)
    return {name: i for i, name in enumerate(names)}


def _differs_within(values: Sequence[str], kinds: Sequence[str]) -> bool:
    first: dict[str, str] = {}
    return any(first.setdefault(k, v) != v for k, v in zip(kinds, values, strict=True))


def _determined(values: Sequence[str], kept: Mapping[str, Sequence[str]]) -> bool:
    rows = zip(*kept.values(), strict=True) if kept else ((),) * len(values)
    return not _differs_within(values, [str(row) for row in rows])


def typed_value(text: str) -> str:
    """A setting's JSON as typed on the command line; "-" if absent."""
    if not text:
        return "-"
    value = json.loads(text)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def grouped(entries: Sequence[Entry]) -> tuple[list[Variant], list[str]]:
    """Variants sorted by value, and dependent settings; the last of duplicate runs counts."""
    columns, dependent = varying(entries)
    runs: dict[tuple[str, ...], dict[int, Entry]] = {}
    for i, entry in enumerate(entries):
        runs.setdefault(tuple(v[i] for v in columns.values()), {})[entry.seed] = entry
    order = sorted(runs, key=lambda key: [_natural(v) for v in key])
    variants = [
        Variant(_letters(i), dict(zip(columns, key, strict=True)), dict(sorted(runs[key].items())))
        for i, key in enumerate(order)
    ]
    return variants, dependent


def _natural(value: str) -> tuple[bool, float, str]:
    """Sort key: numbers by value, then words."""
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def _letters(number: int) -> str:
    """A .. Z, AA, AB, ..."""
    return (_letters(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


# --- comparison -----------------------------------------------------------------------------------


@dataclass
class Cell:
    """A metric of a variant, its difference to the baseline, and the corrected p-value."""

    here: Estimate
    difference: Estimate | None = None
    p: float | None = None

    @property
    def is_significant(self) -> bool:
        return self.p is not None and self.p < 0.05


@dataclass
class Ablation:
    """The contents of a report; independent of time and place."""

    variants: list[Variant]
    columns: list[str]
    baseline: Variant
    metrics: list[str]
    cells: dict[tuple[str, str], Cell]  # (label of the variant, metric)
    costs: dict[str, dict[str, Estimate]]  # label -> cost -> mean
    meanings: dict[str, str]
    protocols: dict[str, dict[str, str]]  # metric -> the protocol of all runs
    notes: list[str]
    entries: list[Entry]

    @property
    def title(self) -> str:
        return " x ".join(self.columns) or "repeated runs"

    def _repr_markdown_(self) -> str:
        """Shown by notebooks."""
        from sandbox.reports.ablation_tables import markdown

        return markdown(self)


def compare(found: Found, baseline: Sequence[str] = (), metrics: Sequence[str] = ()) -> Ablation:
    """`baseline`: settings that select a variant ("backbone=dit"); empty: the first variant.

    `metrics`: names; empty: all comparable ones. Raises ConfigError for a baseline that matches no
    or several variants, and for a metric that is missing or has different protocols.
    """
    entries = found.entries
    variants, dependent = grouped(entries)
    names, refused = comparable(entries)
    known = ", ".join(names or refused) or "those of runs with scores"
    problems = [
        refused.get(m) or f"task.metrics={m}: no run has it; want one of {known}"
        for m in metrics
        if m not in names
    ]
    if problems:
        raise ConfigError(*problems)
    if not names:
        reasons = [*refused.values()]
        more = [f"and {len(reasons) - MOST_REASONS} more"] if len(reasons) > MOST_REASONS else []
        raise ConfigError(
            "task.runs: the runs have no metric in common; want the folder of a multirun "
            "(outputs/sweeps/TIME), or a folder with runs of one recipe only",
            *reasons[:MOST_REASONS],
            *more,
        )
    names = list(metrics) or names
    base = chosen(variants, baseline)
    cells: dict[tuple[str, str], Cell] = {}
    for name in names:
        column = [Cell(estimate(v, name), difference(v, base, name)) for v in variants]
        corrected = holm([c.difference.p if c.difference else None for c in column])
        for variant, cell, p in zip(variants, column, corrected, strict=True):
            cells[variant.label, name] = Cell(cell.here, cell.difference, p)
    return Ablation(
        variants=variants,
        columns=[*variants[0].settings],
        baseline=base,
        metrics=names,
        cells=cells,
        costs={v.label: cost_of(v) for v in variants},
        meanings={k: v for e in entries for k, v in e.metrics.get("meaning", {}).items()},
        protocols={name: entries[0].protocol(name) for name in names},
        notes=[*_notes(found, variants, dependent), *([] if metrics else refused.values())],
        entries=entries,
    )


def comparable(entries: Sequence[Entry]) -> tuple[list[str], dict[str, str]]:
    """Metrics that all runs have under one protocol; and metric -> why it is not comparable."""
    names, refused = [], {}
    for name in dict.fromkeys(n for e in entries for n in e.values):
        first = entries[0].protocol(name)
        other = next((e for e in entries if e.protocol(name) != first), None)
        missing = next((e for e in entries if name not in e.values), None)
        scored = _different_clips(entries, name)
        if missing is not None:
            refused[name] = f"{name} is not compared: {missing.folder.name} has none"
        elif other is not None:
            refused[name] = (
                f"{name} is not compared: it was computed under different protocols ("
                + _difference(first, other.protocol(name))
                + f" in {entries[0].folder.name} and {other.folder.name})"
            )
        elif scored:
            refused[name] = (
                f"{name} is not compared: {scored[0].folder.name} and {scored[1].folder.name} "
                "were scored on different held-out clips"
            )
        else:
            names.append(name)
    return names, refused


def _different_clips(entries: Sequence[Entry], name: str) -> list[Entry]:
    """Two entries with different held-out clips, among those that recorded them; else empty."""
    known = [e for e in entries if e.held_out and e.protocol(name).get("split") == '"val"']
    others = [e for e in known if e.held_out != known[0].held_out]
    return [known[0], others[0]] if others else []


def _difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    if not one or not other:
        return "recorded and not recorded"
    keys = [k for k in {**one, **other} if one.get(k) != other.get(k)]
    parts = [f"{k} {one.get(k, '(absent)')} and {other.get(k, '(absent)')}" for k in keys]
    more = f" and {len(parts) - 2} more" if len(parts) > 2 else ""
    return ", ".join(parts[:2]) + more


def chosen(variants: Sequence[Variant], words: Sequence[str]) -> Variant:
    """The variant with this letter or these settings; empty: the first. Raises ConfigError."""
    if not words:
        return variants[0]
    if len(words) == 1 and "=" not in words[0]:
        words = [words[0].upper()]
        named = [v for v in variants if v.label == words[0]]
        if named:
            return named[0]
    wanted = {k: _natural(v) for k, v in (w.partition("=")[::2] for w in words)}
    found = [
        v for v in variants
        if wanted.items() <= {k: _natural(value) for k, value in v.settings.items()}.items()
    ]  # fmt: skip
    if len(found) != 1:
        how_many = f"{len(found)} variants have it" if found else "no variant has it"
        titles = "; ".join(v.title for v in (found or variants)[:MOST_NAMED])
        raise ConfigError(f"task.baseline=[{','.join(words)}]: {how_many}: {titles}")
    return found[0]


def estimate(variant: Variant, name: str) -> Estimate:
    """Mean over seeds with a t interval; with few seeds, over prompts with a bootstrap interval."""
    found = of_seeds([e.values[name] for e in variant.runs.values()])
    prompts = _over_seeds([*variant.runs.values()], name)
    if found.n >= LEAST_SEEDS or len(prompts) < LEAST_PROMPTS:
        return found
    return of_prompts([*prompts.values()])


def difference(variant: Variant, base: Variant, name: str) -> Estimate | None:
    """Difference to the baseline, paired by seed, or by prompt with few seeds; None for itself."""
    seeds = [s for s in variant.runs if s in base.runs]
    if variant is base or not seeds:
        return None
    found = of_seeds([variant.runs[s].values[name] - base.runs[s].values[name] for s in seeds])
    if found.n >= LEAST_SEEDS:
        return found
    here, there = (_over_seeds([v.runs[s] for s in seeds], name) for v in (variant, base))
    paired = [here[p] - there[p] for p in here if p in there]
    return of_prompts(paired) if len(paired) >= LEAST_PROMPTS else found


def _over_seeds(entries: Sequence[Entry], name: str) -> dict[str, float]:
    """Prompt -> mean over the runs, for prompts that all runs have."""
    each = [e.by_prompt.get(name, {}) for e in entries]
    common = [p for p in each[0] if all(p in e for e in each)]
    return {p: math.fsum(e[p] for e in each) / len(each) for p in common}


def cost_of(variant: Variant) -> dict[str, Estimate]:
    found = {}
    for name in COSTS:
        values = [e.costs[name] for e in variant.runs.values() if name in e.costs]
        if values:
            found[name] = of_seeds(values)
    return found


def _notes(found: Found, variants: Sequence[Variant], dependent: Sequence[str]) -> Iterator[str]:
    """Caveats that a reader must know."""
    if found.left_out:
        more = len(found.left_out) - MOST_NAMED
        names = "; ".join(found.left_out[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        yield f"Left out: {names}."
    seeds = {tuple(v.runs) for v in variants}
    if len(seeds) > 1:
        yield "The variants have different seeds; differences use the seeds that both have."
    if dependent:
        yield f"Determined by the settings shown: {', '.join(dependent)}."
    of_data = [n.partition(".")[2] for n in variants[0].settings if n.startswith("data.")]
    if shown := [f"data.{name}" for name in of_data if name not in LOADING]:
        yield (
            f"Clips depend on {', '.join(shown)}: each run is scored on its own held-out clips, "
            "and distances to real clips refer to those."
        )
    if min(len(v.runs) for v in variants) < LEAST_SEEDS:
        yield (
            f"An interval needs {LEAST_SEEDS} seeds, or scores of {LEAST_PROMPTS} prompts; "
            "otherwise only the mean is given."
        )
    codes = {json.dumps(e.environment.get("code")) for e in found.entries}
    if len(codes) > 1:
        yield f"The runs used {len(codes)} versions of the code."
    machines = {json.dumps(e.environment.get("hardware")) for e in found.entries}
    if len(machines) > 1:
        yield f"The runs used {len(machines)} kinds of machines, so times are not comparable."
    if any(e.environment.get("earlier") for e in found.entries):
        yield "Training time excludes runs that were resumed."
