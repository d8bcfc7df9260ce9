"""generate: text from a bundle, one request at a time."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cla_export.bundle import Bundle, open_bundle
from cla_export.engines.executor import Executor
from cla_export.engines.opening import open_executor
from cla_export.errors import BadInput, BundleError, RunError
from cla_export.sampling import Sampler, SamplingParams, decode_and_choose
from cla_export.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHUNK = 512  # prompt tokens per prefill call


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A bundle on a backend, with its tokenizer where it has one."""

    bundle: Bundle
    executor: Executor
    tokenizer: "Tokenizer | None"
    eos: frozenset[int]

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The text that follows a prompt. Options as for `stream`."""
        sampler = Sampler(SamplingParams(temperature=temperature, top_p=top_p, seed=seed))
        return "".join(self.stream(prompt, max_new_tokens, sampler))

    def stream(
        self, prompt: str | Sequence[int], max_new_tokens: int, sampler: Sampler | None = None
    ) -> Iterator[str]:
        """Text as it is generated, in pieces that are whole characters. Greedy by default."""
        from tokenizers.decoders import DecodeStream

        if self.tokenizer is None:
            raise BundleError(
                f"{self.bundle.folder}: no tokenizer.json, so it cannot turn tokens into text; use "
                "generate_ids, or put the model's tokenizer.json into its folder and export again"
            )
        decoder = DecodeStream(skip_special_tokens=True)
        for token in self.generate_ids(self.encode(prompt), max_new_tokens, sampler):
            piece = decoder.step(self.tokenizer, token)
            if piece:
                yield piece

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; a sequence of ids is taken as it is."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise BundleError(
                f"{self.bundle.folder}: no tokenizer.json; give the prompt as token ids"
            )
        return list(self.tokenizer.encode(prompt).ids)

    def generate_ids(
        self, prompt: Sequence[int], max_new_tokens: int, sampler: Sampler | None = None
    ) -> Iterator[int]:
        """Token ids that follow a prompt, until an end token, the limit, or a full slot."""
        sampler = sampler or Sampler()
        capacity = self.executor.capacity
        if not prompt:
            raise BadInput("the prompt is empty; give at least one token")
        if max_new_tokens < 1:
            raise BadInput(f"{max_new_tokens} new tokens asked for; expected at least 1")
        if len(prompt) >= capacity:
            raise BadInput(
                f"the prompt has {len(prompt)} tokens; the capacity is {capacity}, and one place "
                "at least must be left to generate. Shorten it, or load with a larger capacity "
                f"(this model: at most {self.bundle.max_positions})"
            )
        for start in range(0, len(prompt), _CHUNK):
            logits = self.executor.prefill(0, prompt[start : start + _CHUNK], start)[-1]
        token = sampler.pick(logits)
        for length in range(len(prompt), min(capacity, len(prompt) + max_new_tokens)):
            if token in self.eos:
                return
            yield token
            if length + 1 < len(prompt) + max_new_tokens:
                token = self._next(token, length, sampler)

    def _next(self, token: int, length: int, sampler: Sampler) -> int:
        """The token after one that the slot, which holds `length`, is given."""
        chosen = decode_and_choose(self.executor, 0, token, length, sampler)
        if chosen is None:
            raise RunError(
                f"the model's logits after {length + 1} tokens are not numbers; compare it with "
                f"PyTorch: cla-export parity {self.bundle.folder}"
            )
        return chosen


def load(
    bundle: Bundle | Path | str,
    *,
    backend: str | None = None,
    engine: Path | None = None,
    capacity: int | None = None,
    slots: int = 1,
    threads: int | None = None,
    module: str | None = None,
) -> LoadedModel:
    """Open a bundle for running. Options and errors as for `engines.opening.open_executor`.

    Args:
        bundle: an opened bundle, or its folder (verified before use).
        backend: what runs it; None: what it was exported for.
        engine: folder of a TensorRT engine; None: the only one that the bundle has.
        capacity: tokens a slot can hold; None for all of the model's positions.
        slots: rows that can run side by side.
        threads: intra-operator threads (onnxruntime only).
        module: `package.module:factory`, where the bundle was exported with one (torch only).
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    executor = open_executor(
        bundle,
        backend,
        engine=engine,
        capacity=capacity,
        slots=slots,
        threads=threads,
        module=module,
    )
    return LoadedModel(bundle, executor, load_tokenizer(bundle.folder), end_tokens(bundle.folder))


def end_tokens(folder: Path) -> frozenset[int]:
    """End tokens by generation_config.json, else config.json: an id, a list of ids, or none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        eos = content.get("eos_token_id")
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()
