"""The page of task=ui, served by its command: in a real browser, and for scripts."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from shutil import which

import av
import pytest

from sandbox import compose, train
from tests.command import CHECKOUT
from tests.helpers import TINY

pytestmark = pytest.mark.slow
PATIENCE = 300_000  # ms; only a hang takes this long
CHROMIUM = which("chromium") or which("chromium-browser")
PROMPTS = "a red 3 moving left\na blue 7 moving up"
SMALL = ("task.score_clips=2", "task.samples=1", "task.untrained=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """The folder of runs, and the names of two runs in it."""
    out = tmp_path_factory.mktemp("runs")
    roots = [compose(*TINY, *SMALL, f"seed={seed}", "checkpoint.every=1") for seed in (0, 1)]
    made = [train(replace(r, out=str(out), cache=str(out / "cache"))) for r in roots]
    (out.parent / "secret.txt").write_text("not of this page")
    return [str(out), *(run.name for run in made)]


@pytest.fixture(scope="module")
def of_images(runs) -> str:
    """The name of a run in the same folder that is conditioned on the first and last frames."""
    words = ("experiment=dynamicrafter_512_interp_tiny", "vae.weights=null", "callbacks=[]",
             "sampler.steps=2", "data.batch_size=1", "trainer.accumulate=1", "trainer.threads=1",
             "logger=null", "steps=1")  # fmt: skip
    root = compose(*words, *SMALL)
    return train(replace(root, out=runs[0], cache=f"{runs[0]}/cache")).name


@pytest.fixture(scope="module")
def image_files(tmp_path_factory) -> list[str]:
    """Files: a red image, a blue image, and one that is no image."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for name in ("red", "blue"):
        Image.new("RGB", (40, 30), name).save(folder / f"{name}.png")
    (folder / "text.png").write_text("not an image")
    return [str(folder / f"{name}.png") for name in ("red", "blue", "text")]


@pytest.fixture(scope="module")
def address(runs) -> Iterator[str]:
    """The address of the page, served by the command."""
    words = [sys.executable, "-u", "run.py", "task=ui", f"run={runs[0]}/{runs[1]}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, env=env
    ) as server:
        assert server.stdout is not None
        said = [*takewhile(lambda line: not line.startswith("runs"), server.stdout)]
        try:
            yield next(line.split()[1] for line in said if line.startswith("page"))
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=300)


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 300})


