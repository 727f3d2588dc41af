"""Products with frozen matrices are those of torch, whichever kernel computes them."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from split_model import products
from split_model.products import add_frozen_linear, frozen_linear, frozen_linear_aligned

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative to the largest element."""


@pytest.fixture(params=[True, False], ids=["fast bfloat16", "slow bfloat16"], autouse=True)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_fast_bfloat16", lambda: request.param)
    monkeypatch.setattr(products, "CONVERTED_AT_ONCE", 15 * 24)  # each matrix below has more


@pytest.fixture(params=[True, False], ids=["oneDNN", "other kernels"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_prefers_onednn", lambda: request.param)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == expected.dtype
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype] * largest)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("stores_in_out", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_product_is_that_of_torch(dtype: torch.dtype, has_bias: bool, stores_in_out: bool, rows: int) -> None:
    torch.manual_seed(0)
    of_rows = torch.float64 if dtype == torch.float64 else torch.float32
    stored = torch.randn((24, 40) if stores_in_out else (40, 24), dtype=dtype)
    weight, bias = stored.T if stores_in_out else stored, torch.randn(40, dtype=dtype) if has_bias else None
    x = torch.randn(rows, 30, dtype=of_rows)[:, 3:27]  # a part of the columns, as one layer leaves several
    product = x.double() @ weight.double().T
    exact = product if bias is None else product + bias.double()
    assert_close(frozen_linear(x, weight, bias), exact.to(of_rows), dtype)
    already = torch.randn(rows, 40, dtype=of_rows)
    found = already.clone()
    add_frozen_linear(found, x, weight)
    assert_close(found, (product + already).to(of_rows), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_product_with_many_outputs_is_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(29, 24, dtype=dtype), torch.randn(601, 24, dtype=dtype)
    assert_close(frozen_linear_aligned(x, weight), F.linear(x.double(), weight.double()).to(dtype), dtype)


@pytest.mark.parametrize("rows", [16, 17])
def test_bfloat16_is_multiplied_in_float32_where_that_is_faster(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Of integers that bfloat16 holds: in either way the products are exact, and the last result is rounded once."""
    in_float32: list[int] = []
    multiply = products._multiply_in_float32
    monkeypatch.setattr(
        products, "_multiply_in_float32", lambda x, weight, y: in_float32.append(len(x)) or multiply(x, weight, y)
    )
    x, weight = (torch.randint(-9, 9, shape).bfloat16() for shape in ((rows, 24), (40, 24)))
    bias = torch.randint(-9, 9, (40,)).bfloat16()
    found = frozen_linear(x, weight, bias)
    assert torch.equal(found, F.linear(x.double(), weight.double(), bias.double()).bfloat16())
    assert in_float32 == ([] if rows == 16 or products._has_fast_bfloat16() else [17])
    if in_float32:  # then what comes in float32 is not rounded to bfloat16 on the way
        exact = torch.randn(rows, 24)
        expected = F.linear(exact.double(), weight.double()).float()
        assert_close(frozen_linear(exact, weight), expected, torch.float32)
        assert_close(frozen_linear_aligned(exact, weight), expected, torch.float32)


def test_kernels_of_onednn_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for capability, available, has_operator, name, expected in (
        ("AVX512", True, True, "AMD Zen 4", True),
        ("AVX512", True, True, "Intel Xeon", False),
        ("AVX512", True, True, None, True),
        ("AVX512", True, False, None, False),
        ("AVX512", False, True, None, False),
        ("AVX2", True, True, None, False),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            patch.setattr(torch.backends.mkldnn, "is_available", lambda available=available: available)
            operators = SimpleNamespace(_linear_pointwise=None) if has_operator else SimpleNamespace()
            patch.setattr(torch.ops, "mkldnn", operators)
            known = {} if name is None else {"cpu_name": name}
            patch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
            assert products._prefers_onednn.__wrapped__() is expected
