r"""Softmax in two passes over memory: keep $e^x$ as a pair of floats and nothing can overflow.

Softmax reads its input three times, and the first time only to find the largest element, so that no exponential
overflows. On a row that no cache holds, that pass costs what it moves: a quarter of all traffic. Keep $e^x$ as
$m \cdot 2^n$, with both $m$ and $n$ floats, and the sum can be taken at once: the first pass is gone.

The readable form is torch, for any device. The same arithmetic in C, beside it, is compiled when it is first asked for.

Dukhan and Ablavatski (2020), https://arxiv.org/abs/2001.04438, sections 3 to 5.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from paperlab.checks import require_at_least, require_between, require_finite, require_nonempty, require_one_of

LN2 = (float.fromhex("0x1.62e43p-1"), -float.fromhex("0x1.05c61p-29"))  # high part with 21 bits, and the rest
LARGEST = 2.0**19 * math.log(2)  # 363,409: up to here float32 knows x / ln 2 to 1/32, and the error stays a few ulp
ALGORITHMS = ("two_pass", "online", "three_pass_recompute", "three_pass_reload")
PASSES = ("read_pass", "copy_pass", "scale_pass")


class Ext(NamedTuple):
    r"""A non-negative number as $m \cdot 2^n$, in two floats; zero is $(0, -\infty)$."""

    m: Float[Tensor, "..."]
    n: Float[Tensor, "..."]


@lru_cache
def exp_polynomial(degree: int = 5) -> tuple[float, ...]:
    r"""Coefficients, constant term first, of $p(t) \approx e^t$ on $[-\frac{\ln 2}2, \frac{\ln 2}2]$ with $p(0) = 1$.

    The largest relative error is made as small as it gets, by Lawson's iteration: least squares with weights that grow
    where the error is largest.

    Raises:
        ValueError: ``degree`` is less than 1.
    """
    require_at_least(1, degree=degree)
    t = math.log(2) / 2 * np.cos(np.pi * np.arange(401) / 400)
    powers = t[:, None] ** np.arange(1, degree + 1) / np.exp(t)[:, None]
    target, weight = -np.expm1(-t), np.ones_like(t)
    for _ in range(200):
        root = np.sqrt(weight)
        c = np.linalg.lstsq(root[:, None] * powers, root * target, rcond=None)[0]
        error = np.abs(powers @ c - target)
        if error.max() < 1e-14:  # as good as float64 gets
            break
        weight *= error / (weight @ error)
    return (1.0, *map(float, c))


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a * b + c`` as the fused instruction gives it, up to rare ties: float64 holds the product exactly."""
    return (a.double() * b + c).to(a.dtype)


def ext_exp(x: Float[Tensor, "..."], *, ln2: tuple[float, ...] = LN2, degree: int = 5) -> Ext:
    r"""$e^x$ as a pair that cannot overflow (algorithm ExtExp).

    $n = \mathrm{round}(x \log_2 e)$, $t = x - n \ln 2$ with $\ln 2$ in several parts (Cody and Waite), $m = p(t)$.
    So $m \in [\frac{\sqrt 2}2, \sqrt 2]$, but for a slack of 3 percent when $|x|$ comes near `LARGEST`; beyond,
    float32 cannot say which $n$ is the nearest, and $t$ leaves the interval where the polynomial is good.

    Raises:
        ValueError: ``x`` is not float32, or ``degree`` is less than 1.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"x must be float32, got {x.dtype}")
    n = torch.round(x * float(np.float32(math.log2(math.e))))
    t = x
    for part in ln2:
        t = _fma(n, -part, t)
    *rest, top = map(float, np.float32(exp_polynomial(degree)))
    m = torch.full_like(t, top)
    for c in reversed(rest):
        m = _fma(m, t, c)
    return Ext(m, n)


def power_of_two(d: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """$2^d$ for whole $d \\le 0$, by writing the exponent's bits; 0 from $d = -127$ down, and for NaN."""
    exponent = torch.where(d > -127, d, -127.0).to(torch.int32)
    return ((exponent + 127) << 23).view(torch.float32)


def merge(a: Ext, b: Ext) -> Ext:
    r"""The sum of two pairs: $n' = \max(n_a, n_b)$, $m' = m_a 2^{n_a - n'} + m_b 2^{n_b - n'}$.

    The differences are never positive, so a term can vanish but nothing can overflow. Associative up to rounding, with
    $(0, -\infty)$ as its zero: any number of accumulators may run side by side and be merged at the end.
    """
    top = torch.maximum(a.n, b.n)
    return Ext(_fma(b.m, power_of_two(b.n - top).double(), a.m * power_of_two(a.n - top)), top)


def sum_pairs(x: Float[Tensor, "*rows n"], lanes: int = 1024) -> Ext:
    """Pass 1: the sum of $e^x$ along the last axis, reading every element once, in ``lanes`` accumulators side by side.

    Raises:
        ValueError: ``lanes`` is not a power of two, or ``x`` is not float32.
    """
    if lanes < 1 or lanes & (lanes - 1):
        raise ValueError(f"lanes must be a power of two, got {lanes}")
    total = Ext(x.new_zeros(*x.shape[:-1], lanes), x.new_full((*x.shape[:-1], lanes), -math.inf))
    for block in x.split(lanes, dim=-1):
        k = block.shape[-1]  # the last block may be short: its missing lanes stay as they are
        head = merge(Ext(total.m[..., :k], total.n[..., :k]), ext_exp(block))
        total = Ext(*(torch.cat((new, old[..., k:]), -1) for new, old in zip(head, total, strict=True)))
    while lanes > 1:
        lanes //= 2
        total = merge(*(Ext(total.m[..., s], total.n[..., s]) for s in (slice(lanes), slice(lanes, None))))
    return Ext(total.m[..., 0], total.n[..., 0])


