"""export: a model folder becomes a bundle. Trace, rewrite, lower, write, hash, rename."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cla_export import __version__
from cla_export.bundle import (
    COPIED,
    CPU_GRAPH,
    CUDA_GRAPH,
    CUDA_PLUGIN_GRAPH,
    GRAPH,
    WEIGHTS,
    Bundle,
    Progress,
    background_digests,
    new_folder,
    open_bundle,
    require_space,
    write_json,
    write_manifest,
)
from cla_export.errors import BadInput
from cla_export.genai import genai_config
from cla_export.layout import DTYPE_BITS, DTYPES, KVLayout
from cla_export.lower import check_target
from cla_export.models.checkpoint import Checkpoint, open_checkpoint
from cla_export.quantization import Quantization
from cla_export.spec import ModelSpec
from cla_export.tokenizer import token_stream

if TYPE_CHECKING:
    import onnx_ir as ir

    from cla_export.kv_scales import Scales
    from cla_export.lower import Lowered

KV_CACHES = ("int8",)
ATTENTION = ("auto", "native", "plugin")
_ATTENTION_KEYS = {  # of each group
    CPU_GRAPH: "cpu_attention",
    CUDA_GRAPH: "cuda_attention",
    CUDA_PLUGIN_GRAPH: "cuda_plugin_attention",
}
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def _silent(_what: str, _done: int, _of: int) -> None:
    pass


def export(
    source: Path | str,
    dest: Path | str,
    *,
    target: str = "onnxruntime",
    dtype: str = "fp32",
    quantize: str | None = None,
    kv_cache: str | None = None,
    calibration: Path | None = None,
    attention: str | None = None,
    module: str | None = None,
    weights: str = "auto",
    force: bool = False,
    progress: Progress = _silent,
) -> Bundle:
    """Export a model folder to a bundle.

    Args:
        source: model folder with config.json and safetensors weights.
        dest: folder to create; refused if it exists, unless `force`.
        target: what the graph is lowered for: `onnxruntime`, `portable`, `tensorrt` or
            `tensorrt-rtx`.
        dtype: `fp32`, `fp16` or `bf16`, of weights, activations and caches. Conversion happens
            tensor by tensor while writing; fp32 holds every checkpoint exactly.
        quantize: `int4` or `int8` weights in place of `dtype`'s; see `quantization`. Target
            `onnxruntime` only.
        kv_cache: `int8` caches in place of `dtype`'s; see `calibration`. Target `onnxruntime` in
            fp32 only. The model is loaded into memory to choose scales.
        calibration: the text that scales of such caches are chosen on; None: the model folder's
            heldout.txt, or random token ids where it has none.
        attention: of the TensorRT targets: `native`, `plugin`, or `auto` (None), which takes the
            plugin where TensorRT has no kernel of its own.
        module: `package.module:factory` that makes the model's PyTorch module, where no family
            does; see `models.module`. It is imported.
        weights: `link`: take the checkpoint's files in without copying a byte, where they have
            this dtype; `copy`: write weights anew; `auto`: link 1 GiB and more, where the file
            system can. See `linked_weights`.
        force: replace an existing bundle.
        progress: called with (what, done, of) as work goes on.

    Raises:
        BadInput: the source, the destination or an option is wrong; nothing is left behind.
        GraphError: the traced graph cannot be understood, or contradicts the config.
    """
    import torch

    from cla_export.linked_weights import linkable, take_in
    from cla_export.lower import lower
    from cla_export.rewrite import rewrite
    from cla_export.trace import trace
    from cla_export.weights import attach

    _check_choices(target, dtype, kv_cache, calibration)
    quantization = _quantization(quantize, target, weights)
    options = _lowering_options(target, attention)
    source, dest = Path(source), Path(dest)
    steps = 5
    progress("read the model folder", 0, steps)
    checkpoint = open_checkpoint(source, module)
    spec = checkpoint.spec
    torch_dtype: torch.dtype = getattr(torch, DTYPES[dtype])
    files = linkable(checkpoint, DTYPES[dtype], "copy" if quantization else weights)
    with (
        new_folder(dest, force=force, needed_bytes=0) as folder,
        background_digests(checkpoint_files(checkpoint)) as digests,
    ):
        taken_in = take_in(files, folder, required=weights == "link")
        in_place = sum(
            entry.nbytes
            for entry in checkpoint.tensors.values()
            if entry.path in taken_in and not entry.parts
        )
        require_space(folder.parent, spec.parameters() * torch_dtype.itemsize - in_place)
        family = checkpoint.family
        progress("trace", 1, steps)
        scales, origin = _scales(checkpoint, calibration) if kv_cache else (None, "")
        stateless = trace(family, spec, torch_dtype)
        progress("rewrite", 2, steps)
        canonical = rewrite(stateless, spec.layout)
        progress("lower", 3, steps)
        lowered = lower(target, canonical.model, spec.layout, **options)
        companions = _companions(
            target, dtype, canonical.model, spec.layout, quantization, narrow=scales is not None
        )
        for made in (lowered, *companions.values()):
            _quantize(made.model, spec, quantization, scales)
        progress("write", 4, steps)
        constants = family.constants(spec)
        attach(lowered.model, checkpoint, constants, quantization, taken_in, folder)
        _write_graph(lowered.model, folder, progress)
        for name, made in companions.items():
            _write_companion(made.model, folder, name)
        _copy_files(checkpoint, folder, target)
        found = digests()
        manifest = _manifest(checkpoint, lowered, companions, DTYPES[dtype], quantization, found)
        manifest |= {"kv_cache": {"dtype": kv_cache, "calibrated_on": origin}} if kv_cache else {}
        manifest |= {"linked": sorted(taken_in.values())} if taken_in else {}
        known = {name: found[path] for path, name in taken_in.items()}
        write_manifest(folder, manifest, progress, known)
        progress("write", 5, steps)
    return open_bundle(dest, verify=False)


def checkpoint_files(checkpoint: Checkpoint) -> list[Path]:
    """config.json and the files that its weights are in."""
    weight_files = sorted({p.path for entry in checkpoint.tensors.values() for p in entry.places})
    return [checkpoint.folder / "config.json", *weight_files]


def _quantization(quantize: str | None, target: str, weights: str) -> Quantization | None:
    if quantize is None:
        return None
    if target != "onnxruntime":
        raise BadInput(
            f"quantize is {quantize!r} for target {target!r}; only `onnxruntime` has an operator "
            "for quantised weights"
        )
    if weights == "link":
        raise BadInput(f"weights is 'link' and quantize {quantize!r}; such weights are packed anew")
    return Quantization.named(quantize)


def _check_choices(target: str, dtype: str, kv_cache: str | None, calibration: Path | None) -> None:
    check_target(target)
    if dtype not in DTYPES:
        raise BadInput(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if kv_cache is None:
        if calibration is not None:
            raise BadInput(
                f"calibration is {str(calibration)!r} and kv_cache is not set; it is the text for "
                "scales of int8 caches"
            )
        return
    if kv_cache not in KV_CACHES:
        raise BadInput(f"kv_cache is {kv_cache!r}; expected {' or '.join(KV_CACHES)}")
    if target != "onnxruntime" or dtype != "fp32":
        raise BadInput(
            f"kv_cache is {kv_cache!r} for target {target!r} in {dtype}; only `onnxruntime` in "
            "fp32, on a CPU, has operators for such a cache"
        )


def _scales(checkpoint: Checkpoint, text: Path | None) -> "tuple[list[Scales], str]":
    """Scales of int8 caches, and what they were chosen on."""
    from cla_export.calibration import calibrate
    from cla_export.lower.quantize_caches import check_heads
    from cla_export.models.checkpoint import load_model

    spec = checkpoint.spec
    check_heads(spec.layout)
    if spec.spelt_attention:
        raise BadInput(
            f"kv_cache is 'int8' and {checkpoint.module} writes its attention out, so nothing "
            "shows the keys and values to choose scales for; call scaled_dot_product_attention"
        )
    stream, origin = token_stream(checkpoint.folder, spec.vocab_size, text)
    return calibrate(load_model(checkpoint), stream), origin


def _quantize(
    model: "ir.Model",
    spec: ModelSpec,
    quantization: Quantization | None,
    scales: "list[Scales] | None",
) -> None:
    """What a graph holds in fewer bits: weights, and with `scales` caches."""
    from cla_export.lower.quantize_caches import quantize_caches
    from cla_export.lower.quantize_experts import quantize_experts
    from cla_export.lower.quantize_weights import quantize_weights

    if quantization is not None:
        quantize_weights(model, quantization, spec.tied)
        quantize_experts(model, quantization)
    if scales is not None:
        quantize_caches(model, spec.layout, scales)


def _lowering_options(target: str, attention: str | None) -> dict[str, str]:
    if attention is None:
        return {}
    if target not in ("tensorrt", "tensorrt-rtx"):
        raise BadInput(
            f"attention is {attention!r} for target {target!r}; only the TensorRT targets have a "
            "choice"
        )
    if attention not in ATTENTION:
        raise BadInput(f"attention is {attention!r}; expected one of {', '.join(ATTENTION)}")
    return {"attention": attention}


def _write_graph(model: "ir.Model", folder: Path, progress: Progress) -> None:
    """Write the graph, and those of its weights that no file of the folder holds already."""
    import onnx_ir as ir

    from cla_export.weights import SMALL

    def tensor_written(_tensor: object, info: ir.external_data.CallbackInfo) -> None:
        progress("weights", info.index + 1, info.total)

    values = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes > SMALL
    ]
    tensors = [value.const_value for value in values if value.const_value is not None]
    write = ir.external_data.convert_tensors_to_external
    # One tensor at a time in memory; before onnx-ir 1.1 there is no other way.
    one: dict[str, Any] = {"max_workers": 1} if "max_workers" in signature(write).parameters else {}
    written = write(tensors, folder, WEIGHTS, callback=tensor_written, **one)
    for value, tensor in zip(values, written, strict=True):
        value.const_value = tensor
    ir.save(model, folder / GRAPH)


def _companions(
    target: str,
    dtype: str,
    canonical: "ir.Model",
    layout: KVLayout,
    quantization: Quantization | None,
    *,
    narrow: bool,
) -> "dict[str, Lowered]":
    """The other graphs that a bundle has over its weights, by the names of their files.

    Where caches are `narrow`, a graph is left out that keeps the standard form for some of them.
    """
    from cla_export.lower import CPU, CUDA, CUDA_PLUGIN, lower

    if target != "onnxruntime":
        return {}
    if dtype != "fp32":
        for_cuda = {CUDA_GRAPH: lower(CUDA, canonical, layout)}
        if quantization is None:  # our products read weights as they are
            for_cuda[CUDA_PLUGIN_GRAPH] = lower(CUDA_PLUGIN, canonical, layout)
        return for_cuda
    for_cpu = lower(CPU, canonical, layout)
    ours = [operator == "ClaAttention" for operator in for_cpu.attention]
    return {CPU_GRAPH: for_cpu} if (all(ours) if narrow else any(ours)) else {}


def _write_companion(model: "ir.Model", folder: Path, name: str) -> None:
    """Write a graph whose weights are those that the bundle's own graph has on disk already."""
    import onnx_ir as ir

    from cla_export.lower.fuse_products import fuse_products
    from cla_export.lower.linears import read_weights_in_place

    if name == CPU_GRAPH:
        read_weights_in_place(model)
    elif name == CUDA_GRAPH:
        fuse_products(model)
    written = ir.load(folder / GRAPH).graph.initializers
    for weight, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = written[weight].const_value
    ir.save(model, folder / name)


