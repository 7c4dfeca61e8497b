"""What a run records of its surroundings."""

import json
import subprocess

from sandbox.config import registry
from sandbox.runs import environment


def test_code_tells_one_change_beside_the_commit_from_another(tmp_path, monkeypatch):
    """Else a sweep that is repeated after an edit takes the runs of before for its own."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    for folder in (checkout, elsewhere / "guidance"):
        folder.mkdir(parents=True)
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    (checkout / "known.py").write_text("1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(environment, "CHECKOUT", checkout)
    monkeypatch.setattr(registry, "_plugins", {})
    found = [environment.code()]
    for path, text in [(checkout / "known.py", "2\n"), (checkout / "known.py", "3\n"),
                       (checkout / "new.py", "1\n"), (checkout / "new.py", "2\n")]:  # fmt: skip
        path.write_text(text)
        found.append(environment.code())
    installed = checkout / ".venv"  # a folder that git ignores
    (installed / "guidance").mkdir(parents=True)
    (installed / ".gitignore").write_text("*\n")
    for folder in (elsewhere, installed):
        own = registry.Plugin("guidance", "mine", "mine", folder / "guidance/mine.py")
        registry._plugins[own.key] = own
        for text in ("1\n", "2\n"):
            own.path.write_text(f"{folder.name} {text}")
            found.append(environment.code())
    assert found[0] == {"commit": found[0]["commit"], "dirty": False}
    assert len({json.dumps(c) for c in found}) == len(found)
    assert environment.code() == found[-1]
