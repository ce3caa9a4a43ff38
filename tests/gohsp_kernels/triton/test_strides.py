# SPDX-License-Identifier: Apache-2.0
"""Every operator gives the same numbers however its tensors lie in memory: the forward pass and the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gohsp_kernels import dispatch
from gohsp_kernels.testing import TOLERANCE, Call, Maker, poisoned
from gohsp_kernels.triton.rows import as_rows

from .helpers import assert_close
from .test_backward import TOLERANCE as GRADIENT_TOLERANCE

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with poisoned():
        yield


def transposed(x: Tensor) -> Tensor:
    """The last two dimensions lie in memory the other way round, as after ``flatten(2).transpose(1, 2)``."""
    return x.mT.contiguous().mT if x.dim() > 1 else every_second(x)


def every_second(x: Tensor) -> Tensor:
    """Every second number of rows that are twice as long."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7.0)
    wide[..., ::2] = x
    return wide[..., ::2]


def one_number(x: Tensor) -> Tensor:
    """The first number of each row, repeated without memory of its own."""
    return x[..., :1].expand(x.shape)


def one_row(x: Tensor) -> Tensor:
    """The first row, repeated without memory of its own."""
    return x[..., :1, :].expand(x.shape) if x.dim() > 1 else one_number(x)


def in_the_middle(x: Tensor) -> Tensor:
    """Part of a larger tensor: an odd offset, and a gap after each row."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), 7.0)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    form.__name__: form for form in (transposed, every_second, one_number, one_row, in_the_middle)
}


def calls() -> dict[str, Call]:
    """Calls on one image, whose rows are a view of it however it lies, and on two."""
    maker = Maker(3)
    norms = maker.qk_norm(8)
    # Equal numbers in a row have no variance: with a small eps their norm would be the rounding of their mean.
    eps = {"eps": 1.0}
    return {
        "packed_linear": maker.linear((1, 9), 24, None, 16, None, "gelu"),
        "packed_linear, columns": maker.linear((2, 5), 24, 17, 32, 20, "gelu"),
        "packed_linear, identity": maker.linear((6,), 24, None, 16, None, "identity"),
        "ragged_attention": maker.attention(1, 9, [8, 0, 5], [8, 3, 16]),
        "ragged_attention, two images": maker.attention(2, 9, [8, 8], [8, 16], num_queries=3),
        "ragged_attention, norms": maker.attention(1, 9, [8, 8], [8, 16], **norms, **eps),
        "attention_sublayer": maker.attention_sublayer(1, 9, 24, [8, 16], [8, 8], **eps),
        "attention_sublayer, columns": maker.attention_sublayer(2, 9, 24, [8, 0, 5], [8, 3, 16], 17, 20, **eps),
        "attention_sublayer, class token": maker.attention_sublayer(1, 9, 24, [8, 16], [8, 8], num_queries=1, **eps),
        "attention_sublayer, norms": maker.attention_sublayer(1, 9, 24, [8, 8], [8, 16], **norms, **eps, qk_eps=1.0),
        "mlp_sublayer": maker.mlp_sublayer((1, 9), 24, 40, **eps),
        "mlp_sublayer, columns": maker.mlp_sublayer((2, 9), 24, 40, 17, 20, **eps),
    }


CALLS = calls()


def in_form(call: Call, form: Callable[[Tensor], Tensor], *, x: bool) -> Call:
    """``call`` with ``x``, or all float tensors but it, laid out by ``form``; leaves that share no tensor with it."""

    def lay(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return form(tensor) if x == (tensor is call.x) else tensor.clone()

    return call.mapped(lay)


def gradients(call: Call, backend: str, lay_grad: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Gradient of each float argument under a gradient of the result that ``lay_grad`` laid out."""
    leaves = [leaf.requires_grad_() for leaf in call.tensors()]
    result = call.run(backend)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(5)).to(result.dtype)
    return list(torch.autograd.grad(result, leaves, lay_grad(grad), materialize_grads=True))


def check_gradients(call: Call, lay_grad: Callable[[Tensor], Tensor]) -> None:
    exact = call.to(torch.float64)
    truth, result = gradients(exact, "reference", lay_grad), gradients(call, "triton", lay_grad)
    assert_close(
        *(torch.cat([g.double().flatten() for g in grads]) for grads in (result, truth)),
        GRADIENT_TOLERANCE[torch.float32],
    )


def as_it_is(x: Tensor) -> Tensor:
    return x.clone()


@pytest.mark.slow
@pytest.mark.parametrize("of_x", [True, False], ids=["x", "weights"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_any_layout_of_an_argument(name: str, form: str, of_x: bool) -> None:
    call = in_form(CALLS[name], FORMS[form], x=of_x)
    truth = call.truth()
    result = call.run("triton")
    assert result.is_contiguous()
    assert_close(result, truth, TOLERANCE[torch.float32])
    if dispatch.can_run("cpu"):
        assert_close(call.run("cpu"), truth, TOLERANCE[torch.float32])
    check_gradients(call, as_it_is)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_any_layout_of_the_gradient_of_the_result(name: str, form: str) -> None:
    check_gradients(in_form(CALLS[name], as_it_is, x=True), FORMS[form])


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_gradient_of_a_sum_is_one_number_without_strides(name: str) -> None:
    call = CALLS[name]
    exact, single = call.to(torch.float64), in_form(call, as_it_is, x=True)
    x, truth = single.x.requires_grad_(), exact.x.requires_grad_()
    single.run("triton").sum().backward()
    exact.run("reference").sum().backward()
    assert_close(x.grad, truth.grad, GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.slow
def test_images_of_one_token_that_lie_as_tokens_of_one_image() -> None:
    """PyTorch calls such a tensor contiguous although the stride of its tokens is that of all images together."""
    for call in (Maker(4).attention(1, 6, [8, 8], [8, 16]), Maker(4).attention_sublayer(1, 6, 24, [8, 8], [8, 8])):
        x = call.x.transpose(0, 1)
        assert x.is_contiguous() and x.stride(1) != x.shape[2]
        turned = call.with_x(x)
        assert_close(turned.run("triton"), turned.truth(), TOLERANCE[torch.float32])
        check_gradients(turned, lambda grad: grad.flatten(0, 1)[None].transpose(0, 1))


def test_rows_are_copied_only_where_their_features_are_apart() -> None:
    x = torch.randn(3, 4, 24)
    for right in (x, x[1:2], x[..., 3:11], x[:, :1], x.transpose(0, 1)[1], x[0, :1].expand(4, 24), x[0, 0], x[..., :1]):
        assert as_rows(right).data_ptr() == right.data_ptr()
    for wrong in (x.mT, x[:1].mT, x[..., ::2], x[..., :1].expand(3, 4, 24)):
        rows = as_rows(wrong)
        assert rows.stride(1) == 1 and torch.equal(rows, wrong.reshape(-1, wrong.shape[-1]))
    assert as_rows(torch.empty(2, 0)).shape == (2, 0)
