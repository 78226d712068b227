"""Configuration: a YAML file becomes one frozen dataclass; unknown keys are refused.

A misspelt key that is silently ignored changes nothing and says nothing, so every unknown key is
an error that names the nearest known one, and so is a key that stands twice, with both lines. Values
are checked against the annotations, sections are nested dataclasses, and ``key=value`` words on the
command line override the file (``lora.r=8``; values are read as YAML).
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from candor.errors import UserError, nearest

Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but of two equal keys the second does not silently replace the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            other = first.setdefault((key.tag, key.value), key)
            if other is not key:
                lines = f"line {other.start_mark.line + 1} and again in line {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"the key {key.value!r} stands in {lines}. Keep one of them.")
        return node


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> Any:
    """The value in a YAML file; UserError with the line when it cannot be read."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {found} (looked from {Path.cwd()}). Check the path to the YAML file.")
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def load(config_type: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, apply ``key=value`` overrides and build ``config_type``."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not a mapping of keys to values.")
    for override in overrides:
        apply_override(values, override)
    return build(config_type, values, where=str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in nested mappings, in place."""
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"{override!r} is not of the form key=value.")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise UserError(f"{override!r}: {parent!r} is not a section.")
    try:
        place[last] = _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML; put it in quotes (key='\"a: b\"').") from error


def build(config_type: type[Config], values: dict[str, Any], *, where: str) -> Config:
    """Build a config dataclass from a mapping, checking keys and types.

    Raises UserError that names the place, the key found and the nearest known key.
    """
    hints = typing.get_type_hints(config_type)
    fields = {f.name: f for f in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(str(key), fields)}")
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: the required key {name!r} is missing.")
    try:
        return config_type(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _convert(annotation: Any, value: Any, where: str) -> Any:
    """One value checked against, and where harmless converted to, its annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [a for a in arguments if a is not type(None)]
        listed = [a for a in inner if isinstance(value, list) and typing.get_origin(a) is tuple]
        return _convert([*listed, *inner][0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where} is {value!r}; {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        for k in value:
            if arguments[0] is str and not isinstance(k, str):
                raise UserError(f"{where}: YAML reads the key {k!r} as {type(k).__name__}; put it in quotes.")
        return {k: _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        return build(typing.cast(type, annotation), value, where=where)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5 (no dot) as a string; people write it everywhere
        try:
            return float(value)
        except ValueError:
            pass
    if annotation in (str, int, float, bool) and type(value) is annotation:
        return value
    name = "a section" if dataclasses.is_dataclass(annotation) else getattr(annotation, "__name__", str(annotation))
    name = {"tuple": "a list", "dict": "a section", "Path": "a path"}.get(name, name)
    raise UserError(f"{where} must be {name}, found {value!r} ({type(value).__name__}).")


def plain(config: Any) -> Any:
    """A config as plain JSON-able values, for manifests and hashes."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Path):
        return config.as_posix()
    if isinstance(config, dict):
        return {k: plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(v) for v in config]
    return config
