"""Images to pixels: decode, resize, crop, normalise. The pixels equal open_clip's."""

from __future__ import annotations

import dataclasses
import io
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

import jax
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tclip_jax.schema import key, plain

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN = (0.5, 0.5, 0.5)
HALF_STD = (0.5, 0.5, 0.5)

# Twice the size at which Pillow warns; Pillow refuses larger images too.
MAX_PIXELS = 178_956_970

# Pillow renders EPS and WMF with other programs, IPTC may contain any format, and the others are only identified.
_UNSUPPORTED = ("EPS", "WMF", "IPTC", "MPEG", "BUFR", "GRIB", "HDF5")
Image.preinit()
Image.init()
# In Pillow's order, so that a file is identified as Image.open identifies it. MPO is JPEG with several pictures.
_FORMATS = tuple(
    name for name in Image.ID if name in Image.registered_extensions().values() and name not in _UNSUPPORTED
)
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in (*_FORMATS, "MPO")
)  # in lower case, with the dot
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = ("shortest", "longest", "squash")

Array = TypeVar("Array", npt.NDArray[Any], jax.Array)
Picture = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | jax.Array


@dataclasses.dataclass(frozen=True, init=False)
class Preprocess:
    """How an image becomes the (height, width, 3) pixels of a model: open_clip's `preprocess_cfg`.

    Attributes:
      size: (height, width) in pixels; the constructor also takes one number for both.
      mean, std: mean and standard deviation of the R, G and B values in 0–1.
      interpolation: "bicubic" or "bilinear".
      resize_mode: "shortest" resizes the shortest side to `size` and crops the centre; "longest" resizes the longest
        side and pads with zeros; "squash" resizes both sides and changes the aspect ratio.

    Raises:
      ValueError: a value that open_clip does not support either.
    """

    size: tuple[int, int] = key(doc="(height, width) in pixels, or one number for both; None: those of the model")
    mean: tuple[float, ...] = key(OPENAI_MEAN, "mean of the R, G and B values in 0–1")
    std: tuple[float, ...] = key(OPENAI_STD, "standard deviation of the R, G and B values in 0–1", gt=0)
    interpolation: Literal["bicubic", "bilinear"] = key("bicubic", "resampling of the resized image")
    resize_mode: Literal["shortest", "longest", "squash"] = key(
        "shortest",
        "shortest: resize the shortest side and crop the centre; longest: resize the longest side and pad with zeros;"
        " squash: resize both sides",
    )

    def __init__(
        self,
        size: int | Sequence[int],
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
    ) -> None:
        both = (size, size) if isinstance(size, int) else _tuple(size, numbers.Integral)
        if len(both) != 2 or min(both) < 1:
            raise ValueError(f"image size {plain(size)} is not one positive number or a (height, width) of two")
        means, deviations = _tuple(mean, numbers.Real), _tuple(std, numbers.Real)
        finite = np.isfinite([*means, *deviations]).all()
        if len(means) != 3 or len(deviations) != 3 or not finite or min(deviations) <= 0:
            raise ValueError(f"mean {plain(mean)} and std {plain(std)} are not three numbers each, with std above 0")
        if not isinstance(interpolation, str) or interpolation not in _RESAMPLING:
            raise ValueError(f"interpolation {interpolation!r:.80} is not one of {', '.join(_RESAMPLING)}")
        if resize_mode not in _RESIZE_MODES:
            raise ValueError(f"resize_mode {resize_mode!r:.80} is not one of {', '.join(_RESIZE_MODES)}")
        values = (both, means, deviations, interpolation, resize_mode)
        self.__dict__.update(zip(self.__dataclass_fields__, values, strict=True))

    def __call__(self, images: Picture | Sequence[Picture]) -> npt.NDArray[np.float32]:
        """Open, resize, crop and normalise images: the input of a model.

        Args:
          images: one image or several, of any size: paths of image files, PIL images, or uint8 arrays (H, W, 3). An
            array (N, H, W, 3) is N images.

        Returns:
          Normalised pixels, float32 (N, height, width, 3); N is 1 for one image.

        Raises:
          FileNotFoundError: there is no file at a path.
          ValueError: a file is not a usable image (the message names the file), or an array is not uint8 (H, W, 3).
        """
        pixels = [preprocess(_open(picture), self) for picture in as_sequence(images)]
        return normalize(np.reshape(pixels, (-1, *self.size, 3)), self.mean, self.std)

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any], image_size: int | Sequence[int] = 224) -> Self:
        """Read a `preprocess_cfg`; a missing size defaults to the model's `image_size`."""
        padded = cfg.get("fill_color") and cfg.get("resize_mode") == "longest"  # the other modes do not pad
        if cfg.get("mode") not in (None, "RGB") or padded:
            raise ValueError(
                "preprocess_cfg: only mode 'RGB' is supported, and with resize_mode 'longest' fill_color 0"
            )
        known = {field.name: cfg[field.name] for field in dataclasses.fields(cls) if cfg.get(field.name) is not None}
        # open_clip draws it at random only in training.
        if known.get("interpolation") == "random":
            known["interpolation"] = "bicubic"
        return cls(**{"size": image_size, **known})

    def to_open_clip(self) -> dict[str, Any]:
        """Return the `preprocess_cfg` for open_clip_config.json."""
        return {"mode": "RGB", **dataclasses.asdict(self), "fill_color": 0}

    def to_hugging_face(self) -> dict[str, Any]:
        """Return the preprocessor_config.json for transformers' CLIPImageProcessor.

        CLIPImageProcessor rounds the start of the crop down and open_clip rounds it to even, so the pixels may be
        shifted by one row or column.

        Raises:
          ValueError: CLIPImageProcessor does not support `resize_mode` "longest", or "shortest" with a `size` that is
            not square.
        """
        height, width = self.size
        if self.resize_mode == "longest" or (self.resize_mode == "shortest" and height != width):
            raise ValueError(f"CLIPImageProcessor has no resize_mode {self.resize_mode!r} to {height}x{width}")
        both = {"height": height, "width": width}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": both if self.resize_mode == "squash" else {"shortest_edge": height},
            "resample": int(_RESAMPLING[self.interpolation]),
            "do_center_crop": self.resize_mode == "shortest",
            "crop_size": both,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def _tuple(values: Any, kind: type) -> tuple[Any, ...]:
    """Return the values of a list, tuple or array as a tuple; an empty one if any value is not of that kind."""
    is_list = isinstance(values, (Sequence, np.ndarray)) and not isinstance(values, str)
    return tuple(values) if is_list and all(isinstance(value, kind) for value in values) else ()


