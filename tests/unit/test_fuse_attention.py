"""Attention that a module or an exporter spells out, in many ways, is found and understood.

Every layer of a module has another form. It is traced by PyTorch's exporters at several opsets and
rewritten; the rewritten graph is then run beside the traced one, prompt and steps.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cla_export import inspect
from cla_export.errors import GraphError
from cla_export.stateless_graph import rewrite_graph

VOCAB, WIDTH, HEADS, KV_HEADS, DIM = 47, 30, 6, 2, 10
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, heads, S, D] -> y


class Decoder(nn.Module):
    """RoPE, RMS norm, a layer for each of `attends`, sharing as `owners` says."""

    def __init__(self, attends: list[Attend], owners: list[int], kv_heads: int) -> None:
        super().__init__()
        self.attends, self.owners, self.kv_heads = attends, owners, kv_heads
        self.kept = nn.ModuleList(a for a in attends if isinstance(a, nn.Module))
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.q = nn.ModuleList(nn.Linear(WIDTH, HEADS * DIM) for _ in owners)
        kv = 2 * kv_heads * DIM
        self.kv = nn.ModuleDict({str(i): nn.Linear(WIDTH, kv) for i in set(owners)})
        self.o = nn.ModuleList(nn.Linear(HEADS * DIM, WIDTH) for _ in owners)
        self.scale = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in owners)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        angles = torch.arange(32)[:, None] / 100 ** (torch.arange(0, DIM, 2) / DIM)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def rotate(self, x: Tensor, places: Tensor) -> Tensor:
        cos, sin = (table[places][:, None].to(x.dtype) for table in (self.cos, self.sin))
        turned = torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), -1)
        return x * cos + turned * sin

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        batch, length = input_ids.shape
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, owner in enumerate(self.owners):
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale[layer]
            q = self.q[layer](h)
            q = q.view(batch, length, HEADS, q.shape[-1] // HEADS).transpose(1, 2)
            if owner == layer:
                kv = self.kv[str(layer)](h).view(batch, length, 2, self.kv_heads, DIM)
                k, v = kv.permute(2, 0, 3, 1, 4)
                made[layer] = self.rotate(k, position_ids), v
            y = self.attends[layer](self.rotate(q, position_ids), *made[owner])
            x = x + self.o[layer](y.transpose(1, 2).reshape(batch, length, HEADS * DIM))
        return self.head(x)


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // x.shape[1], 1)


def tril(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeated(k).transpose(-1, -2) / math.sqrt(DIM)
    return scores.masked_fill(~tril(q.shape[2]), -math.inf).softmax(-1) @ repeated(v)


def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2],) * 2, torch.finfo(q.dtype).min).triu(1).to(q.dtype)
    scores = torch.matmul(q * 0.3, repeated(k).transpose(2, 3)) + mask[None, None]
    return torch.matmul(F.softmax(scores, -1, dtype=torch.float32).to(q.dtype), repeated(v))


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, repeated(k)) * DIM**-0.5
    seen = torch.where(tril(q.shape[2]), scores, torch.tensor(-1e9, dtype=q.dtype))
    return torch.einsum("bhqk,bhkd->bhqd", seen.softmax(-1), repeated(v))


def three_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, _, length, _ = q.shape
    q, k, v = (x.reshape(batch * HEADS, length, DIM) for x in (q, repeated(k), repeated(v)))
    scores = torch.bmm(q, k.transpose(1, 2)) / DIM**0.5
    y = torch.bmm(scores.masked_fill(~tril(length), -1e30).softmax(-1), v)
    return y.view(batch, HEADS, length, DIM)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, _ = k.shape
    shape = (batch, heads, HEADS // heads, length, DIM)
    k, v = (x[:, :, None].expand(shape).flatten(1, 2) for x in (k, v))
    places = torch.arange(length)
    scores = (q @ k.mT).masked_fill(places[:, None] < places, -math.inf)  # no scale at all
    return F.dropout(scores.softmax(-1), 0.1, training=False) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What it makes never has four axes before something else happens to it."""
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgsd,bktd->bkgst", q, k) / DIM**0.5
    weights = scores.masked_fill(~tril(q.shape[3]), -math.inf).softmax(-1)
    y = torch.einsum("bkgst,bktd->bskgd", weights, v).flatten(2).sigmoid()
    return y.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ repeated(k).mT / DIM**0.5 / 3.0) * 3.0
    return scores.masked_fill(~tril(q.shape[2]), -math.inf).softmax(-1) @ repeated(v)


