"""Chromium with the page of an export: what the tests of the page share."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tests.interop import model_shapes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = CLIPConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=(32, 32), patch_size=8, width=64, layers=2, head_width=32),
    text=TextConfig(context_length=16, vocab_size=49408, width=64, heads=2, layers=2),
)
# Chromium has WebGL and WebGPU without a graphics card only by software, on request.
SOFTWARE = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")

Page = Any
Open = Callable[..., Page]


def draw_params(config: CLIPConfig, deviation: float = 0.1) -> dict[str, Any]:
    """Random parameters whose probabilities are neither even nor certain."""
    params = model_shapes.draw_params(config, model_shapes.RULES["Q-ALL"], deviation=deviation)
    return {**params, "logit_scale": np.float32(np.log(20))}


@contextlib.contextmanager
def served(folder: pathlib.Path, asked: list[str] | None = None) -> Iterator[str]:
    """Serves a folder, and adds the paths that were asked for to a list."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            if asked is not None:
                asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def png(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "PNG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Waves, edges and noise: all that a wrong filter would change."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [128 + 90 * np.sin(x / (5 + c)) * np.cos(y / (9 - c)) for c in range(channels)]
    pixels = np.stack(planes, -1) + rng.normal(0, 25, (height, width, channels))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, channels)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def shown(page: Page, card: str = "#pictures .card") -> list[list[str]]:
    """The texts of each card: its name, its rank, and the label and value of each bar."""
    return page.locator(card).evaluate_all(
        "cards => cards.map(c => [...c.querySelectorAll('span')].map(s => s.textContent))"
    )


def chromium() -> str:
    """The path of the browser; skips if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    return path or pytest.skip(f"no browser: none of {', '.join(names)} is installed (apt-get install chromium)")


def run_alone(folder: pathlib.Path, profile: pathlib.Path, until: str) -> list[int]:
    """Open a page without a debugger until it asks for a path; return the peak memory of each renderer, in bytes."""
    asked: list[str] = []
    with served(folder, asked) as url:
        options = ("--headless=new", "--no-sandbox", f"--user-data-dir={profile}", "--window-size=1280,900")
        process = subprocess.Popen(
            [chromium(), *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 600
            while until not in asked:
                assert time.monotonic() < deadline, asked
                time.sleep(0.1)
            renderers = [
                each
                for each in pathlib.Path("/proc").glob("[0-9]*")
                if str(profile).encode() in (command := read(each / "cmdline")) and b"--type=renderer" in command
            ]
            return sorted(1024 * int(re.findall(rb"VmHWM:\s+(\d+)", read(each / "status"))[0]) for each in renderers)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def read(path: pathlib.Path) -> bytes:
    """The content of a file of /proc; nothing if the process has ended."""
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def settled(page: Page, expression: str) -> None:
    """Waits until an expression of JavaScript holds, without the eval that the page forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"not within a minute: {expression}; {page.locator('body').inner_text()}")
