"""What hosts need of this machine: the wheel of this installation, a recipe file, and no data that is only here."""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tclip_jax
from tclip_jax.data.sources.mixture import parse
from tclip_jax.data.sources.remote import is_remote
from tclip_jax.evaluation.tasks import named_source

WHEEL = f"tclip_jax-{tclip_jax.__version__}-py3-none-any.whl"
# scheme of a URL -> extra that brings its reader; extra -> the reader
EXTRAS = {"gs": "gcs", "s3": "s3"}
READERS = {"gcs": "gcsfs", "s3": "s3fs"}
# Keys of a configuration, and options of commands, whose values name data sources, models, and folders for results.
SOURCES = ("data.source", "eval.source", "--data")
MODELS = ("init", "teacher", "inherit", "data.teacher_cache", "data.tokenizer", "--teacher", "--tfds", "MODEL")
RESULTS = ("--workdir", "--out", "--html")
_REMEDIES = {
    "sources": "write a URL that the hosts read, such as wds:gs://BUCKET/cc12m/*.tar",
    "models": "copy it to a bucket and write its URL, such as gs://BUCKET/teacher",
    "results": "all hosts must share it: write a URL, such as gs://BUCKET/run",
}


class Shipment(NamedTuple):
    """What hosts run, and what they need for it.

    Attributes:
      command: the command of tclip, with the recipe at its place on the hosts.
      recipe: the recipe file on this machine, or "".
      extras: the extras of the package that the URLs of the command need.
      buckets: the buckets of the command and of its configuration, as URLs.
    """

    command: tuple[str, ...]
    recipe: str
    extras: tuple[str, ...]
    buckets: tuple[str, ...]

    def assignments(self) -> str:
        """Return assignments of shell variables with the names of the attributes, for launchers to evaluate."""
        values = {"wheel": WHEEL, "recipe": self.recipe, "extras": ",".join(self.extras)}
        lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
        lines += [f"buckets=({shlex.join(self.buckets)})", f"command=({shlex.join(self.command)})"]
        return "\n".join(lines)


def shipment(command: Sequence[str], args: argparse.Namespace, config: Mapping[str, Any], prefix: str = "") -> Shipment:
    """Return what hosts need to run a command of tclip.

    Args:
      command: the command and its arguments.
      args: the same arguments, parsed.
      config: the resolved configuration; empty for a command without --config.
      prefix: what the recipe's name follows on the hosts, such as "folder/".
    """
    recipe, words = "", list(command)
    spec = getattr(args, "config", "")
    name, colon, argument = spec.partition(":")
    if name.endswith(".py"):
        recipe = str(pathlib.Path(name).resolve())
        there = f"{prefix}{pathlib.Path(name).name}{colon}{argument}"
        words = [re.sub(rf"^(--config=)?{re.escape(spec)}$", lambda match: (match[1] or "") + there, w) for w in words]
    text = "\n".join([*words, *(value for _, value in _values(args, config))])
    urls = sorted(set(re.findall(r"\b(?:gs|s3)://[^/\s:,'\"]+", text)))
    extras = dict.fromkeys(EXTRAS[url.partition(":")[0]] for url in urls)
    return Shipment(tuple(words), recipe, tuple(extras), tuple(urls))


def out_of_reach(args: argparse.Namespace, config: Mapping[str, Any], mounted: Iterable[str] = ()) -> Iterator[str]:
    """Yield a line for each value that names files of this machine, which hosts of a cloud do not have.

    Args:
      args: the parsed arguments of the command.
      config: the resolved configuration; empty for a command without --config.
      mounted: folders that the hosts have too, such as mounted disks and buckets.
    """
    for plugin in args.plugin:
        if plugin.endswith(".py"):
            yield (
                f"--plugin is {plugin!r}: hosts of a cloud do not have {plugin}; put its code into the recipe file,"
                " which goes along, or install it there as a package"
            )
    for name, value, path in _paths(args, config, mounted):
        if not is_remote(path):
            remedy = _REMEDIES[_role(name)]
            yield f"{name} is {value!r}: hosts of a cloud do not have {path}; {remedy}, or give --mounted a mount"
        elif value.startswith(("tfds:", "arrayrecord:")):
            yield (
                f"{name} is {value!r}: ArrayRecord's reader opens only local paths; mount the bucket on the hosts"
                " and give --mounted the mount, or read tars (wds:gs://…)"
            )


