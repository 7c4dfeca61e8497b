"""Many finished runs as one comparison: what varies, seeds grouped, each against a baseline.

`reports.ablation_runs` finds the runs below a folder, `compare` makes an `Ablation` of them, and
`sandbox.reports.ablation_page` writes it.
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

ASIDE = (*IGNORED, "seed", "task")  # settings that make no variant
MOST_REASONS = 3  # why numbers are not compared, where none is


# --- variants -------------------------------------------------------------------------------------


@dataclass
class Variant:
    """One combination of the settings that vary, with a run for each seed."""

    label: str  # A, B, ...
    settings: dict[str, str]  # of the columns, as one would type them
    runs: dict[int, Entry]

    @property
    def title(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.settings.items()) or "all runs"


def varying(entries: Sequence[Entry]) -> tuple[dict[str, list[str]], list[str]]:
    """Columns (name -> a value for each entry) that tell the entries apart, and what follows.

    A component that is swapped is one column; its settings are columns of their own only where they
    differ within one component. What was typed comes first; of the rest a setting that follows from
    the columns before it (a width that wiring fills) is no column but named.
    """
    names = dict.fromkeys(n for e in entries for n in e.settings if not matches(n, ASIDE))
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
    follows = []
    for name in order:
        if name not in typed and _determined(columns[name], kept):
            follows.append(name)
        else:
            kept[name] = columns[name]
    return {n: [typed_value(v) for v in values] for n, values in kept.items()}, follows


def _typed(entries: Sequence[Entry]) -> dict[str, int]:
    """Names of settings that commands gave -> place, first ones first."""
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
    """A setting's JSON as one would type it; "-" where there is none."""
    if not text:
        return "-"
    value = json.loads(text)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def grouped(entries: Sequence[Entry]) -> tuple[list[Variant], list[str]]:
    """Variants in order of their values, and what follows from these; of equal runs the last."""
    columns, follows = varying(entries)
    runs: dict[tuple[str, ...], dict[int, Entry]] = {}
    for i, entry in enumerate(entries):
        runs.setdefault(tuple(v[i] for v in columns.values()), {})[entry.seed] = entry
    order = sorted(runs, key=lambda key: [_natural(v) for v in key])
    variants = [
        Variant(_letters(i), dict(zip(columns, key, strict=True)), dict(sorted(runs[key].items())))
        for i, key in enumerate(order)
    ]
    return variants, follows


def _natural(value: str) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
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
    """A number of a variant, what it differs from the baseline by, and the corrected p-value."""

    here: Estimate
    difference: Estimate | None = None
    p: float | None = None

    @property
    def stands_out(self) -> bool:
        return self.p is not None and self.p < 0.05


@dataclass
class Ablation:
    """Everything that a report shows; nothing in it depends on when or where it is written."""

    variants: list[Variant]
    columns: list[str]
    baseline: Variant
    metrics: list[str]
    cells: dict[tuple[str, str], Cell]  # (label of the variant, metric)
    costs: dict[str, dict[str, Estimate]]  # label -> cost -> mean
    meanings: dict[str, str]
    protocols: dict[str, dict[str, str]]  # metric -> what all runs share
    notes: list[str]
    entries: list[Entry]

    @property
    def title(self) -> str:
        return " x ".join(self.columns) or "repeated runs"

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        from sandbox.reports.ablation_tables import markdown

        return markdown(self)


def compare(found: Found, baseline: Sequence[str] = (), metrics: Sequence[str] = ()) -> Ablation:
    """`baseline`: settings that choose a variant ("backbone=dit"), the first one without any.

    `metrics`: names, all that can be compared without any. Raises ConfigError for a baseline that
    chooses none or several, and for a metric that is not there or of different protocols.
    """
    entries = found.entries
    variants, follows = grouped(entries)
    names, refused = comparable(entries)
    known = ", ".join(names or refused) or "those of runs with scores"
    problems = [
        refused.get(m) or f"task.metrics={m}: no run has it; want some of {known}"
        for m in metrics
        if m not in names
    ]
    if problems:
        raise ConfigError(*problems)
    if not names:
        reasons = [*refused.values()]
        more = [f"and {len(reasons) - MOST_REASONS} more"] if len(reasons) > MOST_REASONS else []
        raise ConfigError(
            "task.runs: the runs have no number in common; want the folder of a multirun "
            "(outputs/sweeps/TIME), or one that holds runs of one recipe alone",
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
        notes=[*_notes(found, variants, follows), *([] if metrics else refused.values())],
        entries=entries,
    )


