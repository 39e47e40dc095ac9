"""Every command in README and docs/ is one that the program takes: options, recipes, overrides, benchmarks.

This is all that is asked of blocks without a language and of `console`; `bash` and `python` are run by test_pages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pathlib
import re

import pytest
from pages import FILE, PAGES, ROOT, blocks, commands

from tclip_jax.cli import COMMANDS, main
from tclip_jax.recipes import load_recipe, override
from tclip_jax.registry import PLUGINS
from tclip_jax.runs.config import run_config
from tests.plugins import own_registries

CALLS = [
    pytest.param(words, id=f"{block.page}:{block.line}:{' '.join(words)[:50]}")
    for page in PAGES
    for block in blocks(page)
    if block.language in ("", "bash", "console")
    for words in commands(block.text)
]
# Commands within the text: with an ellipsis or a placeholder they are no whole ones.
INLINE = re.compile(r"`(tclip [^`…]*|python -m benchmarks\.[^`…]*)`")
LANGUAGES = {"", "bash", "console", "diff", "json", "mermaid", "python", "toml", "yaml"}


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a call as the program does; a recipe and its overrides must make a run."""
    if words[0] == "python":
        module = importlib.import_module(words[2])
        monkeypatch.setattr("sys.argv", words[2:])
        parse = argparse.ArgumentParser.parse_args

        def parsed(parser: argparse.ArgumentParser, *args: object) -> None:
            parse(parser, *args)
            raise KeyboardInterrupt

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        with pytest.raises(KeyboardInterrupt):
            module.main()
        return
    name = next(" ".join(words[1:n]) for n in (3, 2) if " ".join(words[1:n]) in COMMANDS)
    seen: list[argparse.Namespace] = []
    module_name = name.replace(" ", "_").replace("-", "_").replace("import", "import_")
    monkeypatch.setattr(f"tclip_jax.commands.{module_name}.run", seen.append)
    assert main(words[1:]) == 0
    (args,) = seen
    if getattr(args, "config", None):
        config = override(load_recipe(args.config), args.overrides)
        if not config.teacher and not config.data.teacher_cache:
            config.teacher = "any"
        run_config(config)
    if name == "launch":
        check(["tclip", *args.arguments[args.arguments.index("--") + 1 :]], monkeypatch)


@pytest.mark.parametrize("words", CALLS)
def test_a_command_in_a_block_is_one(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    for page in PAGES:
        for block in blocks(page):
            if match := FILE.match(block.text):
                (tmp_path / match[1]).write_text(block.text)
    monkeypatch.setenv(PLUGINS, "")
    with own_registries(), contextlib.chdir(tmp_path):
        check(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_the_text_exist(page: pathlib.Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for call in INLINE.findall(text):
        if call.startswith("python"):
            assert (ROOT / "benchmarks" / f"{call.split('.')[1].split()[0]}.py").is_file(), call
        else:
            named = call.split()[1:3]
            assert (
                named[0].startswith("-")
                or named[0] == "COMMAND"
                or any(name in (named[0], " ".join(named)) or name.split()[0] == named[0] for name in COMMANDS)
            ), call


def test_every_block_has_a_language_that_the_rules_know() -> None:
    assert {block.language for page in PAGES for block in blocks(page)} <= LANGUAGES and len(CALLS) > 40


def test_every_page_is_in_the_navigation_and_every_link_has_its_file() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page.parent == ROOT / "docs":
            assert f": {page.name}\n" in navigation, f"{page.name} is not in mkdocs.yml"
        text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link and not link.startswith("mailto:"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
