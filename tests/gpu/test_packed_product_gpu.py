"""Products with packed weights against float32 of what these stand for, and as an operator.

Skipped where there is no GPU with clusters.
"""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.cuda_notes import Call
from cla_export.engines.cuda_operators import CudaOperators
from cla_export.plugin import compile_cpu
from cla_export.plugin.launch import Launcher, ProductPointers
from cla_export.plugin.product import plan_product

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="no GPU with clusters",
)
SHAPES = ((2304, 2048), (2048, 5472), (4, 32), (36, 96), (1000, 1312), (50304, 512))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
EPSILON = 1e-5


@dataclass(frozen=True)
class Weight:
    """A random packed weight, and what it stands for, each number rounded to 16 bits."""

    packed: Tensor
    scales: Tensor
    whole: Tensor  # float32


def weight_of(rows: int, columns: int, bits: int, kind: torch.dtype) -> Weight:
    blocks = -(-columns // 32)
    packed = torch.randint(0, 256, (rows, blocks, bits * 4), device="cuda", dtype=torch.uint8)
    scales = (0.5 + torch.rand(rows, blocks, device="cuda")) / (2 ** (bits - 2) * columns**0.5)
    scales = scales.to(kind)
    numbers = packed
    if bits == 4:
        numbers = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    steps = numbers.float() - 2 ** (bits - 1)
    whole = (steps * scales.float()[..., None]).flatten(-2)[:, :columns]
    return Weight(packed, scales, whole.to(kind).float())


def expected(x: Tensor, weight: Weight, *, gated: bool) -> tuple[Tensor, Tensor]:
    """The product, rounded as the kernel rounds, and by how many units each may be off."""
    made = (x.float() @ weight.whole.T).to(x.dtype).float()
    if not gated:
        return made, torch.full_like(made, 2)
    gate, up = made.chunk(2, -1)
    product = (torch.nn.functional.silu(gate).to(x.dtype).float() * up).to(x.dtype).float()
    return product, 8 + 2 * gate.abs()


def check(
    made: Tensor, product: Tensor, units: Tensor, added: Tensor | None, more: float = 0
) -> None:
    """Whether each number is off by `units` of itself, or by `more` and float32's sums."""
    unit = UNITS[str(made.dtype).removeprefix("torch.")]
    wanted = product if added is None else product + added.float()
    allowed = unit * (units * product.abs() + 2 * wanted.abs() + more) + 2e-4
    off = (made.float() - wanted).abs()
    assert (off <= allowed).all(), float((off / allowed).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_products(dtype: str, bits: int, shape: tuple[int, int], gated: bool) -> None:
    """Outputs begin poisoned; what lies behind the last token stays as it was; twice the same."""
    torch.manual_seed(shape[0])
    launcher, (n, k), kind = Launcher(), shape, DTYPES[dtype]
    x = (3 * torch.randn(64, k, device="cuda")).to(kind)
    weight = weight_of(n * (2 if gated else 1), k, bits, kind)
    residual = torch.randn(64, n, device="cuda").to(kind)
    for tokens in (1, 2, 7, 8, 9, 16, 31, 32, 33, 48, 64):
        plan = plan_product(tokens, n, k, launcher.gpu, gated=gated, bits=bits)
        if plan is None:  # too little shared memory
            assert tokens > 32 and launcher.gpu.compute_capability != (9, 0)
            continue
        product, units = expected(x[:tokens], weight, gated=gated)
        for added in (None, residual):
            made = []
            for _ in range(2):
                y = torch.full((64, n), float("nan"), device="cuda", dtype=kind)
                pointers = ProductPointers(
                    weight.packed.data_ptr(), x.data_ptr(), y.data_ptr(),
                    0 if added is None else added.data_ptr(), weight.scales.data_ptr(),
                )  # fmt: skip
                stream = torch.cuda.current_stream().cuda_stream
                launcher.launch_product(plan, dtype, pointers, (tokens, n, k), stream, gated=gated)
                made.append(y)
            check(made[0][:tokens], product, units, None if added is None else added[:tokens])
            assert made[0][tokens:].isnan().all()
            assert torch.equal(made[0][:tokens], made[1][:tokens])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_token_gets_the_same_in_any_company(bits: int, gated: bool) -> None:
    launcher, n, k = Launcher(), 1152, 2080
    x = torch.randn(32, k, device="cuda").half()
    weight = weight_of(n * (2 if gated else 1), k, bits, torch.float16)
    made = []
    for tokens in range(1, 33):
        y = torch.empty(tokens, n, device="cuda").half()
        plan = plan_product(tokens, n, k, launcher.gpu, gated=gated, bits=bits)
        assert plan is not None
        pointers = ProductPointers(
            weight.packed.data_ptr(), x.data_ptr(), y.data_ptr(), 0, weight.scales.data_ptr()
        )
        stream = torch.cuda.current_stream().cuda_stream
        launcher.launch_product(plan, "float16", pointers, (tokens, n, k), stream, gated=gated)
        made.append(y)
    for y in made:
        assert torch.equal(y, made[-1][: len(y)])


class Operator:
    """ClaLinear as ONNX Runtime would call it, on torch's tensors."""

    def __init__(self, memory: CudaMemory, dtype: str, *, gated: bool) -> None:
        path = compile_cpu.library(compile_cpu.HOST_OPERATORS)
        node = {"gated": int(gated), "epsilon": EPSILON}
        self._operators = CudaOperators(path, memory, {0: node}, dtype, 0)
        self._library, self._stream = ctypes.CDLL(str(path)), memory.stream
        self._notes = ctypes.c_void_p()

    def __call__(self, y: Tensor, *inputs: Tensor | None) -> None:
        """Asked at first; of a shape that was seen before, done by its note."""
        call = Call(stream=self._stream, notes=ctypes.addressof(self._notes))
        pairs = [*zip(call.inputs, inputs, strict=False), (call.outputs[0], y)]
        for argument, tensor in pairs:
            if tensor is not None:
                argument.data, argument.rank = tensor.data_ptr(), tensor.ndim
                argument.dims[: tensor.ndim] = tensor.shape
        torch.cuda.synchronize()
        status = self._library.cla_run(ctypes.byref(call))
        assert status == 0, self._operators.take_error()
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", [(320, 96), (36, 24), (32, 2048)], ids=str)
def test_as_an_operator(
    memory: CudaMemory, dtype: str, bits: int, gated: bool, shape: tuple[int, int]
) -> None:
    """Few tokens and many, padded blocks too, with a norm and a residual; twice the same.

    Products are of order 1. Norms may round to the other side.
    """
    torch.manual_seed(0)
    (n, k), kind = shape, DTYPES[dtype]
    operator = Operator(memory, dtype, gated=gated)
    weight = weight_of(n * (2 if gated else 1), k, bits, kind)
    norm = (1 + 0.1 * torch.randn(k, device="cuda")).to(kind)
    for tokens in (1, 33, 65, 300):
        x = torch.randn(1, tokens, k, device="cuda").to(kind)
        wide = x.float()
        factors = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
        normed = (wide * factors * norm.float()).to(kind)
        residual = None if gated else torch.randn(1, tokens, n, device="cuda").to(kind)
        product, units = expected(normed, weight, gated=gated)
        made = []
        for _ in range(2):
            y = torch.full((1, tokens, n), float("nan"), device="cuda", dtype=kind)
            operator(y, x, weight.packed, norm, residual, weight.scales)
            made.append(y)
        check(made[0], product, units, residual, 32 if gated else 8)
        assert torch.equal(made[0], made[1])
