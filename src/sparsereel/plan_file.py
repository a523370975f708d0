"""Plan files: YAML or JSON text to plain data with the line of every entry, and back.

Only plain values are read (no tags, no anchors), so a plan file can do nothing but describe a plan.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

Keys = tuple[str | int, ...]
LONGEST_LINE = 110
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
# Dates and the like are kept as the text that they are.
TEXT_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp", "merge", "value")}


@dataclass(frozen=True)
class Source:
    """Where plain data came from: a name for messages, and the line (from 1) of each entry."""

    name: str = "plan"
    lines: dict[Keys, int] = field(default_factory=dict)

    def fail(self, keys: Keys, message: str) -> NoReturn:
        """Raise ValueError with the file, the line and the key."""
        line = self.lines.get(keys)
        where = [self.name, *([f"line {line}"] if line else []), *([".".join(map(str, keys))] if keys else [])]
        raise ValueError(f"{', '.join(where)}: {message}")


def read(path: str | Path) -> tuple[Any, Source]:
    """Plain data of a plan file, and its source.

    Raises:
        ValueError: no such file, not UTF-8, not valid YAML or JSON, duplicate keys, tags or anchors.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no plan file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a plan file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return parse_json(text, str(path)) if path.suffix == ".json" else parse_yaml(text, str(path))


def parse_yaml(text: str, name: str = "plan") -> tuple[Any, Source]:
    """Plain data of YAML text, and its source."""
    loader = yaml.SafeLoader(_printable(text, name))
    source = Source(name)
    try:
        node = loader.get_single_node()
        return (None if node is None else _plain(node, (), source, loader, set())), source
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name}{line}: not valid YAML ({error.problem or error.context})") from None
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply for a plan") from None
    finally:
        loader.dispose()


def _printable(text: str, name: str) -> str:
    try:
        yaml.reader.Reader(text)
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{name}: holds the character {error.character!r}, which YAML does not allow") from None
    return text


def _plain(node: yaml.Node, keys: Keys, source: Source, loader: yaml.SafeLoader, seen: set[int]) -> Any:
    source.lines.setdefault(keys, node.start_mark.line + 1)
    if id(node) in seen:
        source.fail(keys, "anchors and aliases are not used in plans; name the pattern under `patterns` instead")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _mapping(node, keys, source, loader, seen)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_plain(item, (*keys, i), source, loader, seen) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag in TEXT_TAGS:
        return node.value
    if not (isinstance(node, yaml.ScalarNode) and node.tag in PLAIN_TAGS):
        source.fail(keys, f"the tag {node.tag} is not used in plans; allowed are mappings, lists, text and numbers")
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError):
        source.fail(keys, f"{node.value[:20]!r} cannot be read as {node.tag.rpartition(':')[2]}")


def _mapping(node: yaml.MappingNode, keys: Keys, source: Source, loader: yaml.SafeLoader, seen: set[int]) -> Any:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            source.fail(keys, "a key must be text or a number")
        # Numbers as keys ("5: skip") are kept as they were written.
        key = key_node.value
        source.lines[*keys, key] = key_node.start_mark.line + 1
        if key in out:
            source.fail((*keys, key), "this key appears twice")
        out[key] = _plain(value_node, (*keys, key), source, loader, seen)
    return out


def parse_json(text: str, name: str = "plan") -> tuple[Any, Source]:
    """Plain data of JSON text, and its source. Lines are known as far as the text is YAML too, which JSON mostly is."""
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from None
    source = Source(name)
    with contextlib.suppress(ValueError):
        source = parse_yaml(text, name)[1]
    return data, source


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return out


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a plan may hold")


class _Dumper(yaml.SafeDumper):
    """Writes short mappings on one line."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        node.flow_style = _depth(mapping) <= 2 and len(repr(mapping)) <= LONGEST_LINE - 20
        return node


def _depth(value: Any) -> int:
    """Mappings inside each other."""
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return max(map(_depth, value), default=0) if isinstance(value, list) else 0


def to_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML text: keys in order, short lists and mappings on one line."""
    text: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=LONGEST_LINE, allow_unicode=True
    )
    return text


def write(path: str | Path, data: dict[str, Any]) -> None:
    """Write plain data to `path` (JSON where it ends so, else YAML), all of it or nothing.

    Raises:
        OSError: the folder is missing or not writable, the disk is full; an earlier file is then untouched.
    """
    path = Path(path)
    text = json.dumps(data, indent=2, allow_nan=False) + "\n" if path.suffix == ".json" else to_yaml(data)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a plan is an ordinary one.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
