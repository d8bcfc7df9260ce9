"""Inspect: what a model's KV layout is and what it saves, from whatever there is of the model.

| given | read from |
|---|---|
| a folder with a config.json, or that file | the config alone |
| a model folder | config and weights, which must agree |
| an .onnx file | the graph: which layers read the same cache; its weights are not opened |
| a bundle | bundle.json, config.json and the graph, which must agree |
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from cla_export.bundle import MANIFEST, is_bundle, open_bundle
from cla_export.errors import BadInput, BundleError, GraphError, LayoutError, MissingEnvironment
from cla_export.layout import DTYPE_BITS, KVLayout, layout_from_config
from cla_export.models import FAMILIES, family_of
from cla_export.models.checkpoint import open_checkpoint, read_config
from cla_export.spec import ModelSpec

if TYPE_CHECKING:
    import onnx_ir as ir

Kind = Literal["config", "model", "graph", "bundle"]
ASSUMED_DTYPE = "bfloat16"
DEFAULT_CONTEXT = 2048  # tokens attended to, for FLOPs
_LARGEST_CONSTANT = 1024  # elements; bigger initialisers are weights, which nothing here reads
_PAST_SLOT = {"Attention": 4, "GroupQueryAttention": 3}  # where past_key stands, past_value next


@dataclass(frozen=True, slots=True)
class Costs:
    """What one layout costs. None where the model's dimensions are not known."""

    cache_bytes_per_token: int  # keys and values of all groups, at the inspection's dtype
    cache_inputs: int  # key and value caches a runtime must bind
    kv_activation_bytes_per_token: int  # K and V that owners produce in training, same dtype
    parameters: int | None
    flops_per_token: int | None  # forward, one token, at the inspection's context


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What was found in an ONNX graph."""

    file: str
    stage: Literal["stateless", "stateful"]  # stateless: no caches threaded yet
    attention: dict[str, int]  # operator -> how many of them
    cache_inputs: int


@dataclass(frozen=True, slots=True)
class Check:
    """Two sources that should agree, and whether they do."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's KV layout beside its dense twin, in which every layer has its own cache."""

    kind: Kind
    name: str
    path: str
    model_type: str | None
    layout: KVLayout
    dtype: str
    dtype_source: str  # what said so, or that it was assumed
    context: int | None  # tokens, for FLOPs
    own: Costs
    dense: Costs
    target: str | None = None  # of a bundle
    graph: GraphFacts | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()  # what could not be said, and why

    @property
    def ok(self) -> bool:
        """Whether every check came out right."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, object]:
        """Plain data; `layout` reads back with `KVLayout.from_json`."""
        return {
            "kind": self.kind,
            "name": self.name,
            "path": self.path,
            "model_type": self.model_type,
            "target": self.target,
            "description": self.layout.describe(),
            "layout": self.layout.to_json(),
            "groups": [asdict(group) for group in self.layout.groups],
            "dtype": self.dtype,
            "dtype_source": self.dtype_source,
            "context": self.context,
            "this_model": asdict(self.own),
            "dense_twin": asdict(self.dense),
            "graph": None if self.graph is None else asdict(self.graph),
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }


def inspect(path: Path | str, *, context: int | None = None) -> Inspection:
    """Inspect a config, a model folder, an .onnx file or a bundle.

    `context` is the tokens attended to in the FLOPs figure; by default the model's positions, at
    most 2048. Raises BadInput, LayoutError or GraphError where the model cannot be understood.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".onnxtxt") and path.is_file():
        return _inspect_graph(path)
    if path.name == "config.json" and path.is_file():
        return _inspect_folder(path.parent, context, weights=False)
    if path.is_dir() and is_bundle(path):
        return _inspect_bundle(path, context)
    if path.is_dir():
        return _inspect_folder(path, context, weights=any(path.glob("*.safetensors*")))
    kind = "is a file of another kind" if path.exists() else "does not exist"
    raise BadInput(
        f"{path}: {kind}; expected a model folder, a config.json, an .onnx file or a bundle"
    )


def read_model_spec(config: Mapping[str, object]) -> ModelSpec:
    """Read a config of a supported family; BadInput names the families if it is another."""
    try:
        return family_of(config).read_spec(config)
    except ImportError as error:
        raise MissingEnvironment(
            f"PyTorch, which reads models of type {config.get('model_type')!r}, cannot be loaded "
            f"({error}); install it: pip install cla-export"
        ) from error


# Folders and bundles


