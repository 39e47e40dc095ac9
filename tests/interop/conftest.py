"""Random parameters without any 0 or 1, so that a dropped tensor is detected; a folder to push; a browser."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from tclip_jax.data.images import Preprocess
from tclip_jax.interop.demo_page import CDN, find_runtime
from tclip_jax.interop.export import export_model
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tests.interop.browser import CONFIG, SOFTWARE, Open, Page, chromium, draw_params, served

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def random_params() -> Callable[[CLIPConfig], dict[str, Any]]:
    def draw(config: CLIPConfig) -> dict[str, Any]:
        rng = np.random.default_rng(0)

        def leaf(path: tuple[jax.tree_util.DictKey, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
            mean = 1.0 if path[-1].key in ("scale", "logit_scale") else 0.0
            return mean + 0.1 * rng.standard_normal(shape.shape, np.float32)

        return jax.tree_util.tree_map_with_path(leaf, param_shapes(config))

    return draw


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two large files, two small ones in a folder of their own, and a card."""
    root = tmp_path / "release"
    (root / "stablehlo").mkdir(parents=True)
    (root / "README.md").write_text("---\ntags: [clip]\n---\n# Model\n")
    (root / "config.json").write_text("{}\n")
    (root / "stablehlo" / "load.py").write_text("import jax\n")
    for seed, name in enumerate(("model.safetensors", "open_clip_model.safetensors")):
        array = np.random.default_rng(seed).standard_normal(1000, np.float32)
        safetensors.numpy.save_file({"w": array}, root / name)
    return root


@pytest.fixture(scope="session")
def npm() -> pathlib.Path:
    """A folder with onnxruntime-web in node_modules."""
    try:
        find_runtime(ROOT)
    except ValueError as error:
        pytest.skip(f"no onnxruntime-web: {error}")
    return ROOT


@pytest.fixture(scope="session")
def demo_params() -> dict[str, Any]:
    return draw_params(CONFIG)


@pytest.fixture(scope="session")
def demo(npm: pathlib.Path, demo_params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An export with the page, of a model that takes digits."""
    pytest.importorskip("onnx", reason="the onnx package is not installed (pip install -e '.[onnx]')")
    out = tmp_path_factory.mktemp("demo") / "demo"
    same: dict[str, Any] = {"config": CONFIG, "preprocess": Preprocess(32), "params": demo_params}
    provenance = {"data": {"source": "digits"}}
    export_model(out, **same, formats=["onnx"], demo=True, demo_runtime=npm, provenance=provenance)
    return out


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    path = chromium()
    with playwright.sync_playwright() as api:
        launched = api.chromium.launch(executable_path=path, args=SOFTWARE)
        yield launched
        launched.close()


def fulfill(route: Any, **answer: Any) -> None:
    route.fulfill(**answer)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens index.html of a folder. Errors of its scripts fail the test."""
    errors: list[str] = []
    with contextlib.ExitStack() as stack:

        def opened(
            folder: pathlib.Path, *, script: str = "", cdn: pathlib.Path | None = None, load: bool = True
        ) -> Page:
            url = stack.enter_context(served(folder))
            context = browser.new_context()
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.add_init_script(script)
            if cdn:
                headers = {"access-control-allow-origin": "*"}
                for file in cdn.glob("ort*"):
                    page.route(f"{CDN}{file.name}", functools.partial(fulfill, path=file, headers=headers))
            if not load:  # scripts alone, to call them
                page.route("**/main.js", lambda route: route.fulfill(body="", content_type="text/javascript"))
            page.goto(url)
            if load:
                page.wait_for_selector(".card, .problem, .empty")
            return page

        yield opened
    assert not errors
