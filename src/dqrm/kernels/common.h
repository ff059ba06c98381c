/* What the kernels share: bf16 as uint16_t, magnitudes as bit patterns, and the quantizer of `quant/uniform.py`. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define SMALLEST_MAXIMUM 1e-8f
#define AHEAD 12      /* rows prefetched before they are needed: a table lies in memory, not in a cache */
#define LITTLE 16384  /* elements below which starting threads costs more than it gives */

#ifdef _OPENMP
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

EXPORT void dqrm_raise_scales(const int64_t *rows, int64_t count, const int64_t *starts, int64_t tables,
                              const void *weight, const void *hot, int format, int64_t dim, float *scale, int high,
                              const int32_t *highs, const int64_t *first, int shift, int threads); /* kernels.c */

/* Sixteen floats: one register with AVX-512, two with AVX2, four with NEON; unaligned. */
typedef float v16 __attribute__((vector_size(64), aligned(4)));

static inline uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static inline float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
static inline float widen(uint16_t h) { return float_of((uint32_t)h << 16); }
static inline uint16_t narrow(float x) { /* round half to even; NaN stays NaN */
    uint32_t b = bits_of(x), r = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return (uint16_t)((b & 0x7fffffff) > 0x7f800000 ? (b >> 16) | 0x40 : r);
}
static inline float load(const void *p, int half, int64_t i) {
    return half ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}
static inline void store(void *p, int half, int64_t i, float x) {
    if (half) ((uint16_t *)p)[i] = narrow(x);
    else ((float *)p)[i] = x;
}
static inline float scale_of(uint32_t max_bits, int high) {
    float m = float_of(max_bits);
    return (m < SMALLEST_MAXIMUM ? SMALLEST_MAXIMUM : m) / (float)high;
}
static inline float code_of(float x, float scale, float low, float high) {
    float q = rintf(x / scale);
    q = q < low ? low : q;
    return q > high ? high : q;
}
static inline uint32_t max_bits_of(const void *x, int half, int64_t count) {
    uint32_t m = 0;
    if (half) {
        const uint16_t *h = x;
        uint16_t n = 0;
        for (int64_t i = 0; i < count; i++) { uint16_t b = h[i] & 0x7fff; n = b > n ? b : n; }
        m = (uint32_t)n << 16;
    } else if (count == 16) { /* of known length, as rows often are: a few instructions */
        const uint32_t *f = x;
        for (int i = 0; i < 16; i++) { uint32_t b = f[i] & 0x7fffffff; m = b > m ? b : m; }
    } else {
        const uint32_t *f = x;
        for (int64_t i = 0; i < count; i++) { uint32_t b = f[i] & 0x7fffffff; m = b > m ? b : m; }
    }
    return m;
}

/* Formats of a row of a table: float, bf16, int8 codes followed by the row's scale in bf16 (`quant/int8_rows.py`), or codes
 * of 4 bits and the scale, or the number of the row's int8 slot (`quant/tiered_rows.py`). */
enum { ROW_FLOAT, ROW_BF16, ROW_INT8, ROW_TIERED };
#define HOT 0x8000 /* in the place of the scale: the row lies in a slot */

