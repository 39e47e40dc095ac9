"""Which samples of a run were bad, and when there are too many of them."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from typing import Any

from etils import epath

from tclip_jax.data.sources import FAULTS
from tclip_jax.storage import is_local, write_atomic

_logger = logging.getLogger(__name__)

_LISTED = 10_000  # more names say nothing more, and memory must not grow with the run
_SHOWN = 10
_WINDOW = 10_000  # samples over which the share is taken
_FEWEST = 1_000  # samples before anything is judged


class BadSamples:
    """The first 10,000 bad samples, each once: as warnings, and in a file of lines {"name", "kind", "reason"}.

    A file that is there already is gone on with. On an object store the file is written at every doubling and at last.

    Attributes:
      path: of the file; None for none.
    """

    def __init__(self, path: epath.PathLike | None = None, max_share: float = 1.0) -> None:
        self.path, self._max_share = path and epath.Path(path), max_share
        self._lines: dict[str, str] = {}
        if self.path and self.path.exists():
            *whole, cut = self.path.read_text().split("\n")
            self._lines = {json.loads(line)["name"]: line for line in whole}
            if cut:  # by a crash: the next line must not go on with it
                write_atomic(self.path, "".join(line + "\n" for line in whole))
        self._lock = threading.Lock()
        self._seen = 0.0
        self._kinds: dict[str, float] = {}

    def add(self, kind: str, name: str, reason: str) -> None:
        """Lists a sample, unless it was listed before."""
        with self._lock:
            if name in self._lines or len(self._lines) >= _LISTED:
                return
            self._lines[name] = json.dumps({"name": name, "kind": kind, "reason": reason})
            _logger.warning("%s: %s; the sample counts with weight 0", name, reason)
            if not self.path:
                return
            if is_local(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(self._lines[name] + "\n")
            elif len(self._lines).bit_count() == 1:
                self.write()

    def write(self) -> None:
        """Writes the whole file."""
        if self.path and self._lines:
            write_atomic(self.path, "".join(line + "\n" for line in self._lines.values()))

    def check(self, metrics: Mapping[str, Any], samples: int) -> None:
        """Judges a step that had `samples` samples over all processes, by its metrics `bad/<kind>`.

        Every process must call this with every step, and all will stop at the same one.

        Raises:
          ValueError: of about the last 10,000 samples more than `max_share` were bad.
        """
        counts = {kind: float(metrics[f"bad/{kind}"]) for kind in FAULTS[1:]}
        keep = 0.5 if self._seen > _WINDOW else 1.0
        self._kinds = {kind: keep * self._kinds.get(kind, 0) + count for kind, count in counts.items()}
        self._seen = keep * self._seen + samples
        bad = sum(self._kinds.values())
        if self._seen < _FEWEST or bad <= self._max_share * self._seen:
            return
        self.write()
        kinds = ", ".join(f"{kind} {count:.0f}" for kind, count in self._kinds.items() if count)
        where = f", listed in {self.path}" if self.path else ""
        shown = "".join(f"\n  {line}" for line in list(self._lines.values())[-_SHOWN:])
        raise ValueError(
            f"{bad:.0f} of the last {self._seen:.0f} samples are bad ({kinds}), more than "
            f"config.data.max_bad_share = {self._max_share}{where}{shown}"
        )
