"""Which samples of a run were bad, and when there are too many of them."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from etils import epath

from tclip_jax.data.sources import FAULTS
from tclip_jax.storage import is_local, write_atomic

_logger = logging.getLogger(__name__)

_LISTED = 10_000  # more names say nothing more, and memory must not grow with the run
_SHOWN = 10  # warned of by name; then their number, at every doubling
_WINDOW = 10_000  # samples over which the share is taken
_FEWEST = 1_000  # samples before their share is judged, but at the end of a run


class BadSamples:
    """The first 10,000 bad samples, each once, in a file of lines {"name", "kind", "reason"}; the first 10 as warnings.

    A file that is there already is appended to. On an object store the file is written at every doubling and at last.

    Args:
      path: of the file; None for none.
      max_share: of about the last 10,000 samples, 0 to 1: more bad ones stop a run.
      epoch: samples of the source; so many without a single usable one stop a run, whatever `max_share` is.
    """

    def __init__(self, path: epath.PathLike | None = None, max_share: float = 1.0, epoch: int | None = None) -> None:
        self.path, self._max_share, self._epoch = path and epath.Path(path), max_share, epoch
        self._lines: dict[str, str] = {}
        self._listed: Counter[str] = Counter()
        self._cut = False  # by a crash, within a line, which the next line must not continue
        if self.path and self.path.exists():
            *whole, cut = self.path.read_text().split("\n")
            self._lines = {json.loads(line)["name"]: line for line in whole}
            self._listed.update(json.loads(line)["kind"] for line in whole)
            self._cut = bool(cut)
        self._warned, self._next = 0, 2 * _SHOWN
        self._lock = threading.Lock()
        self._seen = 0.0
        self._kinds: dict[str, float] = {}
        self._whole: Counter[str] = Counter()
        self._samples = self._without = 0  # all, and the last of them, in batches without a usable one

    def add(self, kind: str, name: str, reason: str) -> None:
        """Lists a sample, unless it was listed before."""
        with self._lock:
            if name in self._lines or len(self._lines) >= _LISTED:
                return
            self._lines[name] = json.dumps({"name": name, "kind": kind, "reason": reason})
            self._listed[kind] += 1
            self._warn(name, reason)
            if not self.path:
                return
            if self._cut:
                self.write()
            elif is_local(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(self._lines[name] + "\n")
            elif len(self._lines).bit_count() == 1:
                self.write()

    def _warn(self, name: str, reason: str) -> None:
        self._warned += 1
        if self._warned <= _SHOWN:
            _logger.warning("%s: %s; the sample counts with weight 0", name, reason)
        elif self._warned == self._next:
            self._next *= 2
            kinds = _counted(self._listed)
            _logger.warning("%d bad samples so far (%s)%s", self._listed.total(), kinds, self._where())

    def write(self) -> None:
        """Writes the whole file."""
        self._cut = False
        if self.path and self._lines:
            write_atomic(self.path, "".join(line + "\n" for line in self._lines.values()))

    def check(self, metrics: Mapping[str, Any], samples: int) -> None:
        """Judges a step that had `samples` samples over all processes, by its metrics `bad/<kind>`.

        Every process must call this with every step, and all will stop at the same one.

        Raises:
          ValueError: of about the last 10,000 samples more than `max_share` were bad, or of a whole epoch all.
        """
        counts = {kind: float(metrics[f"bad/{kind}"]) for kind in FAULTS[1:]}
        keep = 0.5 if self._seen > _WINDOW else 1.0
        self._kinds = {kind: keep * self._kinds.get(kind, 0) + count for kind, count in counts.items()}
        self._seen = keep * self._seen + samples
        self._whole.update({kind: int(count) for kind, count in counts.items()})
        self._samples += samples
        self._without = self._without + samples if sum(counts.values()) >= samples else 0
        if self._epoch is not None and self._without >= self._epoch:
            self._stop(
                f"of the last {self._without} samples, a whole epoch, not one can be used ({_counted(self._kinds)})"
            )
        if self._seen >= _FEWEST:
            self._judge("the last", sum(self._kinds.values()), self._seen, _counted(self._kinds))

    def resume(self, counts: Mapping[str, float], samples: int) -> None:
        """Counts for `finish` the bad samples, by kind, of the steps before those that `check` will be told of."""
        self._whole.update({kind: int(count) for kind, count in counts.items()})
        self._samples += samples

    def finish(self) -> None:
        """Judges a whole run at its end, be it ever so short, and logs how many of its samples were bad.

        Raises:
          ValueError: more than `max_share` were bad, or all.
        """
        bad, kinds = self._whole.total(), _counted(self._whole)
        if not bad:
            return
        if bad >= self._samples:
            self._stop(f"of all {self._samples} samples not one can be used ({kinds})")
        self._judge("all", bad, self._samples, kinds)
        _logger.warning("%d of %d samples were bad (%s)%s", bad, self._samples, kinds, self._where())

    def _judge(self, which: str, bad: float, samples: float, kinds: str) -> None:
        if bad > self._max_share * samples:
            more = f"more than config.data.max_bad_share = {self._max_share}"
            self._stop(f"{bad:.0f} of {which} {samples:.0f} samples are bad ({kinds}), {more}")

    def _stop(self, why: str) -> NoReturn:
        self.write()
        shown = "".join(f"\n  {line}" for line in list(self._lines.values())[-_SHOWN:])
        raise ValueError(f"{why}{self._where()}{shown}")

    def _where(self) -> str:
        return f", listed in {self.path}" if self.path else ""


def _counted(kinds: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {count:.0f}" for kind, count in kinds.items() if count)
