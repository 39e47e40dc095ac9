"""Images in folders: one folder per class, or every image beside a text file of captions."""

from __future__ import annotations

import functools
from typing import NamedTuple

from etils import epath

from tclip_jax.data.sources.base import Record, decode_captions, printable
from tclip_jax.data.sources.content import combined, contents

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SPLITS = ("train", "test", "val", "validation")


class _Sample(NamedTuple):
    image: epath.Path
    has_captions: bool
    label: int


class Folder:
    """Images under `<path>/<split>`, or under `<path>` itself where it holds no splits.

    Captioned if any image `x.jpg` has a sibling `x.txt` (UTF-8, one caption per line); an image without one has no
    captions. Otherwise labelled by the sub-folder it lies in: every sub-folder is a class, in alphabetical order, and
    underscores in its name are read as spaces. Images are found in the folder and one level below, in the order of
    their paths; names that start with a dot are passed over. Files are read only when a record is asked for.
    """

    classnames: tuple[str, ...]

    def __init__(self, argument: str, split: str) -> None:
        self._root = root = _find_root(epath.Path(argument).expanduser(), split)
        children = _visible(root)
        # Object stores answer every is_dir with a request, so ask only about names that are not files by their suffix.
        folders = [c for c in children if c.suffix.lower() not in (*_IMAGE_SUFFIXES, ".txt") and c.is_dir()]
        contents = [_visible(folder) for folder in folders]
        files = [*children, *(file for content in contents for file in content)]
        texts = {str(file) for file in files if file.suffix == ".txt"}
        captioned = [_Sample(image, str(image.with_suffix(".txt")) in texts, -1) for image in _images(files)]
        if any(sample.has_captions for sample in captioned):
            self._samples, self.classnames = captioned, ()
        else:
            self._samples = [
                _Sample(i, False, label) for label, content in enumerate(contents) for i in _images(content)
            ]
            self.classnames = tuple(folder.name.replace("_", " ") for folder in folders)
        if not self._samples:
            wanted = f"<class>/<image> nor <image> with a .txt beside it ({', '.join(_IMAGE_SUFFIXES)})"
            raise ValueError(f"{root}: found neither {wanted}")

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def digest(self) -> str:
        """Of the contents of images and captions, their names within the folder, and the classes."""
        files = [(image, image.with_suffix(".txt")) if captioned else (image,) for image, captioned, _ in self._samples]
        paths = [str(path) for each in files for path in each]
        names = [path.removeprefix(str(self._root)) for path in paths]
        return combined([*self.classnames, *names, *contents(paths, total=len(paths))])

    def __getitem__(self, index: int) -> Record:
        image, has_captions, label = self._samples[index]
        name = printable(str(image))
        captions = decode_captions(image.with_suffix(".txt").read_bytes(), name) if has_captions else ()
        return Record(image.read_bytes(), captions, label, name)


def _find_root(folder: epath.Path, split: str) -> epath.Path:
    if (folder / split).is_dir():
        return folder / split
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (looked for it and for {folder / split})")
    # A folder of splits must not be read as a folder of classes called train and test.
    if splits := [name for name in _SPLITS if (folder / name).is_dir()]:
        raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
    return folder


def _images(files: list[epath.Path]) -> list[epath.Path]:
    return [file for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]


def _visible(folder: epath.Path) -> list[epath.Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
