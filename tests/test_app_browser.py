"""The app in a real browser: JupyterLab and Voila, by keyboard and mouse, light and dark, wide and narrow."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

import shardkit
from tests.fake_loads import fake_comparison

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def write_notebook(path: Path, code: str) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = {"cell_type": "code", "id": "app", "metadata": {}, "execution_count": None, "outputs": []}
    document = {"cells": [cell | {"source": code}], "metadata": {"kernelspec": kernel}}
    path.write_text(json.dumps(document | {"nbformat": 4, "nbformat_minor": 5}))


@contextmanager
def serving(folder: Path, *command: str) -> Iterator[str]:
    """Run a Jupyter server in a folder, its own settings beside it, and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = folder.with_name(f"{folder.name}-home")
    places = ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    own = {place: str(home / place.lower()) for place in (*places, "JUPYTERLAB_SETTINGS_DIR")}
    settings = Path(own["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", "apputils-extension")
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, f"--port={port}", "--no-browser"],
            cwd=folder,
            env={**os.environ, **own, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(f"{address}/api"), 60, lambda: (home / "log").read_text())
        yield address
    finally:
        server.terminate()  # which also ends its kernels
        server.wait(30)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError as error:
        return getattr(error, "code", 0) in (403, 404)


def wait_until(done: Callable[[], Any], seconds: float, told: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, told()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip("needs chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("lab")
    options = ("--IdentityProvider.token=open", "--allow-root", "--expose-app-in-browser")
    with serving(folder, "jupyterlab", *options) as address:
        yield address, folder


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose console stays free of errors; what Voila fetches from elsewhere is Voila's own."""
    with browser.new_context(viewport={"width": 1280, "height": 3600}) as context:
        page, errors = context.new_page(), []

        def told(message: ConsoleMessage) -> None:
            if message.type == "error" and "//127.0.0.1" in message.location.get("url", "//127.0.0.1"):
                errors.append(message.text)

        page.on("console", told)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        assert errors == []


class App:
    """The app on a page, as somebody who looks at it finds it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.root = page.locator(".sk-app")
        self.choose, self.plan, self.shard, self.compare = (page.locator(".sk-step").nth(n) for n in range(4))
        expect(self.root).to_be_visible(timeout=60_000)
        expect(self.compare.locator(".sk-later")).to_be_visible()

    def pick(self, label: str, option: str) -> None:
        self.root.get_by_role("combobox", name=label).select_option(label=option)

    def open_demo(self) -> None:
        press(self.choose, "demo, 64 MB")
        ends_well(self.choose)

    def is_tidy(self) -> None:
        """Nothing scrolls inside or sticks out, all has the same edges, and one button is blue at most."""
        scrolls, edges, primary = self.root.evaluate(
            """app => {
            const shown = [...app.querySelectorAll('*')].filter(one => one.checkVisibility());
            const scrolls = [app, ...shown].filter(one => !one.closest('input, .sk-strip, .slider')
              && /auto|scroll|visible/.test(getComputedStyle(one).overflow) && one.clientWidth
              && (one.scrollWidth - one.clientWidth > 1 || (one.scrollHeight - one.clientHeight > 1
              && /auto|scroll/.test(getComputedStyle(one).overflowY)))).map(one => one.className);
            const rows = shown.filter(one => one.matches('.sk-body > :not(.sk-buttons, .sk-examples)'));
            const edges = rows.map(row => row.getBoundingClientRect()).map(({left, right}) => [left, right]);
            return [scrolls, edges, app.querySelectorAll('.mod-primary').length]}"""
        )
        assert scrolls == []
        assert len({tuple(map(round, edge)) for edge in edges}) == 1
        assert primary <= 1

    def focused(self) -> str:
        """What has the focus: its label or text."""
        found: str = self.page.evaluate(
            """() => { const at = document.activeElement;
            return at.getAttribute('aria-label') || at.labels?.[0]?.innerText || at.innerText
            || at.tagName; }"""
        )
        return found.strip()


def unfold(step: Locator) -> None:
    step.locator("summary").last.click()


def press(step: Locator, name: str) -> None:
    step.get_by_role("button", name=name, exact=True).click()


def ends_well(step: Locator, seconds: float = 60) -> None:
    expect(step.locator(".sk-done, .sk-error")).to_be_visible(timeout=1000 * seconds)
    expect(step.locator(".sk-done")).to_be_visible()
    expect(step.get_by_role("button", name="…")).to_have_count(0)  # and it may be started again


def open_in_lab(page: Page, lab: tuple[str, Path], name: str, code: str) -> App:
    """Open a notebook of its own, which has a kernel of its own."""
    address, folder = lab
    write_notebook(folder / f"{name}.ipynb", code)
    page.goto(f"{address}/lab/tree/{name}.ipynb?token=open&reset")
    cell, prompt = page.locator(".jp-Notebook .cm-content").first, page.locator(".jp-InputPrompt").first
    cell.click()
    expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible(timeout=60_000)
    for _ in range(6):  # a kernel that still connects is shown as idle, and overlooks what it is sent
        cell.click()
        page.keyboard.press("Shift+Enter")
        with suppress(AssertionError):
            expect(prompt).not_to_have_text(re.compile(r"\[ ?\]:?"), timeout=10_000)
            break
    return App(page)


def look(app: App, folder: Path, name: str) -> None:
    """Keep pictures in both themes and widths for people to look at."""
    app.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    for theme in ("Light", "Dark"):
        app.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})",
            f"JupyterLab {theme}",
        )
        for width in (1280, 800, 480):
            app.page.set_viewport_size({"width": width, "height": 3600})
            app.page.wait_for_timeout(500)
            app.is_tidy()
            app.root.screenshot(path=folder / f"{name}-{theme.lower()}-{width}.png")


# Where the page is what matters: one test below shards and compares in full.
QUICK = """\
from tests.fake_loads import load_nothing
from tests.unasked import ask_no_models

ask_no_models()
load_nothing()
"""


def code(**settings: object) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"import shardkit\nshardkit.ShardApp({given})"


SLOW_DISK = """\
import time
from shardkit.shard import engine as write

real = write.run_task
write.run_task = lambda task: (time.sleep(0.25), real(task))[1]
"""


def test_by_mouse_through_all_four_steps(page, lab, tmp_path):
    app = open_in_lab(page, lab, "mouse", code(repeats=2, destination="by-mouse"))
    assert app.root.bounding_box()["height"] < 700
    app.open_demo()
    app.pick("Dtype of shards", "float16")
    expect(app.choose.locator(".sk-ways")).to_contain_text("these shards, in float16", timeout=60_000)
    press(app.shard, "Shard")
    ends_well(app.shard)
    expect(app.compare.get_by_text(re.compile(r"^about \d+ s for 2 pairs"))).to_be_visible()
    press(app.compare, "Compare")
    expect(app.compare.locator(".sk-tile")).to_have_count(3, timeout=200_000)
    expect(app.compare.get_by_role("button", name="Comparing…")).to_be_visible()
    unfold(app.compare)
    ends_well(app.compare, 400)
    expect(app.compare.locator("img.sk-picture")).to_be_visible()  # it stays unfolded, though written again
    for name in ("comparison.json", "comparison.png", "comparison.html"):
        with page.expect_download() as download:
            app.compare.get_by_role("link", name=name).click()
        download.value.save_as(tmp_path / name)
    assert shardkit.Comparison.load(tmp_path / "comparison.json").samples
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    look(app, tmp_path, "compared")


def test_by_keyboard_alone(page, lab):
    app = open_in_lab(page, lab, "keyboard", QUICK + code(repeats=1, destination="by-keyboard"))
    app.root.get_by_role("combobox", name="Checkpoint").focus()

    def go_to(label: str) -> None:
        for _ in range(12):
            if app.focused().startswith(label):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"{label!r} cannot be reached: the focus is on {app.focused()[:80]!r}")

    page.keyboard.type("mistral-demo-64MB")
    page.keyboard.press("Enter")
    ends_well(app.choose)
    assert app.focused().startswith("Checkpoint")
    files = app.plan.locator(".sk-label").last
    before = files.inner_text()
    go_to("Max shard size")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("1 GB")
    page.keyboard.press("Tab")
    expect(files).to_contain_text("planned: 1 file")
    assert app.focused().startswith("Max shard size")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    expect(files).not_to_contain_text("planned: 1 file")
    assert files.inner_text() != before
    go_to("Dtype of shards")
    page.keyboard.press("ArrowDown")
    expect(app.choose.locator(".sk-ways")).to_contain_text("these shards, in float16", timeout=60_000)
    go_to("Details and files")
    page.keyboard.press("Enter")
    expect(app.plan.locator("details")).to_contain_text("cast to float16")
    go_to("Shard")
    page.keyboard.press("Space")
    ends_well(app.shard)
    assert app.focused() == "Shard", "a button that was pressed keeps the focus"
    for label in ("Cancel", "Load dtype", "Pairs of loads", "Page cache"):
        go_to(label)
    go_to("Compare")
    page.keyboard.press("Enter")
    ends_well(app.compare, 400)
    go_to("Details")
    page.keyboard.press("Enter")
    go_to("Download comparison.json")
    assert outlined(app.page), "what has the focus shows it"


def outlined(page: Page) -> bool:
    """Whether what has the focus has an outline that stands out from light and dark."""
    found = page.evaluate(
        "() => { const at = getComputedStyle(document.activeElement);"
        "return [at.outlineStyle, at.outlineWidth, at.outlineColor] }"
    )
    return bool(found == ["solid", "2px", "rgb(30, 136, 229)"])


def go_wrong(app: App, text: str) -> None:
    app.root.get_by_role("combobox", name="Checkpoint").fill(text)
    press(app.choose, "Open")
    expect(app.choose.get_by_role("alert")).to_contain_text(text)


def test_wrong_name_cancel_in_the_middle_and_second_click(page, lab, tmp_path):
    slow = QUICK + SLOW_DISK + code(max_shard_size="300KB", destination="cancelled")
    app = open_in_lab(page, lab, "wrong", slow)
    go_wrong(app, "no/such/model")
    look(app, tmp_path, "wrong")
    page.set_viewport_size({"width": 1280, "height": 3600})
    go_wrong(app, "<img src=x onerror=console.error(1)>")
    expect(app.root.locator("script, img")).to_have_count(0)
    expect(app.shard.get_by_role("button")).to_have_count(0)
    app.open_demo()
    press(app.shard, "Shard")
    expect(app.shard.get_by_role("status")).to_contain_text("/s, ", timeout=20_000)
    for _ in range(3):
        press(app.shard, "Sharding…")
        press(app.choose, "Open")
    expect(app.choose.get_by_role("status")).to_contain_text("Another step is running")
    expect(app.root.get_by_role("combobox", name="Strategy")).to_be_disabled()
    look(app, tmp_path, "busy")
    press(app.shard, "Cancel")
    expect(app.shard.get_by_role("status")).to_contain_text("Stopped.", timeout=1500)
    press(app.shard, "Shard")
    ends_well(app.shard)
    expect(app.shard.locator(".sk-done")).to_contain_text("of the interrupted run")


def test_in_voila(page, tmp_path):
    folder = tmp_path / "voila"
    folder.mkdir()
    write_notebook(folder / "app.ipynb", QUICK + code(repeats=1))
    with serving(folder, "voila", "app.ipynb", "--theme=dark") as address:
        page.goto(address)
        app = App(page)
        app.open_demo()
        app.pick("Dtype of shards", "float16")
        press(app.shard, "Shard")
        ends_well(app.shard)
        press(app.compare, "Compare")
        ends_well(app.compare, 400)
        app.is_tidy()
        unfold(app.compare)
        app.root.screenshot(path=tmp_path / "voila.png")
        with page.expect_download() as download:
            app.compare.get_by_role("link", name="comparison.html").click()
        assert "html" in Path(download.value.path()).read_text()


def test_columns_of_text_are_left_aligned_on_the_page_that_nbconvert_makes(browser):
    shown = nbformat.v4.new_output("display_data", {"text/html": fake_comparison()._repr_html_()})
    cell = nbformat.v4.new_code_cell(outputs=[shown])
    html, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    tab = browser.new_page()
    tab.route("http*://**", lambda route: route.abort())
    tab.set_content(html)
    script = "cells => cells.map(cell => getComputedStyle(cell).textAlign)"
    assert set(tab.locator(".shardkit .sk-text").evaluate_all(script)) == {"left"}
    assert "right" in tab.locator(".shardkit td").evaluate_all(script)
    tab.close()
