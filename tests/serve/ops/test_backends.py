"""The table of measured backends: written by the benchmark, read back, and asked for the nearest shape."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.sampling_core import write_table
from candor.errors import UserError
from serve.ops import backends
from serve.ops.backends import Measured, choose, read_table

CPU = torch.device("cpu")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A table of these rows takes the place of the measured one."""

    def put(*rows):
        path = tmp_path / "backends.csv"
        path.write_text(
            "\n".join(["op,device,width,rows,backend,median_us", *(",".join(map(str, row)) for row in rows), ""])
        )
        monkeypatch.setattr(backends, "TABLE", path)
        backends._table.cache_clear()
        backends._fastest.cache_clear()

    yield put
    monkeypatch.undo()
    backends._table.cache_clear()
    backends._fastest.cache_clear()


def head(width, rows, backend, median_us, device="cpu"):
    return ("lmhead_sketch", device, width, rows, backend, median_us)


def test_without_a_table_every_device_gets_the_first(measured):
    measured(head(896, 64, "triton", 1.0, device="another"))
    for op, known in backends.BACKENDS.items():
        assert choose(op, device=CPU, rows=64, width=896) == known[0]


@pytest.mark.parametrize(
    ("width", "rows", "expected"),
    [(3584, 64, "chunks"), (5120, 64, "chunks"), (2048, 64, "triton"), (1, 1, "triton"), (3584, 10**6, "whole")],
)
def test_the_nearest_shape_decides_alone(measured, width, rows, expected):
    """3584 is nearer to itself than to 2048, though both have twelve bits and 2048 is faster with any backend."""
    measured(
        head(2048, 64, "triton", 1.0), head(2048, 64, "chunks", 2.0), head(2048, 64, "whole", 3.0),
        head(3584, 64, "triton", 9.0), head(3584, 64, "chunks", 7.0), head(3584, 64, "whole", 8.0),
        head(3584, 3200, "whole", 70.0), head(3584, 3200, "chunks", 80.0),
    )  # fmt: skip
    assert choose("lmhead_sketch", device=CPU, rows=rows, width=width) == expected


def test_what_is_asked_for_and_what_cannot_be(measured):
    measured(("finish", "cpu", 0, 64, "triton", 1.0), ("finish", "cpu", 0, 64, "torch", 2.0))
    assert choose("finish", device=CPU, rows=64) == "triton"
    assert choose("finish", device=CPU, rows=64, backend="torch") == "torch"
    assert choose("finish", device=CPU, rows=64, dtype=torch.float64) == "torch"
    with pytest.raises(ValueError, match="for float64 it must be 'torch'"):
        choose("finish", device=CPU, rows=64, backend="triton", dtype=torch.float64)


def test_the_benchmark_writes_what_is_read(tmp_path):
    """Rows of one draw by the core's own backends; rows of other devices stay, this device's old ones go."""
    path = tmp_path / "backends.csv"
    assert read_table(path) == []
    path.write_text("op,device,width,rows,backend,median_us\nfinish,Card,0,64,triton,2.5\nfinish,cpu,0,64,torch,9.0\n")
    row = {"op": "head draw", "provider": "core chunks", "draws": 1, "family": "", "width": 896, "rows": 64}
    peers = [row | {"provider": "flashinfer"}, row | {"draws": 500}, row | {"family": "flat"}, row | {"op": "copy"}]
    made = [r | {"median_us": 7.25} for r in (row, *peers)]
    write_table(SimpleNamespace(device="cpu", rows=made), path)
    assert read_table(path) == [
        Measured("finish", "Card", 0, 64, "triton", 2.5),
        Measured("lmhead_sketch", "cpu", 896, 64, "chunks", 7.25),
    ]
    with pytest.raises(UserError, match="no backend was measured"):
        write_table(SimpleNamespace(device="cpu", rows=made[1:]), path)