def _copy_files(checkpoint: Checkpoint, folder: Path, target: str) -> None:
    for name in COPIED:
        path = checkpoint.folder / name
        if path.is_file():
            (folder / name).write_bytes(path.read_bytes())
    if target == "onnxruntime":
        generation = folder / "generation_config.json"
        content = json.loads(generation.read_text("utf-8")) if generation.is_file() else {}
        config = genai_config(checkpoint.spec, checkpoint.config, content)
        write_json(folder / "genai_config.json", config)


def _manifest(
    checkpoint: Checkpoint,
    lowered: "Lowered",
    companions: "dict[str, Lowered]",
    dtype: str,
    quantization: Quantization | None,
    digests: Mapping[Path, str],
) -> dict[str, object]:
    spec = checkpoint.spec
    graph = lowered.model.graph
    return {
        "cla_export": __version__,
        "target": lowered.target,
        "dtype": dtype,
        "quantization": None if quantization is None else asdict(quantization),
        "kv_layout": spec.layout.to_json(),
        "groups": [
            {
                "index": group.index,
                "owner": group.owner,
                "layers": list(group.layers),
                "kv_heads": group.kv_heads,
                "head_dim": group.head_dim,
                "window": group.window,
                "attention": lowered.attention[group.index],
                "reason": lowered.reasons[group.index],
                **{
                    _ATTENTION_KEYS[name]: made.attention[group.index]
                    for name, made in companions.items()
                },
            }
            for group in spec.layout.groups
        ],
        "experts": _experts(spec, lowered, dtype, quantization),
        "inputs": [value.name for value in graph.inputs],
        "outputs": [value.name for value in graph.outputs],
        "limits": {"max_positions": spec.max_positions, "vocab_size": spec.vocab_size},
        "source": {
            "folder": str(checkpoint.folder.absolute()),
            **({"module": checkpoint.module} if checkpoint.module else {}),
            "sha256": {path.name: digest for path, digest in digests.items()},
        },
        "notes": list(checkpoint.notes),
        "tools": {name: found for name in _TOOLS if (found := _version(name))},
    }


