"""Configuration: unknown keys are refused with the nearest known one; types are checked; overrides apply."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from candor.config import load, plain, read_yaml
from candor.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rank: int = 8
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    output: Path
    seed: int = 0
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[str, ...] = ()
    limit: int | None = None
    part: str | tuple[str, ...] | None = None
    places: dict[str, Path] = field(default_factory=dict)


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_reads_nested_sections_and_overrides(tmp_path):
    path = write(tmp_path, "name: a\noutput: runs/a\ninner: {rate: 1e-5}\nsizes: [x, y]\n")
    config = load(Config, path, ["inner.rank=4", "limit=3"])
    assert config == Config(name="a", output=Path("runs/a"), inner=Inner(rank=4, rate=1e-5), sizes=("x", "y"), limit=3)
    assert plain(config)["inner"] == {"rank": 4, "rate": 1e-5}


@pytest.mark.parametrize(("text", "part"), [("a", "a"), ("[a, b]", ("a", "b")), ("null", None)])
def test_a_key_may_take_one_or_several(tmp_path, text, part):
    assert load(Config, write(tmp_path, f"name: a\noutput: o\npart: {text}\n")).part == part


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("name: a\noutput: o\nsede: 1\n", ["'sede'", "'seed'"], id="unknown-key-names-nearest"),
        pytest.param("name: a\noutput: o\ninner: {rnak: 1}\n", ["inner", "'rank'"], id="unknown-nested-key"),
        pytest.param("output: o\n", ["'name'", "missing"], id="missing-key"),
        pytest.param("name: a\noutput: o\nseed: many\n", ["seed", "int", "'many'"], id="wrong-type"),
        pytest.param("name: a\noutput: o\nseed: true\n", ["seed", "int"], id="bool-is-no-int"),
        pytest.param("name: [\n", ["not valid YAML"], id="broken-yaml"),
        pytest.param("name: a\nrate: 0.1\nname: b\n", ["'name'", "in line 1", "in line 3"], id="key-twice"),
        pytest.param("name: a\ninner:\n  width: 1\n  'width': 2\n", ["'width'", "line 3", "line 4"], id="inner-twice"),
        pytest.param("- 1\n", ["list"], id="not-a-mapping"),
        pytest.param("name: a\noutput: o\nsizes: x\n", ["sizes", "a list", "'x'"], id="no-list"),
        pytest.param("name: a\noutput: o\ninner: 3\n", ["inner", "a section", "3"], id="no-section"),
        pytest.param("name: a\noutput: o\nplaces: {7: x}\n", ["places", "key 7", "quotes"], id="key-is-a-number"),
    ],
)
def test_errors_say_what_and_where(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load(Config, path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_a_merge_key_may_be_overridden(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b\n  <<: *a\n  x: 2\nc: {<<: *b, x: 5}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}, "c": {"x": 5, "y": 1}}


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load(Config, Path("nowhere.yaml"))
    with pytest.raises(UserError, match="is a folder"):
        load(Config, tmp_path)


def test_an_override_that_is_no_yaml_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'name=a: b: c': the value is not valid YAML"):
        load(Config, write(tmp_path, "output: o\n"), ["name=a: b: c"])
