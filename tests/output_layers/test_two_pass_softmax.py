import ctypes
import math
import os
import re

import numpy as np
import pytest
import torch
from scipy import special

from paperlab.output_layers import two_pass_softmax as module
from paperlab.output_layers.two_pass_softmax import (
    ALGORITHMS,
    LARGEST,
    Ext,
    NoCompilerError,
    compiled,
    exp_polynomial,
    ext_exp,
    merge,
    normalise,
    power_of_two,
    sum_pairs,
    two_pass_softmax,
    ulp_error,
)


def rows(n=5000, seed=0):
    """Rows that are awkward for a softmax, each float32."""
    z = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=z)
    return {
        "normal": normal,
        "uniform": torch.rand(n, generator=z) * 2e4 - 1e4,
        "equal, high": torch.full((n,), 1e4),
        "equal, low": torch.full((n,), -1e4),
        "rising": torch.linspace(-1e4, 1e4, n),
        "falling": torch.linspace(1e4, -1e4, n),
        "wide": 30 * normal,
        "wide, far out": 1e4 - 40 * normal.abs(),
        "one giant": torch.cat((normal, torch.tensor([9999.0]))),
        "magnitudes": normal.sign() * 10 ** (torch.rand(n, generator=z) * 30 - 26),
    }


def exact(x):
    return torch.from_numpy(special.softmax(x.double().numpy(), axis=-1))


@pytest.fixture(scope="module")
def kernels():
    try:
        return compiled()
    except NoCompilerError as error:
        pytest.skip(str(error).splitlines()[0])


# ---- the pair


def test_pair_is_frexp_of_the_exponential():
    x = torch.linspace(-700, 700, 20_001)
    m, n = ext_exp(x)
    whole = np.ldexp(m.double().numpy(), n.int().numpy())
    np.testing.assert_allclose(whole, np.exp(x.double().numpy()), rtol=2.4e-7)
    fraction, exponent = np.frexp(np.exp(x.double().numpy()))  # in [1/2, 1): ours is the same number, cut elsewhere
    assert set(n.int().numpy() - exponent) <= {-1, 0}
    np.testing.assert_allclose(m.double().numpy(), np.ldexp(fraction, exponent - n.int().numpy()), rtol=2.4e-7)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, LARGEST])
def test_mantissa_stays_in_its_interval(scale):
    m, n = ext_exp(torch.linspace(-scale, scale, 100_001))
    assert (n == n.round()).all()
    slack = 2 ** (1 / 24)  # what the rounding of x / ln 2 may add at the far end
    assert m.min() >= 2**-0.5 / slack
    assert m.max() <= 2**0.5 * slack


@pytest.mark.parametrize(("degree", "bound"), [(3, 1.1e-4), (4, 3e-6), (5, 1e-7), (6, 2.1e-9)])
def test_polynomial_is_near_the_best_there_is(degree, bound):
    # Nothing of this degree does better than half of h^(d+1) / (2^d (d+1)!), the error of the Chebyshev approximation.
    h = math.log(2) / 2
    t = np.linspace(-h, h, 5001)
    worst = np.abs(np.polyval(exp_polynomial(degree)[::-1], t) * np.exp(-t) - 1).max()
    assert h ** (degree + 1) / 2**degree / math.factorial(degree + 1) / 2 < worst < bound


def test_power_of_two_is_exact_and_vanishes():
    d = torch.arange(-126, 1).float()
    assert (power_of_two(d).double() == torch.from_numpy(np.ldexp(1.0, d.int().numpy()))).all()
    assert (power_of_two(torch.tensor([-127.0, -128.0, -1e9, -math.inf, math.nan])) == 0).all()


def test_merging_two_halves_is_the_whole():
    x = rows()["uniform"]
    halves = merge(sum_pairs(x[:1234]), sum_pairs(x[1234:]))
    whole = sum_pairs(x)
    assert halves.n == whole.n
    torch.testing.assert_close(halves.m, whole.m, rtol=1e-6, atol=0)
    m, n = map(float, whole)
    assert math.log(m) + n * math.log(2) == pytest.approx(special.logsumexp(x.double().numpy()), abs=2e-6)


