"""task=new: a component of your own, as one file that works, with a preset and a test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any, ClassVar

from sandbox.config.paths import CHECKOUT
from sandbox.config.registry import register
from sandbox.contracts import ConfigError, TaskConfig

TEMPLATES = CHECKOUT / "sandbox" / "templates"
STAND_IN, STAND_IN_CLASS = "mine", "Mine"  # what the templates call themselves
VALUES = ("null", "true", "false", "nan", "inf")  # words that mean something else on a command line
OPTIONS = {
    "adapter": "adapter={name} init_from=FOLDER",
    "callbacks": "'callbacks=[{name}]'",
    "reconstruction": "task=train_vae vae=kl reconstruction={name}",
    "stage": "task=prepare data_root=FOLDER 'stage=[{name},normalise]'",
}
ELSEWHERE = re.compile(r"^#\? ?(.*\n)", re.M)  # lines of a test that a folder outside needs


@register("task", "new")
class New:
    """Writes a plugin that works, with a preset and a test: task=new group=backbone name=mine."""

    @dataclass
    class Config(TaskConfig):
        """group: kind of component; name: a word. With plugins_path=DIR the files go there."""

        needs_torch: ClassVar[bool] = False
        group: str | None = None
        name: str | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.group is None:
                yield "group=null: say what to write, such as group=backbone name=mine"
            if self.name is None:
                yield "name=null: want a name of your own, such as name=mine"
            elif (
                not re.fullmatch(r"[a-z][a-z0-9_]*", self.name)
                or iskeyword(self.name)
                or self.name in VALUES
            ):
                word = re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_0123456789")
                known = not word or iskeyword(word) or word in VALUES
                yield (
                    f"name={self.name!r}: want lower-case letters, digits and '_', a letter first, "
                    "and no word of Python or YAML, such as name="
                    + (f"my_{word}".rstrip("_") if known else word)
                )

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, root: Any) -> dict[str, Any]:
        """Writes all files or none. Raises ConfigError where one is there, StorageError."""
        from sandbox.storage.atomic import storing

        group, name = self.cfg.group, self.cfg.name
        assert group and name  # problems() asks for both
        self.check()
        outside = Path(root.plugins_path).expanduser().resolve() if root.plugins_path else None
        files = rendered(group, name, outside)
        there = [
            f"{shown(path)}: it is there already; choose another name, or remove it"
            for path in files
            if path.exists()
        ]
        if there:
            raise ConfigError(*there)
        for path, text in files.items():
            with storing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        print(report(group, name, list(files), outside))
        return {"files": [str(path) for path in files]}

    def check(self) -> None:
        """Raises ConfigError for an unknown group and for a name that is taken."""
        from sandbox.config import registry
        from sandbox.config.discovery import options

        group, name, known = self.cfg.group or "", self.cfg.name or "", templates()
        if group not in known:
            raise ConfigError(f"task.group={group!r}: no such group; want {', '.join(known)}")
        taken = dict.fromkeys(options(group), f"a preset of {group}")
        taken |= {p.name: shown(p.path) if p.path else "live code" for p in registry.plugins(group)}
        for word in (name, *(f"{name}_{size}" for size in presets(group))):
            if word in taken:
                raise ConfigError(
                    f"task.name={name!r}: {group}={word} is there already ({taken[word]}); "
                    f"want another name, such as name=my_{name}"
                )


def templates() -> list[str]:
    """Groups that have one, by name."""
    return sorted(p.name for p in TEMPLATES.iterdir() if (p / "plugin.py.txt").is_file())


def presets(group: str) -> list[str]:
    """What the presets of a group's template add to the plugin's name: ["large"]."""
    return sorted(p.stem.removeprefix("preset_") for p in (TEMPLATES / group).glob("preset_*.yaml"))


def rendered(group: str, name: str, outside: Path | None = None) -> dict[Path, str]:
    """Path -> text of every file, plugin first and test last; in the checkout or in `outside`."""
    from sandbox.config.paths import CHECKOUT, CONF

    folder = TEMPLATES / group
    if outside:
        home, conf, tests = outside / group, outside / "conf", outside / "tests"
    else:
        home, conf, tests = CHECKOUT / "plugins" / group, CONF, CHECKOUT / "tests" / "plugins"
    if group == "task" and not outside:
        home = CHECKOUT / "sandbox" / "tasks"  # tasks may use the frame, plugins may not
    source = (folder / "plugin.py.txt").read_text(encoding="utf-8")
    test = (folder / "test.py.txt").read_text(encoding="utf-8")
    cls = class_name(name, source + test)
    found = {home / f"{name}.py": named(source, name, cls)}
    for size in presets(group):
        text = (folder / f"preset_{size}.yaml").read_text(encoding="utf-8")
        found[conf / group / f"{name}_{size}.yaml"] = named(text, name, cls)
    found[tests / group / f"test_{name}.py"] = named(placed(test, outside is not None), name, cls)
    return found


def class_name(name: str, text: str) -> str:
    """my_net -> MyNet, or MyNetPlugin where the template has that word for something else."""
    cls = "".join(part.capitalize() for part in name.split("_"))
    return f"{cls}Plugin" if cls != STAND_IN_CLASS and re.search(rf"\b{cls}\b", text) else cls


def named(text: str, name: str, cls: str) -> str:
    text = re.sub(rf"\b{STAND_IN}(?=\b|_)", name, text)
    return re.sub(rf"\b{STAND_IN_CLASS}\b", cls, text)


def placed(test: str, outside: bool) -> str:
    """A test for the checkout, or for a folder outside it, of which each composition must know."""
    if not outside:
        return ELSEWHERE.sub("", test)
    return ELSEWHERE.sub(r"\1", test).replace("compose(", "compose(HERE, ")


def report(group: str, name: str, files: list[Path], outside: Path | None) -> str:
    """What was written and what to do next."""
    plugin, *presets, test = files
    choice = OPTIONS.get(group, f"{group}={{name}}")
    run = choice.format(name=name) + ("" if group in ("task", "stage") else " debug=fast")
    there = f"SANDBOX_PLUGINS={shown(outside)} " if outside else ""
    rows = [
        ("wrote", shown(plugin), "the component: it works as it is; its top says what it promises"),
        *(("", shown(p), f"a preset: {choice.format(name=p.stem)}") for p in presets),
        ("", shown(test), "its test"),
    ]
    width = max(len(path) for _, path, _ in rows)
    return "\n".join(
        [
            *(f"{what:<6} {path:<{width}}  {why}" for what, path, why in rows),
            f"try    python run.py {run}" + (f" plugins_path={shown(outside)}" if outside else ""),
            f"test   python -m pytest {shown(test)}",
            f"       {there}python -m pytest tests/contract -k {group}/{name}",
        ]
    )


def shown(path: Path | None) -> str:
    """A path as one would type it here."""
    path = path or Path()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
