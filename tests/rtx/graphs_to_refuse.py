"""Small graphs that TensorRT gets wrong, one for each rule of its lint, and right ones beside them.

Each has one group: a cache of 32 places, 2 kv heads, and one or two layers that read it.
"""

from typing import Any

import onnx
from onnx import TensorProto, helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
HEADS, DIM, PLACES = 4, 32, 32


class Graph:
    """Builds one; every method that changes it returns it."""

    def __init__(self, *, dim: int = DIM, dtype: int = HALF, places: int | str = PLACES) -> None:
        self.dim, self.dtype, self.places = dim, dtype, places
        self.nodes: list[onnx.NodeProto] = []
        self.inputs = [
            self.value("q", HEADS, "S"),
            self.value("k", 2, "S"),
            self.value("v", 2, "S"),
        ]
        self.inputs += [self.vector("write_indices"), self.vector("kv_lengths")]
        self.outputs: list[onnx.ValueInfoProto] = []

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
        keys: str = "present", outputs: int = 1, **attributes: Any,
    ) -> "Graph":  # fmt: skip
        dialect = op == "TRT_Attention"
        if dialect and extra is None:
            extra = ("", "", "kv_lengths")
            attributes.setdefault("causal_kind", "lower_right")
        number = sum(node.op_type in ("Attention", "TRT_Attention") for node in self.nodes)
        names = [f"y{number}", *(f"y{number}.{i}" for i in range(1, outputs))]
        inputs = ["q", f"{keys}.key" if keys != "new" else "k"]
        inputs.append(f"{keys}.value" if keys != "new" else "v")
        self.nodes.append(
            helper.make_node(
                op,
                [*inputs, *(extra or ())],
                names,
                name=f"attention.{number}",
                domain="trt" if dialect else "",
                **attributes,
            )
        )
        self.outputs.append(self.value(names[0], HEADS, "S"))
        return self

    def node(self, op: str, inputs: list[str], outputs: list[str], **more: Any) -> "Graph":
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}.extra", **more))
        return self

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs)
        opsets = [("", 24), ("trt", 1), ("com.microsoft", 1)]
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


# rule -> graph, and what becomes of it without the lint: "crash", "refused", "built" (wrong, then),
# or "unclear" where versions differ
WRONG: dict[str, tuple[Graph, str]] = {
    "lengths_ignored": (
        Graph().scattered().reader("Attention", extra=("", "", "", "n"), scale=1.0, is_causal=1),
        "built",
    ),
    "upper_left": (Graph().scattered().reader("Attention", scale=1.0, is_causal=1), "built"),
    "shared_keys_scaled": (
        Graph().scattered().reader("Attention", scale=0.25).reader("Attention", scale=0.25),
        "crash",
    ),
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
VARIANTS: dict[str, Graph] = {  # more ways into a rule's arms
    "not_fused: head dim": Graph(dim=320).cache().reader(),
    "cache_place: present inside": Graph().cache(present_is_output=False).reader(),
    "outputs: past": Graph().cache().reader(
        "Attention", extra=("", "past.key", "past.value"), keys="new", scale=1.0
    ),
    "softcap: dialect": Graph().cache().reader(softcap=30.0),
    "upper_left: keys from a cache": Graph().cache().reader("Attention", scale=1.0, is_causal=1),
}  # fmt: skip
