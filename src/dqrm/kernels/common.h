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
