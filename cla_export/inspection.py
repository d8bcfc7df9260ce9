"""Inspect: what a model's KV layout is and what it saves, from whatever there is of the model.

| given | read from |
|---|---|
| a folder with a config.json, or that file | the config alone |
| a model folder | config and weights, which must agree |
| an .onnx file | the graph: which layers read the same cache; its weights are not opened |
| a bundle | bundle.json, config.json and the graph, which must agree |
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cla_export.bundle import BUILD_RECORD, MANIFEST, engine_folders, is_bundle, open_bundle
from cla_export.errors import BadInput, BundleError, LayoutError, MissingEnvironment
from cla_export.graph_reading import GraphFacts, read_graph
from cla_export.layout import DTYPE_BITS, KVLayout, layout_from_config
from cla_export.layout_config import states_sharing
from cla_export.models import FAMILIES, family_of
from cla_export.models.checkpoint import open_checkpoint, read_config
from cla_export.spec import ModelSpec

if TYPE_CHECKING:
    pass

Kind = Literal["config", "model", "graph", "bundle"]
ASSUMED_DTYPE = "bfloat16"
DEFAULT_CONTEXT = 2048  # tokens attended to, for FLOPs


@dataclass(frozen=True, slots=True)
class Costs:
    """What one layout costs. None where the model's dimensions are not known."""

    cache_bytes_per_token: int  # keys and values of all groups, in the inspection's cache dtype
    cache_inputs: int  # key and value caches a runtime must bind
    kv_activation_bytes_per_token: int  # K and V that owners produce in training, in its dtype
    parameters: int | None
    flops_per_token: int | None  # forward, one token, at the inspection's context


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
    cache_dtype: str
    dtype_source: str  # what said so, or that it was assumed
    context: int | None  # tokens, for FLOPs
    own: Costs
    dense: Costs
    weight_bytes: Mapping[str, int] | None = (
        None  # dtype -> bytes, as stored; None: no weights here
    )
    target: str | None = None  # of a bundle
    graph: GraphFacts | None = None
    attention: tuple[str, ...] = ()  # of a bundle: which operator carries it, and why
    engines: tuple[str, ...] = ()  # of a bundle: what was built from it
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
            "cache_dtype": self.cache_dtype,
            "dtype_source": self.dtype_source,
            "context": self.context,
            "this_model": asdict(self.own),
            "dense_twin": asdict(self.dense),
            "weight_bytes": None if self.weight_bytes is None else dict(self.weight_bytes),
            "graph": None if self.graph is None else asdict(self.graph),
            "attention": list(self.attention),
            "engines": list(self.engines),
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }


def inspect(
    path: Path | str, *, context: int | None = None, module: str | None = None
) -> Inspection:
    """Inspect a config, a model folder, an .onnx file or a bundle.

    `context` is the tokens attended to in the FLOPs figure; by default the model's positions, at
    most 2048. `module` is `package.module:factory` of a model that the user's own code makes; it is
    imported. Raises BadInput, LayoutError or GraphError where the model cannot be understood.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".onnxtxt") and path.is_file():
        return _inspect_graph(path)
    if path.name == "config.json" and path.is_file():
        return _inspect_folder(path.parent, context, module, weights=False)
    if path.is_dir() and is_bundle(path):
        return _inspect_bundle(path, context, module)
    if path.is_dir():
        return _inspect_folder(path, context, module, weights=any(path.glob("*.safetensors*")))
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


def _inspect_folder(
    folder: Path, context: int | None, module: str | None, *, weights: bool
) -> Inspection:
    config = read_config(folder)
    spec, notes = _spec_if_known(config, module)
    dtype, source = _config_dtype(config, folder)
    stored = None
    if weights and spec is not None:
        checkpoint = open_checkpoint(folder, module, spec.layout if module else None)
        dtype, source = checkpoint.dtype, "stored weights"
        stored = checkpoint.weight_bytes
        notes += checkpoint.notes
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
        weight_bytes=stored,
    )


def _inspect_bundle(folder: Path, context: int | None, module: str | None) -> Inspection:
    bundle = open_bundle(folder, verify=False)  # hashing gigabytes is not for a look
    layout, dtype = bundle.layout, str(bundle.manifest.get("dtype"))
    if dtype not in DTYPE_BITS:
        raise BundleError(
            f"{folder / MANIFEST}: dtype is {dtype!r}; expected one of {', '.join(DTYPE_BITS)}; "
            "export the model again"
        )
    config = read_config(folder)
    promised: KVLayout | None
    if bundle.module is None:
        spec, notes = _spec_if_known(config)
        promised = layout_from_config(config) if spec is None else spec.layout
    elif module is None:
        spec, notes = None, [f"parameters and FLOPs: pass --module {bundle.module}, which made it"]
        promised = layout_from_config(config) if states_sharing(config) else None
    else:
        spec, notes = _spec_if_known(config, bundle.module_named(module))
        promised = spec.layout if spec else None
    facts, found, held_in, graph_notes = read_graph(bundle.graph)
    wanted = 2 * layout.num_groups
    checks = [
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
    ]
    if bundle.calibration:
        name = "the graph's caches are in int8, as bundle.json says"
        checks.append(Check(name, held_in == bundle.cache_dtype, held_in))
    if promised is not None:
        who = "config.json" if module is None else "the module"
        checks.append(
            Check(
                f"{who} shares as bundle.json says",
                promised == layout,
                _difference(who, promised, "bundle.json", layout),
            )
        )
    found_all = _compare(
        kind="bundle",
        path=folder,
        model_type=_model_type(config),
        layout=layout,
        spec=spec,
        dtype=(dtype, "bundle.json"),
        cache_dtype=bundle.cache_dtype,
        context=context,
        notes=[*notes, *graph_notes],
        target=str(bundle.manifest.get("target")),
        graph=facts,
        checks=tuple(checks),
    )
    built = tuple(_describe_engine(path) for path in engine_folders(bundle))
    return replace(found_all, attention=tuple(bundle.attention_choices()), engines=built)


def _describe_engine(folder: Path) -> str:
    try:
        record = json.loads((folder / BUILD_RECORD).read_text(encoding="utf-8"))
        options, size = record["options"], record["engine"]["bytes"]
        limits = [options[name] for name in ("slots", "capacity", "chunk")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder.name}: {BUILD_RECORD} is damaged ({error!r}); build it again"
    return (
        f"{folder.name}: {limits[0]} slots of {limits[1]:,} tokens, prompts in chunks of "
        f"{limits[2]:,}, {size:,} bytes"
    )


def _inspect_graph(path: Path) -> Inspection:
    facts, layout, dtype, notes = read_graph(path)
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
    cache_dtype: str | None = None,
    target: str | None = None,
    graph: GraphFacts | None = None,
    checks: tuple[Check, ...] = (),
    weight_bytes: Mapping[str, int] | None = None,
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
        cache_dtype=cache_dtype or dtype[0],
        dtype_source=dtype[1],
        context=context,
        own=_costs(layout, dtype[0], cache_dtype, spec, context),
        dense=_costs(twin, dtype[0], cache_dtype, spec.dense_twin() if spec else None, context),
        weight_bytes=graph.weight_bytes if graph is not None else weight_bytes,
        target=target,
        graph=graph,
        checks=checks,
        notes=tuple(notes),
    )


def _costs(
    layout: KVLayout,
    dtype: str,
    cache_dtype: str | None,
    spec: ModelSpec | None,
    context: int | None,
) -> Costs:
    per_token = layout.bytes_per_token(dtype)
    return Costs(
        cache_bytes_per_token=layout.bytes_per_token(cache_dtype or dtype),
        cache_inputs=2 * layout.num_groups,
        kv_activation_bytes_per_token=per_token,  # what owners project is what caches hold
        parameters=spec.parameters() if spec else None,
        flops_per_token=spec.flops_per_token(context) if spec and context else None,
    )


def _spec_if_known(
    config: Mapping[str, object], module: str | None = None
) -> tuple[ModelSpec | None, list[str]]:
    if module is not None:
        from cla_export.models.module import ModuleFamily

        return ModuleFamily.named(module).read_spec(config), []
    if config.get("model_type") in FAMILIES:
        return read_model_spec(config), []
    try:
        return read_model_spec(config), []
    except (BadInput, LayoutError, MissingEnvironment) as error:
        reason = f"parameters and FLOPs are not known: {error}"
    return None, [f"{reason}; the layout and its caches are read all the same"]


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
