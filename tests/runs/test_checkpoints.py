"""Checkpoints are written whole, kept and deleted; when one is due."""

from __future__ import annotations

import logging
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tclip_jax.runs import checkpoints
from tclip_jax.runs.checkpoints import CheckpointConfig, Checkpoints, check_checkpoint, load_params
from tclip_jax.runs.checksums import CheckpointError
from tclip_jax.runs.steps import saved_steps


@pytest.fixture(params=["v0", "v1"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test through both of Orbax's APIs."""
    monkeypatch.setenv("TCLIP_ORBAX", request.param)
    return request.param


def trees(step: int) -> dict[str, Any]:
    return {"params": {"a": jnp.arange(12.0).reshape(3, 4) + step}, "training": {"step": jnp.int32(step)}}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_late_is_told_by_a_clock_that_cannot_be_set(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with Checkpoints(tmp_path / "c", CheckpointConfig(every=10, every_minutes=5)) as saver:
        monkeypatch.setattr(time, "time", lambda: 1e12)
        assert not saver.is_late() and saver.is_due(10) and not saver.is_due(11)
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now + 301)
        assert saver.is_late() and saver.is_due(11, late=True)
        # "late" is the answer to the step before: what was saved meanwhile is not saved again at once.
        saver.save(11, {"params": {"w": jnp.ones(2)}}, {})
        assert not saver.is_late() and not saver.is_due(12, late=True)
        assert saver.is_due(13, late=True) and not saver.is_due(13) and saver.is_due(20)
    with Checkpoints(tmp_path / "d", CheckpointConfig()) as saver:
        assert not saver.is_late()


def test_what_is_saved_comes_back_and_the_newest_and_best_are_kept(
    api: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()  # what a start before this one left
    (tmp_path / "3.deleted").mkdir()
    with Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_best=1, best_metric="accuracy")) as saver:
        assert saver.restore(abstract(trees(0))) is None
        for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.1), (5, 0.0)):
            saver.save(step, trees(step), {"next_index": 10 * step})
            saver.save(step, trees(step), {})  # as at the end of a run whose last step was due
            saver.score(step, {"accuracy": accuracy})
    assert saved_steps(tmp_path) == [2, 4, 5] and {path.name for path in tmp_path.iterdir()} == {"2", "4", "5"}
    positions: list[Any] = []
    check_checkpoint(tmp_path, 5, abstract(trees(0)), positions.append)
    with Checkpoints(tmp_path, CheckpointConfig()) as saver:
        restored = saver.restore(abstract(trees(0)))
    jax.tree.map(np.testing.assert_array_equal, restored, trees(5))
    assert positions == [{"next_index": 50}]
    with caplog.at_level(logging.WARNING):
        step, params = load_params(tmp_path, abstract(trees(0)["params"]), [4])
    assert step == 4 and not caplog.records  # a good checkpoint is read without a warning
    np.testing.assert_array_equal(params["a"], trees(4)["params"]["a"])


def test_a_partial_one_is_no_reason_to_delete_a_whole_one(api: str, tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as saver:
        saver.save(1, trees(1), {})
    (tmp_path / "2").mkdir()  # copied there while the run stood still
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as saver:
        assert (restored := saver.restore(abstract(trees(0))))
        assert int(restored["training"]["step"]) == 1
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("where", ["write_checksums", "save"])
def test_a_failed_write_is_one_line_and_the_one_before_stays(
    api: str, where: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise IndexError("nothing there")

    with pytest.raises(CheckpointError) as caught, Checkpoints(tmp_path, CheckpointConfig(keep=1)) as saver:
        saver.save(1, trees(1), {})
        saver.wait()
        if where == "save":
            (tmp_path / "2").write_text("a file where the folder should be")
        else:
            monkeypatch.setattr(checkpoints, "write_checksums", fail)
        saver.save(2, trees(2), {})
    assert "2: the checkpoint could not be written, that of step 1 is whole: " in str(caught.value)
    assert (where == "save") or "nothing there" in str(caught.value)
    assert saved_steps(tmp_path) == [1] and not [*tmp_path.glob("2.*")]
    assert load_params(tmp_path, abstract(trees(0)["params"]))[0] == 1


def test_a_folder_that_has_gone_while_it_was_written_fails_the_save_and_leaves_nobody_waiting(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in Orbax's thread, it would leave the other processes at its barrier for a day."""
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as saver:
        iterdir = type(saver._folder).iterdir
        hidden = lambda self: (path for path in iterdir(self) if "3" not in path.name)  # noqa: E731
        monkeypatch.setattr(type(saver._folder), "iterdir", hidden)
        saver.save(3, {"params": {"w": jnp.ones(2)}}, {})
        with pytest.raises(CheckpointError, match=r"c/3: the checkpoint could not be written, .*no such folder"):
            saver.wait()
        monkeypatch.undo()


@pytest.mark.parametrize("reader", ["v0", "v1"])
def test_each_api_reads_what_either_wrote_over_other_devices(
    api: str, reader: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state as training has it, of eight devices: read over two, whole on one, and in part damaged."""

    def sharded(tree: Any, count: int) -> Any:
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        spec = [jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",))]
        return jax.tree.map(lambda x: jax.device_put(x, spec[x.ndim > 0 and x.shape[0] % count == 0]), tree)

    params = {"a": jnp.arange(64.0).reshape(16, 4), "b": {"c": jnp.float32(7)}, "d": jnp.arange(3, dtype=jnp.int32)}
    optimizer = optax.adamw(1e-3).init(params)
    state = {"params": params, "training": {"step": jnp.int32(5), "heads": {}, "optimizer": optimizer}}
    with Checkpoints(tmp_path, CheckpointConfig()) as saver:
        saver.save(5, sharded(state, 8), {"next_index": 1})
        saver.save(6, sharded(state, 8), {"next_index": 2})
    monkeypatch.setenv("TCLIP_ORBAX", reader)
    for count in (2, 1):
        wanted = abstract(sharded(jax.tree.map(jnp.zeros_like, state), count))
        with Checkpoints(tmp_path, CheckpointConfig()) as saver:
            restored = saver.restore(wanted)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        jax.tree.map(lambda x, to: to.sharding.is_equivalent_to(x.sharding, x.ndim) or pytest.fail(), restored, wanted)
    (largest,) = sorted((tmp_path / "6" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)[-1:]
    largest.write_bytes(largest.read_bytes()[:-1])
    assert load_params(tmp_path, abstract(params))[0] == 5
    other = abstract(params | {"a": jnp.zeros((16, 5))})
    with pytest.raises(CheckpointError, match=r"5/params: .*a has shape \(16, 4\), the model's is \(16, 5\)"):
        load_params(tmp_path, other)


def test_an_api_that_there_is_not(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCLIP_ORBAX", "2")
    with pytest.raises(ValueError, match=r"^TCLIP_ORBAX is '2': it must be v0 or v1$"):
        Checkpoints(tmp_path, CheckpointConfig())
