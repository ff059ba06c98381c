/* The CPU kernels of dqrm: what a training step does besides matrix products, each in one pass over its data.
 *
 * Plain C with OpenMP, no header but `common.h` and the standard ones; `build.py` compiles it, with `blocks.c`, for the
 * machine it runs on, and `setup.py` for wheels. Every function gives the same bits for any number of threads, and the quantizer gives the bits of `quant/uniform.py`:
 * compile without -ffast-math and with -ffp-contract=off.
 *
 * bf16 is stored as uint16_t, the upper half of a float. `half` arguments say that a void pointer is to bf16 rather
 * than float, `format` arguments what a row of a table is. Magnitudes are compared as bit patterns: the order is that of the numbers, and NaN is above infinity.
 */
#include "common.h"

#ifdef DQRM_SOURCE /* in wheels: what it was built from */
EXPORT const char *dqrm_source(void) { return DQRM_SOURCE; }
#endif

/* ---- tables ---------------------------------------------------------------------------------------------------- */

/* Whether a weight of this magnitude (or NaN) needs a larger scale; a scale that is NaN stays. */
static int exceeds(float largest, float scale, int high) {
    return !(scale_of(bits_of(largest), high) <= scale) && scale == scale;
}

/* The table of a row, where table t holds the rows from starts[t] on; first tries table `at` and the one after it. */
static int64_t table_of(int64_t row, const int64_t *starts, int64_t tables, int64_t at) {
    if (row >= starts[at] && (at + 1 == tables || row < starts[at + 1])) return at;
    at = at + 1 == tables ? 0 : at + 1;
    if (row >= starts[at] && (at + 1 == tables || row < starts[at + 1])) return at;
    int64_t low = 0, high = tables - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (row >= starts[middle]) low = middle;
        else high = middle - 1;
    }
    return low;
}

/* The highest code of a table: one for all, or (`highs` not NULL) one for each; 0: not quantized. */
static inline int high_of(int high, const int32_t *highs, int64_t table) { return highs ? highs[table] : high; }

/* The scale of a table's row `id`: that of the table, or (`first` not NULL) of its block of 1 << shift rows of the table. */
static inline int64_t group_of(int64_t table, int64_t id, const int64_t *first, int shift) {
    return first ? first[table] + (id >> shift) : table;
}

/* Whether a row of this magnitude may need a larger scale; rarely true, so that who asks looks closely then. */
static int suspect(float largest, float scale, int high) { return !(largest < scale * (float)high * 0.999999f); }

/* scale[g] = max(itself, the scale of max|weight[row]|) for each of the rows, g its table or block of rows (`group_of`); of
 * a block of one row: the scale of max|weight[row]|. `only` (or NULL) says for which tables. Rows come table after table,
 * sample by sample, or sorted. */
static void raise_for(const int64_t *rows, int64_t count, const int64_t *starts, int64_t tables, const void *weight,
                      const void *hot, int format, int64_t dim, float *scale, int high, const int32_t *highs, const int64_t *first,
                      int shift, const uint8_t *only, int threads) {
    int64_t width = row_bytes(format, dim);
#pragma omp parallel num_threads(threads) if (count * dim > LITTLE)
    {
        int64_t table = 0;
#pragma omp for
        for (int64_t i = 0; i < count; i++) {
            table = table_of(rows[i], starts, tables, table);
            if (only && !only[table]) continue;
            if (!only && i + AHEAD < count) __builtin_prefetch((const char *)weight + rows[i + AHEAD] * width);
            int kind = format;
            const void *row = row_at(weight, hot, &kind, dim, rows[i]);
            float largest = row_max(row, kind, dim);
            float now, raised;
            int64_t group = group_of(table, rows[i] - starts[table], first, shift);
            int top = high_of(high, highs, table);
            if (first && !shift) { /* the same from whichever thread */
                raised = scale_of(bits_of(largest), top);
                __atomic_store(&scale[group], &raised, __ATOMIC_RELAXED);
                continue;
            }
            __atomic_load(&scale[group], &now, __ATOMIC_RELAXED);
            if (!top || !suspect(largest, now, top)) continue;
#pragma omp critical(dqrm_raise)
            if (exceeds(largest, scale[group], top)) {
                raised = scale_of(bits_of(largest), top);
                __atomic_store(&scale[group], &raised, __ATOMIC_RELAXED);
            }
        }
    }
}

