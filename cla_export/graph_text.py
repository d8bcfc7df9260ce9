"""A graph as text: ONNX's own textual syntax, one node a line, made to be reviewed and diffed.

    "layers.0/attn/Attention" = Attention <is_causal = 1> (...)  #: float[batch,2,sequence,8]

The syntax has no place for the types and metadata of what a node makes, so they follow as a `#:`
comment: types, then metadata as JSON. `from_text` reads them back; any ONNX parser skips them.
Attributes and initialisers are sorted by name. Of an initialiser with more than 8 elements, or
without a value yet, only dtype and shape are shown.
Source: onnx/docs/Syntax.md.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.parser import ParseError

from cla_export.errors import GraphError

_LARGEST_SHOWN = 8  # elements
_OUTSIDE = '["location": "weights"]'
_METADATA = ("cla.", "pkg.torch.onnx.name_scopes")  # the rest tells where the tracer was
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_BITS = {ir.DataType.FLOAT16: np.uint16, ir.DataType.BFLOAT16: np.uint16}  # as the syntax has them
_NOTED = re.compile(
    r"\s*(?:\[[^\]]*\]\s*)?(?P<outputs>[^=#]+?) = .*#: (?P<types>[^{]*)(?P<meta>\{.*\})?"
)


def to_text(model: ir.Model, comments: Iterable[str] = ()) -> str:
    """Print a flat graph (no functions, no subgraphs); `comments` become its first lines.

    The text depends on the graph alone: names, order, types, attributes and small constants.
    """
    graph = model.graph
    if model.functions:
        raise GraphError(
            f"graph {graph.name}: it has {len(model.functions)} functions; inline them"
        )
    opsets = ", ".join(f'"{domain}" : {n}' for domain, n in sorted(model.opset_imports.items()))
    version = f"<ir_version: {model.ir_version}, opset_import: [{opsets}]>"
    constants = [
        f"{_typed(value)} = {_value(value)}"
        for value in sorted(
            graph.initializers.values(), key=lambda value: _natural(str(value.name))
        )
    ]
    lines = [
        *(f"# {line}".rstrip() for comment in comments for line in comment.splitlines()),
        version,
        f"{_name(graph.name or 'graph')} (",
        *_list(_typed(value) for value in graph.inputs),
        ") => (",
        *_list(_typed(value) for value in graph.outputs),
        ")",
        *(["<", *_list(constants), ">"] if constants else []),
        "{",
        *(_node(node) for node in graph),
        "}",
    ]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> ir.Model:
    """Parse what `to_text` prints, or anything in ONNX syntax.

    Initialisers whose data lies outside are left without a value. Raises GraphError with the
    parser's message and position where the text is not ONNX.
    """
    try:
        model = ir.from_proto(onnx.parser.parse_model(text))
        notes = list(_notes(text))
        declared = ", ".join(f"{kind} {name}" for name, kind, _ in notes if kind != "?")
        types = ir.serde.deserialize_graph(
            onnx.parser.parse_graph(f"types ({declared}) => () {{}}")
        )
    except (ParseError, ValueError) as error:  # ValueError: from a `#:` comment
        message = error.args[0].decode() if isinstance(error, ParseError) else str(error)
        raise GraphError(f"not a graph in ONNX's textual syntax: {message}") from error
    for node in model.graph:
        node.name = node.name or node.outputs[0].name  # what `to_text` leaves out
    values = {output.name: output for node in model.graph for output in node.outputs}
    for value in types.inputs:
        values[value.name].type, values[value.name].shape = value.type, value.shape
    for name, _, metadata in notes:
        made_by = values[name.strip('"')].producer()
        if made_by is not None:
            made_by.metadata_props.update(metadata)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def _notes(text: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(output name as written, type, metadata of its node) of each `#:` comment."""
    for line in text.splitlines():
        match = _NOTED.fullmatch(line)
        if match is not None:
            metadata = json.loads(match["meta"] or "{}")
            types = match["types"].strip().split(", ")
            for name, kind in zip(match["outputs"].split(", "), types, strict=True):
                yield name, kind or "?", metadata


def _node(node: ir.Node) -> str:
    outputs = ", ".join(_name(output.name or "") for output in node.outputs)
    own_name = node.name and node.name != node.outputs[0].name
    name = f"[{_name(str(node.name))}] " if own_name else ""
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = ", ".join(
        _attribute(node, node.attributes[key]) for key in sorted(node.attributes)
    )
    inputs = ", ".join("" if v is None else _name(str(v.name)) for v in node.inputs)
    note = ", ".join(_type(output) for output in node.outputs)
    metadata = {k: v for k, v in sorted(node.metadata_props.items()) if k.startswith(_METADATA)}
    note += " " + json.dumps(metadata) if metadata else ""
    call = f"{operator} <{attributes}> ({inputs})" if attributes else f"{operator} ({inputs})"
    return f"  {name}{outputs} = {call}  #: {note}"


def _attribute(node: ir.Node, attribute: ir.Attr) -> str:
    kind, value = attribute.type, attribute.value
    if attribute.is_ref() or kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise GraphError(
            f"{node.op_type} node {node.name}: attribute {attribute.name} is a subgraph"
        )
    if kind == ir.AttributeType.TENSOR:
        text = f"{_type(value)} {_elements(value)}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = f"[{', '.join(map(_scalar, value))}]"
        if not value:  # an empty list does not tell its type
            return f"{attribute.name}: {kind.name.lower()} = {text}"
    else:
        text = _scalar(value)
    return f"{attribute.name} = {text}"


def _value(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None or tensor.size > _LARGEST_SHOWN:
        return _OUTSIDE
    return _elements(tensor)


def _elements(tensor: ir.TensorProtocol) -> str:
    array = tensor.numpy()
    if tensor.dtype in _BITS:
        array = array.view(_BITS[tensor.dtype])
    return f"{{{', '.join(_scalar(item) for item in array.reshape(-1))}}}"


def _scalar(item: object) -> str:
    """A literal: floats as short as float32 allows, but never without a point or an exponent."""
    if isinstance(item, str | bytes):
        return json.dumps(item if isinstance(item, str) else item.decode())
    if isinstance(item, float) and not isinstance(item, np.float64):
        item = np.float32(item)  # Python floats come from attributes, which are float32
    return str(int(item)) if isinstance(item, bool | np.bool_) else str(item)


def _typed(value: ir.Value) -> str:
    return f"{_type(value)} {_name(str(value.name))}"


def _type(value: ir.Value | ir.TensorProtocol) -> str:
    if value.dtype is None:
        return "?"
    kind = value.dtype.name.lower()
    if value.shape is None:
        return f"{kind}[]"  # the syntax for any rank
    dims = [str(dim) if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape]
    return f"{kind}[{','.join(dims)}]" if dims else kind


def _name(name: str) -> str:
    return name if _IDENTIFIER.fullmatch(name) else json.dumps(name)


def _natural(name: str) -> list[int | str]:
    """Sort key: layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _list(items: Iterable[str]) -> list[str]:
    """Lines of a comma-separated list, indented."""
    lines = [f"  {item}," for item in items]
    return [*lines[:-1], lines[-1].removesuffix(",")] if lines else []
