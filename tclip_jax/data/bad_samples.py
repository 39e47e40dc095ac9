"""The bad samples of a run: a list of their names, and a limit on their share."""

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

_MAX_LISTED = 10_000  # names; memory must not grow with the run
_EXAMPLES = 10  # lines of the list that an error quotes
_WINDOW = 10_000  # samples over which the share is computed
_MIN_SAMPLES = 1_000  # samples before the first check of the share; the end of a run checks any number


class BadSamples:
    """Lists the bad samples of one process and stops a run that has too many.

    The list is a file of lines {"name", "kind", "reason"}, one for each of the first 10,000 bad samples. An existing
    file is appended to. On an object store the file is written each time the count doubles, and by `write`. The log
    gets counts only: those of `news`, or for a run those of its log lines and of `finish`.

    Args:
      path: the file; None for no file.
      max_share: the largest share of bad samples, 0 to 1, among about the last 10,000 samples.
      epoch: number of samples in the source. The run stops after that many samples in a row without a usable one, for
        any `max_share`.
    """

    def __init__(self, path: epath.PathLike | None = None, max_share: float = 1.0, epoch: int | None = None) -> None:
        self.path, self._max_share, self._epoch = path and epath.Path(path), max_share, epoch
        self._lines: dict[str, str] = {}  # by name
        self._new: Counter[str] = Counter()  # listed since the last `news`, by kind
        self._example = ""  # the first of them
        self._truncated = False  # the last line is incomplete after a crash; no line may be appended to it
        if self.path and self.path.exists():
            *lines, rest = self.path.read_text().split("\n")
            self._lines = {json.loads(line)["name"]: line for line in lines}
            self._truncated = bool(rest)
        self._lock = threading.Lock()
        self._window_samples = 0.0
        self._window_bad: dict[str, float] = {}  # by kind
        self._total_samples = 0
        self._total_bad: Counter[str] = Counter()  # by kind
        self._unusable = 0  # samples since the last batch with a usable one

    def add(self, kind: str, name: str, reason: str) -> None:
        """List a sample, unless its name is listed already."""
        with self._lock:
            if name in self._lines or len(self._lines) >= _MAX_LISTED:
                return
            self._lines[name] = json.dumps({"name": name, "kind": kind, "reason": reason})
            self._new[kind] += 1
            self._example = self._example or f"{name}: {reason}"
            if not self.path:
                return
            if self._truncated:
                self.write()
            elif is_local(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(self._lines[name] + "\n")
            elif len(self._lines).bit_count() == 1:  # the count is a power of two
                self.write()

    def news(self) -> str:
        """Return a line with the samples listed since the last call: their count by kind and the first; "" for none."""
        with self._lock:
            count, kinds, example = self._new.total(), format_counts(self._new), self._example
            self._new, self._example = Counter(), ""
        return f"{count:,} bad sample{'s' * (count > 1)} ({kinds}), masked; the first: {example}" if count else ""

    def write(self) -> None:
        """Write the whole list to the file."""
        self._truncated = False
        if self.path and self._lines:
            write_atomic(self.path, "".join(line + "\n" for line in self._lines.values()))

    def check(self, metrics: Mapping[str, Any], samples: int) -> None:
        """Count the bad samples of a step and check their share.

        Every process must call this after every step. All processes then stop at the same step.

        Args:
          metrics: the metrics of the step; `bad/<kind>` are counts over all processes.
          samples: the number of samples of the step over all processes.

        Raises:
          ValueError: more than `max_share` of about the last 10,000 samples, or all samples of an epoch, are bad.
        """
        counts = {kind: float(metrics[f"bad/{kind}"]) for kind in FAULTS[1:]}
        decay = 0.5 if self._window_samples > _WINDOW else 1.0
        self._window_bad = {kind: decay * self._window_bad.get(kind, 0) + count for kind, count in counts.items()}
        self._window_samples = decay * self._window_samples + samples
        self.resume(counts, samples)
        self._unusable = self._unusable + samples if sum(counts.values()) >= samples else 0
        if self._epoch is not None and self._unusable >= self._epoch:
            kinds = format_counts(self._window_bad)
            self._stop(f"none of the last {self._unusable} samples, a whole epoch, is usable ({kinds})")
        if self._window_samples >= _MIN_SAMPLES:
            self._check_share("the last", self._window_bad, self._window_samples)

    def resume(self, counts: Mapping[str, float], samples: int) -> None:
        """Add the bad samples of earlier steps, by kind, to the totals that `finish` checks."""
        self._total_bad.update({kind: int(count) for kind, count in counts.items()})
        self._total_samples += samples

    def finish(self) -> None:
        """Check the share over the whole run, however short, and log it.

        Raises:
          ValueError: more than `max_share` of the samples, or all of them, are bad.
        """
        bad, kinds = self._total_bad.total(), format_counts(self._total_bad)
        if not bad:
            return
        if bad >= self._total_samples:
            self._stop(f"none of all {self._total_samples} samples is usable ({kinds})")
        self._check_share("all", self._total_bad, self._total_samples)
        _logger.warning("%d of %d samples were bad (%s)%s", bad, self._total_samples, kinds, self._location())

    def _check_share(self, which: str, bad: Mapping[str, float], samples: float) -> None:
        count = sum(bad.values())
        if count > self._max_share * samples:
            limit = f"more than config.data.max_bad_share = {self._max_share}"
            self._stop(f"{count:.0f} of {which} {samples:.0f} samples are bad ({format_counts(bad)}), {limit}")

    def _stop(self, reason: str) -> NoReturn:
        self.write()
        examples = "".join(f"\n  {line}" for line in list(self._lines.values())[-_EXAMPLES:])
        raise ValueError(f"{reason}{self._location()}{examples}")

    def _location(self) -> str:
        return f", listed in {self.path}" if self.path else ""


def format_counts(counts: Mapping[str, float]) -> str:
    """Return counts by kind as "corrupt_image 2, no_caption 1", without zeros."""
    return ", ".join(f"{kind} {count:,.0f}" for kind, count in counts.items() if count)