/* Bytes of the codes of a row of 4 bits: enough for the number of a slot. */
static inline int64_t int4_bytes(int64_t dim) { return dim < 8 ? 4 : (dim + 1) / 2; }
static inline int64_t row_bytes(int format, int64_t dim) {
    if (format == ROW_TIERED) return int4_bytes(dim) + 2;
    return format == ROW_FLOAT ? dim * 4 : format == ROW_BF16 ? dim * 2 : ((dim + 1) & ~1LL) + 2;
}
static inline uint16_t int4_scale(const void *row, int64_t dim) {
    uint16_t h;
    memcpy(&h, (const char *)row + int4_bytes(dim), 2);
    return h;
}
static inline uint32_t slot_of(const void *row) { uint32_t slot; memcpy(&slot, row, 4); return slot; }
/* Where a row of a weight lies; of a tiered weight, a row that has a slot in `hot` lies there as int8. */
static inline const void *row_at(const void *weight, const void *hot, int *format, int64_t dim, int64_t row) {
    const char *at = (const char *)weight + row * row_bytes(*format, dim);
    if (*format != ROW_TIERED || !(int4_scale(at, dim) & HOT)) return at;
    *format = ROW_INT8;
    return (const char *)hot + slot_of(at) * row_bytes(ROW_INT8, dim);
}
static inline float row_scale(const void *row, int64_t dim) {
    uint16_t h;
    memcpy(&h, (const char *)row + ((dim + 1) & ~1LL), 2);
    return widen(h);
}
static inline void read_row(const void *row, int format, int64_t dim, float *to) {
    if (format == ROW_FLOAT) {
        memcpy(to, row, dim * 4);
    } else if (format == ROW_BF16) {
        const uint16_t *from = row;
        for (int64_t d = 0; d < dim; d++) to[d] = widen(from[d]);
    } else if (format == ROW_TIERED) {
        const uint8_t *from = row;
        float s = widen(int4_scale(row, dim));
        int64_t half = (dim + 1) / 2;
        if (dim == 16) {
            for (int j = 0; j < 8; j++) to[j] = (float)((from[j] & 15) - 8) * s;
            for (int j = 0; j < 8; j++) to[j + 8] = (float)((from[j] >> 4) - 8) * s;
        } else {
            for (int64_t j = 0; j < half; j++) to[j] = (float)((from[j] & 15) - 8) * s;
            for (int64_t j = half; j < dim; j++) to[j] = (float)((from[j - half] >> 4) - 8) * s;
        }
    } else {
        const int8_t *from = row;
        float s = row_scale(row, dim);
        if (dim == 16) /* of known length: a few instructions */
            for (int d = 0; d < 16; d++) to[d] = (float)from[d] * s;
        else
            for (int64_t d = 0; d < dim; d++) to[d] = (float)from[d] * s;
    }
}
/* max|row|, NaN if any is. */
static inline float row_max(const void *row, int format, int64_t dim) {
    if (format < ROW_INT8) return float_of(max_bits_of(row, format == ROW_BF16, dim));
    const int8_t *codes = row;
    int low = 0, high = 0;
    if (format == ROW_TIERED) {
        const uint8_t *pairs = row;
        for (int64_t j = 0; j < (dim + 1) / 2; j++) { /* the padding of an odd dim is 8, which is code 0 */
            int one = (pairs[j] & 15) - 8, other = (pairs[j] >> 4) - 8;
            low = one < low ? one : low;
            low = other < low ? other : low;
            high = one > high ? one : high;
            high = other > high ? other : high;
        }
        return (float)(-low > high ? -low : high) * widen(int4_scale(row, dim));
    }
    for (int64_t d = 0; d < dim; d++) {
        low = codes[d] < low ? codes[d] : low;
        high = codes[d] > high ? codes[d] : high;
    }
    return (float)(-low > high ? -low : high) * row_scale(row, dim);
}
/* murmur3's finalizer of a position and a seed: no state, so any order and any thread gives the same. */
static inline uint32_t hash_of(uint32_t position, uint32_t seed) {
    uint32_t h = position * 0x9E3779B1u ^ seed;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}
/* The middle of one of 2^16 intervals between 0 and 1. */
static inline float uniform_of(uint32_t position, uint32_t seed) {
    return ((float)(int32_t)(hash_of(position, seed) >> 16) + 0.5f) * 0x1p-16f;
}
/* The scale of an encoded row in bf16: max|row| / the highest code, rounded up; NaN and infinity stay. */
static inline uint16_t stored_scale_of(uint32_t max_bits, int high) {
    uint32_t b = bits_of(scale_of(max_bits, high));
    return b >= 0x7f800000 ? (b > 0x7f800000 ? 0x7fc0 : 0x7f80) : (uint16_t)((b + 0xffff) >> 16);
}
/* Encode a row as int8: to the nearest code, or (`random`) up with the probability of the distance, by the hash of each
 * value's position. NaN or infinite: every code is 0 and the scale NaN or infinite, so NaN comes back. */
static inline __attribute__((always_inline)) void write_int8_row(const float *restrict x, int64_t dim, int random,
                                                                 uint32_t seed, uint32_t position,
                                                                 int8_t *restrict codes) {
    uint16_t stored = stored_scale_of(max_bits_of(x, 0, dim), 127);
    float s = widen(stored);
    memcpy(codes + ((dim + 1) & ~1LL), &stored, 2);
    if (dim & 1) codes[dim] = 0;
    if (stored >= 0x7f80) { memset(codes, 0, dim); return; }
    for (int64_t d = 0; d < dim; d++) {
        float q = random ? floorf(x[d] / s + uniform_of(position + (uint32_t)d, seed)) : rintf(x[d] / s);
        q = q < -127.0f ? -127.0f : q;
        codes[d] = (int8_t)(int32_t)(q > 127.0f ? 127.0f : q);
    }
}
