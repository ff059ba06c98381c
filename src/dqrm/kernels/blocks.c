/* Blocks: runs of values that share a scale, as they are encoded for and decoded from the wire (`layout.py`).
 *
 * Block b is the values x[starts[b]] ... x[starts[b] + lengths[b] - 1]; what is encoded lies block after block, that of
 * block b from offsets[b] on. `residual` (or NULL) is added before encoding; its values for block b begin at keys[b],
 * and so does the block's part of the random stream. Bits are those of the plain torch path.
 */
#include "common.h"

enum { CODES = 0, BF16 = 1, FP32 = 2 };

/* scale[b] = max|x + residual| of block b over the highest code. */
EXPORT void dqrm_block_scales(const float *x, const float *residual, int64_t blocks, const int64_t *starts,
                              const int64_t *lengths, const int64_t *keys, int high, float *scale, int threads) {
#pragma omp parallel for num_threads(threads) if (blocks * 16 > LITTLE)
    for (int64_t b = 0; b < blocks; b++) {
        const float *from = x + starts[b];
        uint32_t m = 0;
        if (residual) {
            const float *rest = residual + keys[b];
            for (int64_t j = 0; j < lengths[b]; j++) {
                uint32_t bits = bits_of(from[j] + rest[j]) & 0x7fffffff;
                m = bits > m ? bits : m;
            }
        } else {
            m = max_bits_of(from, 0, lengths[b]);
        }
        scale[b] = scale_of(m, high);
    }
}

/* codes = clamp(round(z / scale)) of z = x + residual, rounded half to even, or where `random` stochastically:
 * floor(z / scale + u), u the middle of one of 2^16 intervals. The residual becomes z - code * scale. */
EXPORT void dqrm_quantize_blocks(const float *x, float *residual, int64_t blocks, const int64_t *starts,
                                 const int64_t *lengths, const int64_t *keys, const int64_t *offsets,
                                 const float *scale, int low, int high, int random, uint32_t seed, int8_t *codes,
                                 int threads) {
#pragma omp parallel for num_threads(threads) if (blocks * 16 > LITTLE)
    for (int64_t b = 0; b < blocks; b++) {
        const float *from = x + starts[b];
        float *rest = residual ? residual + keys[b] : NULL, s = scale[b], lo = low, hi = high;
        int8_t *to = codes + offsets[b];
        int64_t n = lengths[b];
        uint32_t key = (uint32_t)keys[b];
        if (random) {
            for (int64_t j = 0; j < n; j++) {
                float z = rest ? from[j] + rest[j] : from[j];
                float u = uniform_of(key + (uint32_t)j, seed);
                float q = floorf(z / s + u);
                q = q < lo ? lo : q > hi ? hi : q;
                to[j] = (int8_t)q;
                if (rest) rest[j] = z - q * s;
            }
        } else if (rest) {
            for (int64_t j = 0; j < n; j++) {
                float z = from[j] + rest[j], q = code_of(z, s, lo, hi);
                to[j] = (int8_t)q;
                rest[j] = z - q * s;
            }
        } else {
            for (int64_t j = 0; j < n; j++) to[j] = (int8_t)code_of(from[j], s, lo, hi);
        }
    }
}

/* The same without a scale: z as bf16 (rounded half to even, or stochastically) or as it is. */
EXPORT void dqrm_cast_blocks(const float *x, float *residual, int64_t blocks, const int64_t *starts,
                             const int64_t *lengths, const int64_t *keys, const int64_t *offsets, int kind, int random,
                             uint32_t seed, void *out, int threads) {
#pragma omp parallel for num_threads(threads) if (blocks * 16 > LITTLE)
    for (int64_t b = 0; b < blocks; b++) {
        const float *from = x + starts[b];
        float *rest = residual ? residual + keys[b] : NULL;
        int64_t n = lengths[b];
        if (kind == FP32) {
            float *to = (float *)out + offsets[b];
            for (int64_t j = 0; j < n; j++) to[j] = rest ? from[j] + rest[j] : from[j];
            if (rest) memset(rest, 0, n * sizeof(float));
            continue;
        }
        uint16_t *to = (uint16_t *)out + offsets[b];
        uint32_t key = (uint32_t)keys[b];
        for (int64_t j = 0; j < n; j++) {
            float z = rest ? from[j] + rest[j] : from[j];
            to[j] = narrow(z);
            if (random && (bits_of(z) & 0x7f800000) != 0x7f800000)
                to[j] = (uint16_t)((bits_of(z) + (hash_of(key + (uint32_t)j, seed) >> 16)) >> 16);
            if (rest) rest[j] = z - widen(to[j]);
        }
    }
}