def _inspect_folder(folder: Path, context: int | None, *, weights: bool) -> Inspection:
    config = read_config(folder)
    spec, notes = _spec_if_known(config)
    dtype, source = _config_dtype(config, folder)
    if weights and spec is not None:
        dtype, source = open_checkpoint(folder).dtype, "stored weights"
    elif weights:
        notes.append("the weights were not compared with the config, for the same reason")
    return _compare(
        kind="model" if weights else "config",
        path=folder,
        model_type=_model_type(config),
        layout=layout_from_config(config) if spec is None else spec.layout,
        spec=spec,
        dtype=(dtype, source),
        context=context,
        notes=notes,
    )


def _inspect_bundle(folder: Path, context: int | None) -> Inspection:
    bundle = open_bundle(folder, verify=False)  # hashing gigabytes is not for a look
    layout, dtype = bundle.layout, str(bundle.manifest.get("dtype"))
    if dtype not in DTYPE_BITS:
        raise BundleError(
            f"{folder / MANIFEST}: dtype is {dtype!r}; expected one of {', '.join(DTYPE_BITS)}; "
            "export the model again"
        )
    config = read_config(folder)
    spec, notes = _spec_if_known(config)
    promised = layout_from_config(config) if spec is None else spec.layout
    facts, found, _, graph_notes = _read_graph(bundle.graph)
    wanted = 2 * layout.num_groups
    checks = (
        Check(
            "one key and one value cache per group in the graph",
            facts.cache_inputs == wanted,
            f"{facts.cache_inputs} cache inputs, 2 x {layout.num_groups} groups = {wanted}",
        ),
        Check(
            "the graph shares as bundle.json says",
            found == layout,
            _difference("the graph", found, "bundle.json", layout),
        ),
        Check(
            "config.json shares as bundle.json says",
            promised == layout,
            _difference("config.json", promised, "bundle.json", layout),
        ),
    )
    return _compare(
        kind="bundle",
        path=folder,
        model_type=_model_type(config),
        layout=layout,
        spec=spec,
        dtype=(dtype, "bundle.json"),
        context=context,
        notes=[*notes, *graph_notes],
        target=str(bundle.manifest.get("target")),
        graph=facts,
        checks=checks,
    )


def _inspect_graph(path: Path) -> Inspection:
    facts, layout, dtype, notes = _read_graph(path)
    if facts.stage == "stateless":
        notes.append(
            "the graph is stateless: no caches are threaded yet; the sharing is that of K/V"
        )
        source = "keys of the graph"
    else:
        source = "cache inputs of the graph"
    notes.append("parameters and FLOPs: a graph does not say them; inspect the model's folder")
    return _compare(
        kind="graph",
        path=path,
        model_type=None,
        layout=layout,
        spec=None,
        dtype=(dtype, source),
        context=None,
        notes=notes,
        graph=facts,
    )


def _compare(
    *,
    kind: Kind,
    path: Path,
    model_type: str | None,
    layout: KVLayout,
    spec: ModelSpec | None,
    dtype: tuple[str, str],
    context: int | None,
    notes: list[str],
    target: str | None = None,
    graph: GraphFacts | None = None,
    checks: tuple[Check, ...] = (),
) -> Inspection:
    """Put a layout beside its dense twin."""
    twin = layout.dense_twin()
    if spec is None:
        context = None
    elif context is None:
        context = min(spec.max_positions, DEFAULT_CONTEXT)
    elif not 0 < context <= spec.max_positions:
        raise BadInput(
            f"context is {context} tokens; expected 1 to {spec.max_positions}, the model's "
            "max_position_embeddings"
        )
    return Inspection(
        kind=kind,
        name=path.resolve().name,
        path=str(path),
        model_type=model_type,
        layout=layout,
        dtype=dtype[0],
        dtype_source=dtype[1],
        context=context,
        own=_costs(layout, dtype[0], spec, context),
        dense=_costs(twin, dtype[0], spec.dense_twin() if spec else None, context),
        target=target,
        graph=graph,
        checks=checks,
        notes=tuple(notes),
    )


def _costs(layout: KVLayout, dtype: str, spec: ModelSpec | None, context: int | None) -> Costs:
    per_token = layout.bytes_per_token(dtype)
    return Costs(
        cache_bytes_per_token=per_token,
        cache_inputs=2 * layout.num_groups,
        kv_activation_bytes_per_token=per_token,  # what owners project is what caches hold
        parameters=spec.parameters() if spec else None,
        flops_per_token=spec.flops_per_token(context) if spec and context else None,
    )


def _spec_if_known(config: Mapping[str, object]) -> tuple[ModelSpec | None, list[str]]:
    if config.get("model_type") in FAMILIES:
        return read_model_spec(config), []
    reason = (
        f"parameters and FLOPs: not known for model_type {config.get('model_type')!r} "
        f"(known: {', '.join(sorted(FAMILIES))}); the layout and its caches are read all the same"
    )
    return None, [reason]