EXPORT void dqrm_raise_scales(const int64_t *rows, int64_t count, const int64_t *starts, int64_t tables,
                              const void *weight, const void *hot, int format, int64_t dim, float *scale, int high,
                              const int32_t *highs, const int64_t *first, int shift, int threads) {
    raise_for(rows, count, starts, tables, weight, hot, format, dim, scale, high, highs, first, shift, NULL, threads);
}

/* out[i] = fake-quantized weight[starts[i % tables] + ids[i]], rows_out[i] = that row. `scale` NULL: not quantized.
 * Codes from low to high; `highs` (or NULL): from -highs[t] - 1 to highs[t] for table t, 0: it is not quantized.
 * `clamped` (or NULL): the number of weights beyond the codes is added to it. `raising`: scales are raised first to what
 * these rows need. `dirty` (or NULL): flags per block of `block` rows (a power of 2), those of table t from dirty_starts[t]
 * on, are set for what is read. `first`, `per`: which scale a row has (`group_of`; `highs` is NULL then).
 * Returns the first position whose id is outside its table, or -1; the output is then incomplete. */
EXPORT int64_t dqrm_lookup(const void *ids, int wide, int64_t count, int64_t tables, const int64_t *starts,
                           const int64_t *table_rows, const void *weight, const void *hot, int format, int64_t dim,
                           float *scale, int low, int high, const int32_t *highs, float *out, int64_t *rows_out, int64_t *clamped,
                           int raising, uint8_t *dirty, const int64_t *dirty_starts, int64_t block,
                           const int64_t *first, int per, int threads) {
    int64_t bad = INT64_MAX, beyond;
    int grown;
    int64_t width = row_bytes(format, dim);
    int64_t samples = count / tables; /* sample by sample: a division per id would cost more than its row */
    int shift = 0;
    while (1LL << shift < block) shift++;
#pragma omp parallel for reduction(min : bad) num_threads(threads) if (count * dim > LITTLE)
    for (int64_t sample = 0; sample < samples; sample++)
      for (int64_t table = 0; table < tables; table++) {
        int64_t i = sample * tables + table, id = wide ? ((const int64_t *)ids)[i] : ((const int32_t *)ids)[i];
        if (id < 0 || id >= table_rows[table]) { bad = i < bad ? i : bad; rows_out[i] = starts[table]; continue; }
        rows_out[i] = starts[table] + id;
        if (dirty) __atomic_store_n(&dirty[dirty_starts[table] + (id >> shift)], 1, __ATOMIC_RELAXED);
      }
    if (bad != INT64_MAX) return bad;
again: /* at most once: where a row needs a larger scale, which is rare */
    beyond = grown = 0;
#pragma omp parallel for reduction(+ : beyond) reduction(| : grown) num_threads(threads) if (count * dim > LITTLE)
    for (int64_t sample = 0; sample < samples; sample++)
      for (int64_t table = 0; table < tables; table++) {
        int64_t i = sample * tables + table;
        if (i + AHEAD < count) {
            const char *next = (const char *)weight + rows_out[i + AHEAD] * width;
            for (int64_t b = 0; b < width; b += 64) __builtin_prefetch(next + b);
            if (format >= ROW_INT8) __builtin_prefetch(next + width - 1); /* its scale, where a line of the cache ends */
        }
        float *to = out + i * dim;
        int64_t group = group_of(table, rows_out[i] - starts[table], first, per);
        float s = scale ? scale[group] : 1.0f;
        int kind = format;
        const void *row = row_at(weight, hot, &kind, dim, rows_out[i]);
        read_row(row, kind, dim, to);
        int top = high_of(high, highs, table), bottom = highs ? -top - 1 : low;
        if (!scale || !top) continue;
        if (raising && first && !per) { /* its own scale: nothing is beyond the codes */
            s = scale_of(max_bits_of(to, 0, dim), top);
            __atomic_store(&scale[group], &s, __ATOMIC_RELAXED);
        } else if (clamped || raising) {
            float largest = float_of(max_bits_of(to, 0, dim));
            if (suspect(largest, s, top)) {
                for (int64_t d = 0; d < dim; d++) {
                    float code = rintf(to[d] / s);
                    beyond += code < bottom || code > top;
                }
                grown |= raising && exceeds(largest, s, top);
            }
        }
        for (int64_t d = 0; d < dim; d++) to[d] = code_of(to[d], s, bottom, top) * s;
      }
    if (grown) {
        dqrm_raise_scales(rows_out, count, starts, tables, weight, hot, format, dim, scale, high, highs, first, per, threads);
        goto again;
    }
    if (clamped) *clamped += beyond;
    return -1;
}

