"""task=verify: compares a recipe with records of its published system.

The records are `tests/golden/*/published/<recipe>.json` (format: tests/golden/PUBLISHED.md).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.config.paths import CHECKOUT
from sandbox.config.registry import register
from sandbox.contracts import ConfigError, SandboxError, StorageError, TaskConfig

if TYPE_CHECKING:
    from sandbox.config.wiring import Wiring

GOLDEN = CHECKOUT / "tests" / "golden"
SHOWN = 3  # names that a row lists


@dataclass(frozen=True)
class Row:
    """One row of the table: what is compared, its value here, the published value, the source."""

    what: str
    here: Any
    published: Any
    source: str = ""

    @property
    def is_same(self) -> bool:
        return same(self.here, self.published)


@register("task", "verify")
class Verify:
    """Compares a recipe with its published system: names, shapes, settings, recorded outputs."""

    @dataclass
    class Config(TaskConfig):
        """golden: also run the tests against recorded outputs (pytest, about a minute)."""

        golden: bool = True

        def reads_data(self) -> bool:
            return False

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        evidence = read_evidence(wiring.root.recipe)
        rows = [*weights(wiring, evidence), *settings(wiring.root, evidence)]
        if self.cfg.golden and evidence.get("tests"):
            rows += outputs(evidence["tests"])
        print(table(rows))
        failed = [row.what for row in rows if not row.is_same]
        print(f"{wiring.root.recipe}: {len(rows) - len(failed)} of {len(rows)} rows as published")
        if failed:
            raise SandboxError(
                f"experiment={wiring.root.recipe}: {len(failed)} rows are not as published: "
                + ", ".join(failed)
            )
        return {"rows": len(rows)}


def read_evidence(recipe: str) -> dict[str, Any]:
    """The record of the published system, completed from that of its `base`.

    Raises ConfigError for a recipe without a record.
    """
    known = {path.stem: path for path in sorted(GOLDEN.glob("*/published/*.json"))}
    if recipe not in known:
        there = " or ".join(f"experiment={name}" for name in known) or "none here"
        raise ConfigError(f"recipe={recipe}: nothing published to compare with; want {there}")
    found = json.loads(known[recipe].read_text(encoding="utf-8"))
    if base := found.get("base"):
        of_base = read_evidence(base)
        found = (
            of_base
            | found
            | {"settings": inherited_settings(of_base["settings"], found["settings"])}
        )
    return found


def inherited_settings(of_base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The settings of both; without the base's settings of a group with another plugin here."""
    plugins = {
        path: value for path, (value, _) in own.items() if re.fullmatch(r"\w+\.plugin", path)
    }
    others = {k.partition(".")[0] for k, v in plugins.items() if of_base.get(k, [None])[0] != v}
    return {k: v for k, v in of_base.items() if k.partition(".")[0] not in others} | own


# --- names and shapes -----------------------------------------------------------------------------


def weights(wiring: Wiring, evidence: dict[str, Any]) -> Iterator[Row]:
    """Compares the system on the meta device with manifests: of its parts, and of its layout."""
    counts, tensors = evidence.get("parameters", {}), evidence.get("tensors", {})
    manifests, prefixes = evidence.get("manifests", {}), evidence.get("prefixes", {})
    computed = evidence.get("computed", {})
    if not (evidence.get("manifest") or manifests or counts or tensors):
        return
    parts = on_meta(wiring, evidence.get("built_with", {}))
    for part, count in counts.items():
        yield Row(f"{part}: numbers", sum(x.numel() for x in parts[part].values()), count)
    for part, count in tensors.items():
        yield Row(f"{part}: tensors", len(parts[part]), count)
    for part, file in manifests.items():
        tables, prefix = computed.get(part, ""), prefixes.get(part, "")
        want = {k: x[0] for k, x in manifest(file).items() if not fnmatchcase(k, tables)}
        got = {k.removeprefix(prefix): list(x.shape) for k, x in parts[part].items()}
        yield from compare(got, want, file, f"{part}: ", "shapes: differing")
    if evidence.get("manifest"):
        yield from names(wiring, parts, evidence)


def manifest(file: str) -> dict[str, Any]:
    """Name -> [shape, dtype] of a published state dict."""
    return json.loads((GOLDEN / file).read_text(encoding="utf-8"))


def names(wiring: Wiring, parts: dict[str, Any], evidence: dict[str, Any]) -> Iterator[Row]:
    """Compares names, shapes and types of the whole system, as its layout writes it."""
    from sandbox.config import registry

    want, layout = manifest(evidence["manifest"]), wiring.root.layout
    if layout is None:
        yield Row("layout", None, "that of the manifest")
        return
    try:
        state = registry.create(layout).join({k: v for k, v in parts.items() if k != "adapter"})
    except (StorageError, ValueError) as e:
        yield Row("layout", str(e), "writes this system")
        return
    got = {k: [list(x.shape), str(x.dtype).removeprefix("torch.")] for k, x in state.items()}
    prefix = evidence.get("prefix", "")
    got, want = ({k: v for k, v in d.items() if k.startswith(prefix)} for d in (got, want))
    yield from compare(got, want, evidence["manifest"], "", "shapes and types: differing")
    here, published = (sum(math.prod(shape) for shape, _ in d.values()) for d in (got, want))
    yield Row("numbers", here, published)