/* out[starts[b] + j] = what is encoded for it (times scale[b] for codes), or that much more where `add`. */
EXPORT void dqrm_decode_blocks(const void *stored, int kind, const float *scale, int64_t blocks, const int64_t *starts,
                               const int64_t *lengths, const int64_t *offsets, float *out, int add, int threads) {
#pragma omp parallel for num_threads(threads) if (blocks * 16 > LITTLE)
    for (int64_t b = 0; b < blocks; b++) {
        float *to = out + starts[b];
        int64_t n = lengths[b], at = offsets[b];
        if (kind == CODES) {
            const int8_t *from = (const int8_t *)stored + at;
            float s = scale[b];
            if (add) for (int64_t j = 0; j < n; j++) to[j] += (float)from[j] * s;
            else for (int64_t j = 0; j < n; j++) to[j] = (float)from[j] * s;
        } else if (kind == BF16) {
            const uint16_t *from = (const uint16_t *)stored + at;
            if (add) for (int64_t j = 0; j < n; j++) to[j] += widen(from[j]);
            else for (int64_t j = 0; j < n; j++) to[j] = widen(from[j]);
        } else {
            const float *from = (const float *)stored + at;
            if (add) for (int64_t j = 0; j < n; j++) to[j] += from[j];
            else memcpy(to, from, n * sizeof(float));
        }
    }
}

/* Nibbles: byte j holds codes j and j + width, each plus 8, as `quant/packing.py` lays out a row. */
EXPORT void dqrm_pack_nibbles(const int8_t *codes, int64_t count, uint8_t *out, int threads) {
    (void)threads;
    int64_t width = (count + 1) / 2;
    for (int64_t j = 0; j < count - width; j++)
        out[j] = (uint8_t)((codes[j] + 8) | (codes[j + width] + 8) << 4);
    if (count & 1) out[width - 1] = (uint8_t)((codes[width - 1] + 8) | 8 << 4);
}

EXPORT void dqrm_unpack_nibbles(const uint8_t *bytes, int64_t count, int8_t *codes, int threads) {
    (void)threads;
    int64_t width = (count + 1) / 2;
    for (int64_t j = 0; j < width; j++) codes[j] = (int8_t)((bytes[j] & 15) - 8);
    for (int64_t j = 0; j < count - width; j++) codes[j + width] = (int8_t)((bytes[j] >> 4) - 8);
}

/* ---- rows: messages of `distributed/sparse.py`, whose format is described there --------------------------------- */

static inline int64_t up4(int64_t count) { return (count + 3) / 4 * 4; }

static int64_t value_bytes(int64_t count, int kind, int bits) {
    return kind == CODES ? (count * bits + 7) / 8 : count * (kind == BF16 ? 2 : 4);
}

/* `rows` rising, table t's from bounds[t] to bounds[t + 1] - 1; `values` [count, dim]. One scale per table that has rows,
 * or per row; `given` (or NULL): scales of the tables to use. sizes: bytes until the scales begin, of the scales, in all.
 * Returns -1 without memory. */
