"""Small graphs that TensorRT gets wrong, one for each rule of its lint, and right ones beside them.

Each has one group: a cache of 32 places, 2 kv heads, and one or two layers that read it.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
HEADS, DIM, PLACES = 4, 32, 32


class Graph:
    """Builds one; every method that changes it returns it."""

    def __init__(self, *, dim: int = DIM, dtype: int = HALF, places: int | str = PLACES) -> None:
        self.dim, self.dtype, self.places = dim, dtype, places
        self.nodes: list[onnx.NodeProto] = []
        self.opset = 24
        self.inputs = [
            self.value("q", HEADS, "S"),
            self.value("k", 2, "S"),
            self.value("v", 2, "S"),
        ]
        self.inputs += [self.vector("write_indices"), self.vector("kv_lengths")]
        self.outputs: list[onnx.ValueInfoProto] = []
        self.inner: list[onnx.ValueInfoProto] = []  # shapes that the graph states

    def value(self, name: str, heads: int, length: Any, dtype: int | None = None):
        return helper.make_tensor_value_info(
            name, dtype or self.dtype, ["B", heads, length, self.dim]
        )

    def vector(self, name: str, dtype: int = TensorProto.INT32):
        return helper.make_tensor_value_info(name, dtype, ["B"])

    def cache(self, *, present_is_output: bool = True, past: str = "past", **more: Any) -> "Graph":
        for part, new in (("key", "k"), ("value", "v")):
            if past == "past":
                self.inputs.append(self.value(f"past.{part}", 2, self.places))
            self.nodes.append(
                helper.make_node(
                    "TRT_KVCacheUpdate",
                    [f"{past}.{part}", new, "write_indices"],
                    [f"present.{part}"],
                    name=f"update.{part}",
                    domain="trt",
                    **more,
                )
            )
            if present_is_output:
                self.outputs.append(self.value(f"present.{part}", 2, self.places))
        return self

    def scattered(self) -> "Graph":
        """The standard operator in place of the dialect's."""
        self.inputs[3] = self.vector("write_indices", TensorProto.INT64)
        for part, new in (("key", "k"), ("value", "v")):
            self.inputs.append(self.value(f"past.{part}", 2, self.places))
            inputs = [f"past.{part}", new, "write_indices"]
            outputs = [f"present.{part}"]
            self.nodes.append(
                helper.make_node("TensorScatter", inputs, outputs, name=f"update.{part}", axis=2)
            )
            self.outputs.append(self.value(f"present.{part}", 2, self.places))
        return self

    def reader(
        self, op: str = "TRT_Attention", *, extra: tuple[str, ...] | None = None,
        keys: str = "present", query: str = "q", outputs: int = 1, **attributes: Any,
    ) -> "Graph":  # fmt: skip
        dialect = op == "TRT_Attention"
        if dialect and extra is None:
            extra = ("", "", "kv_lengths")
            attributes.setdefault("causal_kind", "lower_right")
        number = sum(node.op_type in ("Attention", "TRT_Attention") for node in self.nodes)
        names = [f"y{number}", *(f"y{number}.{i}" for i in range(1, outputs))]
        inputs = [query, f"{keys}.key" if keys != "new" else "k"]
        inputs.append(f"{keys}.value" if keys != "new" else "v")
        self.nodes.append(
            helper.make_node(
                op,
                [*inputs, *(extra or ())],
                names,
                name=f"attention.{number}",
                domain=attributes.pop("domain", "trt" if dialect else ""),
                **attributes,
            )
        )
        self.outputs.append(self.value(names[0], HEADS, "S"))
        return self

    def node(self, op: str, inputs: list[str], outputs: list[str], **more: Any) -> "Graph":
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}.extra", **more))
        return self

    def constant(self, name: str, value: float, dims: tuple[int, ...] = ()) -> "Graph":
        count = 1 if not dims else int(np.prod(dims))
        tensor = helper.make_tensor(name, self.dtype, dims, [value] * count)
        self.nodes.append(helper.make_node("Constant", [], [name], name=f"{name}.c", value=tensor))
        return self

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "graph", self.inputs, self.outputs, value_info=self.inner
        )
        opsets = [("", self.opset), ("trt", 1), ("com.microsoft", 1)]
        imports = [helper.make_opsetid(*pair) for pair in opsets]
        return helper.make_model(graph, opset_imports=imports, ir_version=11)


def right() -> Graph:
    return Graph().cache().reader().reader()


