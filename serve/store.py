"""The sample store: rows under the hash of what produced them, in files that are written once.

    python -m serve.store verify RUN     # every file read and checked; exit status 2 when something is wrong
    python -m serve.store stats RUN      # what is there, and what conflicts
    python -m serve.store compact RUN    # many small files into one, what killed writers left removed

RUN is any folder with stores below it. A store lies beside a variant's tables, in
``store/IDENTITY/``: one folder per (weights, text, engine, variant, study seed), so that rows of a
changed adapter, template or seed are never even looked at. A file (shard) is named by the ids of its
rows. It is written under a temporary name and renamed, and never changed afterwards. Compaction
writes one shard of all rows and then deletes those it read, so that at every moment each row lies in
some file. That is all there is to it: any number of processes on any machines may add, read and
compact at the same time without a lock, and any of them may be killed.

A shard that is damaged, or whose rows are not those its name says, is set aside as ``*.bad`` and said
so, never mended or trusted. Where the machine fails (too many open files, a broken disk, no right to
read) the error is raised and the shard stays.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from candor.config import plain
from candor.errors import UserError, nearest, run_script
from candor.hashing import sha256_json
from candor.rows import Distribution, Sample
from candor.tables import ROWS_PER_GROUP, as_table, refuse_machine_failure, replace_file, schema_of, write_tables
from serve.attest import ATTESTATION, compare_records
from serve.plan import Identity

STORE = "store"
IDENTITY = "identity.json"
STALE_SECONDS = 3600.0  # writing a file takes seconds; a temporary file this old belongs to a process that was killed
_TRIES = 20  # readings of a folder that others keep compacting


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of rows."""

    name: str  # begins the names of its shards
    row_type: type
    id_column: str  # identifies a row within a store


SAMPLED = Kind("samples", Sample, "sample_id")
EXACT = Kind("distributions", Distribution, "prompt_sha")
KINDS = (SAMPLED, EXACT)
SAMPLES, DISTRIBUTIONS = (f"{kind.name}.parquet" for kind in KINDS)  # the tables made from a store


class Store:
    """The rows of one identity."""

    def __init__(self, folder: Path, name: str) -> None:
        """A store that is there, or a place for one; ``open_store`` is the usual way in."""
        self.folder = folder
        self.name = name  # of the identity: what its rows' weights and variant must be
        self._known: dict[tuple[Path, int, int], Shard] = {}  # by file: two may carry one name after another
        self._added: set[str] = set()  # names of the shards this object wrote
        self._others: dict[str, tuple[set[str], Index]] = {}  # by kind: the other shards there were, and all rows then

    def add(self, kind: Kind, rows: Sequence[Any]) -> Path:
        """Write rows as one shard."""
        return self.add_tables(kind, [as_table(kind.row_type, rows)])

    def add_tables(self, kind: Kind, tables: Sequence[pa.Table]) -> Path:
        """Write pieces of arrow as one shard, named by all their ids."""
        path = _shard_path(self.folder, kind, (t.column(kind.id_column).to_pylist() for t in tables))
        if not path.exists():  # equal ids: the same rows
            write_tables(path, kind.row_type, tables)
        self._added.add(path.name)
        return path

    def missing(self, kind: Kind, ids: Sequence[str]) -> list[str]:
        """Those of the ids that are not stored, for one who knows what it added itself since it first asked.

        Every row is read and sorted again only when others have written: the cost of a unit of work does
        not grow with the rows that one process has made.
        """
        others = {path.name for path in self.folder.glob(f"{kind.name}-*.parquet")} - self._added
        if kind.name not in self._others or self._others[kind.name][0] != others:
            self._others[kind.name] = others, self.index(kind)
        return self._others[kind.name][1].missing(ids)

    def index(self, kind: Kind) -> "Index":
        """What is stored now. A damaged or foreign file is set aside and does not count."""
        shards = []
        for path in sorted(self.folder.glob(f"{kind.name}-*.parquet")):
            try:
                stat = path.stat()
                file = (path, stat.st_ino, stat.st_mtime_ns)
                if file not in self._known:
                    self._known[file] = _read_shard(path, kind, self.name)
            except FileNotFoundError:
                continue  # compacted by another process; the next reading finds its rows
            except UserError as error:
                _set_aside(path, str(error))
                continue
            shards.append(self._known[file])
        return Index(kind, shards)

    def gather(self, kind: Kind, wanted: Iterable[Sequence[str]], index: "Index | None" = None) -> Iterator[pa.Table]:
        """The rows with these ids, a list of ids at a time, in that order; all must be there.

        A shard that another process has compacted or ordered anew meanwhile is looked for again.
        """
        index = self.index(kind) if index is None else index
        for ids in wanted:
            for attempt in range(_TRIES):
                missing = ids if attempt == _TRIES - 1 else index.missing(ids)
                try:
                    if not missing:
                        yield index.gather(ids)
                        break
                except (FileNotFoundError, Moved):
                    pass
                index = self.index(kind)
            else:
                raise UserError(
                    f"{self.folder} lost rows while they were read ({len(index.missing(ids))} of {len(ids)}). "
                    "Was a file deleted? Run the same command again."
                )

    def compact(self, kind: Kind, first: Callable[[], Iterable[Sequence[str]]] = tuple) -> int:
        """One shard of all rows, those of ``first`` in front in that order; how many files went.

        Equal ids are equal draws, so of several rows with one id the first is kept. ``first`` is called
        twice: making the ids again costs less than holding them.
        """
        index = self.index(kind)
        if len(index.shards) < 2:
            return 0
        try:
            path = _shard_path(self.folder, kind, index.in_order(first()))
            if not path.exists():
                write_tables(path, kind.row_type, self.gather(kind, index.in_order(first()), index))
        except FileNotFoundError:
            return 0  # another process compacts; it will do
        gone = [s.path for s in index.shards if s.path != path]
        for old in gone:
            old.unlink(missing_ok=True)
        return len(gone)

    def clear(self) -> None:
        """Remove what killed writers left half written."""
        for path in self.folder.glob(".*.tmp"):
            remove_if_stale(path)


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A file of the store: eight bytes of each row's id, and how many rows each of its row groups has."""

    path: Path
    keys: NDArray[np.uint64]
    group_starts: NDArray[np.int64]


