/* Softmax over one long row, four ways, and the bare passes over memory that bound them.
 *
 * Every way uses the same e^x (ext_exp), the same number of independent accumulators (LANES) and takes as many elements
 * an accumulator at a time (DEPTH), so that what differs between them is the number of passes. There are no intrinsics:
 * the loops over lanes are written so that the compiler vectorises them for whatever processor it finds (-O3
 * -march=native; it may not reorder a floating-point sum by itself, hence the lanes). LANES is one wide vector, so that
 * memory is touched strictly in order: with 64 lanes a block is read in strides, and the reading passes, which are the
 * baselines' burden, take twice as long once they wait for memory.
 *
 * The caller's memory is touched by load() and store() alone. Compiled with -DCOUNT these count the bytes.
 * COEFFICIENTS, from the constant term up, come from the Python side, and with them the degree. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef LANES
#define LANES 16
#endif
#define DEPTH 8
#define BLOCK 8192
#define UNROLL _Pragma("GCC unroll 16")   /* short loops inside a loop over lanes must be gone before it is vectorised */

static size_t bytes_read, bytes_written;
#ifdef COUNT
#define COUNTED(statement) statement
#else
#define COUNTED(statement)
#endif

static inline float load(const float *p) { COUNTED(bytes_read += sizeof *p;) return *p; }
static inline void store(float *p, float v) { COUNTED(bytes_written += sizeof *p;) *p = v; }
static inline float larger(float a, float b) { return a > b ? a : b; }

/* ---- e^x as m * 2^n --------------------------------------------------------------------------------------------- */

typedef struct { float m, n; } ext;

static inline ext ext_exp(float x) {
    static const float c[] = {COEFFICIENTS};
    float n = rintf(x * 0x1.715476p+0f);    /* round(x / ln 2) */
    float t = fmaf(n, -0x1.62e43p-1f, x);   /* Cody and Waite: x - n ln 2 with ln 2 in two parts */
    t = fmaf(n, 0x1.05c61p-29f, t);
    enum { DEGREE = sizeof c / sizeof *c - 1 };
    float m = c[DEGREE];
    UNROLL for (int k = DEGREE - 1; k >= 0; k--) m = fmaf(m, t, c[k]);   /* Horner */
    return (ext){m, n};
}

/* 2^d for a whole d <= 0: the exponent bits themselves. Exactly 0 from d = -127 down, and for NaN. */
static inline float power_of_two(float d) {
    float biased = larger(d, -127.0f) + 0x1.8000fep23f;   /* d + 127 now stands in the lowest bits */
    uint32_t bits;
    memcpy(&bits, &biased, sizeof bits);
    bits <<= 23;
    memcpy(&biased, &bits, sizeof bits);
    return biased;
}

static inline float exp_nonpositive(float x) { ext e = ext_exp(x); return e.m * power_of_two(e.n); }

static inline ext merge(ext a, ext b) {
    float top = larger(a.n, b.n);
    return (ext){fmaf(b.m, power_of_two(b.n - top), a.m * power_of_two(a.n - top)), top};
}

/* ---- one pass over memory each ----------------------------------------------------------------------------------
 *
 * A sum over a block of at most BLOCK elements runs in lanes; longer rows are halved and the halves' sums added, because
 * float32 accumulators that run over millions of elements drown what they add. All algorithms do the same. */

static inline size_t half_of(size_t N) { return (N / 2 + BLOCK - 1) / BLOCK * BLOCK; }