def _config_dtype(config: Mapping[str, object], folder: Path) -> tuple[str, str]:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                dtype = str(part[key]).removeprefix("torch.")
                if dtype not in DTYPE_BITS:
                    raise BadInput(
                        f"{folder / 'config.json'}: {key} is {part[key]!r}; expected one of "
                        f"{', '.join(DTYPE_BITS)}, or no such key"
                    )
                return dtype, f"config.json {key}"
    return ASSUMED_DTYPE, "assumed: config.json names none"


def _model_type(config: Mapping[str, object]) -> str | None:
    model_type = config.get("model_type")
    return None if model_type is None else str(model_type)


def _difference(name: str, found: KVLayout, other: str, expected: KVLayout) -> str:
    if found == expected:
        return expected.describe()
    if found.num_layers != expected.num_layers:
        return f"{name} has {found.num_layers} layers, {other} {expected.num_layers}"
    for key, seen in found.to_json().items():
        for layer, (a, b) in enumerate(zip(seen, expected.to_json()[key], strict=True)):
            if a != b:
                return f"layer {layer}: {key} is {a} in {name}, {b} in {other}"
    raise AssertionError("unequal layouts differ in an entry")


# Graphs


def _read_graph(path: Path) -> tuple[GraphFacts, KVLayout, str, list[str]]:
    """Facts, layout, cache dtype and notes of a graph; layers are numbered in execution order."""
    import onnx_ir as ir

    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, text parser and deserialiser each have their own
        raise BadInput(f"{path}: not a readable ONNX model ({error}); export it again") from error
    nodes = [node for node in model.graph if _is_attention(node)]
    if not nodes:
        seen = ", ".join(sorted({node.op_type for node in model.graph}))
        raise GraphError(
            f"{path}: no Attention or GroupQueryAttention node (operators seen: {seen}); "
            "attention taken apart into MatMul and Softmax cannot be read"
        )
    notes: list[str] = []
    try:
        if any(_cache_input(cache) is not None for node in nodes for cache in _caches_of(node)):
            stage: Literal["stateless", "stateful"] = "stateful"
            layout, cache_inputs, dtype = _stateful_layout(nodes, notes)
        else:
            stage, cache_inputs = "stateless", 0
            layout, dtype = _stateless_layout(model)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    facts = GraphFacts(path.name, stage, dict(Counter(n.op_type for n in nodes)), cache_inputs)
    return facts, layout, dtype, notes


def _is_attention(node: "ir.Node") -> bool:
    return (node.op_type, node.domain) in (
        ("Attention", ""),
        ("GroupQueryAttention", "com.microsoft"),
    )


def _input(node: "ir.Node", slot: int) -> "ir.Value | None":
    return node.inputs[slot] if slot < len(node.inputs) else None


def _caches_of(node: "ir.Node") -> "list[ir.Value | None]":
    """The key cache and the value cache an attention node reads, as they are after this call.

    1. No past: what it reads as K, which TensorScatter or another node's present output made.
    2. Its past is a graph input: the node is an owner, its own present output.
    3. Its past was made in the graph, by an owner: that, provided it adds nothing to it.
    """
    from cla_export.rewrite.report import describe

    caches: list[ir.Value | None] = []
    for part in (0, 1):
        new, past = _input(node, 1 + part), _input(node, _PAST_SLOT[node.op_type] + part)
        if past is None:  # 1
            caches.append(new)
        elif past.is_graph_input():  # 2
            if len(node.outputs) <= 1 + part or not node.outputs[1 + part].name:
                raise GraphError(
                    f"{describe(node)}: it reads cache input {past.name} but has no present "
                    "output; expected an owner to write what it reads"
                )
            caches.append(node.outputs[1 + part])
        else:  # 3
            if not _is_empty(new):
                raise GraphError(
                    f"{describe(node)}: it appends its own K or V to {past.name}, a cache that "
                    "another layer wrote in this call; expected a sharer to give zero-length K/V"
                )
            caches.append(past)
    return caches


def _is_empty(value: "ir.Value | None") -> bool:
    """Whether K or V has no tokens: a zero in its shape, or a Slice that ends where it starts."""
    from cla_export.rewrite.values import ints, producer

    if value is not None and value.shape is not None and 0 in value.shape:
        return True
    cut = producer(value, "Slice")
    if cut is None:
        return False
    start = ints(_input(cut, 1))
    return start is not None and start == ints(_input(cut, 2))


def _cache_input(present: "ir.Value | None") -> "ir.Value | None":
    """The cache a present value continues; None if it is not a cache."""
    node = None if present is None else present.producer()
    index = None if present is None else present.index()
    if node is None or index is None:
        return None
    if node.op_type == "TensorScatter":
        return node.inputs[0]
    if _is_attention(node) and index in (1, 2):
        return _input(node, _PAST_SLOT[node.op_type] + index - 1)
    return None