class Moved(Exception):
    """Two processes compacted the same rows in different orders, and the later file took the earlier one's name."""


class Index:
    """Where each stored row lies; twelve bytes a row."""

    def __init__(self, kind: Kind, shards: Sequence[Shard]) -> None:
        self.kind, self.shards = kind, list(shards)
        self._starts = np.cumsum([0, *(len(s.keys) for s in shards)])  # of each shard's rows in all rows
        keys = np.concatenate([np.empty(0, np.uint64), *(s.keys for s in shards)])
        order = np.argsort(keys, kind="stable")
        keys, order = keys[order], order.astype(np.uint32)
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1  # the first of equal ids counts
        self._keys, self._at = np.delete(keys, again), np.delete(order, again)  # _at: which of all rows
        self._groups: dict[tuple[int, int], pa.Table] = {}  # read last

    def __len__(self) -> int:
        return len(self._keys)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of the ids that are not stored."""
        keys = keys_of(ids)
        place = np.searchsorted(self._keys, keys)
        found = np.zeros(len(keys), dtype=bool)
        inside = place < len(self._keys)
        found[inside] = self._keys[place[inside]] == keys[inside]
        return [i for i, there in zip(ids, found, strict=True) if not there]

    def in_order(self, first: Iterable[Sequence[str]]) -> Iterator[Sequence[str]]:
        """All ids, some at a time: those of ``first`` whose rows are all there, then the others, shard by shard."""
        left = np.ones(len(self), dtype=bool)
        for ids in first:
            if ids and not self.missing(ids):
                left[np.searchsorted(self._keys, keys_of(ids))] = False
                yield ids
        for number, shard in enumerate(self.shards):
            here = (self._at >= self._starts[number]) & (self._at < self._starts[number + 1])
            wanted = self._keys[left & here]
            if len(wanted):
                ids = _ids(shard.path, self.kind)
                rest = [i for i, there in zip(ids, np.isin(keys_of(ids), wanted), strict=True) if there]
                yield from (rest[i : i + ROWS_PER_GROUP] for i in range(0, len(rest), ROWS_PER_GROUP))

    def gather(self, ids: Sequence[str]) -> pa.Table:
        """The rows with these ids, which must be stored, in that order.

        FileNotFoundError when a shard is gone, Moved when another with the same rows took its place.
        """
        place = np.searchsorted(self._keys, keys_of(ids))
        at = self._at[place].astype(np.int64)
        shard = np.searchsorted(self._starts, at, side="right") - 1
        row = at - self._starts[shard]
        pieces, order = [], []
        for s in np.unique(shard):
            mine, starts = np.flatnonzero(shard == s), self.shards[s].group_starts
            group = np.searchsorted(starts, row[mine], side="right") - 1
            for g in np.unique(group):
                here = mine[group == g]
                pieces.append(self._group(int(s), int(g)).take(pa.array(row[here] - starts[g])))
                order.append(here)
        table = pa.concat_tables(pieces).take(pa.array(np.argsort(np.concatenate(order))))
        if table.column(self.kind.id_column).to_pylist() != list(ids):
            raise Moved
        return table

    def _group(self, shard: int, group: int) -> pa.Table:
        """A row group; the two read last are kept. No functools.lru_cache: it would keep the index alive in a cycle."""
        found = self._groups.pop((shard, group), None)
        if found is None:
            if len(self._groups) > 1:
                del self._groups[next(iter(self._groups))]
            with pq.ParquetFile(self.shards[shard].path, page_checksum_verification=True) as file:
                found = file.read_row_group(group, use_threads=False)  # threads keep memory of their own
        self._groups[shard, group] = found
        return found


def open_store(answers: Path, identity: Identity) -> Store:
    """The store of an identity beside the tables in ``answers``, made if need be."""
    values = plain(identity)
    name = sha256_json(values)
    store = Store(answers / STORE / name[:16], identity.weights_sha)
    path = store.folder / IDENTITY
    if not path.is_file():
        replace_file(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
    return store


def keys_of(ids: Sequence[str]) -> NDArray[np.uint64]:
    """Eight bytes of each id, a hex sha256; that 320,000 of them hold an equal pair has probability 3e-9."""
    return np.array([int(i[:16], 16) for i in ids], dtype=np.uint64)


class ShardName:
    """The file name that rows with some ids have, whatever their order; grows with the ids added."""

    def __init__(self, kind: Kind) -> None:
        self._kind, self._n, self._total = kind, 0, 0

    def add(self, ids: Iterable[str]) -> None:
        """Count these ids in."""
        for i in ids:
            self._n, self._total = self._n + 1, self._total + int(i, 16)

    @property
    def value(self) -> str:
        """The name for the ids added so far."""
        return f"{self._kind.name}-{sha256_json([self._n, self._total % (1 << 256)])[:24]}.parquet"


def _shard_path(folder: Path, kind: Kind, ids: Iterable[Sequence[str]]) -> Path:
    name = ShardName(kind)
    for some in ids:
        name.add(some)
    return folder / name.value


def _ids(path: Path, kind: Kind) -> list[str]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        batches = file.iter_batches(columns=[kind.id_column], batch_size=ROWS_PER_GROUP, use_threads=False)
        return [str(i) for batch in batches for i in batch.column(0).to_pylist()]


def _read_shard(path: Path, kind: Kind, weights: str) -> Shard:
    """A shard's keys; UserError when it is damaged or not what its name says, OSError when it cannot be got at."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.schema_arrow.names != schema_of(kind.row_type).names:
                raise UserError(f"its columns are not those of {kind.row_type.__name__} rows")
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            name, keys = ShardName(kind), [np.empty(0, np.uint64)]
            for batch in file.iter_batches(
                columns=[kind.id_column, "weights_sha"], batch_size=ROWS_PER_GROUP, use_threads=False
            ):
                name.add(batch.column(0).to_pylist())
                keys.append(keys_of(batch.column(0).to_pylist()))
                if set(batch.column(1).to_pylist()) - {weights}:
                    raise UserError("it holds rows of other weights")
    except (pa.ArrowException, OSError, ValueError) as error:
        refuse_machine_failure(error, path)
        raise UserError(f"it cannot be read ({str(error)[:200]})") from error
    found = np.concatenate(keys)
    if name.value != path.name or len(np.unique(found)) < len(found):
        raise UserError(f"it holds {len(found)} rows, not those it was written with")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) if sizes else np.zeros(1, np.int64)
    return Shard(path, found, starts)


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(path.name + ".bad")
    try:
        path.replace(aside)
    except FileNotFoundError:
        return  # another process was first
    sys.stderr.write(f"{path} set aside as {aside.name} and made anew when needed: {reason}\n")


