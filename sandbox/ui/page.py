"""The gradio page of task=ui; `Runs` handlers all its requests."""

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from sandbox.config import discovery
from sandbox.config.secrets import mask_text
from sandbox.contracts import ConfigError, SandboxError
from sandbox.reports.pages import Media, render
from sandbox.ui.requests import NUMBERS, Request, Runs, captions_of

FONTS = ["system-ui", "sans-serif"]  # local fonts: the page loads nothing from other servers
MONO = ["ui-monospace", "monospace"]
CSS = """
.clips th, .clips td {padding: 4px 10px; text-align: left; vertical-align: top}
.clips video, .clips img {width: 224px; image-rendering: pixelated; display: block}
iframe.report {width: 100%; height: 75vh; border: 1px solid #8886; background: white}
"""


@contextmanager
def serving(
    runs: Runs, begin: str | None = None, host: str = "127.0.0.1", port: int | None = None
) -> Iterator[str]:
    """Serves the page and yields its address. Its files are in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="sandbox-ui-") as own:
        # the folder is for uploads, too
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": own}
        from gradio.themes import Default

        page = blocks(runs, Path(own), begin)
        try:
            page.queue(default_concurrency_limit=1).launch(
                server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
                prevent_thread_lock=True, show_error=True, ssr_mode=False, footer_links=["api"],
                theme=Default(font=FONTS, font_mono=MONO), css=CSS, mcp_server=False,
                enable_monitoring=False, max_file_size="32mb", pwa=False,
            )  # fmt: skip
            yield page.local_url
        except OSError as e:
            raise ConfigError(
                f"task.host={host} task.port={port}: no such address, or the port is in use; "
                "choose another port, or null for a free one"
            ) from e
        finally:
            page.close(verbose=False)


# --- handlers -------------------------------------------------------------------------------------


@contextmanager
def showing_errors() -> Iterator[None]:
    """Shows errors of a handler on the page and to API clients."""
    import gradio as gr

    try:
        yield
    except SandboxError as e:
        message = escape(mask_text(str(e)), quote=False).replace("\n", "<br>")
        raise gr.Error(message, duration=30, print_exception=False) from e


def sample(
    runs: Runs, own: Path, requests: Sequence[Request], progress: Callable[..., Any]
) -> tuple[str, list[str], str]:
    """A table of clips with a column per request, their files, and equivalent commands.

    The requests have the same prompts. Files are written to new folders in `own`.
    """
    for request in requests:  # report errors of all before sampling
        runs.resolve(request.run)
        request.overrides()
    columns: dict[str, list[Path]] = {}
    for i, request in enumerate(requests):
        name = f"{request.run} ({request.weights})"
        progress(i / len(requests), desc=f"loading {name}")

        def watch(done: int, total: int, i: int = i, name: str = name) -> None:
            progress((i + done / total) / len(requests), desc=f"{name}: call {done} of {total}")

        to = Path(tempfile.mkdtemp(prefix="clips-", dir=own))
        columns[f"{name}{' ' * (name in columns)}"] = runs.make(request, to, watch)
    commands = "\n".join(dict.fromkeys(runs.command(request) for request in requests))
    files = [str(file) for column in columns.values() for file in column]
    return table(requests[0].prompts, columns), files, mask_text(commands)


def table(prompts: Sequence[str], columns: dict[str, list[Path]]) -> str:
    """A row per prompt, a column per run: the same prompt and noise side by side."""
    of_prompts = zip(chain(prompts, repeat("")), zip(*columns.values(), strict=True), strict=False)
    rows = [(prompt, [_embedded(f, prompt) for f in files]) for prompt, files in of_prompts]
    return render("clips.html", report=None, heads=[*columns], rows=rows)


def browse(runs: Runs, page: str | None) -> str:
    """A report in a frame that runs no scripts, and samples of its runs."""
    if not page:
        return ""
    source, samples = runs.report(page)
    rows = [(run, [_embedded(f, f.stem) for f in files]) for run, files in samples.items()]
    return render("clips.html", report=source, title=page, heads=(), rows=rows)


def _embedded(file: Path, caption: str) -> dict[str, Any]:
    return Media(file.parent).item(file, caption)


# --- the page -------------------------------------------------------------------------------------


def blocks(runs: Runs, own: Path, begin: str | None) -> Any:
    """The page: a tab to sample and compare runs, and one for reports."""
    import gradio as gr

    with gr.Blocks(title="Latent video sandbox", analytics_enabled=False) as page:
        gr.Markdown(f"## Latent video sandbox\n`{runs.folder}`")
        with gr.Tab("Sample"):
            run, other, shown = _sample_tab(gr, runs, own, begin)
        with gr.Tab("Reports"):
            report = gr.Dropdown(runs.pages(), value=None, label="report", allow_custom_value=True)
            html = gr.HTML(label="report", min_height=240)
        report.change(showing_errors()(lambda page: browse(runs, page)), report, html,
                      api_name="report")  # fmt: skip

        def refresh() -> tuple[Any, ...]:
            names = runs.readable(runs.names(), begin)
            one = next(iter(names), None)
            lists = gr.Dropdown(choices=names, value=one), gr.Dropdown(choices=["", *names])
            description = runs.description(one) if one else ""
            fields = inputs(gr, runs, one)
            return *lists, description, *fields, not_usable(runs), gr.Dropdown(choices=runs.pages())

        outputs = [run, other, *shown, report]
        page.load(showing_errors()(refresh), outputs=outputs, api_visibility="private")
    return page


def not_usable(runs: Runs) -> str:
    """The runs that cannot be read, in grey, with the reason of each."""
    lines = [f"<br>`{name}`: {escape(why)}" for name, why in runs.unusable.items()]
    return f'<span style="opacity:0.6">Not usable:{"".join(lines)}</span>' if lines else ""


def inputs(gr: Any, runs: Runs, name: str | None) -> tuple[Any, ...]:
    """The image section, and a field for each conditioning image of a run.

    Hidden fields are cleared, so that they are not sent.
    """
    wanted = runs.images(name) if name else ()
    images = (gr.Image(visible=True) if end in wanted else gr.Image(visible=False, value=None)
              for end in ("start", "end"))  # fmt: skip
    return gr.Accordion(visible=bool(wanted)), *images


def _sample_tab(gr: Any, runs: Runs, own: Path, begin: str | None) -> tuple[Any, Any, list[Any]]:
    """Builds the tab; returns the run lists and the outputs that depend on the first."""

    def run_row(label: str, names: Sequence[str], value: str | None) -> tuple[Any, Any]:
        with gr.Row():
            run = gr.Dropdown(names, value=value, label=label, allow_custom_value=True, scale=3)
            return run, gr.Radio(["ema", "live"], value="ema", label="weights", min_width=140)

    def fields(*labels: str) -> list[Any]:
        # not gr.Number, which reads a blank field as 0
        return [gr.Textbox("", label=label, min_width=80, max_lines=1) for label in labels]

    names = runs.names()
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            run, weights = run_row("run", names, begin)
            description = gr.Markdown()
            unusable = gr.Markdown()
            other, other_weights = run_row("compare with (optional)", ["", *names], None)
            prompts = gr.Textbox(label="prompts, one per line", lines=3)
            with gr.Accordion("conditioning images", visible=False) as images, gr.Row():
                ends = [gr.Image(label=label, sources=["upload"], height=200)
                        for label in ("first frame", "last frame")]  # fmt: skip
            gr.Markdown("Leave a field blank to use the run's setting.")
            with gr.Row():
                samplers = ["", *discovery.options("sampler")]
                sampler = gr.Dropdown(samplers, value="", label="sampler", min_width=120)
                numbers = fields("steps", "guidance")
            with gr.Row():
                numbers += fields("frames", "height", "width")
            with gr.Row():
                (seed,) = fields("seed")
                randomise = gr.Button("random", min_width=60)
            go = gr.Button("Generate", variant="primary")
        with gr.Column(scale=3, min_width=480):
            clips = gr.HTML(label="clips", min_height=240)
            command = gr.Code(label="command", language="shell", interactive=False)
            files = gr.Files(label="files", interactive=False)
    # no preprocessing: gradio would decode the images and raise its own errors for invalid files
    go.click(_handler(gr, runs, own), [run, weights, other, other_weights, prompts, *ends, sampler,
             *numbers, seed], [clips, files, command], preprocess=False, api_name="sample",
             concurrency_limit=1)  # fmt: skip
    randomise.click(lambda: str(random.randrange(2**31)), outputs=seed, api_visibility="private")
    run.change(showing_errors()(lambda name: runs.description(name) if name else ""), run,
               description, api_name="about")  # fmt: skip
    run.change(showing_errors()(lambda name: inputs(gr, runs, name)), run, [images, *ends],
               api_visibility="private")  # fmt: skip
    return run, other, [description, images, *ends, unusable]


def _handler(gr: Any, runs: Runs, own: Path) -> Callable[..., Any]:
    """The handler of the button; API clients name its parameters."""

    @showing_errors()
    def handler(
        run, weights, other, other_weights, prompts, image, end_image, sampler, steps, guidance,
        frames, height, width, seed, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        uploads = {"images": image, "end_images": end_image}
        images = {name: (file["path"],) for name, file in uploads.items() if file and file["path"]}
        numbers = dict(zip(NUMBERS, (steps, guidance, frames, height, width, seed), strict=True))
        first = Request(run or "", weights, captions_of(prompts), sampler=sampler or None,
                        numbers=numbers, **images)  # fmt: skip
        second = [replace(first, run=other, weights=other_weights)] if other else []
        return sample(runs, own, [first, *second], progress)

    return handler
