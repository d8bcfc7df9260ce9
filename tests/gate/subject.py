"""What a mutant edits: one exported bundle, opened for surgery; and the register of mutants."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.layout import Group
from cla_export.models.checkpoint import open_checkpoint
from cla_export.quantization import PACKED, SCALES, Quantization
from cla_export.rewrite.builder import named_constant
from cla_export.rewrite.group_attention import LAYER

FUSED = "GroupQueryAttention"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the gate must say that it went wrong.

    groups  one of these is named, by the first divergence, or by the failing caches where no
            layer's values differ; None: the fault is global
    layer   the layer that the first divergence names, and `role` the tensor in it
    outside no layer may be named: the fault is before the caches or behind the last layer
    """

    groups: tuple[int, ...] | None = None
    layer: int | None = None
    role: str | None = None
    outside: bool = False


ANYWHERE = Place()
OUTSIDE = Place(outside=True)


class Subject:
    """A bundle's graph and executor, both free to be spoilt. `save` makes a bundle of it again."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.spec = open_checkpoint(bundle.source).spec
        self.layout = bundle.layout
        self.model = ir.external_data.load_to_model(ir.load(bundle.graph))
        self.graph = self.model.graph
        self.engine: type[OnnxRuntimeExecutor] = OnnxRuntimeExecutor
        self._made = 0

    def save(self, folder: Path) -> Bundle:
        self.graph.sort()
        ir.save(self.model, folder / "model.onnx")
        return dataclasses.replace(self.bundle, folder=folder)

    # Who is who

    @property
    def shared(self) -> Group:
        """The last group with a sharer: faults there are neither at the front nor everywhere."""
        return [group for group in self.layout.groups if len(group.layers) > 1][-1]

    @property
    def sharer(self) -> int:
        """The last sharer of that group."""
        return self.shared.layers[-1]

    @property
    def middle(self) -> int:
        """A layer with others before and after it."""
        return self.layout.num_layers // 2

    def group_of(self, layer: int) -> Group:
        return self.layout.groups[self.layout.group_of(layer)]

    def at(self, layer: int, role: str | None = None) -> Place:
        return Place((self.layout.group_of(layer),), layer, role)

    # Nodes

    def node(self, name: str) -> ir.Node:
        return next(node for node in self.graph if node.name == name)

    def attention(self, layer: int) -> ir.Node:
        return next(node for node in self.graph if node.metadata_props.get(LAYER) == str(layer))

    def is_fused(self, layer: int) -> bool:
        return self.attention(layer).op_type == FUSED

    def reads(self, layer: int) -> tuple[int, int]:
        """The slots of a layer's attention node that a sharer's cache comes in by."""
        return (3, 4) if self.is_fused(layer) else (1, 2)

    def writes(self, group: Group) -> list[tuple[ir.Node, int]]:
        """The node and slot by which new keys, and new values, enter a group's cache."""
        owner = self.attention(group.owner)
        if owner.op_type == FUSED:
            return [(owner, 1), (owner, 2)]
        return [(present.producer(), 1) for present in owner.inputs[1:3]]

    def rope_gathers(self) -> list[ir.Node]:
        return [
            node
            for node in self.graph
            if node.op_type == "Gather" and str(node.inputs[0].name).startswith("model.rope_")
        ]

    def rotation(self, node: ir.Node, slot: int) -> ir.Node:
        """The RotaryEmbedding that an input comes from."""
        rotary = node.inputs[slot].producer()
        assert rotary is not None and rotary.op_type == "RotaryEmbedding", rotary
        return rotary

    def residuals(self, layer: int) -> tuple[ir.Node, ir.Node]:
        """The additions around attention and around the MLP: (stream, branch) are their inputs."""
        return self.node(f"layers.{layer}/Add"), self.node(f"layers.{layer}/Add_1")

    def norms(self, part: str) -> list[ir.Node]:
        """RMSNormalization nodes of modules whose name ends so, in execution order."""
        return [
            node
            for node in self.graph
            if node.op_type == "RMSNormalization" and f"{part}/" in str(node.name)
        ]

    # Edits

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A new node's output, with the shape and dtype of `like`."""
        self._made += 1
        node = ir.node(op_type, inputs, attributes or {}, name=f"mutant/{self._made}/{op_type}")
        value = node.outputs[0]
        value.name = node.name
        kind = dtype or (like.dtype if like is not None else None)
        value.type = None if kind is None else ir.TensorType(kind)
        self.graph.append(node)
        return value

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        array = np.array(value, dtype)
        self._made += 1
        name = f"mutant/{self._made}/constant"
        return named_constant(self.graph, array, name)

    def wrap(self, node: ir.Node, slot: int, op_type: str, *others: ir.Value, **attributes: Any):
        """Put a node between a node and one of its inputs."""
        old = node.inputs[slot]
        node.replace_input_with(slot, self.op(op_type, [old, *others], attributes, like=old))

    def follow(self, value: ir.Value, op_type: str, *others: ir.Value, **attributes: Any):
        """Put a node between a value and all who read it."""
        consumers = list(value.uses())
        new = self.op(op_type, [value, *others], attributes, like=value)
        for node, slot in consumers:
            node.replace_input_with(slot, new)

    def through(self, node: ir.Node, slot: int, dtype: ir.DataType) -> None:
        """Round one input of a node to a dtype and back."""
        old = node.inputs[slot]
        small = self.op("Cast", [old], {"to": int(dtype)}, dtype=dtype)
        node.replace_input_with(slot, self.op("Cast", [small], {"to": int(old.dtype)}, like=old))

    def permute_heads(self, value: ir.Value, heads: int, order: Sequence[int]) -> ir.Value:
        """Heads of [B, S, H * D] or [B, H, S, D] in another order."""
        index = self.constant(list(order))
        if value.shape is not None and len(value.shape) == 4:
            return self.op("Gather", [value, index], {"axis": 1}, like=value)
        split = self.op("Reshape", [value, self.constant([0, 0, heads, -1])], like=value)
        moved = self.op("Gather", [split, index], {"axis": 2}, like=value)
        return self.op("Reshape", [moved, self.constant([0, 0, -1])], like=value)

    # Weights

    def weight(self, name: str) -> NDArray[Any]:
        """A copy of a weight's values; layer weights go by `3.mlp.up_proj.weight`.

        Of a quantised one, what it stands for.
        """
        full = self._full_name(name)
        if full in self.graph.initializers:
            return self.part(full)
        packed, scales = self.part(full + PACKED), self.part(full + SCALES)
        columns = self._product_with(full).attributes.get_int("K")
        return self._how(full).unpack(packed, scales, columns)

    def set_weight(self, name: str, array: NDArray[Any]) -> None:
        full = self._full_name(name)
        if full in self.graph.initializers:
            self.set_part(full, array)
            return
        packed, scales = self._how(full).pack(array.astype(np.float32))
        self.set_part(full + PACKED, packed)
        self.set_part(full + SCALES, scales)

    def part(self, name: str) -> NDArray[Any]:
        """A copy of an initialiser's values."""
        return self.graph.initializers[name].const_value.numpy().copy()

    def set_part(self, name: str, array: NDArray[Any]) -> None:
        value = self.graph.initializers[name]
        array = np.ascontiguousarray(array.astype(value.dtype.numpy()))
        value.const_value = ir.tensor(array, name=value.name)
        value.shape = ir.Shape(array.shape)

    def _how(self, full: str) -> Quantization:
        assert self.bundle.quantization is not None
        return self.bundle.quantization.of_weight(full)

    def _product_with(self, full: str) -> ir.Node:
        (use, *_) = self.graph.initializers[full + PACKED].uses()
        return use[0]

    def product(self, scope: str) -> ir.Node:
        """The product with a Linear's weight: MatMul, or MatMulNBits of a quantised one."""
        names = (f"{scope}/MatMul", f"{scope}/MatMulNBits")
        return next(node for node in self.graph if node.name in names)

    @staticmethod
    def _full_name(name: str) -> str:
        return f"model.layers.{name}" if name[0].isdigit() else name


