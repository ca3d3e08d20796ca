"""YAML texts: parsed by the rules of YAML 1.2, safely, and with errors of one line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import ConfigError
from ..mistakes import shortened

__all__ = ["parse_yaml"]


_DEEPEST = 100
"""Brackets within brackets.  No setting has so many, and the time that PyYAML takes grows with the
square of their number."""


class _UnfitError(yaml.MarkedYAMLError):
    """Valid YAML that is not fit for settings."""


class _Loader(yaml.SafeLoader):
    """Safe YAML loader by the rules of YAML 1.2, which refuses a key that is given twice, and
    locates values of the wrong type."""

    def fetch_flow_collection_start(self, kind: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise _UnfitError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(kind)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _mistake(key, f"key given twice: {shortened(key.value)}")
            seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if re.search("[\ud800-\udfff]", node.value):
            raise _mistake(node, f"{node.value!a} is not valid text: it contains a lone surrogate")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
            # PyYAML's own constructors raise any of these for a malformed value.
            kind = node.tag.rpartition(":")[2]
            raise _mistake(node, f"not a valid {kind}: {shortened(repr(node.value))}") from error


# The core schema of YAML 1.2.  PyYAML follows YAML 1.1, in which off is false, 010 is eight, 1:30
# is ninety, and 1e-4 is a text.
_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)
_FORMS = {kind: re.compile(f"(?:{form})") for kind, form, _ in _SCHEMA}


def _construct_bool(_: _Loader, node: yaml.Node) -> bool:
    return _scalar(node, "bool").lower() == "true"


def _construct_int(_: _Loader, node: yaml.Node) -> int:
    text = _scalar(node, "int")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _construct_float(_: _Loader, node: yaml.Node) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", _scalar(node, "float").lower()))


def _scalar(node: yaml.Node, kind: str) -> str:
    """The text of a node, which may have been given its type by a tag.

    Raises:
        ValueError: it has not the form of its type.
    """
    if not isinstance(node, yaml.ScalarNode) or _FORMS[kind].fullmatch(node.value) is None:
        raise ValueError(node.value)
    return str(node.value)


_Loader.yaml_implicit_resolvers = {}
for _kind, _form, _first in _SCHEMA:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_form})$"), _first
    )
for _kind, _construct in (
    ("bool", _construct_bool),
    ("int", _construct_int),
    ("float", _construct_float),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)


def parse_yaml(text: str, where: str) -> Any:
    """Parse the single YAML document in a text.

    Args:
        text: YAML.
        where: the source of the text, for messages.

    Raises:
        ConfigError: the text is not one valid document.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        kind = "" if isinstance(error, _UnfitError) else "not YAML: "
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        reason = shortened(f"{error.problem or error.context}")
        raise ConfigError(f"{where}: {kind}{line}{reason}") from error
    except yaml.YAMLError as error:
        reason = shortened(" ".join(str(error).split()))
        raise ConfigError(f"{where}: not YAML: {reason}") from error


def _mistake(node: yaml.Node, problem: str) -> _UnfitError:
    return _UnfitError(problem=problem, problem_mark=node.start_mark)
