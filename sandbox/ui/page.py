"""The page of task=ui, in gradio. It asks `Runs` for everything, and shows what comes back."""

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
from sandbox.reports.markup import Markup, el, join
from sandbox.reports.run_page import Media
from sandbox.ui.requests import Runs, Wish, captions_of

FONTS = ["system-ui", "sans-serif"]  # of the machine: the page asks no other server for one
P = ParamSpec("P")
T = TypeVar("T")
Upload = dict[str, Any] | None  # what gradio says of a file; it has looked that it was uploaded
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
    """The page's address while it answers. Its files lie in a folder of its own, then removed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gradio.themes import Default

    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="sandbox-ui-") as own:
        os.environ["GRADIO_TEMP_DIR"] = own  # uploads, too
        page = blocks(Answers(runs, Path(own)), begin)
        try:
            page.queue(default_concurrency_limit=1).launch(
                server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
                prevent_thread_lock=True, show_error=True, ssr_mode=False, footer_links=["api"],
                theme=Default(font=FONTS, font_mono=MONO), css=CSS, mcp_server=False,
                enable_monitoring=False, max_file_size="32mb", pwa=False,
            )  # fmt: skip
            yield page.local_url
        except OSError as e:
            raise ConfigError(f"task.host={host} task.port={port}: cannot be had ({e})") from e
        finally:
            page.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


# --- answers --------------------------------------------------------------------------------------


def told(answer: Callable[P, T]) -> Callable[P, T]:
    """`answer`, whose errors the page and its clients show."""

    @wraps(answer)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        import gradio as gr

        try:
            return answer(*args, **kwargs)
        except SandboxError as e:
            said = escape(mask_text(str(e)), quote=False).replace("\n", "<br>")
            raise gr.Error(said, duration=30, print_exception=False) from e

    return call


class Answers:
    """What the page's buttons do; each call of `sample` has a folder of its own below `own`."""

    def __init__(self, runs: Runs, own: Path) -> None:
        self.runs, self.own = runs, own

    def sample(
        self, run: str | None, weights: str, beside: str | None, beside_weights: str,
        prompts: str | None, image: Upload, end_image: Upload, sampler: str | None,
        steps: str | None, guidance: str | None, frames: str | None, height: str | None,
        width: str | None, seed: str | None, progress: Callable[..., Any],
    ) -> tuple[str, list[str], str]:  # fmt: skip
        """Table of clips, a column for each run; their files, and the commands that make them."""
        ends = {"images": image, "end_images": end_image}
        files = {name: (file["path"],) for name, file in ends.items() if file and file["path"]}
        first = Wish(
            run or "", weights, captions_of(prompts), sampler=sampler or None,
            steps=number("steps", steps), guidance=number("guidance", guidance, float),
            frames=number("frames", frames), height=number("height", height),
            width=number("width", width), seed=number("seed", seed), **files,
        )  # fmt: skip
        wishes = [first]
        if beside:
            wishes.append(replace(first, run=beside, weights=beside_weights))
        for wish in wishes:  # a wrong second one is told before the first is made
            self.runs.chosen(wish.run)
            wish.overrides()
        columns: dict[str, list[Path]] = {}
        for i, wish in enumerate(wishes):
            name = f"{wish.run} ({wish.weights})"
            progress(i / len(wishes), desc=f"loading {name}")

            def watch(done: int, total: int, i: int = i, name: str = name) -> None:
                progress((i + done / total) / len(wishes), desc=f"{name}: call {done} of {total}")

            to = Path(tempfile.mkdtemp(prefix="clips-", dir=self.own))
            columns[f"{name}{' ' * (name in columns)}"] = self.runs.make(wish, to, watch)
        commands = "\n".join(dict.fromkeys(self.runs.command(wish) for wish in wishes))
        made = [str(file) for column in columns.values() for file in column]
        return table(first.prompts, columns), made, mask_text(commands)

    def browse(self, page: str | None) -> str:
        """A report, which may run no script here, and samples of its runs."""
        if not page:
            return ""
        source, samples = self.runs.report(page)
        frame = el("iframe", srcdoc=source, sandbox="", class_="report", title=page)
        rows = [
            el("tr", el("th", run), *(el("td", _shown(file, file.stem)) for file in files))
            for run, files in samples.items()
        ]
        return join(frame, el("table", *rows, class_="clips"))


def number(name: str, said: str | None, kind: Callable[[str], Any] = int) -> Any:
    """The number in a field; None where it is empty. Raises ConfigError."""
    if not said or not said.strip():
        return None
    try:
        return kind(said)
    except ValueError:
        want = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name}={said!r}: want {want}, or nothing") from None


def table(prompts: Sequence[str], columns: dict[str, list[Path]]) -> Markup:
    """A row for each prompt, a column for each run: the same prompt and noise side by side."""
    rows = [el("tr", el("th"), *(el("th", name) for name in columns))]
    for i, files in enumerate(zip(*columns.values(), strict=True)):
        caption = prompts[i] if i < len(prompts) else ""
        cells = [el("td", _shown(file, caption)) for file in files]
        rows.append(el("tr", el("th", caption), *cells))
    return el("table", *rows, class_="clips")


