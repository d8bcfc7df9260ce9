"""ONNX Runtime's GroupQueryAttention on a GPU, many nodes in one CUDA graph, for benchmarks.

Needs onnxruntime-gpu; `import torch` comes first, so that its CUDA libraries are found.
"""

from collections.abc import Sequence
from itertools import pairwise

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from cla_export.engines.cuda_session import environment_variable

TYPES = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
OPSET, IR = 24, 11


def available() -> bool:
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


class GroupQueryAttentionNodes:
    """One decode step of a node for each cache: a group's owner, or one of its sharers.

    Args:
        q: [B, Hq, 1, D].
        caches: of each node, keys and values [B, Hkv, C, D], bound in place.
        lengths: int32 [B], tokens of each row once the step is done.
        sharer: read the cache as it is; else write the row's last key and value first, which here
            are those that the first cache holds there already.
        xqa: let the owner use ONNX Runtime's XQA kernel.
        repeat: how often the caches take their turns in one graph.
    """

    def __init__(
        self,
        q: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        lengths: Tensor,
        *,
        scale: float,
        sharer: bool,
        xqa: bool = True,
        repeat: int = 1,
    ) -> None:
        self.count = len(caches) * repeat
        batch, heads, _, dim = q.shape
        kv_heads, capacity = caches[0][0].shape[1:3]
        self._stream = torch.cuda.Stream()
        graph = _model(self.count, TYPES[q.dtype], heads, kv_heads, scale, sharer)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        provider = {
            "enable_cuda_graph": "1",
            "user_compute_stream": str(self._stream.cuda_stream),
        }
        with environment_variable("ORT_ENABLE_XQA", "1" if xqa else "0"):
            self._session = onnxruntime.InferenceSession(
                graph.SerializeToString(), options, [("CUDAExecutionProvider", provider)]
            )
        new = 0 if sharer else 1
        last = (lengths.long() - 1)[:, None, None, None].expand(-1, kv_heads, 1, dim)
        rows = [part.gather(2, last).transpose(1, 2).reshape(batch, 1, -1) for part in caches[0]]
        total = torch.tensor(capacity, dtype=torch.int32)
        self.y = torch.empty((batch, 1, heads * dim), dtype=q.dtype, device="cuda")
        others = torch.empty_like(self.y)
        self._kept = [q.reshape(batch, 1, -1).contiguous(), *rows, lengths - 1, total, others]
        self._binding = binding = self._session.io_binding()

        def bind(name: str, tensor: Tensor, shape: Sequence[int], *, out: bool = False) -> None:
            kind = TYPES.get(tensor.dtype, TensorProto.INT32)
            put = binding.bind_output if out else binding.bind_input
            put(name, tensor.device.type, 0, kind, list(shape), tensor.data_ptr())

        bind("q", self._kept[0], self.y.shape)
        for name, part in zip(("k", "v"), rows, strict=True):
            bind(name, part, (batch, new, kv_heads * dim))
        bind("lengths", self._kept[3], (batch,))
        bind("total", total, ())
        for node in range(self.count):
            bind(f"y.{node}", self.y if node == 0 else others, self.y.shape, out=True)
            for name, part in zip(("key", "value"), caches[node % len(caches)], strict=True):
                bind(f"past.{node}.{name}", part, part.shape)
                if not sharer:
                    bind(f"present.{node}.{name}", part, part.shape, out=True)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        for _ in range(3):  # ONNX Runtime captures in one of the first
            self.run()
        torch.cuda.synchronize()

    def run(self) -> None:
        """Queue all nodes: one launch of the captured graph."""
        self._session.run_with_iobinding(self._binding, self._options)

    def replay_ms(self, count: int) -> list[float]:
        """Milliseconds of each of so many replays."""
        with torch.cuda.stream(self._stream):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            events[0].record()
            for event in events[1:]:
                self.run()
                event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]


def _model(
    count: int, kind: int, heads: int, kv_heads: int, scale: float, sharer: bool
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    inputs = [value("q", kind, ["b", "s", "q"])]
    inputs += [value(name, kind, ["b", "n", "kv"]) for name in ("k", "v")]
    inputs += [value("lengths", TensorProto.INT32, ["b"]), value("total", TensorProto.INT32, [])]
    nodes, outputs = [], []
    cache = ["b", kv_heads, "c", "d"]
    for node in range(count):
        past = [f"past.{node}.{part}" for part in ("key", "value")]
        present = [] if sharer else [f"present.{node}.{part}" for part in ("key", "value")]
        inputs += [value(name, kind, cache) for name in past]
        outputs += [value(f"y.{node}", kind, ["b", "s", "q"])]
        outputs += [value(name, kind, cache) for name in present]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                ["q", "k", "v", *past, "lengths", "total"],
                [f"y.{node}", *present],
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=kv_heads,
                scale=scale,
            )
        )
    graph = helper.make_graph(nodes, "nodes", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR)