def _chained() -> Graph:
    graph = Graph().cache().reader()
    for part in ("key", "value"):
        graph.nodes.append(
            helper.make_node(
                "TRT_KVCacheUpdate",
                [f"present.{part}", "k", "write_indices"],
                [f"again.{part}"],
                name=f"again.{part}",
                domain="trt",
            )
        )
        graph.outputs.append(graph.value(f"again.{part}", 2, PLACES))
    return graph


def _masked() -> Graph:
    graph = Graph().cache()
    mask = helper.make_tensor_value_info("mask", TensorProto.BOOL, ["B", 1, "S", PLACES])
    graph.inputs.append(mask)
    return graph.reader(extra=("mask", "", "kv_lengths"), causal_kind="lower_right")


def _past_read() -> Graph:
    graph = Graph().cache()
    return graph.reader().reader(keys="past")


def _two_readers(query: str, op: str = "Identity", mask: bool = True, **how: Any) -> Graph:
    """Two standard nodes over one cache; the second reads it through `op`, and asks `query`."""
    graph = Graph().scattered()
    graph.inputs.append(graph.value("q2", HEADS, "S"))
    kind = TensorProto.BOOL
    graph.inputs.append(helper.make_tensor_value_info("mask", kind, ["B", 1, "S", PLACES]))
    for part in ("key", "value"):
        graph.node(op, [f"present.{part}"], [f"seen.{part}"])
    how["extra"] = ("mask",) if mask else ()
    return graph.reader("Attention", **how).reader("Attention", keys="seen", query=query, **how)


def other_queries() -> Graph:
    """Not what it looks like: scaled, but each node has a query and a key of its own."""
    return _two_readers("q2", "Neg", scale=0.25)


def _turned(dims_lie: bool) -> Graph:
    """A causal reader of a cache that was turned around twice, whose shape says otherwise."""
    graph = Graph().scattered()
    for part in ("key", "value"):
        graph.node("Transpose", [f"present.{part}"], [f"turned.{part}"], perm=[0, 1, 3, 2])
        graph.node("Transpose", [f"turned.{part}"], [f"back.{part}"], perm=[0, 1, 3, 2])
        if dims_lie:
            graph.inner.append(graph.value(f"back.{part}", 2, "S"))
    return graph.reader("Attention", keys="back", scale=1.0, is_causal=1)


def _glued() -> Graph:
    """The cache of a plain export: past and new keys in one Concat, no update."""
    graph = Graph()
    for part, new in (("key", "k"), ("value", "v")):
        graph.inputs.append(graph.value(f"past.{part}", 2, "P"))
        graph.node("Concat", [f"past.{part}", new], [f"present.{part}"], axis=2)
        graph.node("Mul", [f"present.{part}", "one"], [f"mine.{part}"])
        graph.inner.append(graph.value(f"mine.{part}", 2, "S"))
    graph.inputs.append(helper.make_tensor_value_info("one", HALF, []))
    return graph.reader("Attention", keys="mine", scale=1.0, is_causal=1)


def _past_into_another() -> Graph:
    graph = Graph().cache().reader()
    graph.inputs.append(graph.value("other", 2, PLACES))
    inputs = ["other", "past.key", "write_indices"]
    graph.node("TRT_KVCacheUpdate", inputs, ["other.present"], domain="trt")
    graph.outputs.append(graph.value("other.present", 2, PLACES))
    return graph


def _multiplied(*queries: str, op: str = "Mul", key: bool = True, written: int = 1) -> Graph:
    """Dialect readers; the key, or the query they ask, is a product with one number."""
    graph = Graph().cache().constant("number", 0.42)
    graph.inputs.append(graph.value("q2", HEADS, "S"))
    of, heads = ("present.key", 2) if key else ("q", HEADS)
    for copy in range(written):
        graph.node(op, [of, "number"], [f"product{copy}.key"])
        graph.inner.append(graph.value(f"product{copy}.key", heads, PLACES if key else "S"))
    for index, query in enumerate(queries):
        product = f"product{index % written}"
        if not key:
            graph.reader(query=f"{product}.key")
            continue
        graph.node("Identity", ["present.value"], [f"{product}.value.{index}"])
        graph.reader(query=query, keys=product)
        graph.nodes[-1].input[2] = f"{product}.value.{index}"
    return graph


def _latent() -> Graph:
    graph = Graph().cache().constant("weight", 0.1, (DIM, DIM))
    graph.node("MatMul", ["present.key", "weight"], ["latent.key"])
    graph.node("MatMul", ["present.value", "weight"], ["latent.value"])
    return graph.reader(extra=(), keys="latent", causal_kind="lower_right")


