/* Adam on some rows: what it does to those that get no gradient, many steps at once, and its moments of the others. */
#include "common.h"
#include <math.h>

enum { LANES = 16, SIZES = 7 }; /* block lengths 1, 2, 4, ... 64 */
#define AT_REST 1e-10f
#define AHEAD 8 /* rows that are fetched while others are computed */

/* What a block of 2^j steps needs: see `kernels.IdleCourse`. */
typedef struct {
    const float *alpha, *root, *powers; /* [entries], [entries], [4 * SIZES] */
    const float *fades, *grows; /* [steps] each */
    int64_t steps;
    int shift; /* an entry is of 2^shift steps */
    float beta1, one_minus_beta1, beta2, eps, l2, gamma, most;
} Course;

/* The number of steps from `done` on that are taken at once: 2^j; rows had their last gradient `age` steps ago. */
static int block_of(int64_t done, int64_t age, int64_t left) {
    int64_t most = age >> 3 < done >> 4 ? age >> 3 : done >> 4;
    most = most > 64 ? 64 : most < 1 ? 1 : most;
    most = most > left ? left : most;
    return 63 - __builtin_clzll((uint64_t)most);
}

/* One step without a gradient, as `torch.optim.Adam` makes it. */
static inline __attribute__((always_inline)) void one_step(float *restrict w, float *restrict m, float *restrict v,
                                                           float alpha, float root, const Course *c) {
    float beta2 = c->powers[2 * SIZES], one_minus_beta2 = c->powers[3 * SIZES];
_Pragma("omp simd")
    for (int i = 0; i < LANES; i++) {
        float g = c->l2 * w[i];
        m[i] = c->beta1 * m[i] + c->one_minus_beta1 * g;
        v[i] = beta2 * v[i] + one_minus_beta2 * (g * g);
        w[i] = w[i] - alpha * m[i] / (sqrtf(v[i]) * root + c->eps);
    }
}

/* 2^j steps, j > 0, with one value of the root: then (w, m) follow a matrix, which is squared j times. Returns whether
 * all lanes are at rest. */
static inline __attribute__((always_inline)) int many_steps(float *restrict w, float *restrict m, float *restrict v,
                                                            int j, float alpha, float root, const Course *c) {
    float half = c->powers[j], half_l2 = c->powers[SIZES + j];
    float whole = c->powers[2 * SIZES + j], whole_l2 = c->powers[3 * SIZES + j];
    int moving[LANES];
    float q[LANES], p00[LANES], p01[LANES], p10[LANES], p11[LANES];
_Pragma("omp simd")
    for (int i = 0; i < LANES; i++) {
        float middle = half * v[i] + half_l2 * (w[i] * w[i]);
        float rate = alpha / (sqrtf(middle) * root + c->eps);
        q[i] = rate > c->most ? c->most : rate;
        p00[i] = 1.0f - q[i] * c->gamma, p01[i] = -q[i] * c->beta1, p10[i] = c->gamma, p11[i] = c->beta1;
    }
    for (int n = 0; n < j; n++)
_Pragma("omp simd")
        for (int i = 0; i < LANES; i++) {
            float cross = p01[i] * p10[i], trace = p00[i] + p11[i];
            p00[i] = p00[i] * p00[i] + cross, p11[i] = p11[i] * p11[i] + cross;
            p01[i] = p01[i] * trace, p10[i] = p10[i] * trace;
        }
_Pragma("omp simd")
    for (int i = 0; i < LANES; i++) {
        float x = w[i], y = p00[i] * x + p01[i] * m[i], z = p10[i] * x + p11[i] * m[i];
        v[i] = whole * v[i] + whole_l2 * (x * x + x * y + y * y);
        float far = fabsf(q[i] * z), height = c->l2 == 0.0f ? 0.0f : fabsf(y);
        int at_rest = (far <= AT_REST) & (height <= AT_REST);
        m[i] = at_rest ? 0.0f : z;
        w[i] = at_rest & (c->l2 != 0.0f) ? 0.0f : y;
        moving[i] = !at_rest;
    }
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= moving[i];
    return !any;
}

/* Bring the lanes from step `last` to step `now`. */
static void idle_lanes(float *restrict w, float *restrict m, float *restrict v, int64_t last, int64_t now,
                       const Course *c) {
    int rest = 0;
    for (int64_t done = last; done < now;) {
        int j = block_of(done, done - last, now - done);
        if (rest) { /* neither w nor m changes any more, and v only fades: what the code below would give */
            float whole = c->powers[2 * SIZES + j];
            for (int i = 0; i < LANES; i++) v[i] = whole * v[i];
        } else {
            int64_t at = (done + ((1LL << j) - 1) / 2) >> c->shift;
            if (j == 0) {
                one_step(w, m, v, c->alpha[at], c->root[at], c);
            } else {
                int64_t next = (done + (1LL << j) / 2) >> c->shift;
                float alpha = (c->alpha[at] + c->alpha[next]) * 0.5f, root = (c->root[at] + c->root[next]) * 0.5f;
                rest = many_steps(w, m, v, j, alpha, root, c);
            }
        }
        done += 1LL << j;
    }
}

/* A gap without L2: w -= way * m / (sqrt(v) + eps), then the moments shrink. */
typedef struct {
    float way, eps, first, second;
} Coast;