@pytest.fixture(scope="module")
def page(address):
    """The page in headless Chromium, without access to other machines."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.elsewhere = []

        def only_here(route) -> None:
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                page.elsewhere.append(route.request.url)
                route.abort()

        page.route("**/*", only_here)
        page.goto(address)
        page.get_by_role("button", name="Generate").wait_for()
        yield page
        browser.close()


# --- in a browser ---------------------------------------------------------------------------------


def videos_after(page, count: int) -> list[dict]:
    """Waits for `count` clips and returns what the browser decoded."""
    page.wait_for_function(
        "n => {const v = [...document.querySelectorAll('.clips video')];"
        " return v.length === n && v.every(x => x.readyState >= 2)}",
        arg=count,
    )
    return page.eval_on_selector_all(
        ".clips video", "vs => vs.map(v => ({s: v.duration, w: v.videoWidth, h: v.videoHeight}))"
    )


def test_a_page_makes_a_video_for_each_prompt(page, runs):
    page.get_by_text("9 frames of 16 x 16").wait_for()  # of the initial run
    page.get_by_label("prompts").fill(PROMPTS)
    page.get_by_label("seed").fill("5")
    page.get_by_role("button", name="Generate").click()
    for video in videos_after(page, 2):
        assert video["s"] == pytest.approx(9 / 8, abs=0.02)  # 9 frames at 8 a second
        assert video["w"] == video["h"] >= 160
    command = page.locator(".cm-content").inner_text()
    assert "seed=5" in command
    assert runs[1] in command


def test_the_dice_button_sets_a_random_seed(page):
    from playwright.sync_api import expect

    page.get_by_label("seed").fill("")
    page.get_by_role("button", name="random").click()
    expect(page.get_by_label("seed")).to_have_value(re.compile(r"^\d+$"))


def test_two_runs_are_shown_side_by_side(page, runs):
    page.get_by_label("compare with").fill(runs[2])
    page.get_by_label("compare with").press("Enter")
    page.get_by_role("button", name="Generate").click()
    videos_after(page, 4)
    heads = page.locator(".clips tr").first.inner_text()
    assert runs[1] in heads
    assert runs[2] in heads


def test_a_wrong_input_is_reported_and_the_page_still_works(page):
    page.get_by_label("frames").fill("-3")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("frames=-3").first.wait_for()
    page.get_by_label("frames").fill("")
    page.get_by_role("button", name="Generate").click()
    videos_after(page, 4)


def test_an_image_conditioned_run_has_image_fields(page, runs, of_images, image_files):
    from playwright.sync_api import expect

    run, upload = page.get_by_label("run", exact=True), page.locator("input[type=file]")
    page.reload()
    page.get_by_text("9 frames of 16 x 16").wait_for()
    expect(page.get_by_text("first frame")).to_be_hidden()
    page.get_by_label("prompts").fill(PROMPTS)
    run.fill(of_images)
    run.press("Enter")
    page.get_by_text("last frame").wait_for()
    for i, file in enumerate(image_files[:2]):
        upload.nth(i).set_input_files(file)
    page.locator("img[src*='blue']").wait_for()
    page.get_by_role("button", name="Generate").click()
    videos_after(page, 2)
    run.fill(runs[1])  # not conditioned on images: the earlier ones are not used
    run.press("Enter")
    expect(page.get_by_text("first frame")).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("columnheader", name=runs[1]).wait_for()
    videos_after(page, 2)


def test_reports_are_shown_with_samples(page, runs):
    page.get_by_role("tab", name="Reports").click()
    page.get_by_label("report", exact=True).fill(f"{runs[1]}/report.html")
    page.get_by_label("report", exact=True).press("Enter")
    page.frame_locator("iframe.report").get_by_text("Run report").wait_for()
    page.locator(".clips video:visible").first.wait_for()


def test_the_page_contacts_no_other_server(page):
    assert page.elsewhere == []


# --- for scripts ----------------------------------------------------------------------------------


def asked(client, run: str, *, weights="ema", other=None, prompts=PROMPTS, **named):
    return client.predict(
        run=run, weights=weights, other=other, other_weights="live", prompts=prompts,
        api_name="/sample", **{"image": None, "end_image": None, **named},
    )  # fmt: skip


def test_a_script_gets_files_that_hold_the_frames(client, runs):
    _, files, command = asked(client, runs[1], steps="1", sampler="heun")
    assert len(files) == 2
    for file in files:
        with av.open(file) as video:
            assert sum(1 for _ in video.decode(video=0)) == 9
    assert "sampler=heun" in command
    assert "sampler.steps=1" in command


def test_a_script_gets_a_video_between_two_images(client, of_images, image_files):
    from gradio_client import handle_file

    red, blue, _ = map(handle_file, image_files)
    # its first stage and CLIP are random, drawn from the run's seed, not from this one
    _, files, command = asked(client, of_images, image=red, end_image=blue, seed="3")
    assert len(files) == 2
    for file in files:
        with av.open(file) as video:
            assert sum(1 for _ in video.decode(video=0)) == 5
    assert 'images=["red.png"]' in command
    assert 'end_images=["blue.png"]' in command


@pytest.mark.parametrize(
    ("said", "image", "end_image"),
    [
        ("needs the end image; give one file", 0, None),
        ("needs the start image; give one file", None, 1),
        ("cannot be read as an image", 2, 1),
    ],
)
def test_a_wrong_image_is_reported_to_a_script(
    client, of_images, image_files, said, image, end_image
):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    chosen = [None if i is None else handle_file(image_files[i]) for i in (image, end_image)]
    with pytest.raises((AppError, ValueError), match=re.escape(said)):
        asked(client, of_images, image=chosen[0], end_image=chosen[1])


def test_the_displayed_command_makes_the_same_clips(client, runs, tmp_path):
    import shlex

    _, files, command = asked(client, f"{runs[1]}@1", weights="live", seed="3")
    words = [sys.executable, *shlex.split(command)[1:], f"to={tmp_path}"]
    subprocess.run(words, cwd=CHECKOUT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    made = sorted(tmp_path.glob("*.mp4"))
    assert [p.read_bytes() for p in made] == [Path(f).read_bytes() for f in files]


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("'../secret.txt': not in the folder", {"run": "../secret.txt"}),
        ("'/etc': not in the folder", {"run": "/etc"}),
        ("no such run", {"run": "none"}),
        ("task.step=7", {"run": "RUN@7"}),
        ("does not use this image", {"run": "RUN", "image": "PICTURE"}),
        ("sampler.steps", {"run": "RUN", "steps": "0"}),
        ("guidance_scale", {"run": "RUN", "guidance": "-1"}),
        ("seed='${oc.env:HOME}': want an integer", {"run": "RUN", "seed": "${oc.env:HOME}"}),
        ("../x", {"run": "RUN", "sampler": "../x"}),
    ],
)
def test_a_wrong_input_is_reported_to_a_script(client, runs, image_files, said, named):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    named = {k: v.replace("RUN", runs[1]) if k == "run" else v for k, v in named.items()}
    if "image" in named:
        named["image"] = handle_file(image_files[0])
    with pytest.raises((AppError, ValueError), match=re.escape(said)):
        asked(client, **named)


def test_no_request_can_read_other_files(address, runs):
    secret = Path(runs[0]).parent / "secret.txt"
    inside = Path(runs[0]) / runs[1] / "config.yaml"
    for path in (secret, inside, Path("/etc/passwd"), CHECKOUT / "pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_an_image_that_was_not_uploaded_is_refused(address, runs):
    body = json.dumps(
        {"data": [runs[1], "ema", None, "ema", "", {"path": "/etc/passwd",
         "meta": {"_type": "gradio.FileData"}}, *(None,) * 8]}
    ).encode()  # fmt: skip
    ask = urllib.request.Request(
        f"{address}gradio_api/call/sample", body, {"Content-Type": "application/json"}
    )
    event = json.load(urllib.request.urlopen(ask))["event_id"]
    answer = urllib.request.urlopen(f"{address}gradio_api/call/sample/{event}").read().decode()
    assert "event: error" in answer
    assert "root:" not in answer


def test_a_system_is_freed_after_its_clips_are_made(runs, tmp_path):
    from sandbox.ui.requests import Request, Runs

    def systems() -> int:
        gc.collect()  # frees what the training of `runs` left
        return sum(type(x).__name__ == "LatentDiffusion" for x in gc.get_objects())

    seen: list[int] = []
    before = systems()
    request = Request(runs[1], prompts=("a red 3 moving left",))
    files = Runs(Path(runs[0])).make(request, tmp_path, lambda done, total: seen.append(systems()))
    assert len(files) == 1
    assert seen and set(seen) == {before + 1}
    assert systems() == before


def test_it_listens_on_localhost_only(address):
    assert address.startswith("http://127.0.0.1:")
