"""The store: rows survive kills, concurrent writers and compaction; nothing is lost and nothing counts twice.

Writers here are light processes without torch, so that many can be killed at random points.
"""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from candor.errors import UserError
from candor.hashing import sha256_json
from candor.rows import Distribution, Sample
from candor.tables import read_rows, write_tables
from serve.plan import Identity
from serve.store import EXACT, SAMPLED, Store, main, open_store, verify

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = Identity(weights_sha="w", text_sha="t", engine={"name": "torch"}, variant="v", study_seed=1)
N_UNITS, UNIT = 6, 40


def sample(i, **changes):
    values = {
        "sample_id": sha256_json(["row", i]), "prompt_id": f"p{i // 10}", "prompt_sha": sha256_json(i // 10),
        "variant": "v", "weights_sha": "w", "draw": i % 10, "study_seed": 1, "temperature": 1.0,
        "text": f"reply {i} " * (i % 7), "n_tokens": i % 50, "finish_reason": "stop", "logprob": -0.5 * i,
    }  # fmt: skip
    return Sample(**values | changes)


def unit(k):
    return [sample(i) for i in range(k * UNIT, (k + 1) * UNIT)]


def ids(k):
    return [row.sample_id for row in unit(k)]


def write_all(folder, seed):
    """What a worker does: every unit that is missing, in random order, with compactions in between; then the table."""
    rng = random.Random(seed)
    store = open_store(folder, IDENTITY)
    order = list(range(N_UNITS))
    rng.shuffle(order)
    for k in order:
        if store.missing(SAMPLED, ids(k)):
            store.add(SAMPLED, unit(k))
        if rng.random() < 0.3:
            store.compact(SAMPLED)
    write_tables(folder / "samples.parquet", Sample, store.gather(SAMPLED, map(ids, range(N_UNITS))))
    store.compact(SAMPLED, lambda: map(ids, range(N_UNITS)))


# Imports once, then forks a writer for each seed it reads, so that a kill costs milliseconds.
NURSERY = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/serve")
from test_store import write_all
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        while True:  # each round is a folder of its own; the writers join whichever is not finished
            done = len(list(Path(sys.argv[1]).glob("*/samples.parquet")))
            write_all(Path(sys.argv[1]) / str(done), int(line))
    print(child, flush=True)
"""


EXPECTED = [row for k in range(N_UNITS) for row in unit(k)]


def check(folder):
    """A last undisturbed run ends with the table of an uninterrupted one, and the store is sound."""
    write_all(folder, 0)
    assert read_rows(folder / "samples.parquet", Sample) == EXPECTED
    store = open_store(folder, IDENTITY)
    assert len(store.index(SAMPLED)) == len(EXPECTED)
    assert len(list(store.folder.glob("samples-*.parquet"))) == 1
    assert verify(store) == []


def kill_at_random(folder, kills, writers, seed):
    """Keep several writers on one folder and kill them one by one; how many rounds they finished all the same."""
    rng = random.Random(seed)
    log = folder / "log"
    with log.open("wb") as errors:
        nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(folder)], cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start():
        nursery.stdin.write(f"{rng.randrange(10**9)}\n")
        return int(nursery.stdout.readline())

    began = time.monotonic()
    running = [start()]
    while not (folder / "0" / "samples.parquet").exists():
        time.sleep(0.01)
    one_round = time.monotonic() - began  # of one writer left alone: lives last up to about as long on any machine
    running += [start() for _ in range(writers - 1)]
    for _ in range(kills):
        time.sleep(rng.random() * one_round)
        os.kill(running.pop(rng.randrange(writers)), signal.SIGKILL)  # ProcessLookupError: it failed by itself
        running.append(start())
    for process in running:
        os.kill(process, signal.SIGKILL)
    nursery.communicate()
    assert log.read_text() == ""
    return len(list(folder.glob("*/samples.parquet")))


def test_rows_come_back_in_the_order_asked(tmp_path):
    store = open_store(tmp_path, IDENTITY)
    for k in (2, 0, 1):
        store.add(SAMPLED, unit(k))
    wanted = [*ids(1)[::-1], *ids(0)[5:7], *ids(2)]
    (table,) = store.gather(SAMPLED, [wanted])
    assert table.column("sample_id").to_pylist() == wanted
    assert store.index(SAMPLED).missing([*ids(3), ids(0)[0]]) == ids(3)
    assert store.compact(SAMPLED) == 3
    (table,) = store.gather(SAMPLED, [wanted])
    assert table.column("sample_id").to_pylist() == wanted
    assert store.compact(SAMPLED) == 0


def test_an_index_is_gone_when_nobody_uses_it(tmp_path):
    """In a cycle it would stay until some later collection, and its rows with it: memory would grow with the draws."""
    store = open_store(tmp_path, IDENTITY)
    store.add(SAMPLED, unit(0))
    index = store.index(SAMPLED)
    assert index.gather(ids(0)).num_rows == UNIT
    left = weakref.ref(index)
    gc.disable()
    try:
        del index
        assert left() is None
    finally:
        gc.enable()


def test_what_others_add_is_seen_and_own_rows_are_not_read_again(tmp_path, monkeypatch):
    ours, theirs = open_store(tmp_path, IDENTITY), open_store(tmp_path, IDENTITY)
    read = []
    monkeypatch.setattr(Store, "index", lambda self, kind, whole=Store.index: read.append(kind) or whole(self, kind))
    assert ours.missing(SAMPLED, ids(0)) == ids(0)
    for k in (0, 1, 2):
        ours.add(SAMPLED, unit(k))
        assert ours.missing(SAMPLED, ids(k + 1)) == ids(k + 1)
    assert len(read) == 1
    theirs.add(SAMPLED, unit(3))
    assert ours.missing(SAMPLED, ids(3)) == [] and len(read) == 2
    theirs.compact(SAMPLED)  # all rows lie in a new file
    read.clear()
    assert ours.missing(SAMPLED, [*ids(0), *ids(4)]) == ids(4) and len(read) == 1


def test_equal_ids_count_once_and_differing_rows_are_told(tmp_path):
    store = open_store(tmp_path, IDENTITY)
    store.add(SAMPLED, unit(0))
    store.add(SAMPLED, [*unit(1), unit(0)[0]])
    assert len(store.index(SAMPLED)) == 2 * UNIT
    assert verify(store) == []
    store.add(SAMPLED, [sample(0, text="another draw")])
    assert any("made twice and differs" in t for t in verify(store))


def test_another_identity_never_sees_the_rows(tmp_path):
    open_store(tmp_path, IDENTITY).add(SAMPLED, unit(0))
    for change in (
        {"weights_sha": "x"},
        {"text_sha": "x"},
        {"study_seed": 2},
        {"engine": {"name": "vllm"}},
        {"variant": "u"},
    ):
        other = Identity(**{f: getattr(IDENTITY, f) for f in IDENTITY.__dataclass_fields__} | change)
        assert open_store(tmp_path, other).index(SAMPLED).missing(ids(0)) == ids(0)


def test_rows_of_other_weights_are_set_aside(tmp_path, capsys):
    store = open_store(tmp_path, IDENTITY)
    path = store.add(SAMPLED, [sample(0, weights_sha="other")])
    assert len(store.index(SAMPLED)) == 0
    assert "rows of other weights" in capsys.readouterr().err
    assert path.with_name(path.name + ".bad").exists()


@pytest.mark.parametrize("fault", [errno.EMFILE, errno.EACCES])
def test_a_failing_machine_costs_no_shard(tmp_path, fault):
    """Planted: no free file descriptor, and a file that may not be read (by a process that is not root)."""
    store = open_store(tmp_path, IDENTITY)
    path = store.add(SAMPLED, unit(0))
    code = """
import errno, os, resource, sys
from pathlib import Path
sys.path.insert(0, str(Path("tests/serve").resolve()))
from test_store import IDENTITY, SAMPLED, open_store
os.chdir(sys.argv[1])
store = open_store(Path(), IDENTITY)
if int(sys.argv[2]) == errno.EMFILE:  # the folder can still be listed; opening a shard needs more
    listed = sorted(store.folder.glob("samples-*"))
    type(store.folder).glob = lambda self, pattern: listed
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), 4096))
elif os.getuid() == 0:
    os.setuid(65534)
