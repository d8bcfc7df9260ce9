"""Our own operators in a graph for GPUs, wherever a layer is of the plain kind that they compute.

    n = RMSNormalization(h); q, k, v = Linears(n); RotaryEmbedding; Attention over TensorScatter
        ->  ClaLinear(h, Wq | Wk | Wv, norm), ClaRotateAppend, ClaAttention
    h + Linear(x)                          ->  ClaLinear(x, W, residual=h)
    silu(Linear(n)) * Linear(n)            ->  ClaLinear(h, Wgate | Wup, norm, gated=1)
    Linear(GatherND(RMSNormalization(h)))  ->  ClaLinear(GatherND(h), W, norm)

`|` is a Concat of initialisers, which ONNX Runtime folds when it opens the file. What does not
match, such as norms of queries and keys, or biases, stays as it was, for another lowering. Both
kernels and their launch are described in `plugin/decode_ops.cu` and `plugin/host_ops.c`.
"""

from collections.abc import Sequence

import onnx_ir as ir

from cla_export.graph_names import OWN_DOMAINS
from cla_export.layout import Group, KVLayout
from cla_export.lower import cla_attention, onnxruntime_cuda
from cla_export.lower.fuse_rounded_rotary import fuse_rounded_rotary
from cla_export.lower.linears import linear_weight
from cla_export.lower.pack_heads import packed, replace_unpacked
from cla_export.plugin.contract import MAX_HEAD_DIM
from cla_export.rewrite.builder import Builder
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.thread_caches import GROUP
from cla_export.rewrite.values import attention_nodes, heads_and_dim, producer

_DTYPES = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_CHUNK = 8  # numbers of a load: products are over multiples of it


def lower(model: ir.Model, layout: KVLayout) -> list[tuple[str, str]]:
    """Our operators, and those of the other graph for GPUs for what is left."""
    fuse_rounded_rotary(model)
    done = use_cuda_operators(model, layout)
    if not done:
        return onnxruntime_cuda.lower(model, layout)
    onnxruntime_cuda.lower_the_rest(model)
    return [("ClaAttention", "reads each cached key once for all its query heads")] * len(
        layout.groups
    )


def use_cuda_operators(model: ir.Model, layout: KVLayout) -> bool:
    """Rewrite what matches in a canonical graph; whether attention did, of all groups or none."""
    graph = model.graph
    dtype = next(value.dtype for value in graph.inputs if value.name == "past_key_values.0.key")
    if dtype not in _DTYPES:
        return False
    rewriter = _Rewriter(model, OWN_DOMAINS[_DTYPES[dtype]])
    attentions = attention_nodes(graph)
    groups = [(group, [attentions[layer] for layer in group.layers]) for group in layout.groups]
    done = all(rewriter.matches(group, nodes) for group, nodes in groups)
    for group, nodes in groups if done else []:
        rewriter.attention(group, nodes)
    rewriter.products()
    graph.sort()
    drop_unused(model)
    if rewriter.made:
        model.opset_imports[rewriter.domain] = 1
    return done


