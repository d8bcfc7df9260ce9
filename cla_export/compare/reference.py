"""What is right, and how far off PyTorch itself is: one model, computed in several ways.

    exact       in float64, on the very values that the bundle's weights stand for
    native      in the bundle's own arithmetic: its dtype, its rounding of activations
                and with int8 caches, keys and values as those hold them
    reordered   likewise, with the sums of all linear layers in other orders, and in 16 bits with
                attention's scores rounded to them, as some runtimes do

The exact side judges a bundle; the others' distance from it is the yardstick (thresholds.py). There
are several since at a token where the network is ill-conditioned, an error is one random number
times a large one, and a single draw of it can happen to be small.

A model is in memory once in float32, and once more in the bundle's dtype where that is another. A
small one is there in float64 too; of a large one, weights are widened one module at a time, while
that module runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from cla_export.compare.rounded_activations import RoundedExperts, hooked, rounded_activations
from cla_export.compare.routing import Follow, Routes
from cla_export.kv_scales import LEAST, MOST, Scales
from cla_export.layout import KVLayout
from cla_export.models.decoder import KV, Decoder, KVCache
from cla_export.quantization import Quantization

_SMALL = 2**30  # bytes in float64
_PARTS = (2, 3)  # a reordered side adds up the first half, or third, of each sum by itself
Exact = NDArray[np.float64]
GroupKV = list[tuple[NDArray[np.floating], NDArray[np.floating]]]  # keys, values: [T, Hkv, D] each


@dataclass(frozen=True, slots=True)
class Side:
    """A module and the arithmetic that it runs in."""

    model: Decoder
    arithmetic: Callable[[Decoder], AbstractContextManager[None]]
    scales: Sequence[Scales] | None = None  # of int8 caches, which keys and values are rounded to

    @torch.inference_mode()
    def forward(
        self,
        tokens: NDArray[np.int64],
        held: GroupKV | None = None,
        routes: Routes | None = None,
    ) -> tuple[Exact, GroupKV]:
        """Logits [S, V] of one row of tokens [S], and each group's new K and V [S, Hkv, D].

        None of these where the module spells its attention out; it takes no `held` then.

        `held` is what the groups' caches hold before the row's first token; `routes` are the
        experts that its tokens go to, where not those that the module would choose.
        """
        if routes:
            with self.follow(routes):
                return self.forward(tokens, held)
        start = len(held[0][0]) if held is not None else 0
        ids = torch.from_numpy(tokens)[None]
        positions = torch.arange(start, start + len(tokens))[None]
        with self.arithmetic(self.model):
            if held is None and self.scales is None:
                logits, groups = self.model.forward_with_kv(ids, positions)
            else:
                cache = _Held(held or _nothing(self.model.spec.layout), self.scales)
                logits, groups = self.model(ids, positions, cache), cache.groups
        return _exact(logits[0]), [(_tokens_first(k), _tokens_first(v)) for k, v in groups]

    def follow(self, routes: Routes) -> Follow:
        """The mode in which the module's routers choose these."""
        return Follow(routes, list((self.model.spec.routed or {}).values()))

    def logits(self, tokens: NDArray[np.int64], routes: Routes | None = None) -> Exact:
        """Logits [S, V] of one row of tokens [S]."""
        return self.forward(tokens, None, routes)[0]


@dataclass(frozen=True, slots=True)
class Reference:
    """All sides."""

    exact: Side
    native: Side
    reordered: tuple[Side, ...]

    @property
    def yardstick(self) -> tuple[Side, ...]:
        """PyTorch in the bundle's arithmetic, in every order of its sums."""
        return self.native, *self.reordered

    @classmethod
    def of(
        cls,
        model: Decoder,
        rounded: Decoder | None,
        quantization: Quantization | None,
        scales: Sequence[Scales] | None = None,
        *,
        rounds_experts: bool = False,
    ) -> "Reference":
        """Sides over a float32 model; `rounded` is it in the bundle's dtype, where not float32.

        With `rounds_experts` what goes into experts is rounded too (`lower.quantize_experts`).
        """

        def rounding(module: Decoder) -> AbstractContextManager[None]:
            return _native(module, quantization, None, rounds_experts)

        def reordering(part: int) -> Callable[[Decoder], AbstractContextManager[None]]:
            return lambda module: _native(module, quantization, part, rounds_experts)

        size = 8 * sum(parameter.numel() for parameter in model.parameters())
        exact = Side(model, _in_float64)
        if size <= _SMALL:
            exact = Side(deepcopy(model).double(), lambda _: nullcontext())
        own = rounded or model
        return cls(
            exact,
            Side(own, rounding, scales),
            tuple(Side(own, reordering(part), scales) for part in _PARTS),
        )