try:
    found = len(store.index(SAMPLED))
except OSError as error:
    found = -error.errno, error.filename
os.write(1, repr(found).encode())
"""
    if fault == errno.EACCES:
        path.chmod(0)
        tmp_path.chmod(0o755)
        store.folder.chmod(0o777)  # it could be set aside
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(fault)], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.stdout == repr((-fault, str(path.relative_to(tmp_path)))), told
    path.chmod(0o644)
    assert len(store.index(SAMPLED)) == UNIT and not list(store.folder.glob("*.bad"))


def test_distributions_are_kept_too(tmp_path):
    rows = [Distribution(f"p{i}", sha256_json(i), "v", "w", ("A", "B"), (0.25, 0.5), 0.25, 0.0) for i in range(5)]
    store = open_store(tmp_path, IDENTITY)
    store.add(EXACT, rows)
    (table,) = store.gather(EXACT, [[r.prompt_sha for r in rows[::-1]]])
    assert table.column("prompt_id").to_pylist() == ["p4", "p3", "p2", "p1", "p0"]


def test_several_writers_killed_at_random_points(tmp_path):
    kill_at_random(tmp_path, kills=4, writers=2, seed=1)
    for folder in tmp_path.glob("[0-9]*"):
        check(folder)


@pytest.mark.full
def test_two_hundred_kills(tmp_path):
    """Light writers killed at random points, also while they rename and compact, three at a time."""
    assert kill_at_random(tmp_path, kills=220, writers=3, seed=2) >= 5, "the writers hardly got anywhere"
    for folder in tmp_path.glob("[0-9]*"):
        check(folder)


def test_a_deletion_before_the_copy_is_whole_would_be_caught(tmp_path):
    """Planted fault: compaction that deletes first and is killed before it has written."""
    store = open_store(tmp_path, IDENTITY)
    for k in range(N_UNITS):
        store.add(SAMPLED, unit(k))
    for path in list(store.folder.glob("samples-*.parquet"))[:3]:
        path.unlink()
    assert len(store.index(SAMPLED)) < len(EXPECTED)
    with pytest.raises(UserError, match="lost rows while they were read"):
        list(open_store(tmp_path, IDENTITY).gather(SAMPLED, map(ids, range(N_UNITS))))


def test_the_commands(tmp_path, capsys):
    run = tmp_path / "run"
    store = open_store(run / "variants" / "v" / "answers", IDENTITY)
    for k in range(3):
        store.add(SAMPLED, unit(k))
    main(["stats", str(run)])
    assert "v, study seed 1, torch; 120 samples in 3 files" in capsys.readouterr().out
    main(["compact", str(run)])
    assert "3 files compacted" in capsys.readouterr().out
    main(["verify", str(run)])
    assert "1 stores below" in capsys.readouterr().out
    (path,) = store.folder.glob("samples-*.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"1 troubles in 1 stores:\n.*samples-.*cannot be read"):
        main(["verify", str(run)])
    identity = store.folder / "identity.json"
    identity.write_text(identity.read_text().replace('"v"', '"u"'))
    with pytest.raises(UserError, match="was changed"):
        main(["stats", str(run)])
    for words, message in (
        (["prune", "x"], "unknown command 'prune'"),
        (["stats"], "usage"),
        (["stats", "nowhere"], "no sample store"),
    ):
        with pytest.raises(UserError, match=message):
            main(words)
