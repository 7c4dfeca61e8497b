"""Compares finished runs: finds the varying settings, groups seeds, and tests against a baseline.

`ablation_runs.read` finds runs, `compare` builds the `Ablation`, `ablation_page` writes it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sandbox.contracts import LOADING, ConfigError
from sandbox.reports.ablation_runs import COSTS, MOST_NAMED, Entry, RunSet
from sandbox.reports.statistics import (
    LEAST_PROMPTS,
    LEAST_SEEDS,
    Estimate,
    holm,
    of_prompts,
    of_seeds,
)
from sandbox.runs.identity import IGNORED, matches

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
        group = next((g for g in swapped if name.startswith(f"{g}.")), "")
        if name == f"{group}.plugin":  # "backbone/dit" -> "dit"
            columns[group] = [v and json.dumps(json.loads(v).rpartition("/")[2]) for v in values]
        elif not group or not _determined(values, [table[f"{group}.plugin"]]):
            columns[name] = values
    words = (w for e in entries for w in e.metrics.get("overrides", ()))
    typed = dict.fromkeys(w.partition("=")[0].lstrip("+~") for w in words)
    place = {name: i for i, name in enumerate(typed)}
    order = sorted(columns, key=lambda n: (place.get(n, len(place)), n.count(".")))
    kept: dict[str, list[str]] = {}
    for name in order:
        if name in typed or not _determined(columns[name], kept.values()):
            kept[name] = columns[name]
    dependent = [name for name in order if name not in kept]
    return {n: [typed_value(v) for v in values] for n, values in kept.items()}, dependent


def _determined(values: Sequence[str], by: Iterable[Sequence[str]]) -> bool:
    """Whether rows that are equal in the columns `by` have equal values."""
    columns = [*by]
    return len({*zip(*columns, strict=True)}) == len({*zip(*columns, values, strict=True)})


def typed_value(text: str) -> str:
    """A setting's JSON as typed on the command line; "-" if absent."""
    value = json.loads(text) if text else "-"
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return text if text in ("null", "true", "false") else str(value)


def group_variants(entries: Sequence[Entry]) -> tuple[list[Variant], list[str]]:
    """Variants sorted by value, and dependent settings; the last of duplicate runs counts."""
    columns, dependent = varying(entries)
    runs: dict[tuple[str, ...], dict[int, Entry]] = {}
    for i, entry in enumerate(entries):
        seed = int(entry.settings.get("seed", 0))
        runs.setdefault(tuple(v[i] for v in columns.values()), {})[seed] = entry
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

    @property
    def p_text(self) -> str:
        if self.p is None:
            return ""
        return "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"

    @property
    def difference_text(self) -> str:
        """ "+0.12 [0.03, 0.21] p = 0.012 *"; empty for the baseline."""
        if self.difference is None:
            return ""
        return f"{self.difference.text('+')} {self.p_text}".rstrip() + " *" * self.is_significant


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

    @property
    def summary(self) -> str:
        seeds = sorted({len(v.runs) for v in self.variants})
        span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        plural, count = "s" * (seeds[-1] > 1), len(self.variants)
        runs = sum(len(v.runs) for v in self.variants)
        return f"{count} variant{'s' * (count > 1)}, {span} seed{plural} each, {runs} runs"

    @property
    def method(self) -> list[str]:
        """How the numbers were computed."""
        kinds = {c.here.of for c in self.cells.values() if c.here.has_interval}
        lines = [
            ("seeds" in kinds, "Mean over seeds with the 95 % interval (Student's t)."),
            (
                "prompts" in kinds,
                "With fewer than 3 seeds: the 95 % bootstrap interval over prompts.",
            ),
            (
                len(self.variants) > 1,
                f"Differences are relative to {self.baseline.label} ({self.baseline.title}), "
                "paired by seed or prompt. p-values are two-sided and Holm-corrected over the "
                "variants of a column; * is p < 0.05. No p-value is given when all paired "
                "differences are equal.",
            ),
        ]
        return [line for holds, line in lines if holds]

    @property
    def explained(self) -> dict[str, str]:
        """The meaning of each metric that has one."""
        return {m: self.meanings[m] for m in self.metrics if self.meanings.get(m)}

    def _repr_markdown_(self) -> str:
        """Shown by notebooks."""
        from sandbox.reports.ablation_page import markdown

        return markdown(self)


