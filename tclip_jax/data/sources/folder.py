"""Images in folders: one folder per class, or every image beside a text file of captions."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from etils import epath

from tclip_jax.data.files import PassedOver, is_image, suffix, walk
from tclip_jax.data.sources.base import Record, decode_captions
from tclip_jax.data.sources.content import combined, contents
from tclip_jax.data.sources.remote import read_file
from tclip_jax.pages import printable

_SPLITS = ("train", "test", "val", "validation")


class _Sample(NamedTuple):
    image: str
    captions: str  # the file; "" of none
    label: int


class Folder:
    """Images under `<path>/<split>`, or under `<path>` itself where it holds no splits, at any depth.

    Captioned if any image `x.jpg` has a sibling `x.txt` (UTF-8, one caption per line); an image without one has no
    captions. Otherwise labelled by the sub-folder it lies in or below: every sub-folder is a class, in alphabetical
    order, and underscores in its name are read as spaces. The order is that of torchvision's ImageFolder. An image is
    what has the suffix of one, in capitals too; `notes` counts the other files, and hidden ones. Files are read only
    when a record is asked for.
    """

    classnames: tuple[str, ...]

    def __init__(self, argument: str, split: str) -> None:
        self._root = root = _find_root(epath.Path(argument).expanduser(), split)
        passed, images, classes, empty = PassedOver(), list[str](), list[str](), list[str]()
        texts: dict[str, list[str]] = {}  # by their path without the suffix: x.txt, then x.TXT
        for folder, folders, files in walk(root, passed):
            if folder == root:
                classes = folders
            for name in files:
                path = os.path.join(folder, name)
                if is_image(name):
                    images.append(path)
                elif suffix(name) == ".txt":
                    texts.setdefault(path[:-4], []).insert(0 if name.endswith(".txt") else 1, path)
                else:
                    passed.add(path)
        images.sort(key=os.path.split)
        captions = [texts.get(os.path.splitext(image)[0], [""])[0] for image in images]
        if any(captions):
            self._samples = [_Sample(*each, -1) for each in zip(images, captions, strict=True)]
            self.classnames = ()
        else:
            self._samples, empty = _labelled(os.fspath(root), classes, images, passed)
            self.classnames = tuple(name.replace("_", " ") for name in classes)
        used = set(captions)
        for path in (path for paths in texts.values() for path in paths if path not in used):
            passed.add(path, ".txt without an image of its name")
        if not self._samples:
            wanted = "<class>/<image> nor <image> with a .txt beside it"
            raise ValueError(f"{root}: found neither {wanted}{f' ({passed})' if passed.kinds else ''}")
        self.notes = [f"{root}: {passed}"] if passed.kinds else []
        if empty:
            shown = ", ".join([*map(printable, empty[:5]), "…"][: len(empty) + (len(empty) > 5)])
            self.notes.append(f"{root}: {len(empty)} of {len(classes)} class folders without an image: {shown}")

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def digest(self) -> str:
        """Of the contents of images and captions, their names within the folder, and the classes."""
        paths = [path for image, text, _ in self._samples for path in ((image, text) if text else (image,))]
        names = [path.removeprefix(str(self._root)) for path in paths]
        return combined([*self.classnames, *names, *contents(paths, total=len(paths))])

    def __getitem__(self, index: int) -> Record:
        image, text, label = self._samples[index]
        name = printable(image)
        captions = decode_captions(read_file(text, name), name) if text else ()
        return Record(read_file(image, name), captions, label, name)


def _labelled(root: str, classes: list[str], images: list[str], passed: PassedOver) -> tuple[list[_Sample], list[str]]:
    """The images of each class, class by class, and the classes without one."""
    labels = {name: number for number, name in enumerate(classes)}
    samples: list[_Sample] = []
    for image in images:
        name, below, _ = os.path.relpath(image, root).partition(os.sep)
        if below:
            samples.append(_Sample(image, "", labels[name]))
        else:
            passed.add(image, "image outside the class folders")
    samples.sort(key=lambda sample: sample.label)
    full = {sample.label for sample in samples}
    return samples, [name for name, label in labels.items() if label not in full]


def _find_root(folder: epath.Path, split: str) -> epath.Path:
    if (folder / split).is_dir():
        return folder / split
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder}: a file, where a folder of images is expected")
        raise FileNotFoundError(f"{folder}: no such folder (looked for it and for {folder / split})")
    # A folder of splits must not be read as a folder of classes called train and test.
    if splits := [name for name in _SPLITS if (folder / name).is_dir()]:
        raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
    return folder
