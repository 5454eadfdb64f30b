"""pavlovian-attention: against something independent (a closed form, a limit, an invariance, a library)."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, ortho_group
from torch.nn import functional as F

from paperlab.data.sphere import unit_vectors
from paperlab.devices import generator
from paperlab.memory.pavlovian_attention import (
    RULES,
    capacity,
    coherent_keys,
    condition,
    delta_sweeps,
    failure_bound,
    features,
    head_failures,
    heads_needed,
    linear_attention,
    majority_failure,
    network_failures,
    recalled,
    schedule,
    softmax_attention,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthonormal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(ortho_group.rvs(n, random_state=seed))


def test_linear_attention_against_plain_sums():
    q, k, v = normal(6, 4), normal(6, 4, seed=1), normal(6, 3, seed=2)
    by_hand = np.zeros((6, 3))
    for t in range(6):
        for j in range(t + 1):
            by_hand[t] += sum(k[j].numpy() * q[t].numpy()) * v[j].numpy()
    np.testing.assert_allclose(linear_attention(q, k, v), by_hand, atol=1e-12)


def test_hebbian_conditioning_is_causal_linear_attention():
    q, k, v = normal(2, 30, 8), normal(2, 30, 8, seed=1), normal(2, 30, 5, seed=2)
    S, answers = condition(k, v, q[:, :, None])
    torch.testing.assert_close(answers[:, :, 0], linear_attention(q, k, v))
    torch.testing.assert_close(S, torch.einsum("btv,btk->bvk", v, k))


def test_orthonormal_keys_are_recalled_exactly_by_hebb_and_by_delta():
    k, v = orthonormal(16), normal(16, 5)
    hebb, _ = condition(k, v)
    delta, _ = condition(k, v, rule="delta", rate=1.0)
    torch.testing.assert_close(k @ hebb.mT, v)
    torch.testing.assert_close(delta, hebb)


def test_interference_has_variance_m_minus_1_over_d():
    k, v = (unit_vectors(200, 33, n, generator=generator(n)) for n in (64, 48))
    power = ((k @ k.mT) @ v - v).square().sum(-1).mean().item()
    assert power == pytest.approx(32 / 64, rel=0.03)


def test_delta_rule_on_one_stimulus_is_a_geometric_approach():
    # Rescorla and Wagner: after n trials with food 1 - (1 - rate |k|^2)^n, and the same factor takes it down again.
    k = unit_vectors(7, generator=generator(3))
    keys, values = schedule([("A+", 6), ("A-", 4)], {"A": 1.3 * k})
    _, y = condition(keys, values, (1.3 * k).expand(10, 1, 7), rule="delta", rate=0.2)
    shrink = 1 - 0.2 * 1.69
    up = 1.69 * (1 - shrink ** np.arange(1, 7)) / 1.69
    np.testing.assert_allclose(y[:6, 0, 0], up, atol=1e-12)
    np.testing.assert_allclose(y[6:, 0, 0], up[-1] * shrink ** np.arange(1, 5), atol=1e-12)


def test_blocking_and_overshadowing_of_the_delta_rule_in_closed_form():
    A, B = orthonormal(2)
    stimuli = {"A": A, "B": B}
    for program, expected in (
        ([("A+", 500), ("AB+", 500)], [1.0, 0.0]),  # B is blocked
        ([("AB+", 500)], [0.5, 0.5]),  # and shares where it is not
        ([("A+", 500), ("B+", 500), ("AB+", 500)], [0.5, 0.5]),  # overexpectation
        ([("A+", 1), ("AB-", 1)] * 1000, [1.0, -1.0]),  # conditioned inhibition
    ):
        S, _ = condition(*schedule(program, stimuli), rule="delta", rate=0.1)
        torch.testing.assert_close(torch.stack([A, B]) @ S[0], torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_oja_is_the_delta_rule_with_keys_and_values_exchanged():
    k, v = unit_vectors(12, 5, generator=generator(0)), unit_vectors(12, 7, generator=generator(1))
    oja, _ = condition(k, v, rule="Oja", rate=0.3)
    mirrored, _ = condition(v, k, rule="delta", rate=0.3)
    torch.testing.assert_close(oja, mirrored.mT)
    torch.testing.assert_close(delta_sweeps(v, k, rate=0.3).mT, oja)


def test_oja_decays_only_when_it_is_driven():
    A = unit_vectors(9, generator=generator(0))
    tests = A.expand(60, 1, 9)
    _, y = condition(*schedule([("A+", 40), ("A-", 20)], {"A": A}), tests, rule="Oja", rate=0.2)
    np.testing.assert_allclose(y[:40, 0, 0], 1 - 0.8 ** np.arange(1, 41), atol=1e-12)
    assert (y[40:] == y[39]).all()


def test_bcm_holds_the_driven_response_where_the_threshold_is_met():
    # With food on every second step the threshold tends to a²/2, so the response a = 1 + V comes to rest near 2.
    A = unit_vectors(9, generator=generator(0))
    k, v = schedule([("A+", 4000)], {"A": A}, rest=1)
    S, _ = condition(k, v, rule="BCM", rate=0.003, tau=20.0)
    assert (S @ A).item() == pytest.approx(1.0, abs=0.08)


def test_bcm_first_step_by_hand():
    k, v = torch.tensor([[1.0, 2.0], [1.0, 0.0]]).double(), torch.tensor([[3.0], [-1.0]]).double()
    # a = 3, S = 0.1·9·(1, 2) = (0.9, 1.8), theta = 9/10; then a = -1 + 0.9 = -0.1, a(a - theta) = 0.1.
    S, _ = condition(k, v, rule="BCM", rate=0.1, tau=10.0)
    torch.testing.assert_close(S, torch.tensor([[0.91, 1.8]]).double())


def test_one_sweep_in_closed_form_is_the_loop_and_many_are_least_squares():
    k, v = unit_vectors(3, 10, 14, generator=generator(0)), normal(3, 10, 4)
    for rate in (0.3, 1.0):
        torch.testing.assert_close(delta_sweeps(k, v, rate=rate), condition(k, v, rule="delta", rate=rate)[0])
    again, _ = condition(k.repeat(1, 8, 1), v.repeat(1, 8, 1), rule="delta")
    torch.testing.assert_close(delta_sweeps(k, v, doublings=3), again)
    for i in range(3):
        solution = np.linalg.lstsq(k[i].numpy(), v[i].numpy(), rcond=None)[0]
        np.testing.assert_allclose(delta_sweeps(k, v, doublings=20)[i].mT, solution, atol=1e-8)


def test_softmax_limits_and_library():
    q, k, v = normal(4, 6), normal(9, 6, seed=1), normal(9, 3, seed=2)
    torch.testing.assert_close(softmax_attention(q, k, v, 0.7), F.scaled_dot_product_attention(q, k, v, scale=0.7))
    torch.testing.assert_close(softmax_attention(q, k, v, 1e-9), v.mean(0).expand(4, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(softmax_attention(k, k, v, 1e4), v[(k @ k.mT).argmax(-1)])
    unit = unit_vectors(1, 6, generator=generator(0))
    answer = softmax_attention(unit, unit, torch.ones(1, 1).double(), 2.0, empty=True)
    assert answer.item() == pytest.approx(math.e**2 / (1 + math.e**2))


def test_relu_overlap_is_the_arc_cosine_kernel():
    g = generator(0)
    x, z = (torch.randn(400_000, generator=g, dtype=torch.float64) for _ in range(2))
    for s in (0.0, 0.5, 0.9):
        y = s * x + math.sqrt(1 - s**2) * z
        closed = (math.sqrt(1 - s**2) + s * (math.pi - math.acos(s))) / math.pi
        assert (features(x, "ReLU") @ features(y, "ReLU")).item() == pytest.approx(closed, abs=0.005)


@pytest.mark.parametrize(("m", "d"), [(1, 4), (5, 16), (16, 16)])
def test_coherent_keys_have_the_gram_matrix_asked_for(m, d):
    k = coherent_keys(m, d, 0.25, generator(1))
    gram = k @ k.mT
    torch.testing.assert_close(gram, torch.eye(m).double() * 0.75 + 0.25)


def test_worst_case_error_adds_up_in_amplitude():
    k, v = coherent_keys(9, 64, 1 / 8, generator(0)), unit_vectors(1, 5, generator=generator(1)).expand(9, -1)
    error = (k @ condition(k, v)[0].mT - v).norm(dim=-1)
    torch.testing.assert_close(error, torch.ones(9).double())  # (9 - 1) / sqrt(64)


def test_criteria_of_recall():
    v = torch.eye(3).double()
    y = torch.tensor([[1.49, 0.0, 0.0], [0.0, 1.0, 0.51], [3.0, 3.1, 3.2]]).double()
    assert recalled(y, v).tolist() == [True, False, False]
    assert recalled(y, v, "cosine").tolist() == [True, False, False]
    assert recalled(torch.tensor([[9.0, 3.0, 0.0]]).double(), v[:1], "cosine").item()  # length does not matter
    assert recalled(y, v, "nearest").tolist() == [True, True, True]


@pytest.mark.parametrize("true", [0, 1, 2, 7, 100])
def test_capacity_finds_the_threshold(true):
    asked = []
    assert capacity(lambda m: asked.append(m) or float(m <= true)) == true
    assert len(asked) <= 2 * math.log2(true + 2) + 2
    assert capacity(lambda m: 1.0, most=37) == 37
    assert true * 0.9 - 1 <= capacity(lambda m: float(m <= true), rough=0.1) <= true


def test_majority_against_binomial_and_under_hoeffding():
    for heads in (1, 2, 5, 10, 33):
        for p in (0.0, 0.1, 0.3, 0.45):
            exact = sum(binom.pmf(x, heads, p) for x in range(heads + 1) if 2 * x >= heads)
            assert majority_failure(p, heads) == pytest.approx(exact)
            assert exact <= failure_bound(p, heads, 1) + 1e-12
    assert failure_bound(0.3, 25, 4) == pytest.approx(4 * math.exp(-2))
    enough = heads_needed(0.3, 12, 0.01)
    assert failure_bound(0.3, enough, 12) <= 0.01 < failure_bound(0.3, enough - 1, 12)


def test_networks_of_independent_heads_fail_as_often_as_the_binomial_says():
    failed = head_failures(60, 12, 5, 15, 64, 64, shared=0.0, generator=generator(0))
    p = failed.double().mean().item()
    layer = majority_failure(p, 5)
    for layers in (1, 3, 6):
        found = network_failures(failed, layers, 5).double().mean().item()
        assert found == pytest.approx(1 - (1 - layer) ** layers, abs=0.03)


def test_a_layer_of_identical_heads_is_one_head_and_a_network_is_lost_with_any_layer():
    failed = torch.zeros(1, 4, 3, 2, dtype=torch.bool)
    failed[0, 2, :2, 0] = True  # two of three heads of layer 2 fail at item 0, one at item 1
    failed[0, 2, 0, 1] = True
    assert network_failures(failed, 4, 3).tolist() == [[[True, False]]]
    assert network_failures(failed, 2, 3).tolist() == [[[False, False], [True, False]]]
    assert network_failures(failed, 4, 1).tolist() == [[[True, True]]]


def test_schedule_adds_stimuli_and_inserts_rests():
    A, B = torch.eye(2).double()
    k, v = schedule([("A+", 1), ("AB-", 2), ("+", 1)], {"A": A, "B": B}, rest=1)
    assert k.tolist() == [[1, 0], [0, 0], [1, 1], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0]]
    assert v[:, 0].tolist() == [1, 0, 0, 0, 0, 0, 1, 0]


def test_rests_change_nothing_but_bcm():
    A = unit_vectors(6, generator=generator(0))
    for rule in RULES:
        S = [condition(*schedule([("A+", 9)], {"A": A}, rest=r), rule=rule, rate=0.1)[0] for r in (0, 3)]
        assert torch.allclose(*S) == (rule != "BCM")


def test_heads_that_share_their_keys_fail_together():
    p, voted = {}, {}
    for s in (0.0, 1.0):
        failed = head_failures(60, 1, 25, 15, 64, 64, shared=s, generator=generator(0))
        p[s], voted[s] = failed.double().mean().item(), network_failures(failed, 1, 25).double().mean().item()
    assert p[1.0] == pytest.approx(p[0.0], abs=0.05)
    assert voted[0.0] < p[0.0] / 3
    assert voted[1.0] == pytest.approx(p[1.0], abs=0.08)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda k, v: condition(k, v, rule="Pavlov"), "rule"),
        (lambda k, v: condition(k, v, rate=0.0), "rate"),
        (lambda k, v: condition(k, v, tau=0.5), "tau"),
        (lambda k, v: condition(k * math.nan, v), "k must be finite"),
        (lambda k, v: linear_attention(k, k, v / 0), "v must be finite"),
        (lambda k, v: softmax_attention(k, k, v, -1.0), "beta"),
        (lambda k, v: delta_sweeps(k, v, doublings=-1), "doublings"),
        (lambda k, v: features(k, "tanh"), "kind"),
        (lambda k, v: recalled(v, v, "taste"), "criterion"),
        (lambda k, v: coherent_keys(5, 4, 0.1, generator(0)), "m must"),
        (lambda k, v: coherent_keys(3, 4, 1.0, generator(0)), "coherence"),
        (lambda k, v: capacity(lambda m: 1.0, share=2.0), "share"),
        (lambda k, v: failure_bound(0.6, 3, 1), "p must"),
        (lambda k, v: heads_needed(0.5, 3, 0.1), "p must"),
        (lambda k, v: majority_failure(0.2, 0), "heads"),
        (lambda k, v: schedule([("A", 3)], {"A": k[0]}), "sign"),
        (lambda k, v: schedule([("C+", 3)], {"A": k[0]}), "C must"),
        (lambda k, v: network_failures(torch.zeros(1, 2, 3, 4, dtype=torch.bool), 3, 1), "layers"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call(normal(3, 4), normal(3, 2, seed=1))