def test_merge_has_a_zero():
    zero, e = Ext(torch.zeros(3), torch.full((3,), -math.inf)), ext_exp(torch.tensor([-50.0, 0.0, 900.0]))
    for both in (merge(zero, e), merge(e, zero)):
        assert (both.m == e.m).all()
        assert (both.n == e.n).all()
    assert (merge(zero, zero).m == 0).all()


@pytest.mark.parametrize("lanes", [1, 2, 64, 4096])
def test_lanes_change_rounding_only(lanes):
    x = rows(n=300)["wide"]
    torch.testing.assert_close(sum_pairs(x, lanes=lanes).m, sum_pairs(x).m, rtol=3e-6, atol=0)


# ---- the softmax


@pytest.mark.parametrize("name", rows(n=2))
def test_within_a_few_ulp_of_scipy(name):
    x = rows()[name]
    y = two_pass_softmax(x)
    assert ulp_error(y, exact(x)).max() <= 8
    assert (y.double() - exact(x)).abs()[exact(x) < 2.0**-126].sum() <= len(x) * 2.0**-126


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(5))
def test_within_a_few_ulp_up_to_the_guard(sign, seed):
    noise = 20 * torch.randn(4096, generator=torch.Generator().manual_seed(seed))
    x = (sign * (LARGEST - 60) + noise).clamp(-LARGEST, LARGEST)
    assert ulp_error(two_pass_softmax(x), exact(x)).max() <= 8


@pytest.mark.parametrize("shift", [100.0, -5000.0])
def test_shift_invariance(shift):
    x = torch.round(torch.randn(777, generator=torch.Generator().manual_seed(1)) * 64) / 64  # x + shift stays exact
    torch.testing.assert_close(two_pass_softmax(x + shift), two_pass_softmax(x), rtol=2e-6, atol=0)


def test_naive_softmax_overflows_where_ours_does_not():
    x = torch.tensor([100.0, 99.0, -100.0])
    naive = x.exp() / x.exp().sum()
    assert not naive.isfinite().all()
    torch.testing.assert_close(two_pass_softmax(x).double(), exact(x), rtol=1e-6, atol=1e-37)


def test_batches_are_rows():
    x = torch.randn(3, 4, 1500, generator=torch.Generator().manual_seed(2))
    assert (two_pass_softmax(x)[1, 2] == two_pass_softmax(x[1, 2])).all()
    assert (two_pass_softmax(torch.zeros(2, 1)) == 1).all()


def test_no_maximum_is_ever_taken_of_the_input():
    # Refusing the shortcut: the pair of an element does not depend on its neighbours.
    x = rows()["uniform"]
    together, alone = ext_exp(x), ext_exp(x[7:8])
    assert together.m[7] == alone.m[0]
    assert together.n[7] == alone.n[0] == torch.round(x[7] * float(np.float32(1 / math.log(2))))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 4e5, -3e38])
def test_rejects_what_it_cannot_do(bad):
    with pytest.raises(ValueError, match="x must"):
        two_pass_softmax(torch.tensor([0.0, bad]))


def test_rejects_other_bad_input():
    with pytest.raises(ValueError, match="x must not be empty"):
        two_pass_softmax(torch.zeros(0))
    with pytest.raises(ValueError, match="float32"):
        ext_exp(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="degree"):
        exp_polynomial(0)
    with pytest.raises(ValueError, match="lanes"):
        sum_pairs(torch.zeros(3), lanes=3)


@pytest.mark.gpu
def test_gpu_gives_the_same():
    for x in rows().values():
        on_gpu = two_pass_softmax(x.to(torch.device("cuda"))).cpu()
        torch.testing.assert_close(on_gpu, two_pass_softmax(x), rtol=3e-7, atol=2e-38)