def _shown(file: Path, caption: str) -> Markup:
    return Media(file.parent).show(file, caption)


# --- the page -------------------------------------------------------------------------------------


def blocks(answers: Answers, begin: str | None) -> Any:
    """The page: a tab to sample and compare, and one for reports."""
    import gradio as gr

    with gr.Blocks(title="Latent video sandbox", analytics_enabled=False) as page:
        gr.Markdown(f"## Latent video sandbox\n`{answers.runs.folder}`")
        with gr.Tab("Sample"):
            run, beside, shown = _sample_tab(answers, begin)
        with gr.Tab("Reports"):
            reports = _report_tab(answers)

        def again() -> tuple[Any, ...]:
            names = answers.runs.names()
            one = begin if begin in names else next(iter(names), None)
            lists = gr.Dropdown(choices=names, value=one), gr.Dropdown(choices=["", *names])
            said = answers.runs.about(one) if one else ""
            pages = gr.Dropdown(choices=answers.runs.pages())
            return *lists, said, *inputs(answers.runs, one), pages

        page.load(told(again), outputs=[run, beside, *shown, reports], api_visibility="private")
    return page


def inputs(runs: Runs, name: str | None) -> tuple[Any, ...]:
    """The place for images, and a field for each that a run is told.

    Fields of others are emptied, for what is not seen must not be sent.
    """
    import gradio as gr

    wanted = runs.images(name) if name else ()
    images = (gr.Image(visible=True) if end in wanted else gr.Image(visible=False, value=None)
              for end in ("start", "end"))  # fmt: skip
    return gr.Accordion(visible=bool(wanted)), *images


def _sample_tab(answers: Answers, begin: str | None) -> tuple[Any, Any, list[Any]]:
    """Makes the tab; the lists of runs, and what the first of them changes."""
    import gradio as gr

    def choose(label: str, names: Sequence[str], value: str | None) -> tuple[Any, Any]:
        with gr.Row():
            run = gr.Dropdown(names, value=value, label=label, allow_custom_value=True, scale=3)
            weights = gr.Radio(["ema", "live"], value="ema", label="weights", min_width=140)
        return run, weights

    def picture(label: str) -> Any:
        return gr.Image(label=label, sources=["upload"], height=200)

    def field(label: str) -> Any:
        # not gr.Number, which takes an empty field for 0
        return gr.Textbox("", label=label, min_width=80, max_lines=1)

    names = answers.runs.names()
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            run, weights = choose("run", names, begin)
            about = gr.Markdown()
            beside, beside_weights = choose("compare with (may be empty)", ["", *names], None)
            prompts = gr.Textbox(label="prompts, one a line", lines=3)
            with gr.Accordion("images that the run is told", visible=False) as images, gr.Row():
                image, end_image = picture("first frame"), picture("last frame")
            gr.Markdown("An empty field is what the run says.")
            with gr.Row():
                samplers = discovery.options("sampler")
                sampler = gr.Dropdown(["", *samplers], value="", label="sampler", min_width=120)
                steps, guidance = field("steps"), field("guidance")
            with gr.Row():
                frames, height, width = field("frames"), field("height"), field("width")
            with gr.Row():
                seed = field("seed")
                dice = gr.Button("dice", min_width=60)
            go = gr.Button("Generate", variant="primary")
        with gr.Column(scale=3, min_width=480):
            clips = gr.HTML(label="clips", min_height=240)
            command = gr.Code(label="command", language="shell", interactive=False)
            files = gr.Files(label="files", interactive=False)

    @told
    def sample(
        run, weights, beside, beside_weights, prompts, image, end_image, sampler, steps, guidance,
        frames, height, width, seed, progress=gr.Progress(),  # noqa: B008
    ):  # fmt: skip
        return answers.sample(
            run, weights, beside, beside_weights, prompts, image, end_image, sampler, steps,
            guidance, frames, height, width, seed, progress,
        )  # fmt: skip

    asked = [run, weights, beside, beside_weights, prompts, image, end_image, sampler, steps,
             guidance, frames, height, width, seed]  # fmt: skip
    # not preprocess: gradio would open the images, and tell of its own insides where they are none
    go.click(sample, asked, [clips, files, command], preprocess=False, api_name="sample",
             concurrency_limit=1)  # fmt: skip
    dice.click(lambda: str(random.randrange(2**31)), outputs=seed, api_visibility="private")
    run.change(told(lambda name: answers.runs.about(name) if name else ""), run, about,
               api_name="about")  # fmt: skip
    asks = [images, image, end_image]
    run.change(told(lambda name: inputs(answers.runs, name)), run, asks, api_visibility="private")
    return run, beside, [about, *asks]


def _report_tab(answers: Answers) -> Any:
    """Makes the tab; the list of reports."""
    import gradio as gr

    page = gr.Dropdown(answers.runs.pages(), value=None, label="report", allow_custom_value=True)
    shown = gr.HTML(label="report", min_height=240)
    page.change(told(answers.browse), page, shown, api_name="report")
    return page