def remove_if_stale(path: Path) -> bool:
    """Remove a temporary file that no living process can still be writing; whether it went."""
    try:
        if time.time() - path.stat().st_mtime < STALE_SECONDS:
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def stores_below(run: Path) -> list[Store]:
    """Every store in a folder; UserError when there is none."""
    found = []
    for path in sorted(run.rglob(f"{STORE}/*/{IDENTITY}")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            values = None
        if sha256_json(values)[:16] != path.parent.name:
            raise UserError(f"{path} was changed: its hash is not its folder's name. Restore it, or delete the folder.")
        found.append(Store(path.parent, values["weights_sha"]))
    if not found:
        raise UserError(f"no sample store below {run} (looked from {Path.cwd()}). Give a run's folder.")
    return found


def verify(store: Store) -> list[str]:
    """What is wrong in a store, in words: files set aside, pages that fail their checksum, ids with unequal rows."""
    troubles = [f"{p}: set aside earlier; delete it when its rows are not needed" for p in store.folder.glob("*.bad")]
    for kind in KINDS:
        for path in sorted(store.folder.glob(f"{kind.name}-*.parquet")):
            try:
                _read_shard(path, kind, store.name)
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    for _ in file.iter_batches():
                        pass
            except (UserError, OSError, pa.ArrowException) as error:
                troubles.append(f"{path}: {error}")
        troubles += [f"{store.folder}: {kind.name} {i} was made twice and differs" for i in _conflicts(store, kind)]
    return troubles


def _conflicts(store: Store, kind: Kind) -> list[str]:
    """Ids stored more than once with unequal rows: the engine did not repeat itself to the last bit."""
    seen: dict[str, str] = {}
    found = []
    paths = sorted(store.folder.glob(f"{kind.name}-*.parquet"))
    if len(paths) < 2:  # within a file ids are unique
        return []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    for row in batch.to_pylist():
                        if seen.setdefault(row[kind.id_column], sha := sha256_json(row)) != sha:
                            found.append(row[kind.id_column])
        except (OSError, pa.ArrowException):
            continue  # told by verify
    return found


def main(argv: list[str]) -> None:
    """Verify, describe or compact every store below a folder."""
    words = ("verify", "stats", "compact")
    if len(argv) != 2:
        raise UserError(f"usage: python -m serve.store {'|'.join(words)} RUN")
    word, run = argv[0], Path(argv[1])
    if word not in words:
        raise UserError(f"unknown command {word!r}; {nearest(word, words)}")
    stores = stores_below(run)
    if word == "verify":
        troubles = [trouble for store in stores for trouble in verify(store)]
        records = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(run.rglob(ATTESTATION))]
        troubles += compare_records(records)
        if troubles:
            raise UserError(f"{len(troubles)} troubles in {len(stores)} stores:\n  " + "\n  ".join(troubles))
        sys.stdout.write(f"{len(stores)} stores below {run} are sound\n")
    for store in stores:
        if word == "compact":
            gone = sum(store.compact(kind) for kind in KINDS)
            store.clear()
            sys.stdout.write(f"{store.folder}: {gone} files compacted\n")
        elif word == "stats":
            sys.stdout.write(_describe(store) + "\n")


def _describe(store: Store) -> str:
    identity = json.loads((store.folder / IDENTITY).read_text(encoding="utf-8"))
    parts = [
        f"{store.folder}: {identity['variant']}, study seed {identity['study_seed']}, {identity['engine']['name']}"
    ]
    for kind in KINDS:
        index = store.index(kind)
        size = sum(s.path.stat().st_size for s in index.shards)
        twice = sum(len(s.keys) for s in index.shards) - len(index)
        parts.append(f"{len(index)} {kind.name} in {len(index.shards)} files ({size / 1e6:.1f} MB, {twice} rows twice)")
    return "; ".join([*parts, f"{len(list(store.folder.glob('*.bad')))} files set aside"])


if __name__ == "__main__":
    run_script(main)
