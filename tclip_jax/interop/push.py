"""Push an exported folder to the Hugging Face hub: what goes, its model card, and the upload.

Files are sent first and committed together last, so the repository never has a part of them. A push that was
interrupted is resumed by the next: the hub knows the files, and with hf_xet their parts, that it has.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from tclip_jax.interop.hub_card import CARD, hub_card, public_provenance
from tclip_jax.interop.privacy import Finding, find_in_text, find_private, read_text
from tclip_jax.pages import aligned, printable

_SHOWN = 5  # findings that an error names
_STATUS = {
    401: "the hub does not accept the token: run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: make one with write access at https://huggingface.co/settings/tokens",
}


class Upload(NamedTuple):
    """A push that is allowed.

    Attributes:
      repository: USER/NAME.
      files: the content of each file by its path in the repository: the model card as bytes, of others their paths.
      sizes: their bytes.
      left_out: hidden files and folders, which stay here.
      notes: what the model card does not repeat of README.md.
      card: the model card.
    """

    repository: str
    files: dict[str, pathlib.Path | bytes]
    sizes: dict[str, int]
    left_out: list[str]
    notes: list[str]
    card: str


def prepare(folder: str, repository: str, *, licence: str = "", public: Sequence[str] = ()) -> Upload:
    """Decide what a push sends, and check all of it. Nothing is sent or changed.

    Args:
      folder: what `tclip export` wrote.
      repository: USER/NAME.
      licence: the licence as the hub names it, such as apache-2.0; "" for that of README.md.
      public: texts that are public though they look private; the account's name is one.

    Raises:
      FileNotFoundError: there is no such folder, or it has no README.md.
      ValueError: the repository's name or the licence is missing or wrong; a file is a link out of the folder, not a
        plain file, an archive, or of a run; or something in it is private. The message names the file and the line.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise ValueError(f"{printable(repository)!r} is not a repository of the hub: write USER/NAME")
    root = pathlib.Path(folder)
    if "://" in folder or not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder on this machine")
    paths, left_out = _walk(root)
    if CARD not in paths:
        raise FileNotFoundError(f"{folder} has no {CARD}, the model card: push what `tclip export` writes")
    public = (*public, repository.partition("/")[0])
    source, notes = public_provenance(read_text(paths[CARD], CARD))
    card = hub_card(source, list(paths), repository, licence)
    # The lines of the file are what its author can change; YAML may hide in escapes what the card then shows.
    findings = list(find_in_text(source, CARD, public=public)) or list(find_in_text(card, CARD, public=public))
    for name, path in paths.items():
        if name != CARD:
            findings += find_private(path, name, public=public)
    _refuse(findings)
    files: dict[str, pathlib.Path | bytes] = {**paths, CARD: card.encode()}
    sizes = {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in files.items()}
    return Upload(repository, files, sizes, left_out, notes, card)


def listing(upload: Upload) -> str:
    """Return a table of the files of a push and their bytes, the front matter of the card, and what stays here."""
    rows = [(printable(name), f"{size:,}") for name, size in sorted(upload.sizes.items())]
    total = (f"total, {len(rows)} files", f"{sum(upload.sizes.values()):,}")
    front = upload.card.split("\n---", 1)[0].removeprefix("---\n").splitlines()
    lines = [
        *aligned([("file", "bytes"), *rows, total]),
        "",
        f"front matter of {CARD}:",
        *(f"  {line}" for line in front),
    ]
    lines += upload.notes
    lines += [f"stays here: {printable(', '.join(upload.left_out))} (hidden)"] * bool(upload.left_out)
    return "\n".join(lines)


def push(upload: Upload, *, private: bool = False) -> str:
    """Create the repository if there is none, send what it lacks, and commit all files together.

    Args:
      upload: what `prepare` returned.
      private: make a new repository private.

    Returns:
      The URL of the commit.

    Raises:
      ValueError: there is no token; the name is that of a data set or a Space; the repository is public and `private`
        is set; or the hub refuses the card or a file.
      PermissionError: the hub refuses the token.
      ConnectionError: the hub cannot be reached, or the upload was interrupted.
    """
    if not huggingface_hub.get_token():
        raise ValueError("no token for the hub: run `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi(library_name="tclip_jax")
    with _one_line(upload.repository):
        huggingface_hub.ModelCard(upload.card).validate()
        existing = _existing(api, upload.repository)
        if existing is None:
            api.create_repo(upload.repository, private=private or None, exist_ok=True)
        elif private and not existing.private:
            raise ValueError(
                f"{upload.repository} exists and is public, which --private does not change:"
                " make it private in its settings on the hub, or choose another name"
            )
        operations = [huggingface_hub.CommitOperationAdd(name, file) for name, file in upload.files.items()]
        message = "Push a model of tclip_jax"
        return api.create_commit(upload.repository, operations, commit_message=message).commit_url


def _walk(root: pathlib.Path) -> tuple[dict[str, pathlib.Path], list[str]]:
    """Return the files below a folder by relative name, and the names of hidden ones, which are passed over."""
    paths: dict[str, pathlib.Path] = {}
    hidden: list[str] = []
    inside = root.resolve()
    for parent, folders, names in os.walk(root, onerror=_raise):
        for name in sorted([*folders, *names]):
            path = pathlib.Path(parent, name)
            relative = path.relative_to(root).as_posix()
            if name.startswith("."):
                hidden.append(relative)
            elif path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise ValueError(
                    f"{printable(relative)} is a link out of the folder, to {path.resolve()}: copy the file"
                )
            elif path.is_symlink() and path.is_dir():
                raise ValueError(f"{printable(relative)} is a link to a folder: copy the folder")
            elif path.is_file():
                paths[relative] = path
            elif name in names:
                raise ValueError(f"{printable(relative)} is not a plain file")
            if printable(relative) != relative or "\\" in relative:
                raise ValueError(f"{printable(relative)}: the hub takes no such name")
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
    return paths, sorted(hidden)


def _raise(error: OSError) -> None:
    raise error


def _refuse(findings: Sequence[Finding]) -> None:
    if findings:
        shown = "; ".join(map(str, findings[:_SHOWN]))
        more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
        raise ValueError(f"private: {shown}{more}. Remove it, or pass --public TEXT for what is public")


def _existing(api: huggingface_hub.HfApi, repository: str) -> huggingface_hub.ModelInfo | None:
    """Return what the hub knows of the repository, or None if there is none of the name."""
    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        for kind in ("dataset", "space"):
            if api.repo_exists(repository, repo_type=kind):
                raise ValueError(
                    f"{repository} is a {kind} on the hub, and this would be a model: choose another name"
                ) from None
        return None


@contextlib.contextmanager
def _one_line(repository: str) -> Iterator[None]:
    """Describe errors of huggingface_hub, of its HTTP library and of the hub, which have many lines, in one."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ConnectionError(f"{repository}: HF_HUB_OFFLINE is set, and a push needs the network") from None
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        if status in _STATUS:
            raise PermissionError(f"{repository}: {_STATUS[status]} ({reason:.200})") from None
        if isinstance(error, ValueError) or 400 <= status < 500:
            raise ValueError(f"{reason:.300}") from None
        raise ConnectionError(
            f"{repository}: {constants.ENDPOINT} cannot be reached, or the upload was interrupted ({reason:.200});"
            " the same command resumes it"
        ) from None