def _stateful_layout(nodes: "list[ir.Node]", notes: list[str]) -> tuple[KVLayout, int, str]:
    from cla_export.rewrite.report import describe
    from cla_export.rewrite.values import heads_and_dim

    owner_of: dict[tuple[ir.Value, ir.Value], int] = {}  # (key, value) present -> first reader
    written_by: dict[ir.Value, int] = {}  # cache input -> owner
    owners: list[int] = []
    shapes: list[tuple[int, int]] = []
    windows: list[int | None] = []
    unclear: list[int] = []
    dtype = ""
    for layer, node in enumerate(nodes):
        key, value = _caches_of(node)
        past_key, past_value = _cache_input(key), _cache_input(value)
        if key is None or value is None or past_key is None or past_value is None:
            raise GraphError(
                f"{describe(node)}: layer {layer} reads no cache though others do; expected "
                "every attention node to read one"
            )
        owner = owner_of.setdefault((key, value), layer)
        for past in (past_key, past_value):
            if not past.is_graph_input():
                raise GraphError(f"{describe(node)}: its cache {past.name} is not a graph input")
            if written_by.setdefault(past, owner) != owner:
                raise GraphError(
                    f"{describe(node)}: layers {written_by[past]} and {owner} each write "
                    f"{past.name}; a cache has one owner"
                )
        owners.append(owner)
        shapes.append(heads_and_dim(past_key, node, "key cache"))
        if shapes[-1] != heads_and_dim(past_value, node, "value cache"):
            raise GraphError(
                f"{describe(node)}: its key cache is {past_key.shape}, its value cache "
                f"{past_value.shape}; expected one shape for both"
            )
        windows.append(_window(node, layer, unclear))
        dtype = dtype or _dtype_name(past_key)
    if unclear:
        notes.append(
            f"layers {', '.join(map(str, unclear))}: the mask is not one cla-export writes; shown "
            "as full attention, though it may slide"
        )
    heads, dims = zip(*shapes, strict=True)
    return _legal_layout(owners, heads, dims, windows), len(written_by), dtype


def _legal_layout(
    owners: list[int], heads: tuple[int, ...], dims: tuple[int, ...], windows: list[int | None]
) -> KVLayout:
    try:
        return KVLayout.create(owners, heads, dims, windows)
    except LayoutError as error:
        raise GraphError(f"its layers share KV in a way that is not legal: {error}") from error


def _window(node: "ir.Node", layer: int, unclear: list[int]) -> int | None:
    """Sliding window in tokens: as the rewriter recorded it, else as the node itself says."""
    from cla_export.rewrite.classify_masks import WINDOW, window_of
    from cla_export.rewrite.values import ints, producer

    if WINDOW in node.metadata_props:
        return window_of(node)
    if node.op_type == "GroupQueryAttention":
        size = node.attributes.get_int("local_window_size", -1)
        return size if size > 0 else None
    mask = _input(node, 3)
    if mask is None:
        return None
    newer = producer(mask, "Greater")  # key position > query position - window
    oldest = producer(newer.inputs[1], "Sub") if newer is not None else None
    width = ints(oldest.inputs[1]) if oldest is not None else None
    if width is not None and len(width) == 1:
        return width[0]
    unclear.append(layer)
    return None


def _stateless_layout(model: "ir.Model") -> tuple[KVLayout, str]:
    """What `rewrite` would find, by the same passes, on a graph without weight values."""
    import onnx_ir as ir

    from cla_export.rewrite.classify_masks import classify_masks
    from cla_export.rewrite.group_attention import group_attention
    from cla_export.rewrite.hoist_key_scale import hoist_key_scale
    from cla_export.rewrite.simplify import simplify
    from cla_export.rewrite.strip_repeat_kv import strip_repeat_kv
    from cla_export.rewrite.values import attention_nodes

    for initializer in model.graph.initializers.values():
        tensor = initializer.const_value
        if tensor is None:
            continue
        if isinstance(tensor, ir.ExternalTensor) or tensor.size > _LARGEST_CONSTANT:
            initializer.const_value = None
    for find in (simplify, strip_repeat_kv, hoist_key_scale, classify_masks):
        find(model)
    layout, _ = group_attention(model, None)
    key = attention_nodes(model.graph)[0].inputs[1]
    return layout, _dtype_name(cast("ir.Value", key))


def _dtype_name(value: "ir.Value") -> str:
    if value.dtype is None:
        raise GraphError(f"{value.name} has no dtype; run ONNX shape inference on the file first")
    names = {"FLOAT": "float32", "FLOAT8E4M3FN": "float8_e4m3fn", "FLOAT8E5M2": "float8_e5m2"}
    return names.get(value.dtype.name, value.dtype.name.lower())
