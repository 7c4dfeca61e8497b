"""The gradio page of task=ui; `Runs` handlers all its requests."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sandbox.config import discovery
from sandbox.config.secrets import mask_text
from sandbox.contracts import ConfigError, SandboxError
from sandbox.reports.pages import Media, render
from sandbox.ui.requests import Request, Runs, captions_of

FONTS = ["system-ui", "sans-serif"]  # local fonts: the page loads nothing from other servers
P = ParamSpec("P")
T = TypeVar("T")
Upload = dict[str, Any] | None  # gradio's description of an uploaded file, which it has verified
MONO = ["ui-monospace", "monospace"]
CSS = """
.clips th, .clips td {padding: 4px 10px; text-align: left; vertical-align: top}
.clips video, .clips img {width: 224px; image-rendering: pixelated; display: block}
iframe.report {width: 100%; height: 75vh; border: 1px solid #8886; background: white}
"""


@contextmanager
def served(
    runs: Runs, begin: str | None = None, host: str = "127.0.0.1", port: int | None = None
) -> Iterator[str]:
    """Serves the page and yields its address. Its files are in a temporary folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gradio.themes import Default

    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="sandbox-ui-") as own:
        os.environ["GRADIO_TEMP_DIR"] = own  # uploads, too
        page = blocks(Handlers(runs, Path(own)), begin)
        try:
            page.queue(default_concurrency_limit=1).launch(
                server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
                prevent_thread_lock=True, show_error=True, ssr_mode=False, footer_links=["api"],
                theme=Default(font=FONTS, font_mono=MONO), css=CSS, mcp_server=False,
                enable_monitoring=False, max_file_size="32mb", pwa=False,
            )  # fmt: skip
            yield page.local_url
        except OSError as e:
            raise ConfigError(f"task.host={host} task.port={port}: cannot be used ({e})") from e
        finally:
            page.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


# --- handlers -------------------------------------------------------------------------------------


def reports_errors(handler: Callable[P, T]) -> Callable[P, T]:
    """Shows errors of `handler` on the page and to API clients."""

    @wraps(handler)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        import gradio as gr

        try:
            return handler(*args, **kwargs)
        except SandboxError as e:
            message = escape(mask_text(str(e)), quote=False).replace("\n", "<br>")
            raise gr.Error(message, duration=30, print_exception=False) from e

    return call


class Handlers:
    """The page's handlers; each call of `sample` writes to a new folder in `own`."""

    def __init__(self, runs: Runs, own: Path) -> None:
        self.runs, self.own = runs, own

    def sample(
        self, run: str | None, weights: str, other: str | None, other_weights: str,
        prompts: str | None, image: Upload, end_image: Upload, sampler: str | None,
        steps: str | None, guidance: str | None, frames: str | None, height: str | None,
        width: str | None, seed: str | None, progress: Callable[..., Any],
    ) -> tuple[str, list[str], str]:  # fmt: skip
        """A table of clips with a column per run, their files, and equivalent commands."""
        ends = {"images": image, "end_images": end_image}
        files = {name: (file["path"],) for name, file in ends.items() if file and file["path"]}
        first = Request(
            run or "", weights, captions_of(prompts), sampler=sampler or None,
            steps=number("steps", steps), guidance=number("guidance", guidance, float),
            frames=number("frames", frames), height=number("height", height),
            width=number("width", width), seed=number("seed", seed), **files,
        )  # fmt: skip
        requests = [first]
        if other:
            requests.append(replace(first, run=other, weights=other_weights))
        for request in requests:  # report errors of both before sampling
            self.runs.resolve(request.run)
            request.overrides()
        columns: dict[str, list[Path]] = {}
        for i, request in enumerate(requests):
            name = f"{request.run} ({request.weights})"
            progress(i / len(requests), desc=f"loading {name}")

            def watch(done: int, total: int, i: int = i, name: str = name) -> None:
                progress((i + done / total) / len(requests), desc=f"{name}: call {done} of {total}")

            to = Path(tempfile.mkdtemp(prefix="clips-", dir=self.own))
            columns[f"{name}{' ' * (name in columns)}"] = self.runs.make(request, to, watch)
        commands = "\n".join(dict.fromkeys(self.runs.command(request) for request in requests))
        made = [str(file) for column in columns.values() for file in column]
        return table(first.prompts, columns), made, mask_text(commands)

    def browse(self, page: str | None) -> str:
        """A report in a frame that runs no scripts, and samples of its runs."""
        if not page:
            return ""
        source, samples = self.runs.report(page)
        rows = [(run, [_embedded(file, file.stem) for file in files])
                for run, files in samples.items()]  # fmt: skip
        return render("clips.html", report=source, title=page, heads=(), rows=rows)


def number(name: str, text: str | None, kind: Callable[[str], Any] = int) -> Any:
    """The number in a field; None if it is blank. Raises ConfigError."""
    if not text or not text.strip():
        return None
    try:
        return kind(text)
    except ValueError:
        want = "an integer" if kind is int else "a number"
        raise ConfigError(f"{name}={text!r}: want {want}, or blank") from None


def table(prompts: Sequence[str], columns: dict[str, list[Path]]) -> str:
    """A row per prompt, a column per run: the same prompt and noise side by side."""
    rows = []
    for i, files in enumerate(zip(*columns.values(), strict=True)):
        caption = prompts[i] if i < len(prompts) else ""
        rows.append((caption, [_embedded(file, caption) for file in files]))
    return render("clips.html", report=None, heads=[*columns], rows=rows)


