"""Weights & Biases; without credentials or network, a run is recorded offline."""

import json
import logging
import netrc
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from sandbox.contracts import PluginConfig, Preempted, above, added, one_of
from sandbox.registry import mask_text, register

MODES = ("auto", "online", "offline", "disabled")

log = logging.getLogger(__name__)


@register("logger", "wandb")
class WandbLogger:
    """Weights & Biases: online with credentials or a sweep agent, else offline; never prompts."""

    @dataclass
    class Config(PluginConfig):
        """project, entity, job_type, tags: as W&B has them; null: W&B's variables, WANDB_PROJECT
        and so on, else the project "sandbox" and the name of the task as job type. WANDB_NAME,
        WANDB_RUN_GROUP and WANDB_DIR count, too. timeout: seconds to connect; finish_timeout:
        seconds to send remaining data at the end.

        requeue: return a preempted trial to its sweep, so that the next agent with access to the
        folder resumes it; not for sweeps with early termination.
        """

        imports = ("wandb",)
        mode: str = "auto"
        project: str | None = None
        entity: str | None = None
        job_type: str | None = added(None)
        tags: tuple[str, ...] | None = None
        timeout: float = 10.0
        finish_timeout: float = 60.0
        requeue: bool = False

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("mode", self.mode, MODES)
            yield from above("timeout", self.timeout, 0)
            yield from above("finish_timeout", self.finish_timeout, 0)
            if self.project is not None and not _is_project(self.project):
                yield f"project={self.project!r}: want a name without / \\ # ? % :"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.run: Any = None

    def start(
        self,
        folder: Path,
        config: dict[str, Any],
        name: str,
        group: str | None,
        sweep: str | None = None,
    ) -> None:
        mode = self.mode()
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as e:
            raise ImportError(
                "logger=wandb needs the package wandb; install it or use logger=csv"
            ) from e
        _ensure_cache()
        options: dict[str, Any] = {
            **self._named(config, name, group),
            "id": _run_id(folder),
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR") or str(folder),
            "config": {"cfg": config, "environment": _environment(folder)},
        }
        settings: dict[str, Any] = {
            "finish_timeout": self.cfg.finish_timeout,
            "finish_timeout_raises": True,
            "console": "off",
            "silent": True,
            # W&B's metadata contain the command line with secrets; `environment` replaces them.
            "x_disable_meta": True,
        }
        if sweep is not None:
            settings["sweep_id"] = sweep
        reason = self._start_online(settings, options) if mode == "online" else None
        if self.run is None:
            offline = wandb.Settings(**settings)
            self.run = wandb.init(mode="offline", settings=offline, **options)
            self._say_offline(reason)
        known = self.run.config.keys()  # a sweep's parameters have their columns already
        self.run.config.update({k: v for k, v in columns(config).items() if k not in known})

    def _named(self, config: Mapping[str, Any], name: str, group: str | None) -> dict[str, Any]:
        """Project, entity, name, group, job type and tags: settings first, then W&B's variables."""
        cfg, given = self.cfg, os.environ.get
        tags = cfg.tags
        if tags is None:
            tags = tuple(filter(None, given("WANDB_TAGS", "").split(",")))
        task = columns(config).get("task")
        found = {
            "project": cfg.project or given("WANDB_PROJECT") or "sandbox",
            "entity": cfg.entity or given("WANDB_ENTITY"),
            "name": given("WANDB_NAME") or name,
            "group": given("WANDB_RUN_GROUP") or group,
            "job_type": cfg.job_type or given("WANDB_JOB_TYPE") or task,
        }
        texts = {key: text and mask_text(text) for key, text in found.items()}
        return {**texts, "tags": [mask_text(tag.strip()) for tag in tags]}

    def _say_offline(self, reason: str | None) -> None:
        if reason is None:
            log.info("W&B offline; to upload later: %s", self._sync_command())
        else:
            text = "W&B cannot be used online (%s); recording offline; to upload later: %s"
            log.warning(text, reason, self._sync_command())

    def _start_online(self, settings: dict[str, Any], options: dict[str, Any]) -> str | None:
        """Starts an online run; returns the reason why it has not started."""
        import wandb

        # Without credentials, `wandb.init` prompts at a terminal before it reads `silent`.
        silent = wandb.Settings(silent=True)
        wandb.setup(silent)
        wandb.termsetup(silent, None)  # if W&B was set up before
        wait = self.cfg.timeout
        try:
            own = wandb.Settings(**settings, init_timeout=wait, login_timeout=wait)
            self.run = wandb.init(mode="online", settings=own, **options)
            return None
        except Exception as e:  # network, server, login or settings: continue offline
            reason = str(e).partition("\n")[0][:200]
            wandb.teardown()  # releases the run id
            return reason

    def mode(self) -> str:
        """The effective mode, with `auto` resolved."""
        if self.cfg.mode != "auto":
            return self.cfg.mode
        from_environment = os.environ.get("WANDB_MODE", "")
        if from_environment in MODES[1:]:
            return from_environment
        return "online" if os.environ.get("WANDB_SWEEP_ID") or _has_credentials() else "offline"

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, dict(metrics))

    def video(self, step: int, name: str, path: Path, caption: str = "") -> None:
        if self.run is not None:
            import wandb

            self._log(step, {name: wandb.Video(str(path), caption=caption or None, format="mp4")})

    def images(
        self, step: int, name: str, paths: Sequence[Path], captions: Sequence[str] = ()
    ) -> None:
        if self.run is not None:
            import wandb

            texts = captions or [None] * len(paths)
            images = [wandb.Image(str(p), caption=c) for p, c in zip(paths, texts, strict=True)]
            self._log(step, {name: images})

    def summary(self, values: Mapping[str, Any]) -> None:
        if self.run is not None:
            self.run.summary.update(dict(values))

    def page(self, name: str, path: Path) -> None:
        """A self-contained HTML page."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def table(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """Rows of text; the first is the header."""
        if self.run is not None:
            import wandb

            head, *rest = rows
            table = wandb.Table(columns=[c or "variant" for c in head], data=[[*r] for r in rest])
            self.run.log({name: table})

    def finish(self, exit_code: int) -> None:
        if self.run is None:
            return
        if exit_code == Preempted.exit_code and self.cfg.requeue:
            self.run.mark_preempting()
        run, command = self.run, self._sync_command()
        self.run = None
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            log.warning(
                "W&B did not finish uploading in %g s; to upload later: %s",
                self.cfg.finish_timeout,
                command,
            )

    def _log(self, step: int, values: dict[str, Any]) -> None:
        # A resumed run repeats steps that the server already has and would reject one by one.
        if self.run is not None and step >= self.run.step:
            self.run.log(values, step=step)

    def _sync_command(self) -> str:
        return f"wandb sync {Path(self.run.dir).parent}"


def columns(config: Mapping[str, Any]) -> dict[str, Any]:
    """Columns to filter and group runs by: the option of each group, and the run's own settings."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            if isinstance(plugin := value.get("plugin"), str):
                found[name] = plugin.rpartition("/")[2]
        elif isinstance(value, str | int | float):
            found[name] = value
    return found


def _is_project(name: str) -> bool:
    return bool(name) and not set(name) & set("/\\#?%:")


def _ensure_cache() -> None:
    """Gives W&B another cache folder where its own cannot be written: it would log to stderr."""
    named, home = os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME")
    default = named or (f"{home}/.cache" if home else "")
    cache = os.environ.get("WANDB_CACHE_DIR") or default
    try:
        if not cache:
            raise OSError("no HOME")
        Path(cache).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return
    except OSError:
        os.environ["WANDB_CACHE_DIR"] = tempfile.mkdtemp(prefix="wandb-cache-")


def _run_id(folder: Path) -> str:
    """The id of this run folder, kept on resume; a sweep agent sets its own."""
    path = folder / "wandb_id"
    given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    if given is None and path.is_file():
        return path.read_text().strip()
    run_id = given or secrets.token_hex(4)
    path.write_text(run_id + "\n")
    return run_id


def _environment(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "environment.json").read_text())
    except (OSError, ValueError):
        return {}


def _has_credentials() -> bool:
    """Whether W&B can log in without a prompt, from the environment or ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError, RuntimeError):
            continue
    return False
