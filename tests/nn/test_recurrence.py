"""Three forms of one recurrence, against each other, SciPy's filters and plain attention."""

import numpy as np
import pytest
import torch
from scipy import signal
from torch.nn import functional as F

from paperlab.nn.recurrence import (
    causal_convolution,
    chunked,
    decay_matrix,
    diagonal_kernel,
    masked,
    recurrent,
    zero_order_hold,
)

F64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(tokens=23, batch=(2, 3), state=4, dim=5):
    q, k = draws(*batch, tokens, state), draws(*batch, tokens, state, seed=1)
    v = draws(*batch, tokens, dim, seed=2)
    return q, k, v, -F.softplus(draws(*batch, tokens, seed=3))


@pytest.mark.parametrize("size", [1, 5, 8, 23, 64])
def test_three_forms_agree(size):
    q, k, v, log_decay = problem()
    wanted, _ = recurrent(q, k, v, log_decay)
    torch.testing.assert_close(masked(q, k, v, log_decay), wanted)
    torch.testing.assert_close(chunked(q, k, v, log_decay, size), wanted)


def test_three_forms_have_the_same_gradients():
    inputs = [x.requires_grad_() for x in problem(tokens=11)]
    weight = draws(2, 3, 11, 5, seed=9)
    gradients = [
        torch.autograd.grad((form * weight).sum(), inputs)
        for form in (recurrent(*inputs)[0], masked(*inputs), chunked(*inputs, size=4))
    ]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_the_state_carries_over():
    q, k, v, log_decay = problem()
    whole, last = recurrent(q, k, v, log_decay)
    _, state = recurrent(q[..., :9, :], k[..., :9, :], v[..., :9, :], log_decay[..., :9])
    rest, end = recurrent(q[..., 9:, :], k[..., 9:, :], v[..., 9:, :], log_decay[..., 9:], state)
    torch.testing.assert_close(rest, whole[..., 9:, :])
    torch.testing.assert_close(end, last)


def test_without_decay_it_is_a_cumulative_sum():
    _, _, v, _ = problem()
    one, zero = torch.ones(*v.shape[:-1], 1, dtype=F64), torch.zeros(v.shape[:-1], dtype=F64)
    torch.testing.assert_close(masked(one, one, v, zero), v.cumsum(-2))
    torch.testing.assert_close(chunked(one, one, v, zero, 4), v.cumsum(-2))


def test_constant_decay_is_scipys_filter():
    v = draws(40, 3)
    one = torch.ones(40, 1, dtype=F64)
    wanted = signal.lfilter([1.0], [1.0, -0.8], v.numpy(), axis=0)
    log_decay = torch.full((40,), 0.8, dtype=F64).log()
    np.testing.assert_allclose(chunked(one, one, v, log_decay, 16).numpy(), wanted)
    np.testing.assert_allclose(masked(one, one, v, log_decay).numpy(), wanted)


def test_decay_matrix_is_a_product_of_gates():
    log_decay = -F.softplus(draws(6))
    a = log_decay.exp()
    wanted = torch.tensor([[a[j + 1 : i + 1].prod().item() if j <= i else 0.0 for j in range(6)] for i in range(6)])
    torch.testing.assert_close(decay_matrix(log_decay), wanted.to(F64))


def test_strong_decay_over_long_rows_stays_finite():
    q, k, v, _ = problem(tokens=400, batch=())
    log_decay = torch.full((400,), -50.0, dtype=F64, requires_grad=True)
    for form in (masked, chunked):
        out = form(q, k, v, log_decay)
        torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v)  # nothing is left of the token before
        assert torch.autograd.grad(out.sum(), log_decay)[0].isfinite().all()


def test_zero_order_hold_is_scipys():
    A, B = torch.complex(-draws(4).abs(), draws(4, seed=1)), torch.complex(draws(4, seed=2), draws(4, seed=3))
    ours = zero_order_hold(A, B, torch.tensor(0.3, dtype=F64))
    system = (np.diag(A.numpy()), B.numpy()[:, None], np.ones((1, 4)), np.zeros((1, 1)))
    wanted_A, wanted_B, *_ = signal.cont2discrete(system, 0.3, "zoh")
    np.testing.assert_allclose(torch.diag(ours[0]).numpy(), wanted_A, atol=1e-12)
    np.testing.assert_allclose(ours[1].numpy(), wanted_B[:, 0])


def test_zero_order_hold_of_an_integrator():
    A = torch.zeros(1, dtype=F64, requires_grad=True)
    kept, made = zero_order_hold(A, torch.full((1,), 2.0, dtype=F64), torch.tensor(0.5, dtype=F64))
    assert kept.item() == made.item() == 1.0
    assert torch.autograd.grad(made.sum(), A)[0].isfinite().all()


def test_kernel_and_convolution_are_the_simulated_system():
    A = 0.9 * torch.exp(1j * draws(4))
    B, C = torch.complex(draws(4, seed=2), draws(4, seed=3)), torch.complex(draws(4, seed=4), draws(4, seed=5))
    u = draws(30, seed=6)
    y = causal_convolution(u, diagonal_kernel(A, B, C, 30))
    state, wanted = np.zeros(4, dtype=complex), []
    for value in u.numpy():
        state = A.numpy() * state + B.numpy() * value
        wanted.append((C.numpy() @ state).real)
    np.testing.assert_allclose(y.numpy(), wanted)


def test_one_real_pole_is_scipys_filter():
    u, one = draws(30), torch.ones(1, dtype=torch.complex128)
    y = causal_convolution(u, diagonal_kernel(0.9 * one, one, 2 * one, 30))
    np.testing.assert_allclose(y.numpy(), signal.lfilter([2.0], [1.0, -0.9], u.numpy()))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="size"):
        chunked(*problem(), size=0)
    with pytest.raises(ValueError, match="length"):
        diagonal_kernel(*torch.ones(3, 4, dtype=torch.complex128), 0)
