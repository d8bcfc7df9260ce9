"""Products of a few tokens against float32. Skipped where there is no GPU with clusters."""

import pytest
import torch

from cla_export.plugin.launch import Launcher, ProductPointers
from cla_export.plugin.product import plan_product

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="no GPU with clusters",
)
SHAPES = ((2304, 2048), (2048, 5472), (64, 8), (36, 72), (1000, 3072), (50304, 512))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Products:
    """Launches, on torch's tensors."""

    def __init__(self) -> None:
        self.launcher = Launcher()

    def __call__(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        y: torch.Tensor,
        tokens: int,
        *,
        gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> bool:
        """Whether the kernel takes it."""
        n, k = w.shape[0] // (2 if gated else 1), w.shape[1]
        plan = plan_product(tokens, n, k, self.launcher.gpu, gated=gated)
        if plan is None:
            assert tokens > 32 and self.launcher.gpu.compute_capability != (9, 0)
            return False
        added = 0 if residual is None else residual.data_ptr()
        self.launcher.launch_product(
            plan,
            str(x.dtype).removeprefix("torch."),
            ProductPointers(w.data_ptr(), x.data_ptr(), y.data_ptr(), added),
            (tokens, n, k),
            torch.cuda.current_stream().cuda_stream,
            gated=gated,
        )
        return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_products(dtype: str, shape: tuple[int, int], gated: bool) -> None:
    """Outputs begin poisoned; what lies behind the last token stays as it was; twice the same."""
    multiply, (n, k), kind = Products(), shape, DTYPES[dtype]
    torch.manual_seed(n)
    x = (3 * torch.randn(64, k, device="cuda")).to(kind)
    w = (torch.randn(n * (2 if gated else 1), k, device="cuda") * k**-0.5).to(kind)
    residual = torch.randn(64, n, device="cuda").to(kind)
    tolerance = {"rtol": 2e-2, "atol": 8e-2 if dtype == "bfloat16" else 1e-2}
    for tokens in (1, 5, 8, 9, 16, 17, 32, 33, 63, 64):
        expected = (x[:tokens].float() @ w.float().T).to(kind)
        if gated:
            gate, up = expected.float().chunk(2, -1)
            expected = (torch.nn.functional.silu(gate).to(kind).float() * up).to(kind)
        for added in (None, residual):
            made = []
            for _ in range(2):
                y = torch.full((64, n), float("nan"), device="cuda", dtype=kind)
                if multiply(x, w, y, tokens, gated=gated, residual=added):
                    made.append(y)
            if not made:
                continue
            wanted = expected if added is None else expected.float() + added[:tokens].float()
            torch.testing.assert_close(made[0][:tokens].float(), wanted.float(), **tolerance)
            assert made[0][tokens:].isnan().all()
            assert torch.equal(made[0][:tokens], made[1][:tokens])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_token_gets_the_same_in_any_company(gated: bool) -> None:
    multiply, n, k = Products(), 2304, 2048
    x = torch.randn(32, k, device="cuda").half()
    w = (torch.randn(n * 2, k, device="cuda") * k**-0.5).half()
    made = []
    for tokens in range(1, 33):
        y = torch.empty(tokens, n if gated else n * 2, device="cuda").half()
        assert multiply(x, w, y, tokens, gated=gated)
        made.append(y)
    for y in made:
        assert torch.equal(y, made[-1][: len(y)])