def comparable(entries: Sequence[Entry]) -> tuple[list[str], dict[str, str]]:
    """Numbers that all runs have under one protocol; and by name why another one is not shown."""
    names, refused = [], {}
    for name in dict.fromkeys(n for e in entries for n in e.values):
        first = entries[0].protocol(name)
        other = next((e for e in entries if e.protocol(name) != first), None)
        lacking = next((e for e in entries if name not in e.values), None)
        judged = _judged_apart(entries, name)
        if lacking is not None:
            refused[name] = f"{name} is not compared: {lacking.folder.name} has none"
        elif other is not None:
            refused[name] = (
                f"{name} is not compared: it was computed under different protocols ("
                + _apart(first, other.protocol(name))
                + f" in {entries[0].folder.name} and {other.folder.name})"
            )
        elif judged:
            refused[name] = (
                f"{name} is not compared: {judged[0].folder.name} and {judged[1].folder.name} "
                "were judged on different held-out clips"
            )
        else:
            names.append(name)
    return names, refused


def _judged_apart(entries: Sequence[Entry], name: str) -> list[Entry]:
    """The first two of different held-out clips; none where all that say so had the same."""
    told = [e for e in entries if e.held_out and e.protocol(name).get("split") == '"val"']
    others = [e for e in told if e.held_out != told[0].held_out]
    return [told[0], others[0]] if others else []


def _apart(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    if not one or not other:
        return "recorded and not recorded"
    keys = [k for k in {**one, **other} if one.get(k) != other.get(k)]
    said = [f"{k} {one.get(k, '(absent)')} and {other.get(k, '(absent)')}" for k in keys]
    more = f" and {len(said) - 2} more" if len(said) > 2 else ""
    return ", ".join(said[:2]) + more


def chosen(variants: Sequence[Variant], words: Sequence[str]) -> Variant:
    """The variant with this letter, or with these settings, if it is one; the first without any.

    Raises ConfigError.
    """
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
        there = "; ".join(v.title for v in (found or variants)[:MOST_NAMED])
        raise ConfigError(f"task.baseline=[{','.join(words)}]: {how_many}: {there}")
    return found[0]


def estimate(variant: Variant, name: str) -> Estimate:
    """Mean over seeds with Student's interval; of few seeds that over many prompts."""
    found = of_seeds([e.values[name] for e in variant.runs.values()])
    prompts = _over_seeds([*variant.runs.values()], name)
    if found.n >= LEAST_SEEDS or len(prompts) < LEAST_PROMPTS:
        return found
    return of_prompts([*prompts.values()])


def difference(variant: Variant, base: Variant, name: str) -> Estimate | None:
    """From the baseline, paired by seed, or for few seeds by prompt; None for itself."""
    seeds = [s for s in variant.runs if s in base.runs]
    if variant is base or not seeds:
        return None
    found = of_seeds([variant.runs[s].values[name] - base.runs[s].values[name] for s in seeds])
    if found.n >= LEAST_SEEDS:
        return found
    here, there = (_over_seeds([v.runs[s] for s in seeds], name) for v in (variant, base))
    apart = [here[p] - there[p] for p in here if p in there]
    return of_prompts(apart) if len(apart) >= LEAST_PROMPTS else found


def _over_seeds(entries: Sequence[Entry], name: str) -> dict[str, float]:
    """Prompt -> mean over the runs; those that all have."""
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


def _notes(found: Found, variants: Sequence[Variant], follows: Sequence[str]) -> Iterator[str]:
    """What a reader must know of the runs."""
    if found.left_out:
        more = len(found.left_out) - MOST_NAMED
        said = "; ".join(found.left_out[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        yield f"Left out: {said}."
    seeds = {tuple(v.runs) for v in variants}
    if len(seeds) > 1:
        yield "Not every variant has the same seeds; differences are of those that both have."
    if follows:
        yield f"Follow from the settings shown: {', '.join(follows)}."
    of_data = [n.partition(".")[2] for n in variants[0].settings if n.startswith("data.")]
    if shown := [f"data.{name}" for name in of_data if name not in LOADING]:
        yield (
            f"Clips depend on {', '.join(shown)}: a score is of the held-out clips of its own run, "
            "and a distance to real clips is to those."
        )
    if min(len(v.runs) for v in variants) < LEAST_SEEDS:
        yield (
            f"An interval wants {LEAST_SEEDS} seeds, or scores of {LEAST_PROMPTS} prompts; "
            "elsewhere only the mean is given."
        )
    codes = {json.dumps(e.environment.get("code")) for e in found.entries}
    if len(codes) > 1:
        yield f"The runs are of {len(codes)} versions of the code."
    machines = {json.dumps(e.environment.get("hardware")) for e in found.entries}
    if len(machines) > 1:
        yield f"The runs are of {len(machines)} kinds of machines: times are not of one."
    if any(e.environment.get("earlier") for e in found.entries):
        yield "Runs that were stopped and continued are left out of the training time."