def compare(runs: RunSet, baseline: Sequence[str] = (), metrics: Sequence[str] = ()) -> Ablation:
    """`baseline`: settings that select a variant ("backbone=dit"); empty: the first variant.

    `metrics`: names; empty: all comparable ones. Raises ConfigError for a baseline that matches no
    or several variants, and for a metric that is missing or has different protocols.
    """
    entries = runs.entries
    variants, dependent = group_variants(entries)
    names, refused = comparable(entries)
    known = ", ".join(names or refused) or "those of runs with scores"
    problems = [
        refused.get(m) or f"task.metrics={m}: no run has it; want one of {known}"
        for m in metrics
        if m not in names
    ]
    if not names and not problems:
        problems = [
            "task.runs: the runs have no metric in common; want the folder of a multirun "
            "(outputs/sweeps/TIME), or a folder with runs of one recipe only",
            *_first_of([*refused.values()], MOST_REASONS),
        ]
    if problems:
        raise ConfigError(*problems)
    names = list(metrics) or names
    base = find_variant(variants, baseline)
    cells: dict[tuple[str, str], Cell] = {}
    for name in names:
        differences = [difference(v, base, name) for v in variants]
        corrected = holm([d and d.p for d in differences])
        for variant, to_base, p in zip(variants, differences, corrected, strict=True):
            cells[variant.label, name] = Cell(estimate(variant, name), to_base, p)
    return Ablation(
        variants=variants,
        columns=[*variants[0].settings],
        baseline=base,
        metrics=names,
        cells=cells,
        costs={v.label: costs_of(v) for v in variants},
        meanings={k: v for e in entries for k, v in e.metrics.get("meaning", {}).items()},
        protocols={name: entries[0].protocol(name) for name in names},
        notes=[*_notes(runs, variants, dependent), *([] if metrics else refused.values())],
        entries=entries,
    )


def comparable(entries: Sequence[Entry]) -> tuple[list[str], dict[str, str]]:
    """Metrics that all runs have under one protocol; and metric -> why it is not comparable."""
    reasons = {n: _why_not(entries, n) for n in dict.fromkeys(n for e in entries for n in e.values)}
    refused = {name: f"{name} is not compared: {why}" for name, why in reasons.items() if why}
    return [name for name in reasons if name not in refused], refused


def _why_not(entries: Sequence[Entry], name: str) -> str:
    """Why a metric of these runs is not comparable; empty if it is."""
    missing = [e for e in entries if name not in e.values]
    if missing:
        return f"{missing[0].folder.name} has none"
    first, protocol = entries[0], entries[0].protocol(name)
    for other in entries:
        if other.protocol(name) != protocol:
            return (
                "it was computed under different protocols ("
                + _difference(protocol, other.protocol(name))
                + f" in {first.folder.name} and {other.folder.name})"
            )
    scored = [e for e in entries if e.held_out and protocol.get("split") == '"val"']
    for other in scored:
        if other.held_out != scored[0].held_out:
            return (
                f"{scored[0].folder.name} and {other.folder.name} were scored on different "
                "held-out clips"
            )
    return ""


def _difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    if not one or not other:
        return "recorded and not recorded"
    keys = [k for k in {**one, **other} if one.get(k) != other.get(k)]
    parts = [f"{k} {one.get(k, '(absent)')} and {other.get(k, '(absent)')}" for k in keys]
    more = f" and {len(parts) - 2} more" if len(parts) > 2 else ""
    return ", ".join(parts[:2]) + more