def as_sequence(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    """Return one image as a sequence of one, and several images unchanged."""
    single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) == 3
    return [images] if single else images  # type: ignore[list-item, return-value]


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read and decode an image file; raise the errors of `read_file` and `decode`."""
    from tclip_jax.data.sources.remote import read_file  # which imports this module

    return decode(read_file(os.fspath(path)))


def _open(picture: Picture) -> Image.Image:
    """Return a picture as a PIL image; raise the errors of `Preprocess.__call__`."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, str | os.PathLike):
        try:
            return read_picture(picture)
        except ValueError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise FileNotFoundError(f"{os.fspath(picture)}: no such file") from None
            reason = str(error).removeprefix(f"{os.fspath(picture)}: ")
            raise ValueError(f"{os.fspath(picture)}: {reason}") from None
    if not isinstance(picture, np.ndarray | jax.Array):
        raise ValueError(f"an image is {picture!r:.80}: it must be a path, a PIL image, or uint8 (H, W, 3)")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"an image is {picture.dtype} {picture.shape}: it must be uint8 (H, W, 3)")
    return Image.fromarray(np.asarray(picture))


class TooManyPixels(ValueError):
    """An image with more pixels than allowed."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image and keep its mode. EXIF orientation is ignored, as in open_clip.

    An animation gives its first frame. 16-bit grey becomes 8-bit grey; open_clip clips it to white.

    Raises:
      ValueError: the data is not a complete image in a format that Pillow decodes by itself, or has 32-bit pixels. No
        other exception is raised.
      TooManyPixels: the image has more than `max_pixels`. The header is checked before pixels are allocated.
    """
    return load(open_lazily(data, max_pixels=max_pixels))


