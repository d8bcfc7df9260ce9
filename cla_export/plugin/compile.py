"""Compile cla_attention.cu for one shape and one GPU, at run time, with NVRTC.

NVIDIA's cuda-core drives NVRTC, which needs no GPU: `compile_kernel` gives the same machine code on
a laptop. Results are cached on disk by source, options, compute capability and NVRTC's version.
"""

import importlib
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cla_export.errors import MissingEnvironment
from cla_export.plugin.prompt import PromptVariant

if TYPE_CHECKING:
    from cla_export.plugin.product import ProductPlan

COMMON = Path(__file__).with_name("common.cu")  # comes before all but the reader
SOURCE = Path(__file__).with_name("cla_attention.cu")
OPERATORS = Path(__file__).with_name("decode_ops.cu")
PRODUCT_TILE = Path(__file__).with_name("decode_tile.cu")
PACKED_TILE = Path(__file__).with_name("decode_packed.cu")
PRODUCT = Path(__file__).with_name("decode_product.cu")
CHOICE = Path(__file__).with_name("choose_tokens.cu")
READER = Path(__file__).with_name("read_memory.cu")
CACHE = Path.home() / ".cache/cla-export/kernels"
KERNELS = ("cla_attention", "cla_attention_merge")
MERGE_WARPS = 8
MERGE_BLOCKS = 256  # about; a batch of many rows seldom splits one
TILE = 16  # keys, and rows, of one
PACK = 4  # key tiles that a block's warps share at a time


