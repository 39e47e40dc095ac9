"""Images in folders: a folder per class, or images with text files of captions."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from etils import epath

from tclip_jax.data.files import SkippedFiles, is_image, suffix, walk
from tclip_jax.data.sources.base import Record, decode_captions
from tclip_jax.data.sources.content import combined, contents
from tclip_jax.data.sources.remote import read_file
from tclip_jax.pages import printable

_SPLITS = ("train", "test", "val", "validation")


class _Sample(NamedTuple):
    image: str
    captions: str  # path of the text file, or ""
    label: int


class Folder:
    """The images below `<path>/<split>`, or below `<path>` if it contains no splits, at any depth.

    The data is captioned if any image `x.jpg` has a sibling `x.txt` (UTF-8, one caption per line); images without one
    then have no captions. Otherwise each image is labelled by the top subfolder that contains it. Every subfolder is a
    class; underscores in its name become spaces. Classes and images are ordered as in torchvision's ImageFolder.
    An image is a file with an image suffix, in lower or upper case. `notes` counts all other files. An image and its
    captions are read when their record is accessed.
    """

    classnames: tuple[str, ...]

    def __init__(self, argument: str, split: str) -> None:
        self._root = root = _find_root(epath.Path(argument).expanduser(), split)
        skipped, images, classes, empty = SkippedFiles(), list[str](), list[str](), list[str]()
        texts: dict[str, list[str]] = {}  # path without suffix -> text files: x.txt, then x.TXT
        for folder, folders, files in walk(root, skipped):
            if folder == root:
                classes = folders
            for name in files:
                path = os.path.join(folder, name)
                if is_image(name):
                    images.append(path)
                elif suffix(name) == ".txt":
                    texts.setdefault(path[:-4], []).insert(0 if name.endswith(".txt") else 1, path)
                else:
                    skipped.add(path)
        images.sort(key=os.path.split)
        captions = [texts.get(os.path.splitext(image)[0], [""])[0] for image in images]
        if any(captions):
            self._samples = [_Sample(image, text, -1) for image, text in zip(images, captions, strict=True)]
            self.classnames = ()
        else:
            self._samples, empty = _labelled(os.fspath(root), classes, images, skipped)
            self.classnames = tuple(name.replace("_", " ") for name in classes)
        used = set(captions)
        for path in (path for paths in texts.values() for path in paths if path not in used):
            skipped.add(path, ".txt without an image")
        if not self._samples:
            layouts = "<class>/<image> nor <image> with a .txt beside it"
            raise ValueError(f"{root}: found neither {layouts}{f' ({skipped})' if skipped.kinds else ''}")
        self.notes = [f"{root}: {skipped}"] if skipped.kinds else []
        if empty:
            names = ", ".join([*map(printable, empty[:5]), "…"][: len(empty) + (len(empty) > 5)])
            self.notes.append(f"{root}: {len(empty)} of {len(classes)} class folders without an image: {names}")

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the contents of images and captions, their paths below the folder, and the class names."""
        paths = [path for image, text, _ in self._samples for path in ((image, text) if text else (image,))]
        names = [path.removeprefix(str(self._root)) for path in paths]
        return combined([*self.classnames, *names, *contents(paths, total=len(paths))])

    def __getitem__(self, index: int) -> Record:
        image, text, label = self._samples[index]
        name = printable(image)
        captions = decode_captions(read_file(text, name), name) if text else ()
        return Record(read_file(image, name), captions, label, name)


def _labelled(
    root: str, classes: list[str], images: list[str], skipped: SkippedFiles
) -> tuple[list[_Sample], list[str]]:
    """Return the samples ordered by class, and the classes without images."""
    labels = {name: number for number, name in enumerate(classes)}
    samples: list[_Sample] = []
    for image in images:
        name, in_class, _ = os.path.relpath(image, root).partition(os.sep)
        if in_class:
            samples.append(_Sample(image, "", labels[name]))
        else:
            skipped.add(image, "image outside the class folders")
    samples.sort(key=lambda sample: sample.label)
    used = {sample.label for sample in samples}
    return samples, [name for name, label in labels.items() if label not in used]


def _find_root(folder: epath.Path, split: str) -> epath.Path:
    if (folder / split).is_dir():
        return folder / split
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder}: a file; expected a folder of images")
        raise FileNotFoundError(f"{folder}: no such folder (tried {folder} and {folder / split})")
    # A folder of splits must not be read as a folder with the classes train and test.
    if splits := [name for name in _SPLITS if (folder / name).is_dir()]:
        raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
    return folder