def normalise(x: Float[Tensor, "*rows n"], total: Ext) -> Float[Tensor, "*rows n"]:
    r"""Pass 2: $y_i = m_i \cdot \frac1{m_s} \cdot 2^{n_i - n_s}$, with $(m_i, n_i)$ computed again."""
    e = ext_exp(x)
    return e.m * total.m.reciprocal()[..., None] * power_of_two(e.n - total.n[..., None])


def two_pass_softmax(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Softmax of float32 along the last axis without a pass for the maximum. Results below $2^{-126}$ may be 0.

    Raises:
        ValueError: ``x`` is empty, not float32, not finite, or somewhere larger than `LARGEST` in magnitude.
    """
    require_nonempty(x=x)
    require_finite(x=x)
    require_between(-LARGEST, LARGEST, x=x)
    return normalise(x, sum_pairs(x))


def ulp_error(y: Float[Tensor, "..."], exact: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Error of ``y`` in units in the last place of the float32 nearest to ``exact``; 0 where that is subnormal."""
    spacing = torch.from_numpy(np.spacing(exact.cpu().numpy().astype(np.float32)).astype(np.float64))
    error = (y.double().cpu() - exact.cpu()).abs() / spacing
    return torch.where(exact.cpu() >= 2.0**-126, error, 0.0)


class NoCompilerError(RuntimeError):
    """There is no C compiler, or it refuses: nothing can be timed."""


class Kernels:
    """The C kernels, compiled for this processor: `ALGORITHMS`, and `PASSES` that only move memory.

    They look at no value before they use it (that would be one more pass); an input that is NaN or infinite shows in
    the normaliser, and raises after the fact.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.repeat.restype = ctypes.c_float

    def __call__(self, name: str, x: Float[Tensor, "_"], y: Float[Tensor, "_"], times: int = 1) -> float:
        """Run a kernel from ``x`` into ``y``, ``times`` times; returns what it summed.

        Raises:
            ValueError: an unknown name; not float32 on the CPU, contiguous, of one length and apart;
                empty; ``times`` below 1; not finite.
        """
        require_one_of(ALGORITHMS + PASSES, name=name)
        require_at_least(1, times=times)
        for label, v in {"x": x, "y": y}.items():
            if v.dtype != torch.float32 or v.device.type != "cpu" or not v.is_contiguous():
                raise ValueError(f"{label} must be contiguous float32 on the CPU, got {v.dtype} on {v.device}")
            require_nonempty(**{label: v})
        if len(x) != len(y) or abs(x.data_ptr() - y.data_ptr()) < 4 * len(x):
            raise ValueError(f"y must be as long as x and apart from it, got lengths {len(x)} and {len(y)}")
        pointers = (ctypes.c_void_p(v.data_ptr()) for v in (x, y))
        sizes = (ctypes.c_size_t(k) for k in (len(x), times))
        found = self._library.repeat(getattr(self._library, name), *pointers, *sizes)
        if name in ALGORITHMS and not math.isfinite(found):
            raise ValueError("x must be finite: the normaliser is not")
        return found

    def traffic(self) -> tuple[int, int]:
        """Bytes read and written since the last call; always (0, 0) unless built with ``count=True``."""
        counts = (ctypes.c_size_t * 2)()
        self._library.take_counts(counts)
        return counts[0], counts[1]


@lru_cache
def compiled(*, degree: int = 5, count: bool = False, lanes: int = 16) -> Kernels:
    """Compile the kernels, or take them from the user's cache (its key: source, options, compiler and processor).

    ``degree`` sets the price of an exponential; ``count`` builds in the byte counters; ``lanes`` as in the C file.

    Raises:
        NoCompilerError: no compiler is found (`CC` or `cc`), or it fails.
    """
    source = Path(__file__).with_suffix(".c")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NoCompilerError("no C compiler: install one as `cc`, or name it in the environment variable CC")
    coefficients = ",".join(f"{c!r}f" for c in exp_polynomial(degree))
    options = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared",
               f"-DCOEFFICIENTS={coefficients}", f"-DLANES={lanes}", *["-DCOUNT"] * count]  # fmt: skip
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    cpu = Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))] \
        if cpu.exists() else []  # fmt: skip
    key = repr((source.read_text(), options, version, platform.machine(), platform.processor(), sorted(set(features))))
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "paperlab"
    library = folder / f"two-pass-softmax-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")  # two processes may compile at once
        done = subprocess.run([compiler, *options, "-o", unfinished, source, "-lm"], capture_output=True, text=True)
        if done.returncode:
            raise NoCompilerError(f"{compiler} failed:\n{done.stderr[-2000:]}")
        unfinished.replace(library)
    return Kernels(library)


def last_level_cache() -> int | None:
    """Bytes of the largest cache that the system admits to, None where it says nothing."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * {"K": 2**10, "M": 2**20}[s[-1]] for s in sizes if s[-1] in "KM"), default=None)