def _branched() -> Graph:
    graph = Graph().cache()
    graph.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    for part in ("key", "value"):
        branches = [
            helper.make_graph(
                [helper.make_node(op, [f"present.{part}"], [f"{op}.{part}"])],
                op,
                [],
                [graph.value(f"{op}.{part}", 2, PLACES)],
            )
            for op in ("Identity", "Neg")
        ]
        how = {"then_branch": branches[0], "else_branch": branches[1]}
        graph.node("If", ["flag"], [f"chosen.{part}"], **how)
    return graph.reader(extra=(), keys="chosen", causal_kind="lower_right")


def _one_column() -> Graph:
    graph = Graph().scattered()
    graph.inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["B", 1, "S", 1]))
    return graph.reader("Attention", extra=("mask",), scale=1.0)


def _windowed() -> Graph:
    graph = Graph().scattered()
    graph.opset = 25
    kind = TensorProto.BOOL
    graph.inputs.append(helper.make_tensor_value_info("mask", kind, ["B", 1, "S", PLACES]))
    return graph.reader("Attention", extra=("mask",), scale=1.0, left_window_size=4)


def _through(*ops: str) -> Graph:
    """Two standard nodes that scale one key; the second reads it through nodes that do nothing."""
    graph = _two_readers("q2", scale=0.25)
    node = next(node for node in graph.nodes if "seen.key" in node.output)
    at, before = list(graph.nodes).index(node), "present.key"
    graph.nodes.remove(node)
    for number, op in enumerate(ops):
        after = "seen.key" if number == len(ops) - 1 else f"seen.{number}"
        how: dict[str, Any] = {"perm": [0, 1, 3, 2]} if op == "Transpose" else {}
        how |= {"axis": 2} if op == "Concat" else {}
        how |= {"to": FLOAT if number == 0 else HALF} if op == "Cast" else {}
        graph.nodes.insert(at + number, helper.make_node(op, [before], [after], name=after, **how))
        before = after
    return graph


def _upper_left_in_the_dialect() -> Graph:
    extra = ("", "", "kv_lengths")
    return Graph().cache().reader(extra=extra, causal_kind="upper_left")


def rotated() -> Graph:
    """A prompt alone, with packed heads and angles from outside: nothing of an earlier call."""
    graph = Graph().constant("weight", 0.1, (64, HEADS * 64))
    graph.inputs = [helper.make_tensor_value_info("hidden", HALF, ["B", "S", 64])]
    graph.inputs += [
        helper.make_tensor_value_info(name, HALF, ["B", "S", 32]) for name in ("cos", "sin")
    ]
    for name in ("q", "k", "v"):
        graph.node("MatMul", ["hidden", "weight"], [f"{name}.flat"])
        packed = helper.make_tensor_value_info(f"{name}.flat", HALF, ["B", "S", HEADS * 64])
        graph.inner.append(packed)
        turn = ["RotaryEmbedding", [f"{name}.flat", "cos", "sin"], [name]]
        graph.node(*(turn if name != "v" else ["Identity", ["v.flat"], ["v"]]),
                   **({"num_heads": HEADS} if name != "v" else {}))  # fmt: skip
        graph.inner.append(helper.make_tensor_value_info(name, HALF, ["B", "S", HEADS * 64]))
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    graph.reader("Attention", keys="new", scale=1.0, is_causal=1, **heads)
    graph.outputs = [helper.make_tensor_value_info("y0", HALF, ["B", "S", HEADS * 64])]
    return graph


def packed() -> Graph:
    """Query, key and value as parts of one product, scaled by the node: three tensors, not one."""
    width = (HEADS + 4) * DIM
    graph = Graph().constant("weight", 0.1, (64, width))
    graph.inputs = [helper.make_tensor_value_info("hidden", HALF, ["B", "S", 64])]
    graph.node("MatMul", ["hidden", "weight"], ["packed"])
    graph.inner.append(helper.make_tensor_value_info("packed", HALF, ["B", "S", width]))
    at = 0
    for name, heads in (("q", HEADS), ("k", 2), ("v", 2)):
        for what, number in (("start", at), ("end", at + heads * DIM), ("axis", 2)):
            tensor = helper.make_tensor(f"{name}.{what}", TensorProto.INT64, [1], [number])
            graph.node("Constant", [], [f"{name}.{what}"], value=tensor)
        graph.node("Slice", ["packed", f"{name}.start", f"{name}.end", f"{name}.axis"], [name])
        graph.inner.append(helper.make_tensor_value_info(name, HALF, ["B", "S", heads * DIM]))
        at += heads * DIM
    graph.reader("Attention", keys="new", scale=0.25, q_num_heads=HEADS, kv_num_heads=2)
    graph.outputs = [helper.make_tensor_value_info("y0", HALF, ["B", "S", HEADS * DIM])]
    return graph