def find_variant(variants: Sequence[Variant], words: Sequence[str]) -> Variant:
    """The variant with this letter or these settings; empty: the first. Raises ConfigError."""
    if not words:
        return variants[0]
    wanted = {k: _natural(v) for k, v in (w.partition("=")[::2] for w in words)}
    matching = [v for v in variants if [v.label] == [w.upper() for w in words]] or [
        v for v in variants
        if wanted.items() <= {k: _natural(value) for k, value in v.settings.items()}.items()
    ]  # fmt: skip
    if len(matching) != 1:
        how_many = f"{len(matching)} variants have it" if matching else "no variant has it"
        titles = "; ".join(v.title for v in (matching or variants)[:MOST_NAMED])
        raise ConfigError(f"task.baseline=[{','.join(words)}]: {how_many}: {titles}")
    return matching[0]


def estimate(variant: Variant, name: str) -> Estimate:
    """Mean over seeds with a t interval; with few seeds, over prompts with a bootstrap interval."""
    runs = [*variant.runs.values()]
    return _mean([e.values[name] for e in runs], [*_over_seeds(runs, name).values()])


def difference(variant: Variant, base: Variant, name: str) -> Estimate | None:
    """Difference to the baseline, paired by seed, or by prompt with few seeds; None for itself."""
    pairs = [(e, base.runs[s]) for s, e in variant.runs.items() if s in base.runs]
    if variant is base or not pairs:
        return None
    here, there = (_over_seeds(runs, name) for runs in zip(*pairs, strict=True))
    return _mean(
        [a.values[name] - b.values[name] for a, b in pairs],
        [here[p] - there[p] for p in here if p in there],
    )


def _mean(of_each_seed: Sequence[float], of_each_prompt: Sequence[float]) -> Estimate:
    """Over seeds, or over prompts where only these are enough for an interval."""
    has_prompts = len(of_each_seed) < LEAST_SEEDS and len(of_each_prompt) >= LEAST_PROMPTS
    return of_prompts(of_each_prompt) if has_prompts else of_seeds(of_each_seed)


def _over_seeds(entries: Sequence[Entry], name: str) -> dict[str, float]:
    """Prompt -> mean over the runs, for prompts that all runs have."""
    each = [e.by_prompt.get(name, {}) for e in entries]
    common = [p for p in each[0] if all(p in e for e in each)]
    return {p: math.fsum(e[p] for e in each) / len(each) for p in common}


def costs_of(variant: Variant) -> dict[str, Estimate]:
    runs = variant.runs.values()
    each = {name: [e.costs[name] for e in runs if name in e.costs] for name in COSTS}
    return {name: of_seeds(values) for name, values in each.items() if values}


def _notes(runs: RunSet, variants: Sequence[Variant], dependent: Sequence[str]) -> list[str]:
    """Caveats that a reader must know."""
    of_data = [n.partition(".")[2] for n in variants[0].settings if n.startswith("data.")]
    shown = [f"data.{name}" for name in of_data if name not in LOADING]
    recorded = [e.environment for e in runs.entries]
    codes, machines = ({json.dumps(r.get(k)) for r in recorded} for k in ("code", "hardware"))
    notes = [
        (runs.left_out, f"Left out: {'; '.join(_first_of(runs.left_out, MOST_NAMED))}."),
        (
            len({tuple(v.runs) for v in variants}) > 1,
            "The variants have different seeds; differences use the seeds that both have.",
        ),
        (dependent, f"Determined by the settings shown: {', '.join(dependent)}."),
        (
            shown,
            f"Clips depend on {', '.join(shown)}: each run is scored on its own held-out clips, "
            "and distances to real clips refer to those.",
        ),
        (
            min(len(v.runs) for v in variants) < LEAST_SEEDS,
            f"An interval needs {LEAST_SEEDS} seeds, or scores of {LEAST_PROMPTS} prompts; "
            "otherwise only the mean is given.",
        ),
        (len(codes) > 1, f"The runs used {len(codes)} versions of the code."),
        (
            len(machines) > 1,
            f"The runs used {len(machines)} kinds of machines, so times are not comparable.",
        ),
        (
            any(r.get("earlier") for r in recorded),
            "Training time excludes runs that were resumed.",
        ),
    ]
    return [note for holds, note in notes if holds]


def _first_of(texts: Sequence[str], most: int) -> list[str]:
    more = len(texts) - most
    return [*texts[:most], f"and {more} more"] if more > 0 else [*texts]
