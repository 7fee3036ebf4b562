"""Checkpoints: named arrays in logical form plus JSON, written by orbax in the background.

    checkpoints/step_00000120/arrays/         orbax (OCDBT, zarr)
    checkpoints/step_00000120/manifest.json   ours, written last: without it the step is incomplete

The manifest (`moejax.training.manifest`) names every array and every file with its size and hash,
so that a torn or altered checkpoint is recognised before anything reads it. Nothing is unpickled.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.errors import UserError
from moejax.training import checkpoint_folders, manifest
from moejax.training.array_store import ArrayStore, any_process
from moejax.training.files import disk_errors, is_disk_full
from sharding.distributed import from_first

__all__ = ["Checkpoints", "Targets"]

Targets = (
    Mapping[str, jax.ShapeDtypeStruct]
    | Callable[[Mapping[str, Any]], Mapping[str, jax.ShapeDtypeStruct]]
)


class Checkpoints:
    """The checkpoints of one run.

    Reading needs no lock and changes nothing; only `save` writes and cleans up, so a model can be
    read while its run goes on. On several hosts the folder is shared, and every process calls
    `save`, `wait` and the restore methods.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3):
        """Names the folder; it is made by the first save.

        Args:
            folder: `checkpoints/` of a run directory.
            keep: how many complete checkpoints stay, the newest ones.

        Raises:
            UserError: keep is less than 1.
        """
        if keep < 1:
            raise UserError(f"keep={keep}: at least 1 checkpoint is kept")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._damaged: set[int] = set()
        self._store: ArrayStore | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._cleaned = False

    def save(
        self, step: int, arrays: Mapping[str, jax.Array | np.ndarray], metadata: Mapping[str, Any]
    ) -> bool:
        """Copies the arrays to the host and returns; writing goes on in the background.

        Waits first for a save still under way. The arrays may be donated or changed afterwards.

        Args:
            step: training steps done, at least 0.
            arrays: by name, any sharding, none empty; typed keys as `jax.random.key_data`.
            metadata: what JSON can hold.

        Returns:
            False if the step is there already, complete, and is left as it is.

        Raises:
            UserError: the disk is full or the folder cannot be written, in this save or the last.
        """
        self.wait()
        # Process 0 decides: another host may see a folder late.
        there = self._is_primary() and step in self.steps() and step not in self._damaged
        if any_process(there):
            return False
        arrays = {name: self._saveable(name, value) for name, value in arrays.items()}
        head = manifest.head(step, arrays, metadata)
        if self._is_primary():
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._clean()
                checkpoint_folders.remove(self.folder, step)
                self._path(step).mkdir()
        self._damaged.clear()
        try:
            self._array_store().save(self._path(step) / "arrays", arrays)
        except Exception as error:
            raise self._save_error(error) from error
        # Whoever saves has to wait or close: at the end of a program threads start no others.
        self._thread = threading.Thread(target=self._commit, args=(step, head), name="checkpoint")
        self._thread.start()
        return True

    def wait(self) -> None:
        """Returns when the save under way is complete on disk.

        Raises:
            UserError: it failed; the previous checkpoints are as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # Only the primary process writes manifests.
            multihost_utils.sync_global_devices("moejax checkpoint")
        failure, self._failure = self._failure, None
        if failure is not None:
            raise self._save_error(failure) from failure

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; nothing is read but names."""
        return checkpoint_folders.complete_steps(self.folder)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays.

        Raises:
            UserError: the checkpoint is missing, damaged, or of another format version.
        """
        self._require(step)
        try:
            return manifest.read(self._path(step))["metadata"]
        except manifest.DamagedCheckpoint as error:
            raise self._damage_error(step, str(error)) from error

    def restore(
        self, step: int, targets: Targets, partial: bool | str = False
    ) -> dict[str, jax.Array]:
        """Reads arrays onto the devices that the targets name, whatever they were saved from.

        Waits first for a save still under way.

        Args:
            step: one of `steps()`.
            targets: shape, dtype and sharding of each array. A float array may be asked for in
                another float dtype and is rounded to it. Or a function that finds them, called with
                the manifest's `arrays` (shape and dtype by name) and `metadata`.
            partial: leave arrays of the checkpoint that no target names unread; text: only those
                whose names begin with it.

        Returns:
            The arrays, by name.

        Raises:
            UserError: the checkpoint is missing, damaged, of another format version, or of another
                model (every name and shape that differs is told).
            ValueError: a target's sharding does not fit its shape.
        """
        if not callable(targets):
            _check_shardings(targets)
        self.wait()
        self._require(step)
        content: dict[str, Any] = {}
        damage = None
        try:
            content = manifest.read(self._path(step))
            if self._is_primary():
                damage = manifest.find_damage(self._path(step), content)
        except manifest.DamagedCheckpoint as error:
            damage = str(error)
        if any_process(damage is not None):
            raise self._damage_error(step, damage or "another process found it unreadable")
        if callable(targets):
            targets = targets(content)
            _check_shardings(targets)
        manifest.check_targets(self._path(step), content, targets, partial)
        try:
            return self._array_store().restore(self._path(step) / "arrays", targets)
        except Exception as error:
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(
                f"{self._path(step)}: the checkpoint is whole and could not be restored: {first}"
            ) from error

    def restore_latest(
        self,
        targets: Targets,
        partial: bool | str = False,
        report: Callable[[str], None] = print,
    ) -> tuple[int, dict[str, jax.Array], dict[str, Any]] | None:
        """Restores the newest checkpoint that is whole.

        A damaged one is reported and passed over; the next `save` renames it to `damaged_…`.

        Args:
            targets: as for `restore`.
            partial: as for `restore`.
            report: called with one line for each checkpoint passed over.

        Returns:
            (step, arrays, metadata); None if there is no complete checkpoint.

        Raises:
            UserError: all are damaged, or the newest whole one is of another model or format.
        """
        self.wait()
        steps = from_first("checkpoints", self.steps())
        for step in reversed(steps):
            try:
                return step, self.restore(step, targets, partial), self.metadata(step)
            except manifest.DamagedCheckpoint as error:
                last = error
                report(str(error))
        if not steps:
            return None
        raise UserError(f"{self.folder}: no checkpoint is usable: {last}")

    def close(self) -> None:
        """Waits for the save under way and releases orbax's threads.

        Raises:
            UserError: that save failed.
        """
        try:
            self.wait()
        finally:
            if self._store is not None:
                self._store.close()
                self._store = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # the others may be gone, and to wait for them has no end
        self.close()

    def _path(self, step: int) -> Path:
        return checkpoint_folders.step_path(self.folder, step)

    def _is_primary(self) -> bool:
        return jax.process_index() == 0

    def _array_store(self) -> ArrayStore:
        if self._store is None:
            self._store = ArrayStore()
        return self._store

    def _saveable(self, name: str, value: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        if isinstance(value, jax.Array):
            if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
                raise TypeError(f"{name}: save jax.random.key_data(key), not the typed key")
            return value
        return np.array(value)  # a copy: orbax reads it after we return

    def _commit(self, step: int, head: dict[str, Any]) -> None:
        try:
            self._array_store().wait()
            if self._is_primary():
                manifest.write(self._path(step), head)
                sound = [s for s in self.steps() if s not in self._damaged]
                for old in sound[: -self._keep]:
                    if old != step:
                        checkpoint_folders.remove(self.folder, old)
        except BaseException as error:  # told by the next `wait`
            self._failure = error

    def _clean(self) -> None:
        for step in sorted(self._damaged & set(self.steps())):
            checkpoint_folders.set_aside(self.folder, step)
        if not self._cleaned:
            checkpoint_folders.remove_incomplete(self.folder)
            self._cleaned = True

    def _require(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"{self.folder}: no complete checkpoint of step {step}: there are {there}"
            )

    def _damage_error(self, step: int, damage: str) -> manifest.DamagedCheckpoint:
        self._damaged.add(step)
        earlier = [s for s in self.steps() if s < step and self._looks_whole(s)]
        remedy = f"resume from step {earlier[-1]}" if earlier else "there is no earlier one"
        return manifest.DamagedCheckpoint(
            f"{self._path(step)}: the checkpoint is damaged: {damage}; {remedy}"
        )

    def _looks_whole(self, step: int) -> bool:
        try:
            manifest.read(self._path(step))
        except UserError:
            return False
        return step not in self._damaged

    def _save_error(self, error: BaseException) -> UserError:
        self._cleaned = False  # the next save removes what this one left
        latest = self.latest_step()
        kept = "there is no earlier one" if latest is None else f"step {latest} stays usable"
        if is_disk_full(error):
            rule = "the disk is full: free some space and start again"
        else:
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            rule = f"{first}: check the disk and start again"
        return UserError(f"{self.folder}: the checkpoint could not be saved ({kept}): {rule}")


def _check_shardings(targets: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    for target in targets.values():
        target.sharding.shard_shape(target.shape)  # raises where the mesh does not divide it
