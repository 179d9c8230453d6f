"""Linear layers by oneDNN are linear layers, and nothing else is touched."""

import pytest
import torch

from reprobe.model import products
from reprobe.model.products import FastProducts


@pytest.mark.parametrize("room", [0, 2**20], ids=["as it is", "packed"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_gives_the_same_but_for_rounding(bias, room, monkeypatch):
    monkeypatch.setattr(products, "PACKED", room)
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(131, 67, bias=bias)
    x = torch.randn(3, 17, 131, generator=generator)
    with torch.no_grad():
        want = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        with FastProducts():
            got, again = layer(x), layer(x[:, :4])
            empty = layer(x[:0])
    assert got.shape == (3, 17, 67)
    torch.testing.assert_close(again, got[:, :4], atol=2e-5, rtol=0)
    assert empty.shape == (0, 17, 67)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert products._onednn() is not None, "oneDNN was not even asked"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 40])
def test_a_product_is_that_of_torch_but_for_rounding(rows, bias, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 131, generator=generator) for n in (rows, 67))
    b = torch.randn(67, generator=generator) if bias else None
    want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    for onednn in (products._onednn(), None):
        monkeypatch.setattr(products, "_onednn", lambda found=onednn: found)
        with torch.no_grad():
            torch.testing.assert_close(products.linear(x, weight, b).double(), want, atol=5e-5, rtol=0)
            got = products.linear(x.view(rows, 1, 131), weight, b)
            assert got.shape == (rows, 1, 67)
    weight.requires_grad_()
    products.linear(x, weight, b).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(67, -1), atol=1e-4, rtol=0)


def test_what_needs_a_gradient_or_has_another_dtype_is_computed_as_ever():
    layer, x = torch.nn.Linear(5, 3), torch.ones(2, 5)
    with FastProducts():
        layer(x).sum().backward()
        with torch.no_grad():
            assert layer.double()(x.double()).dtype == torch.float64
            assert torch.nn.functional.linear(input=x, weight=torch.ones(1, 5)).tolist() == [[5.0], [5.0]]
    torch.testing.assert_close(layer.weight.grad, torch.full((3, 5), 2.0).double(), check_dtype=False)
