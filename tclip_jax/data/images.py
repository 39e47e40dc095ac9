"""Images to pixels, the same pixels as open_clip's: decode, resize, crop, normalise."""

from __future__ import annotations

import dataclasses
import io
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tclip_jax.schema import plain

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN = (0.5, 0.5, 0.5)
HALF_STD = (0.5, 0.5, 0.5)

# Twice Pillow's own warning level, where Pillow refuses too.
MAX_PIXELS = 178_956_970

# Pillow draws EPS and WMF by other programs, opens whatever lies within IPTC, and knows the others by name alone.
_NOT_READ = ("EPS", "WMF", "IPTC", "MPEG", "BUFR", "GRIB", "HDF5")
Image.preinit()
Image.init()
# In Pillow's order, so that a file is what Image.open takes it for. MPO is JPEG with more pictures behind the first.
_FORMATS = tuple(name for name in Image.ID if name in Image.registered_extensions().values() and name not in _NOT_READ)
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in (*_FORMATS, "MPO")
)  # with their dot, in small letters
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = ("shortest", "longest", "squash")

Array = TypeVar("Array", npt.NDArray[Any], jax.Array)


@dataclasses.dataclass(frozen=True, init=False)
class Preprocess:
    """What open_clip's `preprocess_cfg` says: how an image becomes the (height, width, 3) pixels of a model.

    `size` is (height, width), or one number for both. `resize_mode` says which side reaches `size`: the "shortest"
    (then the centre is cropped), the "longest" (then zeros are padded), or both, which distorts ("squash"). `mean` and
    `std` are those of RGB values in 0–1. Raises ValueError for what open_clip does not know either.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str

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

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any], image_size: int | Sequence[int] = 224) -> Self:
        """Reads a `preprocess_cfg`; `image_size`, the model's, stands in for a size it does not name."""
        filled = cfg.get("fill_color") and cfg.get("resize_mode") == "longest"  # the others fill nothing
        if cfg.get("mode") not in (None, "RGB") or filled:
            raise ValueError(
                "preprocess_cfg: only mode 'RGB' is supported, and with resize_mode 'longest' fill_color 0"
            )
        known = {field.name: cfg[field.name] for field in dataclasses.fields(cls) if cfg.get(field.name) is not None}
        # open_clip draws at random only while training.
        if known.get("interpolation") == "random":
            known["interpolation"] = "bicubic"
        return cls(**{"size": image_size, **known})

    def to_open_clip(self) -> dict[str, Any]:
        """Returns the `preprocess_cfg` of open_clip_config.json."""
        return {"mode": "RGB", **dataclasses.asdict(self), "fill_color": 0}

    def to_hugging_face(self) -> dict[str, Any]:
        """Returns the preprocessor_config.json of transformers' CLIPImageProcessor.

        Its crop rounds down where open_clip's rounds to even, so pixels can lie one row or column apart.
        Raises ValueError for what that class cannot do: "longest", and "shortest" to a size that is not square.
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
    """The values of a list, a tuple or an array; none unless all are of that kind."""
    listed = isinstance(values, (Sequence, np.ndarray)) and not isinstance(values, str)
    return tuple(values) if listed and all(isinstance(value, kind) for value in values) else ()


class TooManyPixels(ValueError):
    """An image that would take too much memory."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the decoded image in its own mode, as stored (EXIF orientation is left alone, as open_clip leaves it).

    Of an animation it is the first frame. Grey of 16 bits becomes grey of 8, where open_clip clips it to white. Raises
    ValueError, and nothing else, for what is no whole image of a format that Pillow decodes by itself, for pixels of 32
    bits and, before they are allocated, for an image of more than `max_pixels`.
    """
    return load(open_lazily(data, max_pixels=max_pixels))


def open_lazily(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the image with its header read and its pixels not; `load` reads them. Raises as `decode` does."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"not a usable image ({len(data)} bytes): {error}") from None
    # A broken file makes Pillow raise almost anything: OSError, SyntaxError, struct.error, EOFError, MemoryError.
    except Exception as error:
        # Pillow's own words for this name an object in memory.
        reason = _why_not(data) if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"not a usable image ({len(data)} bytes): {reason}") from error
    if not 0 < image.width * image.height <= max_pixels:
        size = f"{image.width}x{image.height} pixels, where 1 to {max_pixels} are allowed"
        raise TooManyPixels(f"not a usable image ({len(data)} bytes): {size}")
    return image


def _why_not(data: bytes) -> str:
    """Why Pillow does not take the bytes for an image."""
    known = next((name for name in _NOT_READ if (accepts := Image.OPEN[name][1]) and accepts(data[:16])), None)
    if known:
        return f"{known}, which is not read"
    return f"it begins with {data[:12]!r}, as no format that is read does" if data else "it is empty"


def load(image: Image.Image) -> Image.Image:
    """Returns the image with its pixels read. Raises as `decode` does."""
    try:
        image.load()
    except Exception as error:
        raise ValueError(f"not a usable image: {error}") from error
    if image.mode == "P":
        image.info.pop("transparency", None)  # it changes no colour, and Pillow warns of it
    # A PGM of 16 bits has pixels of 32, scaled to the range of 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        grey.format = image.format
        return grey
    if image.mode in ("I", "F"):
        raise ValueError(f"not a usable image: pixels of 32 bits (mode {image.mode}), whose range nothing tells")
    return image


def preprocess(image: Image.Image, p: Preprocess) -> npt.NDArray[np.uint8]:
    """Returns pixels (height, width, 3) uint8, read-only: what open_clip's evaluation transform sees before ToTensor.

    Raises ValueError for an image so thin that it has no pixels at that size, or more than MAX_PIXELS.
    """
    height, width = _resized(image.height, image.width, p)
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"an image of {image.width}x{image.height} cannot be resized to {width}x{height} pixels")
    # open_clip resizes to a rectangle by a call that leaves the interpolation at its default.
    rectangle = p.resize_mode == "shortest" and p.size[0] != p.size[1]
    image = image.resize((width, height), _RESAMPLING["bicubic" if rectangle else p.interpolation])
    top, left = _crop_start(height, p.size[0]), _crop_start(width, p.size[1])
    image = image.crop((left, top, left + p.size[1], top + p.size[0]))
    return np.asarray(image.convert("RGB"))


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Returns (images / 255 − mean) / std as float32 for pixels (..., 3) of NumPy or JAX."""
    return (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _resized(height: int, width: int, p: Preprocess) -> tuple[int, int]:
    """Returns the size before the crop, with the rounding of torchvision (one size for both) or timm."""
    if p.resize_mode == "squash":
        return p.size
    if p.resize_mode == "shortest" and p.size[0] == p.size[1]:
        short = p.size[0]
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    ratios = (height / p.size[0], width / p.size[1])
    ratio = min(ratios) if p.resize_mode == "shortest" else max(ratios)
    return round(height / ratio), round(width / ratio)


def _crop_start(length: int, target: int) -> int:
    """Returns where a centred crop starts; negative where it pads, and then Pillow fills with zeros."""
    return round((length - target) / 2) if length >= target else -((target - length) // 2)
