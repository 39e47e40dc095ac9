"""When checkpoints are saved, which are kept, and how they are written and restored."""

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
from tclip_jax.runs.checkpoints import CheckpointConfig, Checkpoints, check_checkpoint, kept, load_params
from tclip_jax.runs.checksums import CheckpointError
from tclip_jax.runs.steps import saved_steps


@pytest.fixture(params=["v0", "v1"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with each of Orbax's APIs."""
    monkeypatch.setenv("TCLIP_ORBAX", request.param)
    return request.param


def trees(step: int) -> dict[str, Any]:
    return {"params": {"a": jnp.arange(12.0).reshape(3, 4) + step}, "training": {"step": jnp.int32(step)}}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_the_wall_clock_does_not_change_when_a_save_is_late(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    with Checkpoints(tmp_path / "c", CheckpointConfig(every=10, every_minutes=5)) as saver:
        monkeypatch.setattr(time, "time", lambda: 1e12)
        assert not saver.is_late() and saver.is_due(10) and not saver.is_due(11)
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now + 301)
        assert saver.is_late() and saver.is_due(11, late=True)
        # `late` belongs to the step before: a save in the meantime is not repeated at once.
        saver.save(11, {"params": {"w": jnp.ones(2)}}, {})
        assert not saver.is_late() and not saver.is_due(12, late=True)
        assert saver.is_due(13, late=True) and not saver.is_due(13) and saver.is_due(20)
    with Checkpoints(tmp_path / "d", CheckpointConfig()) as saver:
        assert not saver.is_late()


def test_saved_trees_are_restored_and_the_newest_and_best_steps_kept(
    api: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()  # left by an earlier start
    (tmp_path / "3.deleted").mkdir()
    with Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_best=1, best_metric="accuracy")) as saver:
        assert saver.restore(abstract(trees(0))) is None
        for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.1), (5, 0.0)):
            saver.save(step, trees(step), {"next_index": 10 * step})
            saver.save(step, trees(step), {})  # as after a last step that was due
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
    assert step == 4 and not caplog.records  # a whole checkpoint is read without a warning
    np.testing.assert_array_equal(params["a"], trees(4)["params"]["a"])


def test_an_incomplete_step_does_not_count_among_the_steps_to_keep(api: str, tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as saver:
        saver.save(1, trees(1), {})
    (tmp_path / "2").mkdir()  # an incomplete copy
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as saver:
        assert (restored := saver.restore(abstract(trees(0))))
        assert int(restored["training"]["step"]) == 1
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("where", ["write_checksums", "save"])
def test_a_failed_save_is_one_line_and_keeps_the_step_before(
    api: str, where: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise IndexError("nothing there")

    with pytest.raises(CheckpointError) as caught, Checkpoints(tmp_path, CheckpointConfig(keep=1)) as saver:
        saver.save(1, trees(1), {})
        saver.wait()
        if where == "save":
            (tmp_path / "2").write_text("a file in place of the folder")
        else:
            monkeypatch.setattr(checkpoints, "write_checksums", fail)
        saver.save(2, trees(2), {})
    assert "2: the checkpoint could not be written; step 1 is whole: " in str(caught.value)
    assert (where == "save") or "nothing there" in str(caught.value)
    assert saved_steps(tmp_path) == [1] and not [*tmp_path.glob("2.*")]
    assert load_params(tmp_path, abstract(trees(0)["params"]))[0] == 1


def test_a_failed_save_is_reported_before_the_next_save(
    api: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "write_checksums", fail)
    with Checkpoints(tmp_path, CheckpointConfig()) as saver:
        saver.check()
        saver.save(1, trees(1), {})
        with pytest.raises(CheckpointError, match=r"1: the checkpoint could not be written; .*saved: disk full"):
            for _ in range(1000):
                saver.check()
                time.sleep(0.01)
    assert saved_steps(tmp_path) == []


def test_a_folder_removed_during_the_save_fails_it_and_blocks_no_process(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error raised in Orbax's thread would leave the other processes at a barrier for a day."""
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as saver:
        iterdir = type(saver._folder).iterdir
        hidden = lambda self: (path for path in iterdir(self) if "3" not in path.name)  # noqa: E731
        monkeypatch.setattr(type(saver._folder), "iterdir", hidden)
        saver.save(3, {"params": {"w": jnp.ones(2)}}, {})
        with pytest.raises(CheckpointError, match=r"c/3: the checkpoint could not be written; .*no such folder"):
            saver.wait()
        monkeypatch.undo()


@pytest.mark.parametrize("reader", ["v0", "v1"])
def test_each_api_reads_checkpoints_of_both_on_other_devices(
    api: str, reader: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training state of eight devices is read on two and on one; then its newest step is damaged."""

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
    mismatch = abstract(params | {"a": jnp.zeros((16, 5))})
    with pytest.raises(CheckpointError, match=r"5/params: .*a has shape \(16, 4\), the model's is \(16, 5\)"):
        load_params(tmp_path, mismatch)


def test_an_unknown_api_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCLIP_ORBAX", "2")
    with pytest.raises(ValueError, match=r"^TCLIP_ORBAX is '2': it must be v0 or v1$"):
        Checkpoints(tmp_path, CheckpointConfig())


def test_the_newest_and_the_best_are_kept() -> None:
    scores = {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1, 6: 0.2}
    steps = [1, 2, 3, 4, 5, 6]
    assert kept(steps, {}, CheckpointConfig(keep=2, keep_best=3)) == {5, 6}
    assert kept(steps, scores, CheckpointConfig(keep=2)) == {5, 6}
    assert kept(steps, scores, CheckpointConfig(keep=1, keep_best=1)) == {3, 6}  # of equal scores, the newer step
    assert kept(steps, scores, CheckpointConfig(keep=1, keep_best=2, best_mode="min")) == {4, 6}
    assert kept(steps, {1: 0.5}, CheckpointConfig(keep=1, keep_best=5)) == {1, 6}
    assert kept([], scores, CheckpointConfig()) == set()