/* out[i] = the values of packed row starts[i % tables] + ids[i]: codes of 2, 4 or 8 bits as `quant/packing.py` lays them
 * out, minus zero[g] (or NULL), times scale[g], g the row's table or block of rows (`group_of`). Returns the first position
 * whose id is outside its table, or -1; the output is then incomplete. */
EXPORT int64_t dqrm_lookup_packed(const void *ids, int wide, int64_t count, int64_t tables, const int64_t *starts,
                                  const int64_t *table_rows, const uint8_t *codes, int bits, int64_t dim,
                                  const float *scale, const int32_t *zero, const int64_t *first, int shift, float *out,
                                  int threads) {
    enum { BLOCK = 64 }; /* rows on their way from memory at once */
    int64_t bad = INT64_MAX, width = (dim * bits + 7) / 8, blocks = (count + BLOCK - 1) / BLOCK;
    int parts = 8 / bits;
#pragma omp parallel for reduction(min : bad) num_threads(threads) if (count * dim > LITTLE)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t rows[BLOCK], groups[BLOCK], from_here = block * BLOCK;
        int64_t n = count - from_here < BLOCK ? count - from_here : BLOCK, at = from_here % tables;
        for (int64_t k = 0; k < n; k++) {
            int64_t i = from_here + k, id = wide ? ((const int64_t *)ids)[i] : ((const int32_t *)ids)[i];
            if (id < 0 || id >= table_rows[at]) { bad = i < bad ? i : bad; id = 0; }
            rows[k] = starts[at] + id;
            groups[k] = group_of(at, id, first, shift);
            const uint8_t *from = codes + rows[k] * width;
            for (int64_t b = 0; b < width; b += 64) __builtin_prefetch(from + b);
            if (first) __builtin_prefetch(scale + groups[k]);
            if (first && zero) __builtin_prefetch(zero + groups[k]);
            at = at + 1 == tables ? 0 : at + 1;
        }
        for (int64_t k = 0; k < n; k++) {
            const uint8_t *from = codes + rows[k] * width;
            float *to = out + (from_here + k) * dim, s = scale[groups[k]];
            int z = (1 << (bits - 1)) + (zero ? zero[groups[k]] : 0); /* codes are stored without a sign */
            if (bits == 4 && width == 8 && dim == 16) { /* of known length: a few instructions */
                for (int j = 0; j < 8; j++) to[j] = (float)((from[j] & 15) - z) * s;
                for (int j = 0; j < 8; j++) to[j + 8] = (float)((from[j] >> 4) - z) * s;
            } else if (bits == 4 && dim == 2 * width) {
                for (int64_t j = 0; j < width; j++) to[j] = (float)((from[j] & 15) - z) * s;
                for (int64_t j = 0; j < width; j++) to[j + width] = (float)((from[j] >> 4) - z) * s;
            } else {
                for (int p = 0; p < parts; p++)
                    for (int64_t j = 0; j < width && p * width + j < dim; j++)
                        to[p * width + j] = (float)((from[j] >> (p * bits) & ((1 << bits) - 1)) - z) * s;
            }
        }
    }
    return bad == INT64_MAX ? -1 : bad;
}

/* The first position whose row is none of 0 .. total - 1, or -1. */
EXPORT int64_t dqrm_outside(const int64_t *rows, int64_t count, int64_t total, int threads) {
    int64_t bad = INT64_MAX;
#pragma omp parallel for reduction(min : bad) num_threads(threads) if (count > LITTLE)
    for (int64_t i = 0; i < count; i++)
        if (rows[i] < 0 || rows[i] >= total) bad = i < bad ? i : bad;
    return bad == INT64_MAX ? -1 : bad;
}

/* Of `all` threads, the one that owns a row. Neighbours go together, and no division is spent on it. */
static inline int owner_of(int64_t row, int all) {
    return (int)((uint64_t)((uint32_t)(row >> 4) * 0x9e3779b1u) * (uint64_t)all >> 32);
}

/* Flag a table, and that there is one; NULL where there was no memory for flags: then all are looked at. */
static inline void mark(uint8_t *grown, int64_t table, int64_t tables) {
    if (!grown || __atomic_load_n(&grown[table], __ATOMIC_RELAXED)) return;
    __atomic_store_n(&grown[table], 1, __ATOMIC_RELAXED);
    __atomic_store_n(&grown[tables], 1, __ATOMIC_RELAXED);
}

