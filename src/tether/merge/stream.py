"""The work of a merge: every tensor read, merged, rounded once and written at its final place."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from math import prod
from typing import final

import numpy as np

from tether.errors import CheckpointError
from tether.merge.files import BLOCK, Files, Seen, block_bytes
from tether.merge.floats import BYTES, finite, narrow, widen
from tether.merge.inputs import Inputs, Scratch, Source
from tether.merge.journal import Journal, Written
from tether.merge.layout import Place
from tether.merge.operator import Floats
from tether.merge.plan import Plan
from tether.merge.planner import TensorPlan
from tether.merge.recipe import BASE
from tether.merge.staging import Staging
from tether.store.system import open_binary, read_at, write_at

__all__ = ["stream"]

_CHUNK = 1 << 20  # bytes of a finished tensor that are hashed at a time


def stream(
    plan: Plan,
    staging: Staging,
    seen: Seen,
    *,
    claims: bool,
    threads: int,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Written]:
    """Write the weight files of a result.

    Each tensor is the work of one thread from its first block to its last, and depends on nothing but its
    inputs: the bytes are the same for any number of threads, any order and any interruption.

    Args:
        plan: what to do.
        staging: where the files are.
        seen: hashes of all that is read, from the survey.
        claims: whether an earlier process began the work with the same survey: what its journal names is
            checked, and not made again.
        threads: how many tensors at once.
        on_step: called with `done` and `total` bytes written.

    Returns:
        Tensor name to its record.

    Raises:
        CheckpointError: If an input was changed meanwhile, a result leaves the range of its type, the journal
            is damaged, or the disk is full.
    """
    outputs: list[int] = []
    journal = Journal(staging.journal, fresh=not claims)
    files = Files(seen)
    worker = _Worker(plan, outputs, files)
    try:
        _open_outputs(plan, staging, outputs)
        claimed = journal.entries()
        total = sum(place.bytes for place in plan.places.values())
        written: dict[str, Written] = {}
        done = 0
        # The largest first: a thread that starts one last would work on alone.
        order = sorted(plan.tensors, key=lambda tensor: (-prod(tensor.shape), tensor.name))
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(worker.finish, tensor, claimed.get(tensor.name), journal) for tensor in order]
            try:
                for job in as_completed(jobs):
                    entry = job.result()
                    written[entry.name] = entry
                    done += plan.places[entry.name].bytes
                    if on_step:
                        on_step({"done": float(done), "total": float(total)})
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except OSError as error:
        raise CheckpointError(
            f"{staging.final} cannot be written ({error}); free some space, then start the same merge again to go on"
        ) from error
    finally:
        files.close()
        journal.close()
        for descriptor in outputs:
            os.close(descriptor)
    return {name: written[name] for name in sorted(written)}


def _open_outputs(plan: Plan, staging: Staging, outputs: list[int]) -> None:
    for shard in plan.shards:
        descriptor = open_binary(staging.model / shard.name, os.O_RDWR | os.O_CREAT)
        outputs.append(descriptor)
        os.ftruncate(descriptor, shard.bytes)
        write_at(descriptor, shard.header, 0)


@final
class _Worker:
    """Makes one tensor after the other, with buffers of its own in every thread."""

    def __init__(self, plan: Plan, outputs: list[int], files: Files) -> None:
        self.plan, self.outputs, self.files = plan, outputs, files
        self.local = threading.local()

    def finish(self, tensor: TensorPlan, claimed: Written | None, journal: Journal) -> Written:
        place = self.plan.places[tensor.name]
        if claimed and claimed.sha256 == self._hash(place):
            return claimed
        if tensor.kept and tensor.kept.dtype == tensor.dtype:
            written = Written(tensor.name, self._copied(tensor.kept, place), 0.0, 0.0)
        else:
            written = self._merged(tensor, place)
        journal.append(written)
        return written

    def _merged(self, tensor: TensorPlan, place: Place) -> Written:
        inputs = self._inputs(tensor)
        values = self._kept_values(tensor.kept, inputs) if tensor.kept else self.plan.operator.apply(inputs)
        # Rounding is told against a parent; one in other coordinates has none of these values in its file.
        reference = tensor.own if tensor.base is None or BASE in self.plan.coordinates else tensor.base
        digest = hashlib.sha256()
        done = 0
        lost = changed = 0.0
        for merged in values:
            stored = narrow(merged.reshape(-1), tensor.dtype)
            raw = stored.view(np.uint8)
            if not finite(raw, tensor.dtype):
                raise CheckpointError(
                    f"{tensor.name} leaves the range of {tensor.dtype}; choose dtype bfloat16 or float32, "
                    "or smaller weights"
                )
            for start in range(0, len(stored) if tensor.dtype != "F32" else 0, BLOCK):
                part = merged.reshape(-1)[start : start + BLOCK]
                parts = self._losses(
                    inputs, reference, done + start, part, stored[start : start + BLOCK], tensor
                )
                lost, changed = lost + parts[0], changed + parts[1]
            data = raw.data
            digest.update(data)
            self._write(place, done * BYTES[tensor.dtype], data)
            done += len(stored)
        assert done == prod(tensor.shape), f"{self.plan.operator.name}: {done} values for {tensor.name}"
        return Written(tensor.name, digest.hexdigest(), lost, changed)

    def _kept_values(self, source: Source, inputs: Inputs) -> Iterator[Floats]:
        size = prod(source.shape)
        buffer = self._scratch().values[0]
        for start in range(0, size, BLOCK):
            part = buffer[: min(BLOCK, size - start)]
            inputs.read_source(source, start, part)
            yield part

    def _losses(
        self,
        inputs: Inputs,
        reference: Source,
        start: int,
        merged: Floats,
        stored: np.ndarray,
        tensor: TensorPlan,
    ) -> tuple[float, float]:
        there = self._scratch().spare[: len(merged)]
        inputs.read_source(reference, start, there)
        changed = float(np.square(np.subtract(merged, there), dtype=np.float64).sum())
        rounded = np.empty(len(merged), np.float32)
        widen(stored.view(np.uint8), tensor.dtype, rounded)
        return float(np.square(merged - rounded, dtype=np.float64).sum()), changed

    def _inputs(self, tensor: TensorPlan) -> Inputs:
        return Inputs(
            name=tensor.name,
            canonical=tensor.canonical,
            shape=tensor.shape,
            options=tensor.options or self.plan.operator.options.model_construct(),
            settings=tensor.settings or {},
            base=tensor.base,
            models=tensor.models,
            fill=tensor.own,
            coordinates=self.plan.coordinates,
            extras=tensor.extras or {},
            seed=self.plan.recipe.seed,
            files=self.files,
            scratch=self._scratch(),
        )

    def _scratch(self) -> Scratch:
        if not hasattr(self.local, "scratch"):
            self.local.scratch = Scratch(len(self.plan.recipe.inputs))
        scratch: Scratch = self.local.scratch
        return scratch

    def _copied(self, source: Source, place: Place) -> str:
        digest = hashlib.sha256()
        buffer = self._scratch().values[0].view(np.uint8).data
        step = block_bytes(source.dtype)
        for start in range(0, place.bytes, step):
            part = buffer[: min(step, place.bytes - start)]
            self.files.read(source.file, source.start + start, part)
            digest.update(part)
            self._write(place, start, part)
        return digest.hexdigest()

    def _hash(self, place: Place) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_CHUNK, place.bytes)))
        for start in range(0, place.bytes, _CHUNK):
            part = buffer[: min(_CHUNK, place.bytes - start)]
            count = read_at(self.outputs[place.shard], part, place.start + start)
            digest.update(part[:count])
        return digest.hexdigest()

    def _write(self, place: Place, offset: int, data: memoryview) -> None:
        write_at(self.outputs[place.shard], data, place.start + offset)