@dataclass(frozen=True, slots=True)
class Variant:
    """What a kernel is specialised for: the macros that head the source explain them."""

    head_dim: int
    bf16: bool
    softcap: bool
    chunk: bool
    warps: int
    stages: int
    cluster: int
    shared_keys: bool = False

    @property
    def columns(self) -> int:
        """Output columns of one work item: the head dim, padded, or a slice of it."""
        padded = _round_up(self.head_dim, 16)
        return _round_up(-(-padded // self.slices), 16)

    @property
    def slices(self) -> int:
        """Parts the output's columns are done in, so that accumulators stay in registers."""
        padded = _round_up(self.head_dim, 16)
        return 1 if padded <= 256 else -(-padded // 192)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: each warp's ring, and the queries of wide heads."""
        padded = _round_up(self.head_dim, 16)
        stage = _tile_bytes(padded) + _tile_bytes(self.columns)
        queries = _tile_bytes(padded) if padded > 128 else 0
        return (PACK if self.shared_keys else self.warps) * self.stages * stage + queries

    @property
    def block_rows(self) -> int:
        """Query rows of a block: a tile, or a tile of each warp."""
        return TILE * (self.warps if self.shared_keys else 1)

    @property
    def static_shared_bytes(self) -> int:
        """Static shared memory of a block: maxima, sums and weights of its warps' rows."""
        return self.warps * TILE * 12 + TILE * 8

    @property
    def source(self) -> Path:
        """Of its kernels."""
        return SOURCE

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names in the source."""
        return KERNELS

    @property
    def macros(self) -> list[tuple[str, str]]:
        """As the source expects them."""
        return [(name.upper(), str(int(value))) for name, value in asdict(self).items()]


AnyVariant = Variant | PromptVariant


@dataclass(frozen=True, slots=True)
class Resources:
    """What the assembler reports of one kernel."""

    registers: int
    spill_bytes: int
    stack_bytes: int


def compile_kernel(
    variant: AnyVariant, compute_capability: tuple[int, int], cache: Path | None = CACHE
) -> Any:  # noqa: ANN401 (cuda-core is imported when needed)
    """The variant's machine code, as cuda-core's ObjectCode; `cache=None` always compiles."""
    return _compiled(_program(variant, compute_capability), cache)


def _compiled(program: Any, cache: Path | None) -> Any:  # noqa: ANN401
    if cache is None:
        return program.compile("cubin")
    utils = importlib.import_module("cuda.core.utils")
    with utils.FileStreamProgramCache(cache) as store:
        return program.compile("cubin", cache=store)


def compile_operators(
    bf16: bool, compute_capability: tuple[int, int], cache: Path | None = CACHE
) -> Any:  # noqa: ANN401
    """Machine code of decode_ops.cu; as `compile_kernel`."""
    macros = [("BF16", str(int(bf16)))]
    return _compiled(_program_of((COMMON, OPERATORS), macros, compute_capability), cache)


def compile_product(
    bf16: bool,
    plan: "ProductPlan",
    compute_capability: tuple[int, int],
    cache: Path | None = CACHE,
) -> Any:  # noqa: ANN401
    """Machine code of decode_product.cu for the plan's tile; as `compile_kernel`."""
    tile = (PRODUCT_TILE,) if plan.bits == 16 else (PRODUCT_TILE, PACKED_TILE)
    return _compiled(
        _program_of((COMMON, *tile, PRODUCT), plan.macros(bf16), compute_capability), cache
    )


def compile_choice(
    bf16: bool, compute_capability: tuple[int, int], cache: Path | None = CACHE
) -> Any:  # noqa: ANN401
    """Machine code of choose_tokens.cu; as `compile_kernel`."""
    macros = [("BF16", str(int(bf16)))]
    return _compiled(_program_of((COMMON, CHOICE), macros, compute_capability), cache)


def compile_reader(
    threads: int, loads: int, compute_capability: tuple[int, int], cache: Path | None = CACHE
) -> Any:  # noqa: ANN401
    """Machine code of read_memory.cu for tiles of threads x loads x 16 bytes; `compile_kernel`."""
    macros = [("THREADS", str(threads)), ("LOADS", str(loads))]
    return _compiled(_program_of((READER,), macros, compute_capability), cache)


def resources(variant: AnyVariant, compute_capability: tuple[int, int]) -> dict[str, Resources]:
    """Registers, spills and stack of each kernel, after a fresh compilation."""
    log = io.StringIO()
    _program(variant, compute_capability, "-v").compile("cubin", logs=log)
    text = log.getvalue()
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        text,
        re.DOTALL,
    )
    used = {
        name: Resources(int(registers), int(stores) + int(loads), int(stack))
        for name, stack, stores, loads, registers in found
    }
    if set(used) != set(variant.kernels):
        raise RuntimeError(
            f"NVRTC's report names {sorted(used)}, expected {variant.kernels}:\n{text}"
        )
    return used


def _program(variant: AnyVariant, compute_capability: tuple[int, int], *assembler: str) -> Any:  # noqa: ANN401
    return _program_of((COMMON, variant.source), variant.macros, compute_capability, *assembler)


def _program_of(
    sources: Sequence[Path],
    macros: list[tuple[str, str]],
    compute_capability: tuple[int, int],
    *assembler: str,
) -> Any:  # noqa: ANN401
    try:
        core = importlib.import_module("cuda.core")
    except ImportError as error:
        raise MissingEnvironment(
            f"kernels for GPUs are compiled with NVRTC: {error}; "
            "pip install cuda-core cuda-bindings nvidia-cuda-nvrtc"
        ) from error
    major, minor = compute_capability
    text = "".join(f'#line 1 "{p.name}"\n{p.read_text(encoding="utf-8")}' for p in sources)
    options = core.ProgramOptions(
        name=sources[-1].name,
        arch=f"sm_{major}{minor}" + ("a" if major == 9 else ""),  # a: warp groups
        std="c++17",
        define_macro=macros,
        ptxas_options=list(assembler) or None,
    )
    return core.Program(text, "c++", options)


def _tile_bytes(width: int) -> int:
    """Bytes of 16 rows of `width` elements: swizzled, or with 16 bytes of padding a row."""
    return 16 * (width * 2 + (16 if width % 64 else 0))


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to