class _Rewriter:
    def __init__(self, model: ir.Model, domain: str) -> None:
        self.graph, self.domain, self.made = model.graph, domain, 0
        self._build = Builder(model.graph)
        self._frontiers: dict[ir.Value, ir.Value] = {}

    def matches(self, group: Group, nodes: list[ir.Node]) -> bool:
        """Whether all of a group's layers are of the plain kind."""
        if not group.head_dim <= MAX_HEAD_DIM or group.head_dim % _CHUNK:
            return False
        return all(self._projections(node, owner=not i) for i, node in enumerate(nodes))

    def attention(self, group: Group, nodes: list[ir.Node]) -> None:
        """Rewrite a group's layers, which match."""
        presents: list[ir.Value] = []
        for i, node in enumerate(nodes):
            found = self._projections(node, owner=not i)
            assert found is not None
            h, norm, weights, rotary, epsilon = found
            qkv = self._linear(node, h, weights, norm, None, epsilon, "attn/qkv_proj")
            presents = self._attend(group, node, qkv, rotary, presents)

    def products(self) -> None:
        """Residuals, gated products and the head."""
        for node in list(self.graph):
            if node.op_type == "Mul":
                self._gated(node)
        for node in list(self.graph):
            if node.op_type == "Add":
                self._residual(node)
        for node in list(self.graph):
            self._head(node)

    def _projections(
        self, node: ir.Node, *, owner: bool
    ) -> tuple[ir.Value, ir.Value, list[ir.Value], ir.Node, float] | None:
        """What makes a layer's q (k, v): h, norm weight, weights, q's rotation, epsilon."""
        query = node.inputs[0]
        assert query is not None
        values = [query]
        if owner:
            for present in node.inputs[1:3]:
                scatter = producer(present, "TensorScatter")
                if scatter is None or scatter.inputs[1] is None:
                    return None
                values.append(scatter.inputs[1])
        plain = [packed(self._build, value) for value in values]
        rotaries = [producer(value, "RotaryEmbedding") for value in plain[:2]]
        if any(r is None or not _rotates_halves(r) for r in rotaries):
            return None
        sources = [r.inputs[0] for r in rotaries if r is not None] + plain[2:]
        products = [producer(value, "MatMul") for value in sources]
        weights = [None if p is None else linear_weight(p) for p in products]
        xs = {id(p.inputs[0]) for p in products if p is not None}
        if any(w is None for w in weights) or len(xs) != 1:
            return None
        assert products[0] is not None
        normed = producer(products[0].inputs[0], "RMSNormalization")
        if normed is None or normed.inputs[0] is None or normed.inputs[1] is None:
            return None
        rotary = rotaries[0]
        assert rotary is not None
        if _table(rotary.inputs[1]) is None or _table(rotary.inputs[2]) is None:
            return None
        epsilon = normed.attributes.get_float("epsilon", 1e-5)
        kept = [w for w in weights if w is not None]
        return normed.inputs[0], normed.inputs[1], kept, rotary, epsilon

    def _attend(
        self,
        group: Group,
        node: ir.Node,
        qkv: ir.Value,
        rotary: ir.Node,
        presents: list[ir.Value],
    ) -> list[ir.Value]:
        """Rotation, cache and attention of one layer; returns the group's presents."""
        query = node.inputs[0]
        assert query is not None
        heads, dim = heads_and_dim(query, node, "query")
        shape = ir.Shape(["batch", "sequence", heads * dim])
        starts = next(value for value in self.graph.inputs if value.name == "write_indices")
        tables = [_table(rotary.inputs[1]), _table(rotary.inputs[2])]
        name = str(node.name).removesuffix("/Attention")
        q = ir.Value(name=f"{name}/rotated", type=query.type, shape=shape)
        inputs, outputs, kind = [qkv, *tables, starts], [q], "ClaRotate"
        if not presents:
            kind = "ClaRotateAppend"
            for value in node.inputs[1:3]:
                scatter = producer(value, "TensorScatter")
                assert scatter is not None and value is not None
                inputs.append(scatter.inputs[0])
                presents = [*presents, cla_attention.moved(self.graph, value)]
            outputs += presents
        metadata = {**node.metadata_props, GROUP: str(group.index)}
        self._node(kind, inputs, {}, outputs, f"{name}/{kind}", {GROUP: str(group.index)})
        lengths = cla_attention.frontier(self._build, node.inputs[6], self._frontiers)
        y = ir.Value(name=f"{name}/ClaAttention", type=query.type, shape=shape)
        attributes = cla_attention.attributes(node, group, dim)
        self._node("ClaAttention", [q, *presents, lengths], attributes, [y], str(y.name), metadata)
        replace_unpacked(self._build, node.outputs[0], y, heads, dim)
        return presents

    def _gated(self, node: ir.Node) -> None:
        """silu(g) * u, however its factors are ordered."""
        for silu, up in (node.inputs, reversed(node.inputs)):
            inner = producer(silu, "Mul")
            product = producer(up, "MatMul")
            if inner is None or product is None:
                continue
            for gate, sigmoid in (inner.inputs, reversed(inner.inputs)):
                activation, other = producer(sigmoid, "Sigmoid"), producer(gate, "MatMul")
                if activation is None or other is None or activation.inputs[0] is not gate:
                    continue
                normed = producer(product.inputs[0], "RMSNormalization")
                weights = [linear_weight(other), linear_weight(product)]
                if normed is None or other.inputs[0] is not product.inputs[0] or None in weights:
                    continue
                h, norm = normed.inputs[:2]
                assert h is not None
                epsilon = normed.attributes.get_float("epsilon", 1e-5)
                y = self._linear(
                    node, h, [w for w in weights if w is not None], norm, None, epsilon,
                    "mlp/gate_up_proj", gated=True,
                )  # fmt: skip
                node.outputs[0].replace_all_uses_with(y)
                return

    def _residual(self, node: ir.Node) -> None:
        for residual, branch in (node.inputs, reversed(node.inputs)):
            product = producer(branch, "MatMul")
            weight = None if product is None else linear_weight(product)
            if product is None or weight is None or residual is None or branch is None:
                continue
            if residual.is_initializer() or residual.shape != branch.shape:
                continue  # a bias
            if len(list(branch.uses())) != 1 or branch.is_graph_output():
                continue
            x = product.inputs[0]
            assert x is not None
            name = str(product.name).split("/", 1)[-1].removesuffix("/MatMul")
            y = self._linear(product, x, [weight], None, residual, 0.0, name)
            old = node.outputs[0]
            old.replace_all_uses_with(y)
            return

    def _head(self, node: ir.Node) -> None:
        weight = linear_weight(node)
        gather = node.inputs[0].producer() if weight is not None and node.inputs[0] else None
        if gather is None or gather.op_type not in ("GatherND", "Slice"):
            return
        normed = producer(gather.inputs[0], "RMSNormalization")
        if weight is None or normed is None or normed.inputs[0] is None:
            return
        h, norm = normed.inputs[:2]
        gather.replace_input_with(0, h)
        epsilon = normed.attributes.get_float("epsilon", 1e-5)
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        y = self._linear(node, x, [weight], norm, None, epsilon, "")
        if old.is_graph_output():
            self.graph.outputs[self.graph.outputs.index(old)] = y
        old.replace_all_uses_with(y)
        y.name, old.name = old.name, f"{old.name}/unused"

    def _linear(
        self,
        near: ir.Node,
        x: ir.Value,
        weights: Sequence[ir.Value],
        norm: ir.Value | None,
        residual: ir.Value | None,
        epsilon: float,
        name: str,
        *,
        gated: bool = False,
    ) -> ir.Value:
        """ClaLinear over weights one after another; named in the scope of `near`."""
        scope = str(near.name).split("/")[0]
        path = f"{scope}/{name}" if name else scope
        weight, dtype = weights[0], weights[0].dtype
        rows = sum(int(w.shape.numpy()[0]) for w in weights if w.shape is not None)
        if len(weights) > 1:
            assert weight.shape is not None
            columns = weight.shape.numpy()[1]
            weight = self._build.op(
                "Concat",
                list(weights),
                {"axis": 0},
                shape=[rows, columns],
                dtype=dtype,
                name=f"{path}/Concat",
            )
        assert x.shape is not None
        y = ir.Value(
            name=f"{path}/ClaLinear",
            type=x.type,
            shape=ir.Shape([*list(x.shape)[:-1], rows // (2 if gated else 1)]),
        )
        attributes: dict[str, int | float] = {"gated": int(gated), "epsilon": epsilon}
        inputs: list[ir.Value | None] = [x, weight, norm, residual]
        self._node("ClaLinear", inputs, attributes, [y], str(y.name), dict(near.metadata_props))
        return y

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int | float],
        outputs: Sequence[ir.Value],
        name: str,
        metadata: dict[str, str],
    ) -> None:
        self.graph.append(
            ir.node(
                op_type,
                list(inputs),
                {**attributes, "node": self.made},
                outputs=list(outputs),
                domain=self.domain,
                name=name,
                metadata_props=metadata,
            )
        )
        self.made += 1


def _rotates_halves(rotary: ir.Node | None) -> bool:
    return rotary is not None and not (
        rotary.attributes.get_int("interleaved", 0)
        or rotary.attributes.get_int("rotary_embedding_dim", 0)
    )


def _table(rows: ir.Value | None) -> ir.Value | None:
    """The float32 table [positions, D / 2] that a rotation's cosines or sines come from."""
    while rows is not None:
        node = rows.producer()
        if node is None:
            return None
        if node.op_type == "Gather":
            table = node.inputs[0]
            cast = producer(table, "Cast")  # all of it, rounded before it is read
            table = table if cast is None else cast.inputs[0]
            float32 = table is not None and table.dtype == ir.DataType.FLOAT
            return table if float32 and table is not None and table.is_initializer() else None
        if node.op_type not in ("Cast", "Unsqueeze", "Squeeze", "Reshape"):
            return None
        rows = node.inputs[0]
    return None