/* Summed lane by lane, so that the order of the sum does not depend on the width of the processor's vectors. */
static Coast coast_of(int64_t last, int64_t now, const Course *c) {
    int64_t gap = now - last, steps = gap < c->steps ? gap : c->steps;
    float ways[LANES] = {0}, spreads[LANES] = {0};
    for (int64_t k = 0; k < steps; k += LANES) {
        float alpha[LANES] = {0}, root[LANES];
        int width = steps - k < LANES ? (int)(steps - k) : LANES;
        for (int i = 0; i < LANES; i++) root[i] = 1.0f;
        if (c->shift == 0)
            memcpy(alpha, c->alpha + last + k, width * 4), memcpy(root, c->root + last + k, width * 4);
        else
            for (int i = 0; i < width; i++) {
                int64_t at = (last + k + i) >> c->shift;
                alpha[i] = c->alpha[at], root[i] = c->root[at];
            }
_Pragma("omp simd")
        for (int i = 0; i < LANES; i++) {
            float grown = c->grows[k + i] / root[i], share = alpha[i] * c->fades[k + i] * grown;
            ways[i] += share, spreads[i] += share * grown;
        }
    }
    float way = 0.0f, spread = 0.0f;
    for (int i = 0; i < LANES; i++) way += ways[i], spread += spreads[i];
    float first = gap > c->steps ? 0.0f : powf(c->beta1, (float)gap);
    return (Coast){way, c->eps * (way == 0.0f ? 1.0f : spread / way), first, expf((float)(gap * log(c->beta2)))};
}

static void coast_lanes(float *restrict w, float *restrict m, float *restrict v, const Coast *c) {
_Pragma("omp simd")
    for (int i = 0; i < LANES; i++) {
        w[i] = w[i] - c->way * m[i] / (sqrtf(v[i]) + c->eps);
        m[i] = m[i] * c->first, v[i] = v[i] * c->second;
    }
}

static int all_zero(const float *x, int64_t count) {
    uint32_t any = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        any |= bits << 1; /* without the sign */
    }
    return !any;
}

/* The rows that have seen less than `now` steps go to the start of `changed`, each once; returns their number. */
EXPORT int64_t dqrm_idle_adam(float *weight, float *first, float *second, int32_t *last, int64_t dim,
                              const int64_t *rows, int64_t count, int64_t now, int64_t early, const float *alpha,
                              const float *root, int64_t stride, const float *powers, const float *fades, int64_t steps,
                              float beta1, float one_minus_beta1, float beta2, float eps, float l2, float gamma,
                              float most, int64_t *changed, int threads) {
    int shift = 0;
    while (1LL << shift < stride) shift++;
    Course c = {alpha, root, powers, fades, fades + steps, steps, shift, beta1, one_minus_beta1, beta2, eps, l2, gamma,
                most};
    int64_t found = 0, *since = changed + count;
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count) __builtin_prefetch(&last[rows[i + AHEAD]], 1);
        if (last[rows[i]] < now) {
            changed[found] = rows[i], since[found++] = last[rows[i]];
            last[rows[i]] = (int32_t)now;
        }
    }
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads) if (found > 256)
    for (int64_t i = 0; i < found; i++) {
        if (i + AHEAD < found)
            for (int64_t d = changed[i + AHEAD] * dim, end = d + dim; d < end; d += LANES)
                __builtin_prefetch(weight + d, 1), __builtin_prefetch(first + d, 1), __builtin_prefetch(second + d, 1);
        if (steps > 0 && all_zero(first + changed[i] * dim, dim) && all_zero(second + changed[i] * dim, dim))
            continue; /* without L2, a row that has had no gradient stays where it is */
        int coasts = steps > 0 && since[i] >= early;
        Coast coast = {0};
        if (coasts) coast = coast_of(since[i], now, &c);
        for (int64_t d = 0; d < dim; d += LANES) {
            int64_t at = changed[i] * dim + d, width = (dim - d < LANES ? dim - d : LANES) * 4;
            float w[LANES] = {0}, m[LANES] = {0}, v[LANES] = {0};
            memcpy(w, weight + at, width), memcpy(m, first + at, width), memcpy(v, second + at, width);
            if (coasts)
                coast_lanes(w, m, v, &coast);
            else
                idle_lanes(w, m, v, since[i], now, &c);
            memcpy(weight + at, w, width), memcpy(first + at, m, width), memcpy(second + at, v, width);
        }
    }
    return found;
}

EXPORT void dqrm_adam_moments(float *first, float *second, int64_t dim, const int64_t *rows, int64_t count,
                              float *values, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2,
                              float root, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 256)
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count)
            for (int64_t d = rows[i + AHEAD] * dim, end = d + dim; d < end; d += LANES)
                __builtin_prefetch(first + d, 1), __builtin_prefetch(second + d, 1);
        float *restrict m = first + rows[i] * dim, *restrict v = second + rows[i] * dim, *restrict g = values + i * dim;
_Pragma("omp simd")
        for (int64_t d = 0; d < dim; d++) {
            m[d] = beta1 * m[d] + one_minus_beta1 * g[d];
            v[d] = beta2 * v[d] + one_minus_beta2 * (g[d] * g[d]);
            g[d] = m[d] / (sqrtf(v[d]) * root + eps);
        }
    }
}