def windowed(window: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        distance = places[:, None] - places
        seen = (distance >= 0) & (distance < window)
        scores = (q @ repeated(k).transpose(2, 3) * DIM**-0.5).masked_fill(~seen, -math.inf)
        return scores.softmax(-1) @ repeated(v)

    return attend


class Kept(nn.Module):
    """Keeps its mask, of as many tokens as it has places for, and cuts it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(1, 1, 40, 40).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        hidden = self.bias[:, :, :length, :length] == 0
        scores = q @ repeated(k).transpose(2, 3) * DIM**-0.5
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ repeated(v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def traced(
    path: Path,
    attends: list[Attend],
    opset: int = 20,
    *,
    owners: list[int] | None = None,
    kv_heads: int = KV_HEADS,
    dtype: torch.dtype = torch.float32,
) -> Path:
    torch.manual_seed(0)
    owners = owners or [0] * len(attends)
    return saved(path, Decoder(attends, owners, kv_heads).to(dtype), opset)


def saved(path: Path, model: Decoder, opset: int) -> Path:
    model.eval()
    given = torch.randint(0, VOCAB, (2, 5)), torch.arange(5).repeat(2, 1)
    names = {"input_names": ["input_ids", "position_ids"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if opset < 18:
            axes = {name: {0: "b", 1: "s"} for name in ("input_ids", "position_ids", "logits")}
            torch.onnx.export(
                model, given, path, dynamo=False, opset_version=opset, dynamic_axes=axes, **names
            )
        else:
            axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
            torch.onnx.export(
                model, given, path, dynamo=True, opset_version=opset, verbose=False,
                dynamic_shapes=(axes, axes), **names,
            )  # fmt: skip
    return path


FORMS = [plain, added, einsum, three_axes, expanded, capped, sdpa, Kept(), grouped]
OWNERS = [0, 1, 0, 3, 1, 3, 3, 7, 7]


@pytest.mark.parametrize("opset", [20, 23])
def test_every_form_is_understood(tmp_path: Path, opset: int) -> None:
    path = traced(tmp_path / "stateless.onnx", FORMS, opset, owners=OWNERS)
    done = rewrite_graph(path, tmp_path / "stateful.onnx")
    assert list(done.layout.kv_owner) == OWNERS
    assert set(done.layout.kv_heads) == {KV_HEADS}
    assert set(done.layout.window) == {None}
    assert set(done.attention) == {"Attention"}  # 10 is no head dim of the fused operator
    assert done.error is not None and done.error < 2e-6
    fired = {report.name: report.fired for report in done.reports}["fuse_attention"]
    assert fired == len(FORMS) - (opset == 23)  # where the exporter keeps one whole
    found = inspect(path)
    assert (found.layout, found.graph and found.graph.stage) == (done.layout, "stateless")
    assert found.graph is not None and found.graph.attention["spelt out"] == fired
    weights = sum(p.numel() for p in Decoder(FORMS, OWNERS, KV_HEADS).parameters())
    assert found.graph.weight_bytes["float32"] > 4 * weights, "weights, and tables"


def test_the_older_exporter(tmp_path: Path) -> None:
    attends = [plain, three_axes, windowed(4), windowed(4096), Kept()]
    path = traced(tmp_path / "stateless.onnx", attends, 17, owners=[0, 0, 2, 3, 4])
    done = rewrite_graph(path, tmp_path / "stateful.onnx")
    assert done.layout.kv_owner == (0, 0, 2, 3, 4)
    assert done.layout.window == (None, None, 4, 4096, None)
    fired = {report.name: report.fired for report in done.reports}
    assert fired["fuse_rms_norm"] == len(attends), "1 / Sqrt, which is how it spells a norm"
    assert done.error is not None and done.error < 2e-6


def test_one_kv_head_and_windows(tmp_path: Path) -> None:
    attends = [windowed(4), windowed(4096)]
    path = traced(tmp_path / "stateless.onnx", attends, owners=[0, 1], kv_heads=1)
    layout = rewrite_graph(path, tmp_path / "stateful.onnx").layout
    assert (layout.kv_heads, layout.window) == ((1, 1), (4, 4096))


def test_half_precision_with_a_softmax_in_single(tmp_path: Path) -> None:
    path = traced(tmp_path / "stateless.onnx", [added, added], dtype=torch.float16)
    assert rewrite_graph(path, tmp_path / "stateful.onnx").layout.kv_owner == (0, 0)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    scores = q @ repeated(k).mT - 0.1 * (places[:, None] - places)
    return scores.masked_fill(~tril(q.shape[2]), -math.inf).softmax(-1) @ repeated(v)


def open_eyed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ repeated(k).mT).softmax(-1) @ repeated(v)


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat(1, HEADS // KV_HEADS, 1, 1) for x in (k, v))  # heads 0, 1, 0, 1, ...
    return (q @ k.mT).masked_fill(~tril(q.shape[2]), -math.inf).softmax(-1) @ v


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ repeated(k).mT).masked_fill(~tril(q.shape[2]), -math.inf).softmax(-1)
    return scores * scores @ repeated(v)


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (biased, r"Softmax node .* it is not softmax\(scale \* q k\^T \+ mask\) v: at 7 tokens"),
        (open_eyed, r"its mask at length 6 is neither causal nor a sliding window"),
        (tiled, r"it is not softmax\(scale \* q k\^T \+ mask\) v"),
        (squared, r"it is not softmax\(scale \* q k\^T \+ mask\) v"),
    ],
)
def test_what_is_something_else_is_refused(tmp_path: Path, attend: Attend, message: str) -> None:
    path = traced(tmp_path / "stateless.onnx", [sdpa, attend])
    with pytest.raises(GraphError, match=message):
        rewrite_graph(path, tmp_path / "stateful.onnx")
    assert not (tmp_path / "stateful.onnx").exists()


def test_padding_that_a_mask_reads_off_the_tokens(tmp_path: Path) -> None:
    class Padded(Decoder):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            self.hidden = (input_ids == 2)[:, None, None]
            return super().forward(input_ids, position_ids)

        def padded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q @ repeated(k).mT).masked_fill(~tril(q.shape[2]), -math.inf)
            return scores.masked_fill(self.hidden, -1e30).softmax(-1) @ repeated(v)

    model = Padded([plain], [0], KV_HEADS)
    model.attends = [model.padded]
    path = saved(tmp_path / "stateless.onnx", model, 20)
    with pytest.raises(GraphError, match="depends on the tokens of input_ids"):
        rewrite_graph(path, tmp_path / "stateful.onnx")


def test_one_that_cannot_be_cached_beside_one_that_can(tmp_path: Path) -> None:
    path = traced(tmp_path / "stateless.onnx", [sdpa, biased], 23)
    with pytest.raises(GraphError, match="such a layer cannot be cached"):
        rewrite_graph(path, tmp_path / "stateful.onnx")
