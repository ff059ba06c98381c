/* Tables in two tiers (`quant/tiered_rows.py`): rows of 4 bits, and the rows updated most often as int8 in slots. */
#include "common.h"

enum { WAYS = 8 }; /* slots of a set: a row may lie in those of its own set only */
#define SET_SEED 0x5bd1e995u  /* of the hash that gives a row its set */
#define ADMIT 0x2545f491u     /* what the seeds of an update's other random bits are made with */
#define DEMOTE 0x68e31da4u

static inline uint8_t int4_code(float q) { /* plus 8, so that it has no sign */
    q = q < -7.0f ? -7.0f : q;
    return (uint8_t)((int32_t)(q > 7.0f ? 7.0f : q) + 8);
}

/* As `write_int8_row`, codes from -7 to 7: byte j holds code j in its low and code j + half in its high bits. */
static inline __attribute__((always_inline)) void write_int4_row(const float *restrict x, int64_t dim, int random,
                                                                 uint32_t seed, uint32_t position,
                                                                 uint8_t *restrict row) {
    int64_t half = (dim + 1) / 2, bytes = int4_bytes(dim);
    uint16_t stored = stored_scale_of(max_bits_of(x, 0, dim), 7);
    float s = widen(stored);
    memcpy(row + bytes, &stored, 2);
    for (int64_t j = half; j < bytes; j++) row[j] = 0x88;
    if (stored >= 0x7f80) { memset(row, 0x88, half); return; }
    for (int64_t j = 0; j < half; j++) {
        int64_t d = j + half < dim ? j + half : j; /* of an odd dim, the last one has no other half */
        float low = x[j] / s, other = x[d] / s;
        low = random ? floorf(low + uniform_of(position + (uint32_t)j, seed)) : rintf(low);
        other = random ? floorf(other + uniform_of(position + (uint32_t)d, seed)) : rintf(other);
        row[j] = (uint8_t)(int4_code(low) | int4_code(other) << 4);
    }
    if (dim & 1) row[half - 1] = (uint8_t)((row[half - 1] & 15) | 0x80);
}

static inline int is_hot(const uint8_t *row, int64_t dim) { return int4_scale(row, dim) & HOT; }

/* Rows of floats into the rows `cold`, or their slots, to the nearest code. */
EXPORT void dqrm_encode_tiers(const float *values, int64_t rows, int64_t dim, uint8_t *cold, int8_t *hot, int threads) {
    int64_t width = row_bytes(ROW_TIERED, dim), slot = row_bytes(ROW_INT8, dim);
#pragma omp parallel for num_threads(threads) if (rows * dim > LITTLE)
    for (int64_t i = 0; i < rows; i++) {
        uint8_t *row = cold + i * width;
        if (is_hot(row, dim)) write_int8_row(values + i * dim, dim, 0, 0, 0, hot + slot_of(row) * slot);
        else write_int4_row(values + i * dim, dim, 0, 0, 0, row);
    }
}

typedef struct {
    uint8_t *cold;
    int8_t *hot;
    int32_t *owner;  /* of each slot: its row + 1, or 0 */
    uint16_t *count; /* updates of its row that were counted */
    int64_t sets, dim;
} Tiers;

/* row += factor * values, encoded again where it lies. */
static inline __attribute__((always_inline)) void add_to_row(const Tiers *t, int64_t dim, int64_t row,
                                                             const float *restrict values, float factor, uint32_t seed,
                                                             float *restrict x) {
    uint8_t *to = t->cold + row * row_bytes(ROW_TIERED, dim);
    uint32_t position = (uint32_t)(row * dim);
    if (is_hot(to, dim)) {
        uint32_t slot = slot_of(to);
        int8_t *codes = t->hot + slot * row_bytes(ROW_INT8, dim);
        float s = row_scale(codes, dim);
        for (int64_t d = 0; d < dim; d++) x[d] = (float)codes[d] * s + values[d] * factor;
        write_int8_row(x, dim, 1, seed, position, codes);
        t->count[slot] += t->count[slot] < UINT16_MAX;
    } else {
        read_row(to, ROW_TIERED, dim, x);
        for (int64_t d = 0; d < dim; d++) x[d] = x[d] + values[d] * factor;
        write_int4_row(x, dim, 1, seed, position, to);
    }
}

static inline int64_t set_of(int64_t row, int64_t sets) {
    return (int64_t)((uint64_t)hash_of((uint32_t)row, SET_SEED) * (uint64_t)sets >> 32);
}

/* Give a row the slot of its set with the lowest count c, with probability 1 / (c + 1); returns the row that had it, which
 * is then rounded to 4 bits, or -1. */
