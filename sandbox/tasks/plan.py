"""task=plan: parameters, shapes, operations and memory of a configuration, without running it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, in_range


@register("task", "plan")
@dataclass
class Plan:
    """Parameters, shapes, operations, memory and objective of a configuration, before it runs."""

    @dataclass
    class Config(TaskConfig):
        """devices: number of devices for the sharded strategies, unless the trainer sets one.

        to: folder for plan.json and plan.html (null: plans/<recipe>-<hash> in `out`).
        """

        devices: int = 8
        to: str | None = None

        def problems(self) -> Iterator[str]:
            yield from in_range("devices", self.devices, 2)

        def reads_data(self) -> bool:
            return False

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        import json
        from pathlib import Path

        from sandbox.config.root import to_container
        from sandbox.config.secrets import folder_name
        from sandbox.plan.page import page
        from sandbox.plan.plan import plan
        from sandbox.plan.text import plan_text
        from sandbox.runs.identity import identity
        from sandbox.storage.atomic import storage_errors, write_atomic

        made, root = plan(wiring, self.cfg.devices), wiring.root
        print(plan_text(made))
        name = f"{folder_name(root.recipe)}-{identity(to_container(root))}"
        folder = Path(self.cfg.to or Path(root.out) / "plans" / name)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "plan.json", json.dumps(made.as_dict(), indent=1))
            write_atomic(folder / "plan.html", page(made, list(overrides)))
        print(f"\n{made.seconds:.0f} s; page: {folder / 'plan.html'}")
        return {"folder": str(folder)}