static ext block_pairs(const float *restrict x, size_t N) {
    float m[LANES], n[LANES];
    for (int l = 0; l < LANES; l++) m[l] = 0.0f, n[l] = -INFINITY;
    size_t i = 0;
    for (; i + DEPTH * LANES <= N; i += DEPTH * LANES)   /* DEPTH elements share one rescaling of the accumulator */
        for (int l = 0; l < LANES; l++) {
            ext e[DEPTH];
            float top = n[l], sum = 0.0f;
            UNROLL for (int k = 0; k < DEPTH; k++) {
                e[k] = ext_exp(load(x + i + k * LANES + l));
                top = larger(e[k].n, top);
            }
            UNROLL for (int k = 0; k < DEPTH; k++) sum = fmaf(e[k].m, power_of_two(e[k].n - top), sum);
            m[l] = fmaf(m[l], power_of_two(n[l] - top), sum);
            n[l] = top;
        }
    for (; i < N; i += LANES)
        for (size_t l = 0; l < LANES && i + l < N; l++) {
            ext s = merge((ext){m[l], n[l]}, ext_exp(load(x + i + l)));
            m[l] = s.m, n[l] = s.n;
        }
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) {
            ext s = merge((ext){m[l], n[l]}, (ext){m[l + half], n[l + half]});
            m[l] = s.m, n[l] = s.n;
        }
    return (ext){m[0], n[0]};
}

/* Pass 1 of the two-pass algorithm: the sum of e^x as a pair. */
static ext sum_pairs(const float *x, size_t N) {
    if (N <= BLOCK) return block_pairs(x, N);
    ext first = sum_pairs(x, half_of(N));
    return merge(first, sum_pairs(x + half_of(N), N - half_of(N)));
}

/* The largest element. Also the bare reading pass: one comparison an element is next to nothing. */
static float largest(const float *restrict x, size_t N) {
    float top[LANES];
    for (int l = 0; l < LANES; l++) top[l] = -INFINITY;
    size_t i = 0;
    for (; i + DEPTH * LANES <= N; i += DEPTH * LANES)
        for (int l = 0; l < LANES; l++)
            UNROLL for (int k = 0; k < DEPTH; k++) top[l] = larger(load(x + i + k * LANES + l), top[l]);
    for (; i < N; i++) top[0] = larger(load(x + i), top[0]);
    for (int l = 1; l < LANES; l++) top[0] = larger(top[l], top[0]);
    return top[0];
}

static inline float total(float *s) {
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) s[l] += s[l + half];
    return s[0];
}

static inline float block_exp(const float *restrict x, float *restrict y, size_t N, float mu) {
    float s[LANES];
    for (int l = 0; l < LANES; l++) s[l] = 0.0f;
    size_t i = 0;
    for (; i + DEPTH * LANES <= N; i += DEPTH * LANES)
        for (int l = 0; l < LANES; l++) {
            float sum = 0.0f;
            UNROLL for (int k = 0; k < DEPTH; k++) {
                float e = exp_nonpositive(load(x + i + k * LANES + l) - mu);
                if (y) store(y + i + k * LANES + l, e);
                sum += e;
            }
            s[l] += sum;
        }
    for (; i < N; i++) {
        float e = exp_nonpositive(load(x + i) - mu);
        if (y) store(y + i, e);
        s[i % LANES] += e;
    }
    return total(s);
}

/* The sum of e^(x - mu). */
static float sum_exp(const float *x, size_t N, float mu) {
    if (N <= BLOCK) return block_exp(x, NULL, N, mu);
    float first = sum_exp(x, half_of(N), mu);
    return first + sum_exp(x + half_of(N), N - half_of(N), mu);
}

/* The same, and e^(x - mu) is kept in y. */
static float store_exp(const float *x, float *y, size_t N, float mu) {
    if (N <= BLOCK) return block_exp(x, y, N, mu);
    float first = store_exp(x, y, half_of(N), mu);
    return first + store_exp(x + half_of(N), y + half_of(N), N - half_of(N), mu);
}

/* Online softmax (Milakov and Gimelshein): the maximum and the sum in one pass, the sum rescaled when the maximum rises. */
typedef struct { float sum, mu; } shifted;