/* weight[rows[i]] += factor * values[i], in the order of i for each row: exact where rows repeat. `scale` (or NULL), of
 * tables whose first rows are `starts` (of their blocks of rows, where `first` is not NULL: `group_of`): raised to what the
 * new rows need, while they are at hand. */
EXPORT void dqrm_add_rows(float *weight, int64_t dim, const int64_t *rows, const float *values, int64_t count,
                          float factor, const int64_t *starts, int64_t tables, float *scale, int high,
                          const int32_t *highs, const int64_t *first, int shift, int threads) {
    /* Tables whose scale may be too small; last: any. Blocks of rows are too many for flags. */
    uint8_t *grown = scale && !first ? calloc(tables + 1, 1) : NULL;
    if (count * dim <= LITTLE) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t at = 0, last = 0; /* rows come table after table, or sorted */
        /* Each thread walks all rows and takes its own: no two write one row. */
        for (int64_t i = 0; i < count; i++, at = at + 1 >= tables ? 0 : at + 1) {
            if (i + AHEAD < count && owner_of(rows[i + AHEAD], all) == me)
                for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(weight + rows[i + AHEAD] * dim + d, 1);
            if (owner_of(rows[i], all) != me) continue;
            float *to = weight + rows[i] * dim;
            const float *from = values + i * dim;
            if (dim == 16)
                for (int d = 0; d < 16; d++) to[d] += from[d] * factor;
            else
                for (int64_t d = 0; d < dim; d++) to[d] += from[d] * factor;
            if (!grown) continue;
            if (rows[i] < starts[at] || (at + 1 < tables && rows[i] >= starts[at + 1]))
                at = table_of(rows[i], starts, tables, last);
            last = at;
            int top = high_of(high, highs, at);
            if (top && suspect(float_of(max_bits_of(to, 0, dim)), scale[at], top)) mark(grown, at, tables);
        }
    }
    /* From what the rows are in the end: one that repeats may have been larger in between. */
    if (scale && (!grown || grown[tables]))
        raise_for(rows, count, starts, tables, weight, NULL, ROW_FLOAT, dim, scale, high, highs, first, shift, grown, threads);
    free(grown);
}

/* The same on bf16 weights with stochastic rounding; rows must not repeat. A number between two bf16 neighbours goes up
 * with the probability of its distance to the lower one: the 16 bits that are cut off, plus 16 random bits, carry. */
EXPORT void dqrm_add_rows_stochastic(uint16_t *weight, int64_t dim, const int64_t *rows, const float *values,
                                     int64_t count, float factor, uint32_t seed, const int64_t *starts,
                                     int64_t tables, float *scale, int high, const int32_t *highs,
                                     const int64_t *first, int shift, int threads) {
    uint8_t *grown = scale && !first ? calloc(tables + 1, 1) : NULL;
#pragma omp parallel num_threads(threads) if (count * dim > LITTLE)
    {
        int64_t table = 0;
#pragma omp for
        for (int64_t i = 0; i < count; i++) {
            if (i + AHEAD < count) __builtin_prefetch(weight + rows[i + AHEAD] * dim, 1);
            uint16_t *to = weight + rows[i] * dim;
            const float *from = values + i * dim;
            for (int64_t d = 0; d < dim; d++) {
                uint32_t h = hash_of((uint32_t)(rows[i] * dim + d), seed);
                float x = widen(to[d]) + from[d] * factor;
                uint32_t b = bits_of(x);
                int special = (b & 0x7f800000) == 0x7f800000;
                to[d] = special ? narrow(x) : (uint16_t)((b + (h & 0xffff)) >> 16);
            }
            if (!grown) continue;
            table = table_of(rows[i], starts, tables, table);
            int top = high_of(high, highs, table);
            if (top && suspect(float_of(max_bits_of(to, 1, dim)), scale[table], top)) mark(grown, table, tables);
        }
    }
    if (scale && (!grown || grown[tables]))
        raise_for(rows, count, starts, tables, weight, NULL, ROW_BF16, dim, scale, high, highs, first, shift, grown, threads);
    free(grown);
}

/* The same on int8 rows, each encoded anew on the scale of its own largest magnitude; a code goes up with the probability
 * of its distance. Returns 0, or 1 where memory is short. */
static inline __attribute__((always_inline)) void add_to_int8_row(int8_t *restrict row, int64_t dim,
                                                                  const float *restrict values, float factor,
                                                                  uint32_t seed, uint32_t position,
                                                                  float *restrict x) {
    float s = row_scale(row, dim);
    for (int64_t d = 0; d < dim; d++) x[d] = (float)row[d] * s + values[d] * factor;
    write_int8_row(x, dim, 1, seed, position, row);
}

