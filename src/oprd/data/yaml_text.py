"""YAML as people write it in recipes and on the command line: numbers are what they look like, and no key is there twice."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import yaml

# YAML 1.1, which PyYAML reads, takes 1e-5 for text, 0100 for 64, 12:30 for 750 and 2026-11-28 for a date.
_NUMBERS = {
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_REPLACED = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}
_MERGE = "tag:yaml.org,2002:merge"


def _resolvers(left_out: Collection[str]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """First character → the kinds of scalars that may begin with it: PyYAML's but for `left_out`, then those of `_NUMBERS`."""
    found = {
        first: [(tag, pattern) for tag, pattern in kinds if tag not in left_out]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, (pattern, firsts) in _NUMBERS.items():
        for first in firsts:
            found.setdefault(first, []).append((tag, re.compile(f"^(?:{pattern})$")))
    return found


class _Loader(yaml.SafeLoader):
    """Reads decimal numbers as they look, and leaves other digits (but 0x…) and dates as text."""

    yaml_implicit_resolvers = _resolvers(_REPLACED)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes where `_Loader` or PyYAML would read something else."""

    yaml_implicit_resolvers = _resolvers(())


def load_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or a mapping has a key twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_twice(node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def dump_yaml(value: Any, **options: Any) -> str:
    """YAML that `load_yaml` and PyYAML read back equal; `options` of `yaml.dump`."""
    return yaml.dump(value, Dumper=_Dumper, **{"sort_keys": False, **options})


def _refuse_twice(node: yaml.Node, seen: set[int]) -> None:
    """Check a tree before it is built, since merging (`<<`) adds keys that may be there."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    keys: set[str] = set()
    for key, value in node.value:
        _refuse_twice(value, seen)
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            keys.add(key.value)