def _sliced_whole() -> Graph:
    """Two readers that scale one key, which the second takes whole out of a Slice."""
    graph = _through("Identity")
    node = next(node for node in graph.nodes if "seen.key" in node.output)
    at = list(graph.nodes).index(node)
    for what, number in (("start", 0), ("end", 2**31 - 1), ("axis", 2)):
        tensor = helper.make_tensor(what, TensorProto.INT64, [1], [number])
        graph.nodes.insert(at, helper.make_node("Constant", [], [what], name=what, value=tensor))
    node.op_type = "Slice"
    node.input.extend(["start", "end", "axis"])
    return graph


def _untyped() -> Graph:
    graph = Graph(dtype=FLOAT).cache().node("Neg", ["q"], ["asked"])
    return graph.reader(query="asked")


# rule -> graph, and what becomes of it without the lint: "crash", "refused", "built" (wrong, then),
# or "unclear" where versions differ
WRONG: dict[str, tuple[Graph, str]] = {
    "attributes_dropped": (Graph().cache().reader(scale=0.25), "built"),
    "lengths_ignored": (
        Graph().scattered().reader("Attention", extra=("", "", "", "n"), scale=1.0, is_causal=1),
        "built",
    ),
    "lengths_missing": (
        Graph().cache().reader(extra=(), causal_kind="lower_right"),
        "built",
    ),
    "upper_left": (Graph().scattered().reader("Attention", scale=1.0, is_causal=1), "built"),
    "mask_stretched": (_one_column(), "built"),
    "scaled_twice": (_two_readers("q2", scale=0.25), "crash"),
    "outputs": (Graph().reader("Attention", keys="new", outputs=2, scale=1.0), "refused"),
    "softcap": (Graph().reader("Attention", keys="new", softcap=30.0, scale=1.0), "refused"),
    "not_fused": (Graph(dtype=FLOAT).cache().reader(), "refused"),
    "mask_and_causal": (_masked(), "refused"),
    "cache_length": (Graph(places="C").cache().reader(), "refused"),
    "cache_place": (_chained(), "refused"),
    "cache_mode": (Graph().cache(mode="circular").reader(), "refused"),
    "past_read": (_past_read(), "built"),
    "foreign_operators": (
        Graph().cache().reader().node(
            "GroupQueryAttention", ["q", "k", "v"], ["z"], domain="com.microsoft"
        ),
        "refused",
    ),
}  # fmt: skip
WRONG["lengths_ignored"][0].inputs.append(
    helper.make_tensor_value_info("n", TensorProto.INT64, ["B"])
)
CRASHES: dict[str, Graph] = {  # more ways to be scaled twice; each kills the builder
    "a key": _multiplied("q", "q2"),
    "a query": _multiplied("q", "q", key=False),
    "a quotient": _multiplied("q", "q2", op="Div"),
    "written twice": _multiplied("q", "q2", written=2),
    "turned there and back": _through("Transpose", "Transpose"),
    "through nothing": _through("Dropout", "Concat"),
    "cast there and back": _through("Cast", "Cast"),
    "sliced whole": _sliced_whole(),
}
VARIANTS: dict[str, Graph] = {  # more ways into a rule's arms
    "attributes_dropped: window": _windowed(),
    "attributes_dropped: type": Graph().cache().reader(softcap=30),
    "lengths_missing: latent": _latent(),
    "lengths_missing: branches": _branched(),
    "upper_left: dialect": _upper_left_in_the_dialect(),
    "upper_left: other domain": Graph().scattered().reader(
        "Attention", scale=1.0, is_causal=1, domain="trt"
    ),
    "not_fused: head dim": Graph(dim=320).cache().reader(),
    "cache_place: present inside": Graph().cache(present_is_output=False).reader(),
    "outputs: past": Graph().cache().reader(
        "Attention", extra=("", "past.key", "past.value"), keys="new", scale=1.0
    ),
    "softcap: dialect": Graph().cache().reader(softcap=30.0),
    "scaled_twice: one query": _two_readers("q", "Neg", scale=0.25),
    "scaled_twice: default scale": _two_readers("q2"),
    "lengths_missing: standard": _two_readers("q2", mask=False, scale=1.0),
    "lengths_missing: turned": _turned(dims_lie=False),
    "upper_left: a shape that lies": _turned(dims_lie=True),
    "upper_left: glued": _glued(),
    "past_read: into another cache": _past_into_another(),
    "not_fused: dtype unsaid": _untyped(),
    "upper_left: keys from a cache": Graph().cache().reader("Attention", scale=1.0, is_causal=1),
}  # fmt: skip