EXPORT int dqrm_add_rows_int8(int8_t *weight, int64_t dim, const int64_t *rows, const float *values, int64_t count,
                              float factor, uint32_t seed, const int64_t *starts, int64_t tables, float *scale,
                              int high, const int32_t *highs, const int64_t *first, int shift, int threads) {
    uint8_t *grown = scale && !first ? calloc(tables + 1, 1) : NULL;
    int64_t width = row_bytes(ROW_INT8, dim);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (count * dim > LITTLE)
    {
        int64_t table = 0;
        float *x = malloc(dim * 4 + 64);
        if (!x) failed = 1;
#pragma omp barrier
#pragma omp for
        for (int64_t i = 0; i < count; i++) {
            if (failed) continue;
            if (i + AHEAD < count)
                for (int64_t b = 0; b < width + 63; b += 64)
                    __builtin_prefetch(weight + rows[i + AHEAD] * width + (b < width ? b : width - 1), 1);
            int8_t *row = weight + rows[i] * width;
            uint32_t position = (uint32_t)(rows[i] * dim);
            if (dim == 16) add_to_int8_row(row, 16, values + i * 16, factor, seed, position, x);
            else if (dim == 64) add_to_int8_row(row, 64, values + i * 64, factor, seed, position, x);
            else add_to_int8_row(row, dim, values + i * dim, factor, seed, position, x);
            if (!grown) continue;
            table = table_of(rows[i], starts, tables, table);
            int top = high_of(high, highs, table);
            if (top && suspect(127.0f * row_scale(row, dim), scale[table], top) &&
                suspect(row_max(row, ROW_INT8, dim), scale[table], top))
                mark(grown, table, tables);
        }
        free(x);
    }
    if (!failed && scale && (!grown || grown[tables]))
        raise_for(rows, count, starts, tables, weight, NULL, ROW_INT8, dim, scale, high, highs, first, shift, grown, threads);
    free(grown);
    return failed;
}

/* Rows of floats as int8 rows, to the nearest code. */
EXPORT void dqrm_encode_int8(const float *values, int64_t rows, int64_t dim, int8_t *out, int threads) {
    int64_t width = row_bytes(ROW_INT8, dim);
#pragma omp parallel for num_threads(threads) if (rows * dim > LITTLE)
    for (int64_t i = 0; i < rows; i++) write_int8_row(values + i * dim, dim, 0, 0, 0, out + i * width);
}

/* Each row once, in rising order, with the sum of its values in the order of the input. `keys`: 2 * count numbers of
 * scratch. Returns how many rows there are, or -1 where count or a row does not fit the
 * packed sort keys. */
EXPORT int64_t dqrm_sum_duplicates(const int64_t *rows, const float *values, int64_t count, int64_t dim,
                                   int64_t *rows_out, float *values_out, uint64_t *keys, int threads) {
    int64_t largest = 0, smallest = 0;
    for (int64_t i = 0; i < count; i++) {
        largest = rows[i] > largest ? rows[i] : largest;
        smallest = rows[i] < smallest ? rows[i] : smallest;
    }
    if (count >= (1LL << 28) || largest >= (1LL << 36) || smallest < 0) return -1;
    uint64_t *from = keys, *to = keys + count;
    for (int64_t i = 0; i < count; i++) from[i] = (uint64_t)rows[i] << 28 | (uint64_t)i;
    for (int shift = 28; largest >> (shift - 28) > 0; shift += 11) { /* radix sort by row; stable, so by position too */
        int64_t counts[2048] = {0}, at = 0;
        for (int64_t i = 0; i < count; i++) counts[from[i] >> shift & 2047]++;
        for (int b = 0; b < 2048; b++) { int64_t c = counts[b]; counts[b] = at; at += c; }
        for (int64_t i = 0; i < count; i++) to[counts[from[i] >> shift & 2047]++] = from[i];
        uint64_t *swap = from; from = to; to = swap;
    }
    int64_t unique = 0; /* where each run of equal rows begins, in the half of the scratch that is free now */
    for (int64_t i = 0; i < count; i++)
        if (i == 0 || from[i] >> 28 != from[i - 1] >> 28) to[unique++] = i;
#pragma omp parallel for num_threads(threads) if (count * dim > LITTLE)
    for (int64_t u = 0; u < unique; u++) {
        int64_t first = to[u], end = u + 1 < unique ? (int64_t)to[u + 1] : count;
        float *sum = values_out + u * dim;
        rows_out[u] = from[first] >> 28;
        memcpy(sum, values + (from[first] & 0xfffffff) * dim, dim * 4);
        for (int64_t i = first + 1; i < end; i++) {
            const float *v = values + (from[i] & 0xfffffff) * dim;
            for (int64_t d = 0; d < dim; d++) sum[d] += v[d];
        }
    }
    return unique;
}

