"""task=new: creates a working plugin with a preset and a test."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any, ClassVar

from sandbox.config import discovery, registry
from sandbox.config.paths import CHECKOUT, CONF, relative
from sandbox.config.registry import register
from sandbox.contracts import ConfigError, TaskConfig
from sandbox.reports.pages import render

TEMPLATES = CHECKOUT / "sandbox" / "templates"
NAME, CLASS = "mine", "Mine"  # the names in the templates
VALUES = ("null", "true", "false", "nan", "inf")  # not strings on a command line
OPTIONS = {
    "features": "method=repa features={name}",
    "adapter": "adapter={name} init_from=FOLDER",
    "callbacks": "'callbacks=[{name}]'",
    "reconstruction": "task=train_vae vae=kl reconstruction={name}",
    "stage": "task=prepare data_root=FOLDER 'stage=[{name},normalise]'",
}
OUTSIDE = re.compile(r"^#\? ?(.*\n)", re.M)  # lines of a test outside the checkout


@register("task", "new")
@dataclass
class New:
    """Creates a working plugin, a preset and a test: task=new group=backbone name=mine."""

    @dataclass
    class Config(TaskConfig):
        """group, name: of the new plugin. With plugins_path=DIR the files go there."""

        needs_torch: ClassVar[bool] = False
        group: str | None = None
        name: str | None = None

        def problems(self) -> Iterator[str]:
            if self.group is None:
                yield "group=null: want a group, such as group=backbone name=mine"
            if self.name is None:
                yield "name=null: want a name, such as name=mine"
            elif not _is_valid(self.name):
                name = re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_0123456789")
                name = name if _is_valid(name) else f"my_{name}".rstrip("_")
                yield (
                    f"name={self.name!r}: want lower-case letters, digits and '_', a letter first, "
                    f"and no keyword of Python or YAML, such as name={name}"
                )

    cfg: Config

    def __call__(self, root: Any) -> dict[str, Any]:
        """Writes all files or none. Raises ConfigError for an existing file, and StorageError."""
        from sandbox.storage.atomic import storage_errors, write_atomic

        group, name = self.cfg.group, self.cfg.name
        assert group and name  # problems() requires both
        self.check()
        outside = Path(root.plugins_path).expanduser().resolve() if root.plugins_path else None
        files = render_files(group, name, outside)
        if existing := [relative(path) for path in files if path.exists()]:
            raise ConfigError(
                *(
                    f"{path}: it exists already; choose another name, or remove it"
                    for path in existing
                )
            )
        for path, text in files.items():
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, text)
        print(summary(group, name, list(files), outside))
        return {"files": [str(path) for path in files]}

    def check(self) -> None:
        """Raises ConfigError for an unknown group and for a name in use."""
        group, name, known = self.cfg.group or "", self.cfg.name or "", templates()
        if group not in known:
            raise ConfigError(f"task.group={group!r}: no such group; want {', '.join(known)}")
        used = dict.fromkeys(discovery.options(group), f"a preset of {group}")
        used |= {p.name: relative(p.path or Path(p.place)) for p in registry.plugins(group)}
        for option in (name, *(f"{name}_{size}" for size in presets(group))):
            if option in used:
                raise ConfigError(
                    f"task.name={name!r}: {group}={option} exists already ({used[option]}); "
                    f"want another name, such as name=my_{name}"
                )


def _is_valid(name: str) -> bool:
    is_identifier = re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None
    return is_identifier and not iskeyword(name) and name not in VALUES


def templates() -> list[str]:
    """Groups with a template, sorted."""
    return sorted(p.name for p in TEMPLATES.iterdir() if (p / "plugin.py.txt").is_file())


def presets(group: str) -> list[str]:
    """Suffixes of the presets in a group's template: ["large"]."""
    return sorted(p.stem.removeprefix("preset_") for p in (TEMPLATES / group).glob("preset_*.yaml"))


def render_files(group: str, name: str, outside: Path | None = None) -> dict[Path, str]:
    """Path -> text of every file, plugin first and test last; below the checkout or `outside`."""
    folder = TEMPLATES / group
    if outside:
        home, conf, tests = outside / group, outside / "conf", outside / "tests"
    else:
        home, conf, tests = CHECKOUT / "plugins" / group, CONF, CHECKOUT / "tests" / "plugins"
    if group == "task" and not outside:
        home = CHECKOUT / "sandbox" / "tasks"  # tasks may import sandbox, plugins may not
    source = (folder / "plugin.py.txt").read_text(encoding="utf-8")
    test = (folder / "test.py.txt").read_text(encoding="utf-8")
    cls = class_name(name, source + test)
    found = {home / f"{name}.py": rename(source, name, cls)}
    for size in presets(group):
        text = (folder / f"preset_{size}.yaml").read_text(encoding="utf-8")
        found[conf / group / f"{name}_{size}.yaml"] = rename(text, name, cls)
    test = OUTSIDE.sub(r"\1" if outside else "", test)
    if outside:  # compositions must know the plugin folder
        test = test.replace("compose(", "compose(HERE, ")
    found[tests / group / f"test_{name}.py"] = rename(test, name, cls)
    return found


def class_name(name: str, text: str) -> str:
    """my_net -> MyNet, or MyNetPlugin if the template uses that word otherwise."""
    cls = "".join(part.capitalize() for part in name.split("_"))
    return f"{cls}Plugin" if cls != CLASS and re.search(rf"\b{cls}\b", text) else cls


def rename(text: str, name: str, cls: str) -> str:
    return re.sub(rf"\b{CLASS}\b", cls, re.sub(rf"\b{NAME}(?=\b|_)", name, text))


def summary(group: str, name: str, files: list[Path], outside: Path | None) -> str:
    """The created files and the next commands."""
    return render(
        "new.txt", group=group, name=name, choice=OPTIONS.get(group, f"{group}={{name}}"),
        files=[relative(path) for path in files], presets=[path.stem for path in files[1:-1]],
        outside=relative(outside) if outside else None,
    )  # fmt: skip
