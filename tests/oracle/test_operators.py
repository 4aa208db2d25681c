"""The compiled operators over rows: against float64, and against PyTorch's chain of operators."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from workers.dense.operators import TorchOperators, select_operators
from workers.kernels.select import compiled_kernel

if compiled_kernel() is None:
    pytest.skip("the C++ kernel is not built", allow_module_level=True)

from workers.kernels.cpu.kernel import levels
from workers.kernels.cpu.operators import CpuOperators

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = 1e-5
BOUND = {
    # Some roundings of single precision.
    torch.float32: 1e-6,
    # Three roundings to 8 and to 11 bits, of half a unit each, and a cancelling difference in a rotation.
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}
"""Largest error beside the largest number of the row."""
HIDDEN_SIZES = (8, 16, 100, 576, 1000)
HEAD_SIZES = (16, 64, 80, 128)
ROWS = (1, 7, 64)
PLAIN = TorchOperators()
FLOAT = torch.float32

every_level = pytest.mark.parametrize("level", levels())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_rows = pytest.mark.parametrize("rows", ROWS)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Normal numbers."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def norm_exactly(rows: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in float64."""
    wide = rows.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Every number within its dtype's bound of its row's largest."""
    error = (found.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert float(error.max()) < BOUND[found.dtype]


def assert_same(found: Tensor, plain: Tensor, rare: float = 0.0) -> None:
    """Bits equal in 16-bit types; up to a share `rare` of numbers may lie two units of the last place apart.

    That is one unit in the rounding before the last product: above a power of two it is worth two of those
    just below one. In float32 a product and sum may be one instruction, so that bits need not be equal.
    """
    assert found.shape == plain.shape
    assert found.dtype == plain.dtype
    if found.dtype is torch.float32:
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=2e-6)
        return
    steps = (found.view(torch.int16).int() - plain.view(torch.int16).int()).abs()
    steps[found == plain] = 0  # zeros of either sign
    assert int(steps.max()) <= (2 if rare else 0)
    assert float((steps > 0).double().mean()) <= rare


@every_level
@every_dtype
@every_rows
@pytest.mark.parametrize("size", HIDDEN_SIZES)
def test_add_rms_norm(level: str, dtype: torch.dtype, rows: int, size: int) -> None:
    """The sum has PyTorch's bits; the norm too, but where the order of a sum tips a rounding (1 in 100)."""
    hidden, update = (numbers(rows, size, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = numbers(size, dtype=dtype, seed=3)
    total, plain = PLAIN.add_rms_norm(hidden, update, weight, EPSILON)
    found_total, found = CpuOperators(dtype, level=level).add_rms_norm(hidden, update, weight, EPSILON)
    assert torch.equal(found_total, total)
    assert_near(found, norm_exactly(total, weight))
    assert_same(found, plain, rare=0.01)


@every_level
@every_dtype
@every_rows
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rms_norm_of_heads_whose_rows_lie_apart(
    level: str, dtype: torch.dtype, rows: int, head_size: int
) -> None:
    """Keys within a fused projection are normed head by head; what lies beside them is not touched."""
    fused = numbers(rows, 2, 3, head_size, dtype=dtype)
    keys, weight, before = fused[:, 0], numbers(head_size, dtype=dtype, seed=3), fused.clone()
    found = CpuOperators(dtype, level=level).rms_norm(keys, weight, EPSILON)
    assert_near(found, norm_exactly(keys, weight))
    assert_same(found, PLAIN.rms_norm(keys, weight, EPSILON), rare=0.01)
    assert torch.equal(fused, before)


@every_level
@every_dtype
@every_rows
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotate(level: str, dtype: torch.dtype, rows: int, head_size: int) -> None:
    """Queries and strided keys turn in place with PyTorch's bits; values beside them stay."""
    angles = torch.arange(rows).view(-1, 1, 1) * torch.linspace(1, 0.01, head_size // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    fused = numbers(rows, 2, 3, head_size, dtype=dtype)
    keys, values = fused[:, 0], fused[:, 1].clone()
    low, high = keys.double().chunk(2, dim=-1)
    exact = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    plain = PLAIN.rotate(keys, cos, sin)
    found = CpuOperators(dtype, level=level).rotate(keys, cos, sin)
    assert found.data_ptr() == fused.data_ptr()
    assert_near(found, exact)
    assert_same(found, plain)
    assert torch.equal(fused[:, 1], values)


@every_level
@every_dtype
@every_rows
@pytest.mark.parametrize("size", HIDDEN_SIZES)
def test_silu_mul(level: str, dtype: torch.dtype, rows: int, size: int) -> None:
    """Gated as by PyTorch, but where two exponentials tip a rounding (1 in 100)."""
    gate_up = numbers(rows, 2 * size, dtype=dtype, scale=4.0)
    gate, up = gate_up.double().chunk(2, dim=-1)
    found = CpuOperators(dtype, level=level).silu_mul(gate_up)
    assert_near(found, torch.nn.functional.silu(gate) * up)
    assert_same(found, PLAIN.silu_mul(gate_up), rare=0.01)


@every_level
@every_dtype
@every_rows
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 80), (2, 1, 5)], ids=str)
def test_merge_own(
    level: str, dtype: torch.dtype, rows: int, parts: int, heads: tuple[int, int, int]
) -> None:
    """A row's own token and its parts, empty ones too, sum up as one softmax; what is beside keys stays."""
    query_heads, kv_heads, size = heads
    query = numbers(rows, query_heads, size, dtype=dtype, seed=1)
    fused = numbers(rows, 2, kv_heads, size, dtype=dtype, seed=2)
    before, scale = fused.clone(), size**-0.5
    out = numbers(parts * rows, query_heads, size, dtype=torch.float32, seed=3)
    lse = numbers(parts * rows, query_heads, dtype=torch.float32, seed=4, scale=4.0)
    lse[::3], out[::3] = -torch.inf, 0.0
    given = (query, *fused.unbind(1), scale, (out, lse) if parts else None)
    found = CpuOperators(dtype, level=level).merge_own(*given)
    key, value = (half.double().repeat_interleave(query_heads // kv_heads, 1) for half in fused.unbind(1))
    own = (query.double() * key).sum(-1)[None] * scale
    weights = torch.cat((own, lse.double().view(parts, rows, query_heads))).softmax(0)
    outs = torch.cat((value[None], out.double().view(parts, rows, query_heads, size)))
    assert_near(found, (weights[..., None] * outs).sum(0))
    plain = PLAIN.merge_own(*given)
    # A unit of the last place where a rounding tips, or more of them in what nearly cancels.
    unit = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found, plain, rtol=unit, atol=1e-5)
    assert dtype is torch.float32 or float((found != plain).double().mean()) <= 0.01
    assert torch.equal(fused, before)


@every_level
@every_dtype
def test_merge_own_lets_nothing_spoiled_pass(level: str, dtype: torch.dtype) -> None:
    """NaN in a query, a part or its weight comes out, and the other heads and rows are as without it."""
    operators, shape = CpuOperators(dtype, level=level), (3, 2, 16)
    query, key, value = (numbers(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    out, lse = numbers(*shape, dtype=torch.float32, seed=4), numbers(3, 2, dtype=torch.float32, seed=5)
    clean = operators.merge_own(query, key, value, 0.25, (out, lse)).clone()
    query[0, 0, 3], out[1, 1, :], lse[2, 0] = torch.nan, torch.nan, torch.nan
    found = operators.merge_own(query, key, value, 0.25, (out, lse))
    spoiled = found.isnan().all(-1)
    assert spoiled.tolist() == [[True, False], [False, True], [True, False]]
    assert torch.equal(found[~spoiled], clean[~spoiled])


@every_level
@every_dtype
@every_rows
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize(("heads", "size"), [(9, 64), (4, 80), (2, 5)])
def test_merge(level: str, dtype: torch.dtype, rows: int, parts: int, heads: int, size: int) -> None:
    """What rows saw first and their parts, empty ones too, sum up as one softmax, which is rounded once."""
    out = numbers((1 + parts) * rows, heads, size, dtype=torch.float32, seed=3)
    lse = numbers((1 + parts) * rows, heads, dtype=torch.float32, seed=4, scale=4.0)
    lse[rows::3], out[rows::3] = -torch.inf, 0.0
    own, shards = (out[:rows], lse[:rows]), (out[rows:], lse[rows:]) if parts else None
    found = CpuOperators(dtype, level=level).merge(own, shards, dtype)
    weights = lse.double().view(1 + parts, rows, heads).softmax(0)
    exact = (weights[..., None] * out.double().view(1 + parts, rows, heads, size)).sum(0)
    assert_near(found, exact)
    assert_same(found, PLAIN.merge(own, shards, dtype), rare=0.01)
    assert parts or torch.equal(found, own[0].to(dtype))


@every_level
@every_dtype
@every_rows
@pytest.mark.parametrize("size", [2, 15, 16, 1025, 5000])
def test_best_two(level: str, dtype: torch.dtype, rows: int, size: int) -> None:
    """The bits of PyTorch, also among equals, whose first is taken; the rows stay as they were."""
    logits = numbers(rows, size, dtype=dtype)
    logits[0, size // 2 :] = logits[0].max()
    logits[-1, -1] = 1000.0
    before = logits.clone()
    places, best, second = CpuOperators(dtype, level=level).best_two(logits)
    sorted_rows = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    assert torch.equal(places, sorted_rows.indices[:, 0])
    assert torch.equal(torch.stack((best, second), -1), sorted_rows.values[:, :2])
    plain = PLAIN.best_two(logits)
    assert all(torch.equal(one, other.to(one)) for one, other in zip((best, second), plain[1:], strict=True))
    assert torch.equal(logits, before)


@every_level
def test_best_two_of_rows_that_no_token_comes_from(level: str) -> None:
    """NaN wins wherever it stands; infinities, and rows masked but for one place or all, stay as they are."""
    logits = numbers(5, 2000, dtype=torch.float32)
    logits[0, 7], logits[1, -1], logits[2, 1500] = torch.nan, torch.nan, torch.inf
    logits[3], logits[4] = -torch.inf, -torch.inf
    logits[4, 1999] = -3.0
    places, best, second = CpuOperators(torch.float32, level=level).best_two(logits)
    assert best[:2].isnan().all()
    assert (best[2:].tolist(), second[3:].tolist()) == (
        [torch.inf, -torch.inf, -3.0],
        [-torch.inf, -torch.inf],
    )
    assert places[2:].tolist() == [1500, 0, 1999]


@every_level
@every_dtype
def test_numbers_at_the_edges_of_a_type(level: str, dtype: torch.dtype) -> None:
    """Ties, the smallest and largest numbers, infinities and NaN are rounded as by PyTorch."""
    limits = torch.finfo(dtype)
    tie = 1 + limits.eps
    edges = [0.0, -0.0, 1.0, tie, limits.tiny, limits.smallest_normal, limits.max, limits.min]
    edges += [torch.inf, -torch.inf, torch.nan, limits.eps / 2, limits.smallest_normal * limits.eps, 100, -80]
    hidden = torch.tensor([edges] * len(edges), dtype=dtype)
    update = torch.tensor(edges, dtype=dtype)[:, None].expand_as(hidden).contiguous()
    weight = torch.ones(len(edges), dtype=dtype)
    operators = CpuOperators(dtype, level=level)
    plain, _ = PLAIN.add_rms_norm(hidden, update, weight, EPSILON)
    found, _ = operators.add_rms_norm(hidden.clone(), update.clone(), weight, EPSILON)
    assert torch.equal(found.nan_to_num(7.0, 9.0, -9.0), plain.nan_to_num(7.0, 9.0, -9.0))
    gate_up = torch.cat((hidden, torch.ones_like(hidden)), dim=-1)
    torch.testing.assert_close(operators.silu_mul(gate_up), PLAIN.silu_mul(gate_up), equal_nan=True)


@every_dtype
def test_rows_do_not_depend_on_threads_or_batch(dtype: torch.dtype) -> None:
    """A row of many over four threads has the bits of the row alone."""
    gate_up = numbers(300, 2 * 1000, dtype=dtype)
    many = CpuOperators(dtype, threads=4).silu_mul(gate_up).clone()
    alone = CpuOperators(dtype, threads=1)
    for row in (0, 150, 299):
        assert torch.equal(many[row : row + 1], alone.silu_mul(gate_up[row : row + 1].clone()))


def test_threads_do_not_share_what_is_kept() -> None:
    """One object serves two threads: each keeps its own answer."""
    operators = CpuOperators(torch.float32)
    first = operators.silu_mul(numbers(3, 8, dtype=torch.float32))
    before = first.clone()
    rows = [numbers(3, 2, 8, dtype=torch.float32, seed=seed) for seed in range(6)]
    merged = operators.merge_own(rows[0], rows[1], rows[2], 1.0, None)
    kept = merged.clone()
    with ThreadPoolExecutor(1) as other:
        other.submit(operators.silu_mul, numbers(3, 8, dtype=torch.float32, seed=1)).result()
        other.submit(operators.merge_own, rows[3], rows[4], rows[5], 1.0, None).result()
    assert torch.equal(first, before)
    assert torch.equal(merged, kept)


def test_micro_batches_of_two_sizes_keep_their_memory() -> None:
    """Calls with two row counts in turn allocate nothing after the first; many row counts keep no more than
    a few, so that memory does not grow with them.
    """
    operators = CpuOperators(torch.float32)
    rows = {count: numbers(count, 2, 8, dtype=torch.float32) for count in range(1, 20)}

    def answers(count: int) -> tuple[Tensor, Tensor]:
        numbers_of = rows[count]
        gated = operators.silu_mul(numbers_of.reshape(count, 16))
        return gated, operators.merge_own(numbers_of, numbers_of, numbers_of, 1.0, None)

    first, second = answers(3), answers(5)
    for count, before in ((3, first), (5, second), (3, first)):
        assert all(now is kept for now, kept in zip(answers(count), before, strict=True))
    del first, second, before
    results = [weakref.ref(operators.silu_mul(rows[count].reshape(count, 16))) for count in rows]
    assert sum(result() is not None for result in results) <= 4


def test_what_does_not_fit_is_refused() -> None:
    """Shapes, strides, dtypes and devices that would read other memory raise ValueError."""
    operators = CpuOperators(torch.float32)
    rows, weight = torch.ones(2, 8), torch.ones(8)
    heads, table = torch.ones(2, 3, 8), torch.ones(2, 1, 4)
    own, lse = (heads, heads, heads, 1.0), torch.ones(2, 3)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("a weight", lambda: operators.rms_norm(rows, torch.ones(7), EPSILON)),
        ("apart", lambda: operators.rms_norm(rows.half(), weight, EPSILON)),
        ("on meta", lambda: operators.rms_norm(rows.to("meta"), weight, EPSILON)),
        ("apart", lambda: operators.rms_norm(torch.ones(8, 2).T, weight, EPSILON)),
        ("apart", lambda: operators.rms_norm(weight, weight, EPSILON)),
        ("an update", lambda: operators.add_rms_norm(rows, torch.ones(3, 8), weight, EPSILON)),
        ("apart", lambda: operators.add_rms_norm(rows, torch.ones(2, 16)[:, :8], weight, EPSILON)),
        ("float16", lambda: operators.add_rms_norm(rows, rows.clone(), weight.half(), EPSILON)),
        ("tables", lambda: operators.rotate(heads, table, torch.ones(1, 1, 4))),
        ("tables", lambda: operators.rotate(torch.ones(2, 3, 7), table, table)),
        ("apart", lambda: operators.rotate(torch.ones(2, 8, 3).transpose(1, 2), table, table)),
        ("gate and up", lambda: operators.silu_mul(torch.ones(2, 7))),
        ("gate and up", lambda: operators.silu_mul(torch.ones(2, 0))),
        ("gate and up", lambda: operators.silu_mul(torch.ones(4))),
        (
            "query heads",
            lambda: operators.merge_own(heads, torch.ones(2, 2, 8), torch.ones(2, 2, 8), 1.0, None),
        ),
        ("keys", lambda: operators.merge_own(heads, heads[:1], heads, 1.0, None)),
        ("keys", lambda: operators.merge_own(heads, heads, heads[:, :1], 1.0, None)),
        (
            "keys",
            lambda: operators.merge_own(heads, torch.ones(2, 3, 7), torch.ones(2, 3, 7), 1.0, None),
        ),
        ("apart", lambda: operators.merge_own(heads, heads, heads.half(), 1.0, None)),
        ("parts", lambda: operators.merge_own(*own, (torch.ones(3, 3, 8), torch.ones(3, 3)))),
        ("parts", lambda: operators.merge_own(*own, (heads, torch.ones(4, 3)))),
        ("parts", lambda: operators.merge_own(*own, (torch.ones(2, 3, 7), lse))),
        ("a part", lambda: operators.merge_own(*own, (heads.double(), lse))),
        ("a part", lambda: operators.merge_own(*own, (heads, torch.ones(3, 2).T))),
        ("a part", lambda: operators.merge_own(*own, (heads.to("meta"), lse))),
        ("a part", lambda: operators.merge((heads.transpose(0, 1), torch.ones(3, 2)), None, FLOAT)),
        ("parts", lambda: operators.merge((heads, lse), (heads[:1], lse), FLOAT)),
        ("a part", lambda: operators.merge((heads, lse), (heads.half(), lse), FLOAT)),
        ("float16", lambda: operators.merge((heads, lse), None, torch.float16)),
        ("no rows", lambda: operators.best_two(weight)),
        ("no second", lambda: operators.best_two(torch.ones(2, 1))),
        ("apart", lambda: operators.best_two(torch.ones(8, 2).T)),
        ("float64", lambda: CpuOperators(torch.float64)),
        ("no such", lambda: CpuOperators(torch.float32, level="no such")),
    ]
    for words, call in refused:
        with pytest.raises(ValueError, match=words):
            call()


def test_an_empty_batch_is_no_work() -> None:
    """No rows, no numbers."""
    operators = CpuOperators(torch.float32)
    assert operators.silu_mul(torch.ones(0, 8)).shape == (0, 4)
    assert operators.rms_norm(torch.ones(0, 8), torch.ones(8), EPSILON).shape == (0, 8)


def test_selection_and_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled where it can be; PyTorch for other devices and dtypes, and where nothing was built."""
    assert isinstance(select_operators(torch.bfloat16, CPU), CpuOperators)
    assert isinstance(select_operators(torch.float64, CPU), TorchOperators)
    assert isinstance(select_operators(torch.bfloat16, torch.device("cuda")), TorchOperators)
    monkeypatch.setitem(sys.modules, "workers.kernels.cpu._native", None)
    assert isinstance(select_operators(torch.bfloat16, CPU), TorchOperators)