def open_lazily(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header of an image; `load` then decodes the pixels. Raises the errors of `decode`."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"not a usable image ({len(data)} bytes): {error}") from None
    # Pillow raises many types for a broken file: OSError, SyntaxError, struct.error, EOFError, MemoryError.
    except Exception as error:
        # Pillow's own message names the BytesIO object.
        reason = _why_unidentified(data) if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"not a usable image ({len(data)} bytes): {reason}") from error
    if not 0 < image.width * image.height <= max_pixels:
        size = f"{image.width}x{image.height} pixels; 1 to {max_pixels} are allowed"
        raise TooManyPixels(f"not a usable image ({len(data)} bytes): {size}")
    return image


def _why_unidentified(data: bytes) -> str:
    """Return why Pillow does not identify the bytes as an image."""
    known = next((name for name in _UNSUPPORTED if (accepts := Image.OPEN[name][1]) and accepts(data[:16])), None)
    if known:
        return f"the format {known} is not supported"
    return f"no supported format begins with {data[:12]!r}" if data else "it is empty"


def load(image: Image.Image) -> Image.Image:
    """Decode the pixels of an opened image. Raises the errors of `decode`."""
    try:
        image.load()
    except Exception as error:
        raise ValueError(f"not a usable image: {error}") from error
    if image.mode == "P":
        image.info.pop("transparency", None)  # it changes no colour, and Pillow warns about it
    # Pillow reads a 16-bit PGM as 32-bit pixels with 16-bit values.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        grey.format = image.format
        return grey
    if image.mode in ("I", "F"):
        raise ValueError(f"not a usable image: 32-bit pixels (mode {image.mode}), whose range is not known")
    return image


def preprocess(image: Image.Image, p: Preprocess) -> npt.NDArray[np.uint8]:
    """Resize and crop an image: the steps of open_clip's evaluation transform before ToTensor.

    Returns:
      The pixels (height, width, 3) uint8; a read-only array.

    Raises:
      ValueError: the image is so thin that resizing it gives no pixels, or more than MAX_PIXELS.
    """
    height, width = _resized(image.height, image.width, p)
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"an image of {image.width}x{image.height} cannot be resized to {width}x{height} pixels")
    # For a size that is not square, open_clip's call uses the default interpolation.
    rectangle = p.resize_mode == "shortest" and p.size[0] != p.size[1]
    image = image.resize((width, height), _RESAMPLING["bicubic" if rectangle else p.interpolation])
    top, left = _crop_start(height, p.size[0]), _crop_start(width, p.size[1])
    image = image.crop((left, top, left + p.size[1], top + p.size[0]))
    return np.asarray(image.convert("RGB"))


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Return (images / 255 − mean) / std in float32.

    Args:
      images: pixels (..., 3) in 0–255, a NumPy or JAX array.
      mean, std: of the R, G and B values in 0–1.
    """
    return (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _resized(height: int, width: int, p: Preprocess) -> tuple[int, int]:
    """Return the size before the crop, rounded as in torchvision (square sizes) or timm."""
    if p.resize_mode == "squash":
        return p.size
    if p.resize_mode == "shortest" and p.size[0] == p.size[1]:
        short = p.size[0]
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    ratios = (height / p.size[0], width / p.size[1])
    ratio = min(ratios) if p.resize_mode == "shortest" else max(ratios)
    return round(height / ratio), round(width / ratio)


def _crop_start(length: int, target: int) -> int:
    """Return where a centred crop starts. A negative start pads: Pillow then fills with zeros."""
    return round((length - target) / 2) if length >= target else -((target - length) // 2)