/* max|weight[0:rows]| in bits, reading only blocks that are dirty and taking `maxima` for the others; cleans them. */
EXPORT uint32_t dqrm_blocks_max(const void *weight, const void *hot, int format, int64_t rows, int64_t dim,
                                int64_t block, uint8_t *dirty, uint32_t *maxima, int threads) {
    int64_t blocks = (rows + block - 1) / block, width = row_bytes(format, dim);
    uint32_t largest = 0;
#pragma omp parallel for reduction(max : largest) schedule(static, 256) num_threads(threads) if (rows * dim > LITTLE)
    for (int64_t b = 0; b < blocks; b++) {
        if (dirty[b]) {
            int64_t end = rows - b * block < block ? rows : (b + 1) * block;
            uint32_t m = 0;
            if (format < ROW_INT8)
                m = max_bits_of((const char *)weight + b * block * width, format == ROW_BF16, (end - b * block) * dim);
            else
                for (int64_t row = b * block; row < end; row++) {
                    int kind = format;
                    const void *at = row_at(weight, hot, &kind, dim, row);
                    uint32_t n = bits_of(row_max(at, kind, dim)) & 0x7fffffff;
                    m = n > m ? n : m;
                }
            maxima[b] = m;
            dirty[b] = 0;
        }
        largest = maxima[b] > largest ? maxima[b] : largest;
    }
    return largest;
}

/* ---- linear layers ------------------------------------------------------------------------------------------------ */

/* A line of a weight on the scale of its own largest magnitude, so that no code needs to be clamped: codes as bf16 where
 * `half_out`, or values as float. (Products with 1 / s are no faster: memory is what this waits for.) */
static void quantize_line(const float *restrict w, int64_t count, float s, void *restrict out, int half_out) {
    if (half_out) {
        uint16_t *restrict to = out;
        for (int64_t i = 0; i < count; i++) to[i] = narrow(rintf(w[i] / s));
    } else {
        float *restrict to = out;
        for (int64_t i = 0; i < count; i++) to[i] = rintf(w[i] / s) * s;
    }
}

/* Weights [outputs, inputs] on their own scales. Of weight k, plan[7k ...] holds: outputs, inputs, whether there is a
 * scale per output channel (or one for all), highest code, whether codes are wanted as bf16 (exact up to 8
 * bits) rather than values as float, where in `out` (in bytes) they go and where in `scales` its scales begin. */
EXPORT void dqrm_quantize_weights(const float *const *weights, const int64_t *plan, int64_t count, float *scales,
                                  char *out, int threads) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; k++) total += plan[7 * k] * plan[7 * k + 1];
#pragma omp parallel num_threads(threads) if (total > LITTLE)
    for (int64_t k = 0; k < count; k++) {
        const int64_t *p = plan + 7 * k, outputs = p[0], inputs = p[1], per_channel = p[2];
        const float *weight = weights[k];
        float *scale = scales + p[6];
        int high = (int)p[3], half_out = (int)p[4];
        char *to = out + p[5];
        if (!per_channel) {
            uint32_t m = 0; /* each thread for itself: they need it at once */
            for (int64_t o = 0; o < outputs; o++) {
                uint32_t n = max_bits_of(weight + o * inputs, 0, inputs);
                m = n > m ? n : m;
            }
            float s = scale_of(m, high);
#pragma omp single nowait
            scale[0] = s;
#pragma omp for nowait
            for (int64_t o = 0; o < outputs; o++)
                quantize_line(weight + o * inputs, inputs, s, to + o * inputs * (half_out ? 2 : 4), half_out);
        } else {
#pragma omp for nowait
            for (int64_t o = 0; o < outputs; o++) {
                float s = scale[o] = scale_of(max_bits_of(weight + o * inputs, 0, inputs), high);
                quantize_line(weight + o * inputs, inputs, s, to + o * inputs * (half_out ? 2 : 4), half_out);
            }
        }
    }
}

