"""onnxruntime-genai on the bundle's folder."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from random_model import Floats, Prompts, prompts

from cla_export.bundle import Bundle, write_json
from peers.peer import Peer, Refused

PIECE = 512  # tokens of a long prompt that it appends at once
LONGEST_BATCHED = 2048  # tokens of a prompt that it, which takes a batch's whole, has memory for


class GenaiPeer(Peer):
    """onnxruntime-genai. It cannot go back in a batch, so it goes on from round to round."""

    fills = False
    goes_on = True

    @staticmethod
    def prepare(bundle: Bundle, **options: bool) -> None:  # noqa: ARG004
        """The bundle's files once more, linked, of a model that no token of text ends."""
        folder = genai_folder(bundle)
        shutil.copytree(bundle.folder, folder, copy_function=os.link)
        path = folder / "genai_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model"].pop("eos_token_id", None)
        path.unlink()  # not the bundle's
        write_json(path, config)

    def __init__(self, bundle: Bundle, threads: int) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise Refused(
                "onnxruntime-genai is not installed; pip install onnxruntime-genai"
            ) from error
        self._og, self._vocab = onnxruntime_genai, bundle.vocab_size
        config = onnxruntime_genai.Config(str(genai_folder(bundle)))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)
        self._shape = 0, 0
        self._generator: Any = None

    def start(self, batch: int, capacity: int) -> None:
        self.free()
        self._shape = batch, capacity
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, max_length=capacity, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)

    def fill(self, context: int) -> None:
        batch = self._shape[0]
        if batch > 1 and context > LONGEST_BATCHED:
            raise Refused(
                f"a batch's prompts are taken whole, and {batch} x {context} tokens need too much "
                "memory for their scores"
            )
        rows = prompts(batch, context, self._vocab)
        pieces = [rows] if batch > 1 else np.split(rows, range(PIECE, context, PIECE), axis=1)
        for piece in pieces:
            self._generator.append_tokens(piece.astype(np.int32))

    def rewind(self, context: int) -> None:
        if context == 0:
            self.start(*self._shape)

    def prefill(self, rows: Prompts) -> Floats:
        self._generator.append_tokens(rows.astype(np.int32))
        logits: Floats = self._generator.get_logits()[:, -1]
        return logits

    def decode(self, tokens: Sequence[int], length: int) -> Floats:  # noqa: ARG002
        """It appends the token that it chose itself, which should be the same."""
        self._generator.generate_next_token()
        logits: Floats = self._generator.get_logits()[:, -1]
        return logits

    def step(self, tokens: Sequence[int], length: int) -> Sequence[int]:  # noqa: ARG002
        self._generator.generate_next_token()
        return tokens

    def free(self) -> None:
        self._generator = None


def genai_folder(bundle: Bundle) -> Path:
    return bundle.folder.parent / "genai"