static int64_t admit(const Tiers *t, int64_t row, int64_t set, uint32_t seed, float *x) {
    int64_t dim = t->dim, width = row_bytes(ROW_TIERED, dim), slot = set * WAYS;
    uint8_t *mine = t->cold + row * width;
    if (is_hot(mine, dim)) return -1;
    for (int64_t k = set * WAYS + 1; k < (set + 1) * WAYS; k++)
        if (t->count[k] < t->count[slot]) slot = k;
    uint32_t lowest = t->count[slot];
    if ((uint64_t)hash_of((uint32_t)row, seed ^ ADMIT) * (lowest + 1) >> 32) return -1;
    int8_t *codes = t->hot + slot * row_bytes(ROW_INT8, dim);
    int64_t out = (int64_t)t->owner[slot] - 1;
    if (out >= 0) {
        read_row(codes, ROW_INT8, dim, x);
        write_int4_row(x, dim, 1, seed ^ DEMOTE, (uint32_t)(out * dim), t->cold + out * width);
    }
    int64_t half = (dim + 1) / 2; /* exactly the same values: codes * 16 on scale / 16 */
    for (int64_t d = 0; d < dim; d++)
        codes[d] = (int8_t)((((d < half ? mine[d] & 15 : mine[d - half] >> 4)) - 8) * 16);
    if (dim & 1) codes[dim] = 0;
    uint16_t scale = narrow(widen(int4_scale(mine, dim)) * 0.0625f), flag = HOT;
    memcpy(codes + ((dim + 1) & ~1LL), &scale, 2);
    uint32_t number = (uint32_t)slot;
    memset(mine, 0, width);
    memcpy(mine, &number, 4);
    memcpy(mine + width - 2, &flag, 2);
    t->owner[slot] = (int32_t)(row + 1);
    t->count[slot] = (uint16_t)(lowest < UINT16_MAX ? lowest + 1 : lowest);
    return out;
}

/* weight[rows[i]] += factor * values[i] with stochastic rounding; rows must not repeat. Then, in the order of i, rows of 4
 * bits may take a slot of their set (`admit`): randomized admission, Basat et al., INFOCOM 2017. moved[i]: the row that lost
 * it, or -1. Scales are raised as `dqrm_add_rows` says, also for those. Returns 0, or 1 where memory is short. */
EXPORT int dqrm_update_tiers(uint8_t *cold, int8_t *hot, int32_t *owner, uint16_t *counts, int64_t slots, int64_t dim,
                             const int64_t *rows, const float *values, int64_t count, float factor, uint32_t seed,
                             int64_t *moved, const int64_t *starts, int64_t tables, float *scale, int high,
                             const int32_t *highs, const int64_t *first, int shift, int threads) {
    Tiers t = {cold, hot, owner, counts, slots / WAYS, dim};
    int64_t width = row_bytes(ROW_TIERED, dim), lost = 0;
    int failed = 0;
    if (count * dim <= LITTLE) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        float *x = malloc(dim * 4 + 64);
        if (!x) failed = 1;
#pragma omp barrier
#pragma omp for
        for (int64_t i = 0; i < count; i++) {
            if (failed) continue;
            if (i + AHEAD < count) {
                const uint8_t *next = cold + rows[i + AHEAD] * width;
                for (int64_t b = 0; b < width + 63; b += 64) __builtin_prefetch(next + (b < width ? b : width - 1), 1);
            }
            if (dim == 16) add_to_row(&t, 16, rows[i], values + i * 16, factor, seed, x);
            else if (dim == 64) add_to_row(&t, 64, rows[i], values + i * 64, factor, seed, x);
            else add_to_row(&t, dim, rows[i], values + i * dim, factor, seed, x);
        }
        /* Each thread walks all rows and takes those of its sets: whatever it reads and writes is of these. */
        for (int64_t i = 0; i < count && !failed; i++) {
            int64_t set = set_of(rows[i], t.sets);
            if (t.sets && i + AHEAD < count) {
                __builtin_prefetch(counts + set_of(rows[i + AHEAD], t.sets) * WAYS);
                __builtin_prefetch(cold + (rows[i + AHEAD] + 1) * width - 2);
            }
            if (t.sets && set % all != me) continue;
            if (!t.sets && me) continue;
            moved[i] = t.sets ? admit(&t, rows[i], set, seed, x) : -1;
        }
        free(x);
    }
    if (failed || !scale) return failed;
    dqrm_raise_scales(rows, count, starts, tables, cold, hot, ROW_TIERED, dim, scale, high, highs, first, shift, threads);
    for (int64_t i = 0; i < count; i++) lost += moved[i] >= 0;
    if (!lost) return 0;
    int64_t *others = malloc(lost * 8);
    if (!others) return 1;
    for (int64_t i = 0, k = 0; i < count; i++)
        if (moved[i] >= 0) others[k++] = moved[i];
    dqrm_raise_scales(others, lost, starts, tables, cold, hot, ROW_TIERED, dim, scale, high, highs, first, shift, threads);
    free(others);
    return 0;
}