/* y [batch, outputs] bf16, in place: y * scale + bias, and ReLU where asked for. scale: [scales] (1 or outputs). */
EXPORT void dqrm_finish_linear(uint16_t *y, int64_t batch, int64_t outputs, const float *scale, int64_t scales,
                               const float *bias, int relu, int threads) {
#pragma omp parallel for num_threads(threads) if (batch * outputs > LITTLE)
    for (int64_t b = 0; b < batch; b++) {
        uint16_t *row = y + b * outputs;
        float floor = relu ? 0.0f : -INFINITY;
        if (scales == outputs)
            for (int64_t o = 0; o < outputs; o++) {
                float v = widen(row[o]) * scale[o] + bias[o];
                row[o] = narrow(v < floor ? floor : v);
            }
        else
            for (int64_t o = 0; o < outputs; o++) {
                float v = widen(row[o]) * scale[0] + bias[o];
                row[o] = narrow(v < floor ? floor : v);
            }
    }
}

/* The backward pass of the same: grad [batch, outputs] where y > 0 (y NULL: everywhere) into `masked`, times the scale
 * into `scaled` (NULL: not wanted), summed over the batch into bias_grad. Columns are split over threads. */
static inline __attribute__((always_inline)) void start_linear(
    const void *restrict grad, const void *restrict y, int half, int64_t batch, int64_t outputs,
    const float *restrict scale, int64_t scales, void *restrict masked, void *restrict scaled,
    float *restrict bias_grad, int threads) {
    int64_t step = ((outputs + threads - 1) / threads + 63) & ~63LL;
#pragma omp parallel for num_threads(threads) if (batch * outputs > LITTLE)
    for (int64_t from = 0; from < outputs; from += step) {
        int64_t columns = from + step < outputs ? step : outputs - from;
        float *restrict sum = bias_grad + from;
        for (int64_t o = 0; o < columns; o++) sum[o] = 0;
        for (int64_t b = 0; b < batch; b++) {
            int64_t at = b * outputs + from;
            if (y)
                for (int64_t o = 0; o < columns; o++)
                    store(masked, half, at + o, load(y, half, at + o) > 0 ? load(grad, half, at + o) : 0.0f);
            else
                memcpy((char *)masked + at * (half ? 2 : 4), (const char *)grad + at * (half ? 2 : 4),
                       columns * (half ? 2 : 4));
            for (int64_t o = 0; o < columns; o++) sum[o] += load(masked, half, at + o);
            if (scaled && scales == 1)
                for (int64_t o = 0; o < columns; o++)
                    store(scaled, half, at + o, load(masked, half, at + o) * scale[0]);
            else if (scaled)
                for (int64_t o = 0; o < columns; o++)
                    store(scaled, half, at + o, load(masked, half, at + o) * scale[from + o]);
        }
    }
}
EXPORT void dqrm_start_linear(const void *grad, const void *y, int half, int64_t batch, int64_t outputs,
                              const float *scale, int64_t scales, void *masked, void *scaled, float *bias_grad,
                              int threads) {
    if (half) start_linear(grad, y, 1, batch, outputs, scale, scales, masked, scaled, bias_grad, threads);
    else start_linear(grad, y, 0, batch, outputs, scale, scales, masked, scaled, bias_grad, threads);
}

/* ---- interaction -------------------------------------------------------------------------------------------------- */

/* The vectors of one sample, dense first, zero-padded to [ROUND4(vectors), ROUND16(dim)]. */
#define ROUND4(n) (((n) + 3) & ~3LL)
#define ROUND16(n) (((n) + 15) & ~15LL)

static void gather_vectors(float *v, const void *dense, int half, const float *tables, int64_t sample, int64_t count,
                           int64_t dim, int64_t padded) {
    if (dense) {
        for (int64_t d = 0; d < dim; d++) v[d] = load(dense, half, sample * dim + d);
        v += padded;
    }
    for (int64_t t = 0; t < count; t++) memcpy(v + t * padded, tables + (sample * count + t) * dim, dim * 4);
}

/* out[sample] = dense vector, then the dot products of vector i with vectors j < i (j <= i with `self`), i rising.
 * dense: [batch, dim] (half or float) or NULL; tables: float [batch, count, dim]; out: as dense, [batch, width].
 * Returns 0, or 1 where memory is short. */
