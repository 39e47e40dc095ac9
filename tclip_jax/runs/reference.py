"""The reference of a run's configuration: every key with its type, default, bounds and meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.runs.config import RunConfig, base_config
from tclip_jax.schema import Bounds, declared, describe, key_of

POWERS = {str(2**31 - 1): "2³¹ − 1", str(2**32): "2³²"}  # in bounds, for readers


@dataclasses.dataclass(frozen=True)
class KeyReference:
    """A key of a configuration.

    Attributes:
      path: such as "optimizer.learning_rate".
      type: in words.
      default: in the form of a configuration file.
      bounds: in words; "" if every value of the type is valid.
      doc: what it is, with its unit.
    """

    path: str
    type: str
    default: Any
    bounds: str
    doc: str

    @property
    def section(self) -> str:
        """The path of the section, "" for the top level."""
        return self.path.rpartition(".")[0]


def key_references() -> list[KeyReference]:
    """Return every key of a run's configuration, those of the top level first."""
    top = declared(RunConfig)
    sections = {
        name: type(field.default) for name, (field, _) in top.items() if dataclasses.is_dataclass(field.default)
    }
    listed = keys_of(RunConfig, without=[*sections, "model", "preprocess"])
    listed += keys_of(CLIPConfig, "model.", ["vision", "text"]) + keys_of(VisionConfig, "model.vision_cfg.")
    listed += keys_of(TextConfig, "model.text_cfg.") + keys_of(Preprocess, "preprocess.")
    return listed + [key for name, cls in sections.items() for key in keys_of(cls, f"{name}.")]


def values_by_path(config: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Return the values of a nested configuration by path; the options of a quantizer are one value."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{start}{name}"
        nested = isinstance(value, Mapping) and path != "quantizer.options"
        values |= values_by_path(value, f"{path}.") if nested else {path: value}
    return values


def keys_of(cls: type, start: str = "", without: Collection[str] = ()) -> list[KeyReference]:
    """Return the keys that a class declares, except some, with paths that start with `start`."""
    written = values_by_path(base_config().to_dict())
    keys = []
    for name, (field, hint) in declared(cls).items():
        if name in without:
            continue
        bounds = key_of(field).bounds
        default = written.get(start + name, None if field.default is dataclasses.MISSING else field.default)
        limits = "" if bounds == Bounds() else str(bounds)
        for digits, power in POWERS.items():
            limits = limits.replace(digits, power)
        keys.append(KeyReference(start + name, describe(hint), default, limits, key_of(field).doc))
    return keys