def _embedded(file: Path, caption: str) -> dict[str, Any]:
    return Media(file.parent).item(file, caption)


# --- the page -------------------------------------------------------------------------------------


def blocks(handlers: Handlers, begin: str | None) -> Any:
    """The page: a tab to sample and compare runs, and one for reports."""
    import gradio as gr

    with gr.Blocks(title="Latent video sandbox", analytics_enabled=False) as page:
        gr.Markdown(f"## Latent video sandbox\n`{handlers.runs.folder}`")
        with gr.Tab("Sample"):
            run, other, shown = _sample_tab(handlers, begin)
        with gr.Tab("Reports"):
            reports = _report_tab(handlers)

        def refresh() -> tuple[Any, ...]:
            names = handlers.runs.names()
            one = begin if begin in names else next(iter(names), None)
            lists = gr.Dropdown(choices=names, value=one), gr.Dropdown(choices=["", *names])
            about = handlers.runs.about(one) if one else ""
            pages = gr.Dropdown(choices=handlers.runs.pages())
            return *lists, about, *inputs(handlers.runs, one), pages

        outputs = [run, other, *shown, reports]
        page.load(reports_errors(refresh), outputs=outputs, api_visibility="private")
    return page


def inputs(runs: Runs, name: str | None) -> tuple[Any, ...]:
    """The image section, and a field for each conditioning image of a run.

    Hidden fields are cleared, so that they are not sent.
    """
    import gradio as gr

    wanted = runs.images(name) if name else ()
    images = (gr.Image(visible=True) if end in wanted else gr.Image(visible=False, value=None)
              for end in ("start", "end"))  # fmt: skip
    return gr.Accordion(visible=bool(wanted)), *images


def _run_row(label: str, names: Sequence[str], value: str | None) -> tuple[Any, Any]:
    import gradio as gr

    with gr.Row():
        run = gr.Dropdown(names, value=value, label=label, allow_custom_value=True, scale=3)
        weights = gr.Radio(["ema", "live"], value="ema", label="weights", min_width=140)
    return run, weights


def _sample_tab(handlers: Handlers, begin: str | None) -> tuple[Any, Any, list[Any]]:
    """Builds the tab; returns the run lists and the outputs that depend on the first."""
    import gradio as gr

    def image_field(label: str) -> Any:
        return gr.Image(label=label, sources=["upload"], height=200)

    def field(label: str) -> Any:
        # not gr.Number, which reads a blank field as 0
        return gr.Textbox("", label=label, min_width=80, max_lines=1)

    names = handlers.runs.names()
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            run, weights = _run_row("run", names, begin)
            about = gr.Markdown()
            other, other_weights = _run_row("compare with (optional)", ["", *names], None)
            prompts = gr.Textbox(label="prompts, one per line", lines=3)
            with gr.Accordion("conditioning images", visible=False) as images, gr.Row():
                image, end_image = image_field("first frame"), image_field("last frame")
            gr.Markdown("Leave a field blank to use the run's setting.")
            with gr.Row():
                samplers = discovery.options("sampler")
                sampler = gr.Dropdown(["", *samplers], value="", label="sampler", min_width=120)
                steps, guidance = field("steps"), field("guidance")
            with gr.Row():
                frames, height, width = field("frames"), field("height"), field("width")
            with gr.Row():
                seed = field("seed")
                randomise = gr.Button("random", min_width=60)
            go = gr.Button("Generate", variant="primary")
        with gr.Column(scale=3, min_width=480):
            clips = gr.HTML(label="clips", min_height=240)
            command = gr.Code(label="command", language="shell", interactive=False)
            files = gr.Files(label="files", interactive=False)

    @reports_errors
    def sample(
        run, weights, other, other_weights, prompts, image, end_image, sampler, steps, guidance,
        frames, height, width, seed, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        return handlers.sample(
            run, weights, other, other_weights, prompts, image, end_image, sampler, steps,
            guidance, frames, height, width, seed, progress,
        )  # fmt: skip

    sampled = [run, weights, other, other_weights, prompts, image, end_image, sampler, steps,
               guidance, frames, height, width, seed]  # fmt: skip
    # no preprocessing: gradio would decode the images, with errors of its own for invalid files
    go.click(sample, sampled, [clips, files, command], preprocess=False, api_name="sample",
             concurrency_limit=1)  # fmt: skip
    randomise.click(lambda: str(random.randrange(2**31)), outputs=seed, api_visibility="private")
    run.change(reports_errors(lambda name: handlers.runs.about(name) if name else ""), run, about,
               api_name="about")  # fmt: skip
    image_fields = [images, image, end_image]
    run.change(reports_errors(lambda name: inputs(handlers.runs, name)), run, image_fields,
               api_visibility="private")  # fmt: skip
    return run, other, [about, *image_fields]


def _report_tab(handlers: Handlers) -> Any:
    """Builds the tab; returns the list of reports."""
    import gradio as gr

    page = gr.Dropdown(handlers.runs.pages(), value=None, label="report", allow_custom_value=True)
    shown = gr.HTML(label="report", min_height=240)
    page.change(reports_errors(handlers.browse), page, shown, api_name="report")
    return page
