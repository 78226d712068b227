"""Manifests: written last, counts must add up, another configuration is refused by name."""

import pytest

from candor.errors import UserError
from candor.manifest import is_done, read_manifest, write_manifest


def write(folder, config, inputs=None, **changes):
    arguments = {"stage": "s", "config": config, "inputs": inputs or {}, "counts": {"in": 3, "out": 2},
                 "left_out": {"empty": 1}, "seconds": 1.0, **changes}  # fmt: skip
    write_manifest(folder, **arguments)


def test_done_only_with_the_same_config_and_inputs(tmp_path):
    assert not is_done(tmp_path, config={"a": 1}, inputs={})
    write(tmp_path, {"a": 1})
    assert is_done(tmp_path, config={"a": 1}, inputs={})
    with pytest.raises(UserError, match=r"changed: a\)"):
        is_done(tmp_path, config={"a": 2}, inputs={})
    with pytest.raises(UserError, match=r"changed: data\)"):
        is_done(tmp_path, config={"a": 1}, inputs={"data": "sha"})
    record = read_manifest(tmp_path)
    assert record is not None and record["versions"]["python"]


def test_rows_that_vanish_without_a_reason_are_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="do not add up"):
        write(tmp_path, {}, left_out={})
    assert read_manifest(tmp_path) is None
