"""The state of an iterator has the key of its data; a state of other data is refused, and the error names why."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from typing import Any

import pytest

from tclip_jax.data.images import Preprocess
from tclip_jax.data.pipeline import TrainIterator, train_iterator
from tclip_jax.data.sources import open_source
from tclip_jax.data.tokenizer import Tokenizer
from tests.data.sources.layouts import LAYOUTS, Layout, files_of, laid_out

PIXELS = Preprocess((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def iterator(spec: str, **changes: Any) -> TrainIterator:
    arguments: dict[str, Any] = {"augment": "none", "templates": "simple", "batch_size": 4, "seed": 0}
    return train_iterator(
        open_source(spec, "train"), tokenizer=Tokenizer(12), preprocess=PIXELS, **(arguments | changes)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_of_other_data_is_refused(layout: Layout, tmp_path: pathlib.Path) -> None:
    spec = laid_out(layout, tmp_path / "data", (1, 2, 3, 4))
    data = iterator(spec)
    next(data)
    state = data.get_state()
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    iterator(spec.replace("/data", "/copy"), batch_size=2).set_state(state)

    # Replace every image by another one with the same name, size and times.
    laid_out(layout, tmp_path / "other", (5, 6, 7, 8), ("a red triang", "a dog on a mat", "no cat", "a tall free"))
    for name, status in files_of(tmp_path / "data").items():
        (tmp_path / "data" / name).write_bytes((tmp_path / "other" / name).read_bytes())
        os.utime(tmp_path / "data" / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    key = r"parts\.1\.content" if layout.__name__ == "mixture" else "content"
    with pytest.raises(ValueError, match=rf"not those of the checkpoint \({key}: '\w+', not '\w+'\): restore them"):
        iterator(spec).set_state(state)


def test_states_of_another_seed_and_of_older_versions_are_refused() -> None:
    data = iterator("digits")
    with pytest.raises(ValueError, match=r"\(seed: 0, not 1\)"):
        iterator("digits", seed=1).set_state(data.get_state())
    with pytest.raises(ValueError, match=r"data are not those of the checkpoint \(.*samples: 1800, not 1400.*\)"):
        iterator("digits", seed=0).set_state({"samples": 0, "data": data.get_state()["data"] | {"samples": 1800}})
    for old in ({"next_index": 3}, {"samples": 8, "data": "0:1400:"}, 3, None):
        with pytest.raises(ValueError, match=re.escape(str(old)) + ".*older version wrote it.*by config.init"):
            data.set_state(old)  # type: ignore[arg-type]