# ---- the kernels


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 127, 128, 129, 8191, 8193, 50_001])
def test_kernels_agree_with_scipy(kernels, algorithm, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 2 + 300
    y = torch.full_like(x, math.nan)
    kernels(algorithm, x, y)
    assert ulp_error(y, exact(x)).max() <= 16


@pytest.mark.parametrize("name", rows(n=2))
def test_two_pass_kernel_on_awkward_rows(kernels, name):
    x = rows()[name]
    y = torch.full_like(x, math.nan)
    kernels("two_pass", x, y)
    assert ulp_error(y, exact(x)).max() <= 8


def test_kernel_and_torch_compute_the_same_bits(kernels):
    x = rows(n=1000)["uniform"]
    y = torch.empty_like(x)
    m = kernels("two_pass", x, y)
    same_sum = Ext(torch.tensor(m), sum_pairs(x).n)
    assert (normalise(x, same_sum) == y).all()


@pytest.mark.parametrize("n", [1, 129, 20_000])
def test_bytes_are_three_four_five(kernels, n):
    counting = compiled(count=True)
    counting.traffic()
    x, y = torch.randn(n), torch.empty(n)
    expected = {"two_pass": (2, 1), "three_pass_recompute": (3, 1), "three_pass_reload": (3, 2), "read_pass": (1, 0),
                "copy_pass": (1, 1), "scale_pass": (1, 1)}  # fmt: skip
    for name, (reads, writes) in expected.items():
        counting(name, x, y, times=3)
        assert counting.traffic() == (12 * n * reads, 12 * n * writes), name
    counting("online", x, y)
    assert counting.traffic() == (8 * n + 4, 4 * n)  # and one look at the first element
    kernels("two_pass", x, y)
    assert kernels.traffic() == (0, 0)


def test_the_counters_see_all_that_the_source_touches():
    # The callers' arrays may be touched by load() and store() only, or the count is worth nothing.
    source = re.sub(r"/\*.*?\*/", "", (module.Path(module.__file__).with_suffix(".c")).read_text(), flags=re.S)
    body = source[source.index("static ext block_pairs") :]
    assert not re.search(r"\b[xy]\s*\[|\*\s*[xy]\b(?![,\s]*(?:size_t|float|const))(?=\s*[;=+\-*/)])", body)
    assert "memcpy" not in body


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_kernels_notice_what_is_not_finite(kernels, algorithm, bad):
    x = torch.zeros(200)
    x[150] = bad
    with pytest.raises(ValueError, match="x must be finite"):
        kernels(algorithm, x, torch.empty(200))


def test_kernels_reject_bad_arrays(kernels):
    x = torch.zeros(64)
    with pytest.raises(ValueError, match="name"):
        kernels("four_pass", x, x.clone())
    with pytest.raises(ValueError, match="y must be as long"):
        kernels("two_pass", x, torch.zeros(63))
    with pytest.raises(ValueError, match="apart"):
        kernels("two_pass", x, x)
    with pytest.raises(ValueError, match="x must be contiguous float32"):
        kernels("two_pass", torch.zeros(128)[::2], torch.zeros(64))
    with pytest.raises(ValueError, match="y must be contiguous float32"):
        kernels("two_pass", x, torch.zeros(64, dtype=torch.float64))
    with pytest.raises(ValueError, match="times"):
        kernels("two_pass", x, x.clone(), times=0)


def test_no_compiler_is_an_error_and_not_a_fallback(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NoCompilerError, match="CC"):
        compiled.__wrapped__()
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(NoCompilerError, match="no luck"):
        compiled.__wrapped__()
    assert not list((tmp_path / "paperlab").glob("*.so"))


def test_a_compiled_library_is_kept(kernels, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.__wrapped__(degree=2)
    (library,) = (tmp_path / "paperlab").iterdir()
    stamp = os.stat(library).st_mtime_ns
    compiled.__wrapped__(degree=2)
    assert os.stat(library).st_mtime_ns == stamp
    compiled.__wrapped__(degree=3)
    assert len(list((tmp_path / "paperlab").iterdir())) == 2
    assert isinstance(ctypes.CDLL(str(library)), ctypes.CDLL)
