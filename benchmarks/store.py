"""What storing replies costs: seconds and peak memory of the sample store from 3,200 to 320,000 draws.

    python -m benchmarks.store [output=FILE.csv]

Made-up replies of 40 words go in by units of 640, are merged into the table and compacted, as
serve.sample does. Each size runs in a process of its own, so that its peak memory is its own.
"""

import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from candor.hashing import sha256_json
from candor.manifest import commit
from candor.rows import Sample
from candor.tables import write_tables
from serve.plan import Identity
from serve.store import SAMPLED, open_store

SIZES = (3_200, 32_000, 320_000)
UNIT = 640
IDENTITY = Identity(weights_sha="w", text_sha="t", engine={"name": "torch"}, variant="v", study_seed=1)


def ids(unit: int) -> list[str]:
    """Ids of a unit's rows."""
    return [sha256_json(i) for i in range(unit * UNIT, (unit + 1) * UNIT)]


def rows(unit: int) -> list[Sample]:
    """A unit's rows."""
    return [
        Sample(i, f"p{unit}", "s", "v", "w", n, 1, 1.0, " ".join(i[k : k + 5] for k in range(40)), 40, "stop", -60.0)
        for n, i in enumerate(ids(unit))
    ]


def run(n: int) -> dict[str, Any]:
    """Store ``n`` replies in this process."""
    spent, made = 0.0, 0.0
    with tempfile.TemporaryDirectory() as place:
        store = open_store(Path(place), IDENTITY)
        units = range(n // UNIT)
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for unit in units:
            began = time.process_time()
            new = rows(unit)
            made += time.process_time() - began
            began = time.process_time()
            store.index(SAMPLED).missing([r.sample_id for r in new])
            store.add(SAMPLED, new)
            spent += time.process_time() - began
        began = time.process_time()
        write_tables(Path(place) / "samples.parquet", Sample, store.gather(SAMPLED, map(ids, units)))
        store.compact(SAMPLED, map(ids, units))
        spent += time.process_time() - began
        size = (Path(place) / "samples.parquet").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "draws": n,
        "cpu_s": round(spent, 2),
        "us_per_draw": round(spent / n * 1e6, 1),
        "rss_before_mb": start // 1024,
        "peak_rss_mb": peak // 1024,
        "table_mb": round(size / 1e6, 1),
    }


def main(argv: list[str]) -> None:
    """Run every size and write the rows."""
    if argv[:1] == ["child"]:
        print(json.dumps(run(int(argv[1]))))
        return
    output = Path(argv[0].removeprefix("output=")) if argv else Path(__file__).parent / "results" / "store.csv"
    common = {"device": platform.machine(), "load": round(os.getloadavg()[0], 1), "commit": commit()}
    found = []
    for n in SIZES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.store", "child", str(n)], capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout) | common)
        print(found[-1])
    output.parent.mkdir(exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main(sys.argv[1:])