EXPORT int dqrm_interact(const void *dense, int half, const float *tables, int64_t batch, int64_t count, int64_t dim,
                         int self, void *out, int64_t width, int threads) {
    int64_t vectors = count + (dense != NULL), rows = ROUND4(vectors), columns = ROUND16(vectors), padded = ROUND16(dim);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (batch * count * dim > LITTLE)
    {
        float *v = calloc(rows * padded, 4), *turned = calloc(padded * columns, 4), *line = malloc((width + 64) * 4);
        if (!v || !turned || !line) failed = 1;
#pragma omp barrier
#pragma omp for
        for (int64_t s = 0; s < batch; s++) {
            if (failed) continue;
            gather_vectors(v, dense, half, tables, s, count, dim, padded);
            for (int64_t i = 0; i < vectors; i++)
                for (int64_t d = 0; d < dim; d++) turned[d * columns + i] = v[i * padded + d];
            int64_t at = 0;
            if (dense) { memcpy(line, v, dim * 4); at = dim; }
            for (int64_t i = 0; i < vectors; i += 4) {
                int64_t begin[4] = {0};
                for (int64_t k = 0; k < 4 && i + k < vectors; k++) { begin[k] = at; at += i + k + self; }
                const float *v0 = v + i * padded, *v1 = v0 + padded, *v2 = v1 + padded, *v3 = v2 + padded;
                for (int64_t j = 0; j < i + 3 + self && j < vectors; j += 16) {
                    v16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
                    for (int64_t d = 0; d < dim; d++) {
                        v16 t = *(const v16 *)(turned + d * columns + j);
                        s0 += v0[d] * t, s1 += v1[d] * t, s2 += v2[d] * t, s3 += v3[d] * t;
                    }
                    v16 sum[4] = {s0, s1, s2, s3};
                    for (int64_t k = 0; k < 4 && i + k < vectors; k++) {
                        int64_t end = i + k + self - j;
                        if (end > 0) memcpy(line + begin[k] + j, &sum[k], (end < 16 ? end : 16) * 4);
                    }
                }
            }
            if (half) {
                uint16_t *to = (uint16_t *)out + s * width;
                for (int64_t n = 0; n < width; n++) to[n] = narrow(line[n]);
            } else {
                memcpy((float *)out + s * width, line, width * 4);
            }
        }
        free(v), free(turned), free(line);
    }
    return failed;
}

/* The gradients of the same from grad [batch, width]: grad_dense as dense, grad_tables float [batch, count, dim]. */
EXPORT int dqrm_interact_backward(const void *grad, const void *dense, int half, const float *tables, int64_t batch,
                                  int64_t count, int64_t dim, int self, int64_t width, void *grad_dense,
                                  float *grad_tables, int threads) {
    int64_t first = dense != NULL, vectors = count + first, rows = ROUND4(vectors), padded = ROUND16(dim);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (batch * count * dim > LITTLE)
    {
        /* `both` is symmetric: the gradient of pair (i, j) reaches i by way of j and j by way of i. */
        float *v = calloc(rows * padded, 4), *both = calloc(rows * rows, 4), *line = malloc((width + 64) * 4);
        if (!v || !both || !line) failed = 1;
#pragma omp barrier
#pragma omp for
        for (int64_t s = 0; s < batch; s++) {
            if (failed) continue;
            gather_vectors(v, dense, half, tables, s, count, dim, padded);
            for (int64_t n = 0; n < width; n++) line[n] = load(grad, half, s * width + n);
            int64_t at = first ? dim : 0;
            for (int64_t i = 0; i < vectors; i++) {
                for (int64_t j = 0; j < i; j++) both[i * rows + j] = both[j * rows + i] = line[at++];
                if (self) both[i * rows + i] = 2 * line[at++];
            }
            for (int64_t i = 0; i < vectors; i += 4)
                for (int64_t d = 0; d < padded; d += 16) {
                    v16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
                    for (int64_t j = 0; j < vectors; j++) {
                        v16 t = *(const v16 *)(v + j * padded + d);
                        const float *b = both + j * rows + i; /* symmetric: a column is a row */
                        s0 += b[0] * t, s1 += b[1] * t, s2 += b[2] * t, s3 += b[3] * t;
                    }
                    v16 sum[4] = {s0, s1, s2, s3};
                    int64_t end = dim - d < 16 ? dim - d : 16;
                    for (int64_t k = 0; k < 4 && i + k < vectors; k++) {
                        if (i + k >= first) {
                            memcpy(grad_tables + (s * count + i + k - first) * dim + d, &sum[k], end * 4);
                            continue;
                        }
                        for (int64_t n = 0; n < end; n++)
                            store(grad_dense, half, s * dim + d + n, sum[k][n] + line[d + n]);
                    }
                }
        }
        free(v), free(both), free(line);
    }
    return failed;
}