def absent(args: argparse.Namespace, config: Mapping[str, Any], mounted: Iterable[str] = ()) -> Iterator[str]:
    """Yield a line for each value that names data or a model that this machine, and so its cluster, does not have.

    The arguments are those of `out_of_reach`.
    """
    for name, value, path in _paths(args, config, mounted):
        fixed = re.split(r"[*?\[{]", path)[0]  # before a pattern begins
        there = pathlib.Path(fixed if fixed == path else fixed.rpartition("/")[0] or ".").expanduser()
        if _role(name) != "results" and name != "--tfds" and not is_remote(path) and not there.exists():
            yield f"{name} is {value!r}: there is no {there}; give --mounted a folder that only the hosts have"


def unread(extras: Iterable[str]) -> list[str]:
    """Return a remedy for each extra of URLs whose reader is not in this environment, which a cluster's hosts share."""
    missing = [extra for extra in extras if importlib.util.find_spec(READERS[extra]) is None]
    return [f"{READERS[extra]} is not installed: pip install 'tclip-jax[{extra}]'" for extra in missing]


def _paths(
    args: argparse.Namespace, config: Mapping[str, Any], mounted: Iterable[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and path for each path or URL of `_values` that is not below a mounted folder."""
    folders = [pathlib.Path(folder).expanduser() for folder in mounted]
    for name, value in _values(args, config):
        for path in _files(value) if _role(name) == "sources" else [value]:
            below = any(pathlib.Path(path).expanduser().is_relative_to(folder) for folder in folders)
            if not below and not path.startswith("hf-hub:"):
                yield name, value, path


def _role(name: str) -> str:
    """Return what a value of `_values` names: "sources", "models" or "results"."""
    key = re.sub(r"^config\.(?:evals\[\d+\]|eval)\.", "eval.", name).removeprefix("config.")
    return "sources" if key in SOURCES else "models" if key in MODELS else "results"


def _values(args: argparse.Namespace, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each option and key that names data, models or results."""
    options = [option for option in (*SOURCES, *MODELS, *RESULTS) if option.startswith("--") or option == "MODEL"]
    named = [(option, getattr(args, option.removeprefix("--").lower(), None)) for option in options]
    for key in (*SOURCES, *MODELS):
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        named.append((f"config.{key}", value))
    named += [(f"config.evals[{i}].source", each.get("source")) for i, each in enumerate(config.get("evals", ()))]
    for name, value in named:
        for each in value if isinstance(value, list) else [value]:  # an option that may be given again
            if each:
                yield name, named_source(each)[1] if name == "--data" else each


def _files(spec: str) -> list[str]:
    """Return the paths and URLs that a data source reads."""
    kind, _, argument = spec.partition(":")
    if kind == "mixture":
        return [path for _, part in parse(argument) for path in _files(part)]
    if kind == "tfds":
        return [argument.partition("@")[2] or "~/tensorflow_datasets"]
    if kind in ("arrayrecord", "csv", "folder", "parquet", "wds"):
        return argument.split("::")
    return [] if spec == "digits" else [spec]  # the exports of a suite


def write_wheel(folder: pathlib.Path) -> pathlib.Path:
    """Write the wheel of this installation, without the native CPU kernel, so that hosts of all platforms take it.

    A checkout is built by pip. An installed package is packed again from its files.

    Args:
      folder: where the wheel is written; created.

    Raises:
      ValueError: pip cannot build the checkout, or its version is not the one that is installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = pathlib.Path(tclip_jax.__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        return _pack(folder / WHEEL, importlib.metadata.distribution("tclip-jax"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(root)]
    built = subprocess.run(build, env=os.environ | {"HATCH_BUILD_NO_HOOKS": "true"}, capture_output=True, text=True)
    if built.returncode:
        last = (built.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{root}: pip cannot build the wheel: {last}")
    if not (folder / WHEEL).is_file():
        built_now = ", ".join(path.name for path in folder.glob("*.whl"))
        raise ValueError(f"{root}: pip built {built_now}, and {WHEEL} is installed: pip install -e {root}")
    return folder / WHEEL


def _pack(path: pathlib.Path, distribution: importlib.metadata.Distribution) -> pathlib.Path:
    """Write an installed package as a wheel."""
    made_here = {"RECORD", "WHEEL", "INSTALLER", "REQUESTED", "direct_url.json"}
    files = {
        str(file): pathlib.Path(str(file.locate())).read_bytes()
        for file in distribution.files or ()
        if ".." not in file.parts and file.suffix not in (".pyc", ".so") and file.name not in made_here
    }
    info = next(name for name in files if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
    header = ("Wheel-Version: 1.0", "Generator: tclip_jax", "Root-Is-Purelib: true", "Tag: py3-none-any", "")
    files[f"{info}WHEEL"] = "\n".join(header).encode()
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for name, data in files.items()
    ]
    files[f"{info}RECORD"] = "\n".join([*record, f"{info}RECORD,,", ""]).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path