EXPORT int dqrm_encode_rows(const int64_t *rows, const float *values, int64_t count, int64_t dim, const int64_t *bounds,
                            const int64_t *widths, int64_t tables, int per_row, int kind, int bits, const float *given,
                            int random, uint32_t seed, uint8_t *out, int64_t *sizes, int threads) {
    int32_t head = (int32_t)count;
    memcpy(out, &head, 4);
    sizes[0] = sizes[2] = 4;
    sizes[1] = 0;
    if (count == 0) return 0;
    int64_t blocks = per_row ? count : tables, used = 0, wide = count < 65536 ? 2 : 4;
    int64_t *starts = malloc((3 * blocks + 1) * sizeof(int64_t)), *lengths = starts + blocks;
    float *scale = malloc(blocks * sizeof(float));
    int8_t *codes = kind == CODES ? malloc(count * dim) : NULL;
    if (!starts || !scale || (kind == CODES && !codes)) { free(starts); free(scale); free(codes); return -1; }
    uint8_t *to = out + 4 + wide * tables;
    for (int64_t t = 0, i = 0; t < tables; t++) {
        int64_t first = i;
        for (; i < count && rows[i] < bounds[t + 1]; i++) {
            uint32_t id = (uint32_t)(rows[i] - bounds[t]);
            for (int64_t b = 0; b < widths[t]; b++) *to++ = (uint8_t)(id >> (8 * b));
        }
        uint32_t n = (uint32_t)(i - first);
        for (int64_t b = 0; b < wide; b++) out[4 + wide * t + b] = (uint8_t)(n >> (8 * b));
        if (!per_row && n) {
            starts[used] = first * dim;
            lengths[used] = n * dim;
            if (given) scale[used] = given[t];
            used++;
        }
    }
    if (per_row)
        for (used = 0; used < count; used++) { starts[used] = used * dim; lengths[used] = dim; }
    while ((to - out) % 4) *to++ = 0;
    sizes[0] = to - out;
    if (kind == CODES) {
        int high = (1 << (bits - 1)) - 1;
        if (!given) dqrm_block_scales(values, NULL, used, starts, lengths, starts, high, scale, threads);
        memcpy(to, scale, 4 * used);
        sizes[1] = 4 * used;
        to += 4 * used;
        int8_t *into = bits == 8 ? (int8_t *)to : codes;
        dqrm_quantize_blocks(values, NULL, used, starts, lengths, starts, starts, scale, -high - 1, high, random, seed,
                             into, threads);
        if (bits == 4) dqrm_pack_nibbles(codes, count * dim, to, threads);
    } else {
        dqrm_cast_blocks(values, NULL, used, starts, lengths, starts, starts, kind, random, seed, to, threads);
    }
    int64_t written = value_bytes(count * dim, kind, bits);
    memset(to + written, 0, up4(written) - written);
    sizes[2] = to - out + up4(written);
    free(starts);
    free(scale);
    free(codes);
    return 0;
}

/* The inverse, for `count` rows as the message says. Returns -1 without memory. */
EXPORT int dqrm_decode_rows(const uint8_t *message, int64_t count, int64_t dim, const int64_t *bounds,
                            const int64_t *widths, int64_t tables, int per_row, int kind, int bits, int64_t *rows,
                            float *values, int threads) {
    int64_t blocks = per_row ? count : tables, used = 0, wide = count < 65536 ? 2 : 4, at = 0;
    int64_t *starts = malloc((2 * blocks + 1) * sizeof(int64_t)), *lengths = starts + blocks;
    int8_t *codes = kind == CODES && bits == 4 ? malloc(count * dim + 1) : NULL;
    if (!starts || (kind == CODES && bits == 4 && !codes)) { free(starts); free(codes); return -1; }
    const uint8_t *from = message + 4 + wide * tables;
    for (int64_t t = 0; t < tables; t++) {
        uint32_t n = 0;
        for (int64_t b = 0; b < wide; b++) n |= (uint32_t)message[4 + wide * t + b] << (8 * b);
        if (!per_row && n) { starts[used] = at * dim; lengths[used++] = n * dim; }
        for (uint32_t i = 0; i < n; i++) {
            uint32_t id = 0;
            for (int64_t b = 0; b < widths[t]; b++) id |= (uint32_t)*from++ << (8 * b);
            rows[at++] = bounds[t] + id;
        }
    }
    if (per_row)
        for (used = 0; used < count; used++) { starts[used] = used * dim; lengths[used] = dim; }
    from = message + up4(from - message);
    const float *scale = (const float *)from;
    if (kind == CODES) from += 4 * used;
    if (codes) dqrm_unpack_nibbles(from, count * dim, codes, threads);
    dqrm_decode_blocks(codes ? (const void *)codes : from, kind, scale, used, starts, lengths, starts, values, 0, threads);
    free(starts);
    free(codes);
    return 0;
}

/* ---- rows with their own scale behind them: messages of `quant/row_codec.py` ------------------------------------- */

/* Scales as FP16: the smallest number that is not below, at most the largest one; infinity and NaN stay. */
static inline uint16_t half_above(float x) {
    if (!(x < 65504.0f)) return x <= float_of(0x7f7fffff) ? 0x7bff : x == x ? 0x7c00 : 0x7e00;
    if (x < 0x1p-14f) return (uint16_t)ceilf(x * 0x1p24f);
    return (uint16_t)((bits_of(x) - (112u << 23) + 0x1fff) >> 13);
}
static inline float of_half(uint16_t h) { /* not negative */
    if (h < 0x400) return (float)h * 0x1p-24f;
    return h < 0x7c00 ? float_of(((uint32_t)h << 13) + (112u << 23)) : float_of(0x7f800000 | (uint32_t)(h & 0x3ff) << 13);
}