def compare(
    got: dict[str, Any], want: dict[str, Any], source: str, part: str, differ: str
) -> Iterator[Row]:
    """Rows of two state dicts, given as name -> shape or [shape, dtype]."""
    yield Row(f"{part}names", len(got), len(want), source)
    yield Row(f"{part}names: missing", some(want.keys() - got.keys()), "0")
    yield Row(f"{part}names: unexpected", some(got.keys() - want.keys()), "0")
    differing = {k for k in got.keys() & want.keys() if got[k] != want[k]}
    yield Row(f"{part}{differ}", some(differing), "0")


def some(found: set[str]) -> str:
    """How many names, and the first of them."""
    return ": ".join(filter(None, (str(len(found)), ", ".join(sorted(found)[:SHOWN]))))


def on_meta(wiring: Wiring, built_with: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parts of the system, as task=export splits it, on the meta device.

    "adapter" has the tensors of its exported file. built_with: settings to build the parts with,
    such as an encoder that the recipe replaces by cached embeddings.
    """
    import torch

    from sandbox.model.components import build_parts
    from sandbox.model.latent_diffusion import LatentDiffusion
    from sandbox.weights.system_files import split

    # `trainable` does not matter here, and may be that of a first stage
    root = replace(wiring.root, trainable=None)
    if root.data.stored() is not None:  # cached latents have no first stage
        root = replace(root, data=replace(root.data, root=None))
    for path, value in (built_with or {}).items():
        group, _, name = path.partition(".")
        if hasattr(part := getattr(root, group), name):  # another plugin may be chosen
            root = replace(root, **{group: replace(part, **{name: value})})
    wiring = replace(wiring, root=root)
    with torch.device("meta"):
        system = LatentDiffusion(wiring, build_parts(wiring), 1)
    trained = {k: p for k, p in system.named_parameters() if p.requires_grad}
    has_ema = root.ema.plugin != "ema/none"
    parts = split(system, {"updates": 0, "average": trained} if has_ema else None)
    if system.adapter is None:
        return parts | {"adapter": {}}
    return parts | {"adapter": system.adapter.exported(system.backbone)[1]}


# --- settings -------------------------------------------------------------------------------------


def settings(root: Any, evidence: dict[str, Any]) -> Iterator[Row]:
    """Compares resolved settings with the published values."""
    from sandbox.config.root import to_container

    resolved = to_container(root)
    for path, (value, source) in evidence.get("settings", {}).items():
        yield Row(path, at(resolved, path), value, source)


def at(node: Any, path: str) -> Any:
    """The value at a dotted path, or a text that it is missing."""
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return f"no such setting: {key}"
        node = node[key]
    return node


def same(a: Any, b: Any) -> bool:
    """Equality; numbers may differ by the rounding of a product."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-12)
    return a == b


# --- recorded outputs -----------------------------------------------------------------------------


def outputs(tests: Sequence[str]) -> Iterator[Row]:
    """Runs the tests against recorded outputs; a row per file."""
    import subprocess
    import sys
    import tempfile
    from xml.etree import ElementTree

    home = GOLDEN.parents[1]
    print(f"running {len(tests)} test files ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        args = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        done = subprocess.run(
            [sys.executable, *args], cwd=home, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )  # fmt: skip
        if not report.is_file():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            yield Row("tests", " ".join(last), "run by pytest (dependency group dev)")
            return
        cases = list(ElementTree.parse(report).iter("testcase"))
    if done.returncode not in (0, 1):  # 1: some tests failed, which the rows show
        yield Row("tests", f"pytest ended with {done.returncode}", "0 or 1")
    for file in tests:
        module = file.removesuffix(".py").replace("/", ".") + "."
        own = [c for c in cases if f"{c.get('classname') or c.get('name')}.".startswith(module)]
        bad, skipped = (
            sum(any(c.find(kind) is not None for kind in kinds) for c in own)
            for kinds in (("failure", "error"), ("skipped",))
        )
        run = len(own) - skipped
        not_compared = f"{skipped} skipped, not compared" if skipped else ""
        yield Row(file, f"{run - bad} passed", f"{max(run, 1)} passed", not_compared)


# --- the table ------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Columns: ok or NOT, what, value here, published value (where it differs), source."""
    cells = [
        ("ok" if r.is_same else "NOT", r.what, text(r.here),
         "" if r.is_same else f"published: {text(r.published)}", r.source)
        for r in rows
    ]  # fmt: skip
    widths = [max((len(row[i]) for row in cells), default=0) for i in (0, 1, 2)]
    lines = []
    for mark, what, here, published, source in cells:
        padded = [c.ljust(w) for c, w in zip((mark, what, here), widths, strict=True)]
        lines.append("  ".join(filter(None, (*padded, published, source))).rstrip())
    return "\n".join(lines)


def text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    return str(value)
