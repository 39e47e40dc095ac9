"""The data of a run: batches, and the place in them as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

_ATTEMPTS = 3

_logger = logging.getLogger(__name__)


class Batches:
    """An endless iterator of batches that starts its workers again, at the same place, when one of them was killed.

    Attributes:
      position: JSON values that say which batch is next, from one iterator to another.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._iterator = start()
        self.position = self._get()

    def seek(self, position: Any) -> None:
        """Goes to a place that was a `position`."""
        state = self._iterator.get_state()
        self._iterator.set_state(json.dumps(position).encode() if isinstance(state, bytes) else position)
        self.position = position

    def __next__(self) -> dict[str, Any]:
        """Raises what reading raises, and RuntimeError when workers are killed three times in a row."""
        for attempt in range(_ATTEMPTS):
            try:
                batch = next(self._iterator)
                break
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error) or attempt == _ATTEMPTS - 1:
                    raise
                _logger.warning("a process that prepares data was killed: starting it again")
                self._iterator.close()
                self._iterator = self._start()
                self.seek(self.position)
        self.position = self._get()
        return batch

    def close(self) -> None:
        """Ends what prepares batches."""
        self._iterator.close()

    def _get(self) -> Any:
        state = self._iterator.get_state()
        return json.loads(state) if isinstance(state, bytes) else state
