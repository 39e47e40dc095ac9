"""The page of all keys is that of the declarations."""

from __future__ import annotations

import importlib.util

from pages import ROOT


def test_the_page_is_made_from_the_declarations() -> None:
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python docs/configuration.py"
