"""The sample store: each unit of work becomes one shard, and finished shards are merged into tables.

A process may be killed at any moment. A shard is written whole or not at all, so a rerun keeps every
shard that is there and makes the missing ones. A shard that cannot be read, or holds other rows than
its unit's, is set aside as ``*.bad`` and said so, never mended or trusted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from candor.errors import UserError
from candor.rows import Distribution, Sample
from candor.tables import iter_rows, read_rows, write_rows
from serve.plan import Identity, Unit, sample_id

SAMPLES, DISTRIBUTIONS = "samples.parquet", "distributions.parquet"


class Store:
    """The folder of one variant's answers."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder = folder
        self.shards = folder / "shards"
        self._identity = identity

    def path(self, unit: Unit) -> Path:
        """Where a unit's shard lies."""
        return self.shards / f"{unit.name}.parquet"

    def has(self, unit: Unit) -> bool:
        """Whether the unit is done; a damaged or foreign shard is set aside and counts as not done."""
        path = self.path(unit)
        if not path.exists():
            return False
        try:
            trouble = self._trouble(unit)
        except UserError as error:
            trouble = str(error)
        if trouble:
            aside = path.with_suffix(".parquet.bad")
            path.replace(aside)
            sys.stderr.write(f"{path} set aside as {aside.name} and made anew: {trouble}\n")
        return not trouble

    def write_samples(self, unit: Unit, rows: Sequence[Sample]) -> None:
        """Write a sampled unit's shard."""
        write_rows(self.path(unit), Sample, rows)

    def write_distributions(self, unit: Unit, rows: Sequence[Distribution]) -> None:
        """Write an exact unit's shard."""
        write_rows(self.path(unit), Distribution, rows)

    def merge(self, units: Sequence[Unit]) -> dict[str, int]:
        """Write both tables from the shards, in the order of the units; how many rows each got."""
        sampled = [self.path(u) for u in units if u.ask.mode == "sampled"]
        exact = [self.path(u) for u in units if u.ask.mode == "exact"]
        n_samples = write_rows(self.folder / SAMPLES, Sample, iter_rows(sampled, Sample))
        n_exact = write_rows(self.folder / DISTRIBUTIONS, Distribution, iter_rows(exact, Distribution))
        return {SAMPLES: n_samples, DISTRIBUTIONS: n_exact}

    def clear(self, units: Sequence[Unit]) -> None:
        """Delete the shards of merged units and what killed runs left half written; what was set aside stays."""
        for path in [*map(self.path, units), *self.folder.glob(".*.tmp"), *self.shards.glob(".*.tmp")]:
            path.unlink(missing_ok=True)
        if self.shards.is_dir() and not any(self.shards.iterdir()):
            self.shards.rmdir()

    def _trouble(self, unit: Unit) -> str:
        """Why a shard that can be read is not the unit's own, or nothing."""
        if unit.ask.mode == "sampled":
            found = [s.sample_id for s in read_rows(self.path(unit), Sample)]
            wanted = [
                sample_id(self._identity, unit.ask, sha, draw) for sha in unit.prompt_shas for draw in range(unit.ask.n)
            ]
        else:
            rows = read_rows(self.path(unit), Distribution)
            found = [f"{d.weights_sha} {d.variant} {d.prompt_sha}" for d in rows]
            wanted = [f"{self._identity.weights_sha} {self._identity.variant} {sha}" for sha in unit.prompt_shas]
        if found == wanted:
            return ""
        return f"it holds {len(found)} rows, of which {len(set(found) & set(wanted))} belong to the {len(wanted)} asked"
