"""The JSON Schema of parity.json, from the report's own dataclasses.

    python -m cla_export.compare.schema > cla_export/data/parity.schema.json

`report.SCHEMA` is its version: a field that goes or changes its meaning raises it, a new one does
not, so readers should ignore what they do not know.
"""

import json
import sys
import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from cla_export.compare.report import SCHEMA, ParityReport

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_COMPUTED = {
    "schema": {"const": SCHEMA},
    "passed": {"type": "boolean"},
    "greedy_agreement": {"type": ["number", "null"]},
}


def json_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12."""
    definitions: dict[str, Any] = {}
    _of(ParityReport, definitions)
    report = definitions.pop(ParityReport.__name__)
    report["properties"] = {**_COMPUTED, **report["properties"]}
    report["required"] = [*_COMPUTED, *report["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What cla-export parity found",
        **report,
        "$defs": definitions,
    }


def _of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    if kind is float:
        return {"type": ["number", "null"]}  # null: not finite, which JSON cannot say
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(item, definitions) for item in arguments]}
    if origin is list:
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    assert is_dataclass(kind), kind
    name = kind.__name__  # type: ignore[union-attr]
    if name not in definitions:
        definitions[name] = {}
        hints = get_type_hints(kind)
        properties = {item.name: _of(hints[item.name], definitions) for item in fields(kind)}
        definitions[name] = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
        }
    return {"$ref": f"#/$defs/{name}"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