static shifted block_online(const float *restrict x, size_t N, float first) {   /* first: any element, to begin with */
    float s[LANES], top[LANES], mu = first;
    for (int l = 0; l < LANES; l++) s[l] = 0.0f, top[l] = first;
    size_t i = 0;
    for (; i + DEPTH * LANES <= N; i += DEPTH * LANES)
        for (int l = 0; l < LANES; l++) {
            float v[DEPTH], now = top[l], sum = 0.0f;
            UNROLL for (int k = 0; k < DEPTH; k++) v[k] = load(x + i + k * LANES + l), now = larger(v[k], now);
            UNROLL for (int k = 0; k < DEPTH; k++) sum += exp_nonpositive(v[k] - now);
            s[l] = fmaf(s[l], exp_nonpositive(top[l] - now), sum);
            top[l] = now;
        }
    for (; i < N; i++) {
        int l = i % LANES;
        float v = load(x + i), now = larger(v, top[l]);
        s[l] = s[l] * exp_nonpositive(top[l] - now) + exp_nonpositive(v - now);
        top[l] = now;
    }
    for (int l = 0; l < LANES; l++) mu = larger(top[l], mu);
    for (int l = 0; l < LANES; l++) s[l] *= exp_nonpositive(top[l] - mu);
    return (shifted){total(s), mu};
}

static shifted sum_online(const float *x, size_t N, float first) {
    if (N <= BLOCK) return block_online(x, N, first);
    shifted a = sum_online(x, half_of(N), first), b = sum_online(x + half_of(N), N - half_of(N), first);
    float mu = larger(a.mu, b.mu);
    return (shifted){a.sum * exp_nonpositive(a.mu - mu) + b.sum * exp_nonpositive(b.mu - mu), mu};
}

static void scaled_exp(const float *restrict x, float *restrict y, size_t N, float mu, float scale) {
    for (size_t i = 0; i < N; i++) store(y + i, exp_nonpositive(load(x + i) - mu) * scale);
}

static void rescale(float *restrict y, size_t N, float scale) {
    for (size_t i = 0; i < N; i++) store(y + i, load(y + i) * scale);
}

/* ---- the algorithms: each returns its normaliser, which is NaN when an input was NaN or infinite ---------------- */

float two_pass(const float *restrict x, float *restrict y, size_t N) {
    ext sum = sum_pairs(x, N);
    float scale = 1.0f / sum.m;
    for (size_t i = 0; i < N; i++) {
        ext e = ext_exp(load(x + i));
        store(y + i, e.m * scale * power_of_two(e.n - sum.n));
    }
    return sum.m;
}

float online(const float *restrict x, float *restrict y, size_t N) {
    shifted s = sum_online(x, N, load(x));
    scaled_exp(x, y, N, s.mu, 1.0f / s.sum);
    return s.sum;
}

float three_pass_recompute(const float *restrict x, float *restrict y, size_t N) {
    float mu = largest(x, N), sum = sum_exp(x, N, mu);
    scaled_exp(x, y, N, mu, 1.0f / sum);
    return sum;
}

float three_pass_reload(const float *restrict x, float *restrict y, size_t N) {
    float mu = largest(x, N), sum = store_exp(x, y, N, mu);
    rescale(y, N, 1.0f / sum);
    return sum;
}

/* ---- the roofline: the same passes with (next to) no arithmetic ------------------------------------------------- */

float read_pass(const float *restrict x, float *restrict y, size_t N) { (void)y; return largest(x, N); }

float copy_pass(const float *restrict x, float *restrict y, size_t N) {
    for (size_t i = 0; i < N; i++) store(y + i, load(x + i) * 0.5f);   /* a bare copy would become memcpy */
    return 0.0f;
}

float scale_pass(const float *restrict x, float *restrict y, size_t N) { (void)x; rescale(y, N, 0.999f); return 0.0f; }

/* ---- for the caller --------------------------------------------------------------------------------------------- */

typedef float kernel(const float *restrict, float *restrict, size_t);

/* The same kernel many times, so that a call from Python costs nothing next to a small array. */
float repeat(kernel *run, const float *x, float *y, size_t N, size_t times) {
    float last = 0.0f;
    for (size_t k = 0; k < times; k++) last = run(x, y, N);
    return last;
}

void take_counts(size_t *counts) {
    counts[0] = bytes_read, counts[1] = bytes_written;
    bytes_read = bytes_written = 0;
}