static inline __attribute__((always_inline)) void pack_row(const float *restrict x, int64_t dim, int bits, float scale,
                                                           int random, uint32_t seed, uint32_t position,
                                                           uint8_t *restrict out) {
    int64_t width = (dim * bits + 7) / 8;
    float low = -(float)(1 << (bits - 1)), high = -low - 1;
    int finite = (bits_of(scale) & 0x7f800000) != 0x7f800000;
    for (int part = 0; part * bits < 8; part++) {
        const float *from = x + part * width;
        int64_t left = dim - part * width, n = !finite || left < 0 ? 0 : left < width ? left : width;
        for (int64_t j = n; j < width; j++) /* code 0 */
            out[j] = (uint8_t)((part ? out[j] : 0) | (1 << (bits - 1)) << (bits * part));
        for (int64_t j = 0; j < n; j++) {
            float q = from[j] / scale;
            q = random ? floorf(q + uniform_of(position + (uint32_t)(part * width + j), seed)) : rintf(q);
            q = q < low ? low : q;
            q = (q > high ? high : q) - low;
            out[j] = (uint8_t)((part ? out[j] : 0) | (uint32_t)(int32_t)q << (bits * part));
        }
    }
}

/* Row i [dim] as packed codes and its scale, in FP16 if `half`; random: as in dqrm_quantize_blocks, of position i * dim + d. */
EXPORT void dqrm_pack_rows(const float *x, int64_t count, int64_t dim, int bits, int half, int random, uint32_t seed,
                           uint8_t *out, int threads) {
    int64_t width = (dim * bits + 7) / 8, size = width + (half ? 2 : 4);
#pragma omp parallel for num_threads(threads) if (count * dim > LITTLE)
    for (int64_t i = 0; i < count; i++) {
        const float *row = x + i * dim;
        uint8_t *to = out + i * size;
        float scale = scale_of(max_bits_of(row, 0, dim), (1 << (bits - 1)) - 1);
        if (half) {
            uint16_t sent = half_above(scale);
            scale = of_half(sent);
            memcpy(to + width, &sent, 2);
        } else {
            memcpy(to + width, &scale, 4);
        }
        uint32_t position = (uint32_t)(i * dim);
        if (bits == 4 && !random && dim == 16) pack_row(row, 16, 4, scale, 0, 0, 0, to);
        else if (bits == 4 && !random) pack_row(row, dim, 4, scale, 0, 0, 0, to);
        else if (bits == 8 && random && dim == 16) pack_row(row, 16, 8, scale, 1, seed, position, to);
        else if (bits == 8 && random) pack_row(row, dim, 8, scale, 1, seed, position, to);
        else pack_row(row, dim, bits, scale, random, seed, position, to);
    }
}

static inline __attribute__((always_inline)) void unpack_row(const uint8_t *restrict from, int64_t dim, int bits, float scale,
                                                             float *restrict out) {
    int64_t width = (dim * bits + 7) / 8;
    int mask = (1 << bits) - 1, middle = 1 << (bits - 1);
    for (int part = 0; part * bits < 8; part++) {
        int64_t left = dim - part * width, n = left < width ? left : width;
        for (int64_t j = 0; j < n; j++)
            out[part * width + j] = (float)((from[j] >> (bits * part) & mask) - middle) * scale;
    }
}

/* The inverse. */
EXPORT void dqrm_unpack_rows(const uint8_t *message, int64_t count, int64_t dim, int bits, int half, float *out,
                             int threads) {
    int64_t width = (dim * bits + 7) / 8, size = width + (half ? 2 : 4);
#pragma omp parallel for num_threads(threads) if (count * dim > LITTLE)
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *from = message + i * size;
        float *to = out + i * dim, scale;
        uint16_t sent;
        if (half) {
            memcpy(&sent, from + width, 2);
            scale = of_half(sent);
        } else {
            memcpy(&scale, from + width, 4);
        }
        if (bits == 4 && dim == 16) unpack_row(from, 16, 4, scale, to);
        else if (bits == 8 && dim == 16) unpack_row(from, 16, 8, scale, to);
        else unpack_row(from, dim, bits, scale, to);
    }
}