@contextmanager
def _in_float64(model: Decoder) -> Iterator[None]:
    """Run every module in float64; its float32 weights are put back after it."""
    narrow_data: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for parameter in module.parameters(recurse=False):
            narrow_data.setdefault(parameter, parameter.data)
            parameter.data = parameter.data.double()
        return tuple(x.double() if x.is_floating_point() else x for x in inputs)

    def narrow(module: nn.Module, _inputs: object, _output: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = narrow_data.pop(parameter, parameter.data)

    def widen_output(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output.double()

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # a lookup: only the rows it returns need widening
            handles.append(module.register_forward_hook(widen_output))
        elif next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(narrow, always_call=True))
    with hooked(handles), _WidenedParameters():
        yield


class _WidenedParameters(TorchFunctionMode):
    """Widens float32 parameters where they are read beside float64, and not by their own module.

    Code that somebody else wrote may: a list of parameters, or a head that calls
    `linear(x, embedding.weight)`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        given = (*args, *(kwargs or {}).values())
        if getattr(func, "__name__", "") == "__set__":
            return func(*args)  # of `data`, by the hooks above: on the parameter itself
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in given):
            args = tuple(_widened(x) for x in args)
            kwargs = {name: _widened(x) for name, x in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:  # noqa: ANN401
    narrow = isinstance(value, nn.Parameter) and value.dtype == torch.float32
    return value.double() if narrow else value


@contextmanager
def _native(
    model: Decoder, quantization: Quantization | None, part: int | None, rounds_experts: bool
) -> Iterator[None]:
    """The bundle's arithmetic: activations as it rounds them, sums in one part or in two."""
    with ExitStack() as stack:
        if quantization is not None:
            stack.enter_context(rounded_activations(model, quantization))
        if quantization is not None and rounds_experts:
            stack.enter_context(RoundedExperts(model, quantization))
        if part is not None:
            stack.enter_context(_sums_in_parts(model, part))
        if part is not None and next(model.parameters()).dtype != torch.float32:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_scores_in_16_bits())
        yield


@contextmanager
def _scores_in_16_bits() -> Iterator[None]:
    """Let PyTorch's plain attention keep scores in 16 bits: one switch for all devices."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@contextmanager
def _sums_in_parts(model: Decoder, part: int) -> Iterator[None]:
    """Every linear layer as a sum of two: over its first 1/part inputs, and over the others."""

    def split(module: nn.Linear, inputs: tuple[Tensor], _output: Tensor) -> Tensor:
        (x,) = inputs
        at = -(-x.shape[-1] // part)
        first = nn.functional.linear(x[..., :at], module.weight[:, :at], module.bias)
        return first + nn.functional.linear(x[..., at:], module.weight[:, at:])

    handles = [
        module.register_forward_hook(split)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with hooked(handles):
        yield


class _Held:
    """A KVCache of one row that holds made-up tokens, or none, before the row's own."""

    def __init__(self, held: GroupKV, scales: Sequence[Scales] | None) -> None:
        self._held = held
        self._scales = scales
        self.groups: list[KV] = []  # what came since

    def update(self, group: int, key: Tensor, value: Tensor) -> KV:
        if self._scales is not None:
            of_keys, of_values = self._scales[group]
            key, value = _as_int8(key, of_keys), _as_int8(value, of_values)
        self.groups.append((key, value))
        old = (torch.from_numpy(part).transpose(0, 1)[None] for part in self._held[group])
        whole = [torch.cat((a.to(b.dtype), b), 2) for a, b in zip(old, (key, value), strict=True)]
        return whole[0], whole[1]

    def mask(self, position_ids: Tensor, window: int | None) -> Tensor:
        distance = position_ids[:, None, :, None] - torch.arange(int(position_ids.max()) + 1)
        allowed = distance >= 0
        return allowed if window is None else allowed & (distance < window)


def _nothing(layout: KVLayout) -> GroupKV:
    """Keys and values of no tokens."""
    empty = [np.zeros((0, group.kv_heads, group.head_dim)) for group in layout.groups]
    return list(zip(empty, empty, strict=True))


def _as_int8(value: Tensor, scale: NDArray[np.float32]) -> Tensor:
    """What an int8 cache holds of [1, H, S, D]."""
    step = torch.from_numpy(scale).to(value.dtype)
    return (value / step).round().clamp(LEAST, MOST) * step


def _exact(value: Tensor) -> Exact:
    array: Exact = value.double().numpy()
    return array


def _tokens_first(value: Tensor) -> Exact:
    """[1, H, T, D] as [T, H, D]."""
    return _exact(value[0].transpose(0, 1)).copy()


_: type[KVCache] = _Held
