"""ONNX Runtime on a graph whose caches grow by Concat, as most exporters write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from random_model import Floats, Prompts, made_up

from cla_export.bundle import Bundle
from peers.peer import Peer


class ConcatPeer(Peer):
    """A graph that returns caches one token longer; they are bound as the next step's past.

    It has a cache for each layer, or for each group.
    """

    @staticmethod
    def prepare(bundle: Bundle, **options: bool) -> None:
        from peers.concat_graph import write_concat  # PyTorch, which a peer does not need

        write_concat(bundle, graph_path(bundle, **options), **options)

    def __init__(self, bundle: Bundle, threads: int, *, per_layer: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only, as the executor
        options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(bundle.folder)
        )
        self._session = onnxruntime.InferenceSession(
            graph_path(bundle, per_layer=per_layer).read_bytes(),
            options,
            providers=["CPUExecutionProvider"],
        )
        self._batch, self._layout = 0, bundle.layout
        self._groups = (  # of each cache
            [self._layout.group_of(layer) for layer in range(self._layout.num_layers)]
            if per_layer
            else range(self._layout.num_groups)
        )
        self._pasts: dict[str, Any] = {}  # `0.key` -> OrtValue

    def start(self, batch: int, capacity: int) -> None:  # noqa: ARG002
        self._batch = batch
        self.fill(0)

    def fill(self, context: int) -> None:
        self.free()
        for index, group in enumerate(self._groups):
            made = [row[2:] for row in made_up(self._layout, self._batch, context, group)]
            for part, rows in zip(("key", "value"), zip(*made, strict=True), strict=True):
                value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    [self._batch, *rows[0].shape], np.float32
                )
                value.update_inplace(np.stack(rows))
                self._pasts[f"{index}.{part}"] = value

    def rewind(self, context: int) -> None:
        self.fill(context)

    def prefill(self, rows: Prompts) -> Floats:
        return self._append(rows, 0)

    def decode(self, tokens: Sequence[int], length: int) -> Floats:
        return self._append(np.array(tokens, np.int64)[:, None], length)

    def free(self) -> None:
        self._pasts = {}

    def _append(self, rows: Prompts, held: int) -> Floats:
        binding = self._session.io_binding()
        starts = np.full(len(rows), held, np.int64)
        feeds = {
            "input_ids": rows,
            "write_indices": starts,
            "kv_lengths": starts + rows.shape[1],
            "logits_to_keep": np.array(1, np.int64),
        }
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(feeds[name]) for name in feeds}
        values |= {f"past_key_values.{name}": value for name, value in self._pasts.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *(f"present.{name}" for name in self._pasts)):
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        self._pasts = dict(zip(self._pasts, presents, strict=True))
        last: Floats = logits.numpy()[:, -1]
        return last


def graph_path(bundle: Bundle, *, per_layer: bool) -> Path:
    return bundle.folder.parent / f"concat_{'layers' if per_layer else 'groups'}.onnx"
