"""The images on which two models part, to look at."""

from __future__ import annotations

from typing import NamedTuple

import tqdm
from etils import epath

from tclip_jax.data.sources import open_source
from tclip_jax.evaluation.comparison import Comparison
from tclip_jax.evaluation.mistakes import Example, changed
from tclip_jax.evaluation.results import read_predictions
from tclip_jax.evaluation.suite import DATASETS
from tclip_jax.evaluation.tasks import SPLIT, check_content


class Pictures(NamedTuple):
    """Some images that were lost and gained, or why there are none."""

    lost: tuple[Example, ...]
    gained: tuple[Example, ...]
    why_not: str


def flipped(comparison: Comparison, root: epath.PathLike | None, limit: int = 7) -> dict[str, Pictures]:
    """Up to `limit` lost and as many gained images of every data set that has flips.

    A row of the table is read from its webdataset export below `root`; any other data set is a source by its name.
    """
    found = {}
    rows = [(row, row.flips) for row in comparison.rows if row.flips and (row.flips.lost or row.flips.gained)]
    for row, flips in tqdm.tqdm(rows, "images", unit="set", disable=None, leave=False):
        name = row.dataset
        if name in DATASETS and root is None:
            continue
        spec = f"wds:{epath.Path(root).expanduser() / DATASETS[name].folder}" if name in DATASETS else name
        try:
            source = open_source(spec, row.split or SPLIT)
            check_content(spec, source, row.content)
            a, b = (read_predictions(folder, name) for folder in (comparison.a, comparison.b))
            lost, gained = (tuple(changed(a, b, keys, source, limit)) for keys in (flips.lost, flips.gained))
            found[name] = Pictures(lost, gained, "")
        except (ValueError, OSError) as error:
            found[name] = Pictures((), (), str(error))
    return found