Kind = Callable[[Subject], Place]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A kind of export bug. `apply` commits it and says where the gate must find it."""

    name: str
    about: str
    apply: Kind
    applies: Callable[[Subject], bool]
    invisible: Callable[[Subject], str | None]  # why no measurement can see it in that bundle


MUTANTS: dict[str, Mutant] = {}  # filled by importing the modules of kinds; see mutants.py


def always(_subject: Subject) -> bool:
    return True


def visible(_subject: Subject) -> None:
    return None


def mutant(
    applies: Callable[[Subject], bool] = always,
    *,
    invisible: Callable[[Subject], str | None] = visible,
) -> Callable[[Kind], Kind]:
    """Register a function as a kind, under its own name; its docstring says what bug it is."""

    def register(kind: Kind) -> Kind:
        name = kind.__name__
        assert name not in MUTANTS and kind.__doc__, name
        MUTANTS[name] = Mutant(name, kind.__doc__, kind, applies, invisible)
        return kind

    return register


# Predicates


def in_float32(s: Subject) -> bool:
    return s.bundle.dtype == "float32" and s.bundle.quantization is None


def quantized(s: Subject) -> bool:
    return s.bundle.quantization is not None


def plain(s: Subject) -> bool:
    """Weights are in the graph as they are."""
    return s.bundle.quantization is None


def drowned(s: Subject) -> str | None:
    """For errors no larger than what a coarser arithmetic makes of the same tensors by itself."""
    return None if in_float32(s) else f"smaller than what {s.bundle.arithmetic} rounds off itself"


def several_groups(s: Subject) -> bool:
    return s.layout.num_groups > 1


def has_window(s: Subject) -> bool:
    return any(s.layout.window)


def has_qk_norm(s: Subject) -> bool:
    return s.spec.qk_norm


def has_bias(s: Subject) -> bool:
    return s.spec.attention_bias


def rotates(s: Subject) -> bool:
    """RoPE is one operator: in float32, and wherever ONNX Runtime computes in 16 bits."""
    return any(node.op_type == "RotaryEmbedding" for node in s.graph)


def standard(s: Subject) -> bool:
    """Some group's attention is the standard operator."""
    return not s.is_fused(s.sharer)


def fused(s: Subject) -> bool:
    return s.is_fused(s.sharer)
