"""The folded backward pass of batch norm, compared with PyTorch's in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from distinit.pipeline.common.distributed import SINGLE_PROCESS
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.training.batch_norm import ChannelsLastBatchNorm3d, use_folded_backward
from distinit.pipeline.training.hardware import wrap
from distinit.pipeline.training.loop_options import LoopOptions


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(previous)


@pytest.mark.parametrize(
    "shape",
    [(4, 18, 2, 6, 6), (3, 5, 4, 7, 4), (2, 29, 3, 2, 2), (3, 7, 1, 5, 5), (2, 32, 2, 4, 4)],
)
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("mean", [3, 100])
def test_gradients_are_those_of_pytorch(
    shape: tuple[int, ...], contiguous: bool, mean: float
) -> None:
    torch.manual_seed(0)
    memory_format = torch.contiguous_format if contiguous else torch.channels_last_3d
    plain = nn.BatchNorm3d(shape[1])
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    folded, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    use_folded_backward(folded)
    assert type(folded) is ChannelsLastBatchNorm3d
    x = (mean + 2 * torch.randn(shape)).contiguous(memory_format=memory_format)
    grad_out = torch.randn(shape)
    results = []
    for norm, values in ((plain, x), (folded, x), (exact, x.double())):
        inputs = values.clone(memory_format=torch.preserve_format).requires_grad_()
        for _ in range(2):
            out = norm(inputs)
        variables = (inputs, norm.weight, norm.bias)
        results.append((out, *torch.autograd.grad(out, variables, grad_out.to(out.dtype))))
    assert torch.equal(results[1][0], results[0][0])
    for result, expected in zip(results[1], results[2], strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(folded.buffers(), plain.buffers(), strict=True))
    folded.eval(), plain.eval()
    assert torch.equal(folded(x), plain(x))


@pytest.mark.parametrize(
    ("threads", "channels", "folded"), [(2, 18, True), (1, 18, False), (2, 16, False)]
)
def test_pytorchs_backward_pass_is_replaced_where_it_is_slow(
    threads: int, channels: int, folded: bool
) -> None:
    torch.set_num_threads(threads)
    norm = nn.BatchNorm3d(channels)
    use_folded_backward(norm)
    x = torch.randn(2, channels, 2, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    assert ("FoldedBackward" in type(norm(x).grad_fn).__name__) is folded


def test_a_narrow_student_has_the_gradients_of_pytorch() -> None:
    gradients = []
    for folded in (True, False):
        torch.manual_seed(0)
        student = build_student(StudentOptions(width=0.125), {"t": 7}, clip=(4, 32))
        options = LoopOptions(batch_size=4, device="cpu")
        model = wrap(student, options, torch.device("cpu"), SINGLE_PROCESS).train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
        assert norms
        assert all(type(m) is ChannelsLastBatchNorm3d for m in norms)
        for norm in norms if not folded else ():
            norm.__class__ = nn.BatchNorm3d
        clip = torch.randn(4, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
        model(clip)["t"].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        assert gradient is not None
        assert expected is not None
        assert float((gradient - expected).norm()) <= 1e-3 * float(expected.norm()), name


def test_no_batch_norm_is_changed_where_it_is_not_needed() -> None:
    for options in (
        LoopOptions(batch_size=4, device="cpu", channels_last=False),
        LoopOptions(batch_size=4, device="cpu", compile="default"),
    ):
        student = build_student(StudentOptions(width=0.125), {"t": 7}, clip=(4, 32))
        model = wrap(student, options, torch.device("cpu"), SINGLE_PROCESS)
        assert not any(type(m) is ChannelsLastBatchNorm3d for m in model.modules())