def _experts(
    spec: ModelSpec, lowered: "Lowered", dtype: str, quantization: Quantization | None
) -> dict[str, str] | None:
    """The operator that a mixture of experts ended up as, and why."""
    if not spec.routed:
        return None
    operators = {node.op_type for node in lowered.model.graph}
    if "QMoE" in operators and "MoE" not in operators:
        return {"operator": "QMoE", "reason": "computes the chosen ones alone"}
    whole = ""
    if quantization is not None:
        shapes = spec.weights()
        size = sum(math.prod(shapes[name]) for name in spec.routed) * DTYPE_BITS[dtype] // 8
        whole = f"; {size:,} bytes of them are not quantised, which QMoE takes in float32 and "
        whole += f"rows of whole blocks of {quantization.block}"
    if "MoE" in operators:
        return {"operator": "MoE", "reason": f"computes the chosen ones alone{whole}"}
    chosen, count = max(spec.routed.values(), key=lambda pair: pair[1] / pair[0])
    why = f"{lowered.target} has no operator for less"
    if lowered.target == "onnxruntime":
        why = "ONNX Runtime's MoE takes SwiGLU in float32 on a CPU"
    all_of_them = f"computes all {count} and weighs them, where a token goes through {chosen}"
    return {"operator": "MatMul", "reason": f"{all_of_them}: {why}{whole}"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
