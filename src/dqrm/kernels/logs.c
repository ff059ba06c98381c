/* What preparing a log does for every line or id: parse Criteo's lines, code and hash ids, count and merge them.
 *
 * One thread each: several columns are worked on at once by threads of the caller. Everything is whole numbers, and
 * equals what `data/` computes with polars and NumPy where there is no compiler.
 */
#include "common.h"

enum { LABEL, DENSE, HEX, SKIPPED };

/* The value of a hexadecimal digit; 255: none. */
#define N(x) x, x, x, x, x, x, x, x
#define NONE16 N(255), N(255)
static const uint8_t DIGITS[256] = {
    NONE16, NONE16, NONE16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 255, 255, 255, 255, 255,
    255, 10, 11, 12, 13, 14, 15, 255, N(255), NONE16, 255, 10, 11, 12, 13, 14, 15, 255, N(255), NONE16,
    NONE16, NONE16, NONE16, NONE16, NONE16, NONE16, NONE16, NONE16,
};

/* The value of eight hexadecimal digits, the first in the lowest byte; *sound: whether they are some. Byte by byte in one
 * register: to lower case, then 0 to 9 and a to f are 0x30 to 0x3f, where letters are those of 0x3a and above. */
static inline uint32_t eight_digits(uint64_t text, int *sound) {
    const uint64_t each = 0x0101010101010101u;
    uint64_t letters = text >> 6 & each;
    uint64_t digits = (text | letters << 5) - letters * 0x27;
    uint64_t values = digits & each * 0x0f;
    *sound = !(text & each * 0x80) && (digits & each * 0xf0) == each * 0x30 && ((values + each * 6) >> 4 & each) == letters;
    values = __builtin_bswap64(values);
    values = (values | values >> 4) & 0x00ff00ff00ff00ffu;
    values = (values | values >> 8) & 0x0000ffff0000ffffu;
    return (uint32_t)(values | values >> 16);
}

/* Up to 8 hexadecimal digits at `at`, ended by `stop`; returns what follows, NULL if it is anything else. Nothing is 0. */
static inline const uint8_t *hex_field(const uint8_t *at, const uint8_t *end, uint8_t stop, uint32_t *out) {
    uint32_t value = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (end - at > 8 && at[8] == stop) { /* as nearly all are */
        uint64_t text;
        int sound;
        memcpy(&text, at, 8);
        *out = eight_digits(text, &sound);
        if (sound) return at + 9;
    }
#endif
    for (int i = 0; at < end && *at != stop; i++, at++) {
        uint32_t digit = DIGITS[*at];
        if (digit > 15 || i == 8) return NULL;
        value = value << 4 | digit;
    }
    *out = value;
    return at < end ? at + 1 : NULL;
}

/* A whole number of up to 18 digits, ended by `stop`; as `hex_field`. */
static inline const uint8_t *int_field(const uint8_t *at, const uint8_t *end, uint8_t stop, int64_t *out) {
    int64_t value = 0;
    if (at < end && *at == stop) {
        *out = 0;
        return at + 1;
    }
    int negative = at < end && *at == '-';
    const uint8_t *first = at += negative;
    for (; at < end && *at != stop; at++) {
        uint8_t digit = (uint8_t)(*at - '0');
        if (digit > 9 || at - first == 18) return NULL;
        value = value * 10 + digit;
    }
    if (at == first || at == end) return NULL;
    *out = negative ? -value : value;
    return at + 1;
}

/* Newlines in a text. */
EXPORT int64_t dqrm_count_lines(const uint8_t *text, int64_t size) {
    int64_t lines = 0;
    for (int64_t at = 0; at < size; at += 255) { /* so many that a byte can count them */
        int64_t until = size - at < 255 ? size - at : 255;
        uint8_t here = 0;
        for (int64_t i = 0; i < until; i++) here += text[at + i] == '\n';
        lines += here;
    }
    return lines;
}

/* So many lines of so many fields with tabs between them, each line ended by a newline. roles: what each field is. labels
 * [lines], 0 or 1; dense and ids: column after column, [columns, lines]; missing ones are 0. A dense value v is
 * table[v - low] where the table has that; others are 0 there, and are returned as places in `dense` and values.
 *
 * Returns the number of these; -1 if anything is not as it usually is: it is parsed by other means then. */
EXPORT int64_t dqrm_parse_lines(const uint8_t *text, int64_t size, int64_t lines, const uint8_t *roles, int64_t fields,
                                const float *table, int64_t low, int64_t entries, uint8_t *labels, float *dense,
                                uint32_t *ids, int64_t *places, int64_t *values) {
    const uint8_t *at = text, *end = text + size;
    int64_t others = 0;
    for (int64_t line = 0; line < lines; line++) {
        int64_t number = line, id = line;
        for (int64_t field = 0; field < fields; field++) {
            uint8_t stop = field + 1 < fields ? '\t' : '\n';
            if (roles[field] == HEX) {
                if (!(at = hex_field(at, end, stop, &ids[id]))) return -1;
                id += lines;
            } else if (roles[field] == DENSE) {
                int64_t value;
                if (!(at = int_field(at, end, stop, &value))) return -1;
                int64_t entry = value - low;
                if (entry >= 0 && entry < entries) dense[number] = table[entry];
                else {
                    dense[number] = 0;
                    places[others] = number;
                    values[others++] = value;
                }
                number += lines;
            } else if (roles[field] == LABEL) {
                if (end - at < 2 || (at[0] != '0' && at[0] != '1') || at[1] != stop) return -1;
                labels[line] = at[0] - '0';
                at += 2;
            } else {
                while (at < end && *at != stop) {
                    if (*at < ' ' || *at > '~') return -1;
                    at++;
                }
                if (at++ >= end) return -1;
            }
        }
    }
    return at == end ? others : -1;
}

/* ---- coding: distinct numbers, and of each number which one it is ------------------------------------------------ */

static inline uint64_t spread(uint32_t key) { return key * 0x9E3779B97F4A7C15u >> 32; }

/* The distinct ones of some numbers in order of first appearance, and which of them each number is. slots: 1 << bits of
 * them, 0, for at most half as many keys. Returns how many there are, -1 where they are more than `limit`. */
EXPORT int64_t dqrm_code_few(const uint32_t *numbers, int64_t count, int64_t limit, uint64_t *slots, int64_t bits,
                             uint32_t *keys, uint32_t *codes) {
    uint64_t mask = ((uint64_t)1 << bits) - 1;
    int64_t distinct = 0;
    for (int64_t i = 0; i < count; i++) { /* a slot: the key, and one more than its code */
        uint32_t key = numbers[i];
        uint64_t at = spread(key) & mask, slot;
        while ((slot = slots[at]) && slot >> 32 != key) at = (at + 1) & mask;
        if (!slot) {
            if (distinct == limit) return -1;
            keys[distinct++] = key;
            slots[at] = slot = (uint64_t)key << 32 | (uint64_t)distinct;
        }
        codes[i] = (uint32_t)slot - 1;
    }
    return distinct;
}

/* Each number with its place, in one integer that is ordered by number first. */
EXPORT int64_t dqrm_place(const uint32_t *numbers, int64_t count, uint64_t *placed) {
    for (int64_t i = 0; i < count; i++) placed[i] = (uint64_t)numbers[i] << 32 | (uint64_t)i;
    return 0;
}

/* As `code_few` of these, sorted: then the distinct ones are sorted, too. */
EXPORT int64_t dqrm_code_placed(const uint64_t *placed, int64_t count, uint32_t *keys, uint32_t *codes) {
    int64_t distinct = 0;
    uint32_t last = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t key = (uint32_t)(placed[i] >> 32);
        keys[distinct] = key; /* behind the last one, until it is another */
        distinct += !i || key != last;
        last = key;
        codes[(uint32_t)placed[i]] = (uint32_t)distinct - 1;
    }
    return distinct;
}

/* ---- counting ---------------------------------------------------------------------------------------------------- */

static inline uint32_t code_at(const void *codes, int64_t width, int64_t i) {
    return width == 1 ? ((const uint8_t *)codes)[i] : width == 2 ? ((const uint16_t *)codes)[i] : ((const uint32_t *)codes)[i];
}

static inline void count_all(const void *codes, int64_t width, int64_t count, const uint8_t *counted, uint32_t position,
                             uint32_t *counts, uint32_t *first) {
    for (int64_t i = count - 1; i >= 0; i--) {
        if (counted && !counted[i]) continue;
        uint32_t code = code_at(codes, width, i);
        counts[code]++;
        first[code] = position + (uint32_t)i;
    }
}

/* How often each code occurs among those that are `counted` (or NULL: all), and the position of its first one. codes of
 * `width` bytes; counts: 0. */
EXPORT int64_t dqrm_count_codes(const void *codes, int64_t width, int64_t count, const uint8_t *counted, int64_t position,
                                uint32_t *counts, uint32_t *first) {
    if (width == 1) count_all(codes, 1, count, counted, (uint32_t)position, counts, first);
    else if (width == 2) count_all(codes, 2, count, counted, (uint32_t)position, counts, first);
    else count_all(codes, 4, count, counted, (uint32_t)position, counts, first);
    return 0;
}

/* Two runs of (key, count, first position), each sorted by distinct keys, as one; returns its length. */
EXPORT int64_t dqrm_merge_runs(const uint32_t *a, const uint32_t *a_counts, const uint32_t *a_first, int64_t a_length,
                               const uint32_t *b, const uint32_t *b_counts, const uint32_t *b_first, int64_t b_length,
                               uint32_t *keys, uint32_t *counts, uint32_t *first) {
    int64_t i = 0, j = 0, n = 0;
    while (i < a_length && j < b_length) { /* without branches: which key is lower cannot be predicted */
        uint32_t x = a[i], y = b[j], in_a = x <= y, in_b = y <= x;
        uint32_t at_a = a_first[i] | (in_a - 1), at_b = b_first[j] | (in_b - 1);
        keys[n] = in_a ? x : y;
        counts[n] = (a_counts[i] & -in_a) + (b_counts[j] & -in_b);
        first[n++] = at_a < at_b ? at_a : at_b;
        i += in_a;
        j += in_b;
    }
    int64_t left = i < a_length ? a_length - i : b_length - j;
    memcpy(keys + n, i < a_length ? a + i : b + j, (size_t)left * 4);
    memcpy(counts + n, i < a_length ? a_counts + i : b_counts + j, (size_t)left * 4);
    memcpy(first + n, i < a_length ? a_first + i : b_first + j, (size_t)left * 4);
    return n + left;
}

/* ---- table rows -------------------------------------------------------------------------------------------------- */

/* The table row of each of some sorted keys: that of the same one among sorted `known`, or 0. */
EXPORT int64_t dqrm_find_sorted(const uint32_t *known, const int32_t *table_rows, int64_t length, const uint32_t *keys,
                                int64_t count, int32_t *out) {
    int64_t at = 0; /* the first known key that is not below the last one looked for */
    for (int64_t i = 0; i < count; i++) {
        uint32_t key = keys[i];
        int64_t step = 1;
        if (at < length && known[at] < key) { /* steps of 1, 2, 4 ... until beyond it, then halves */
            while (at + step < length && known[at + step] < key) {
                at += step;
                step *= 2;
            }
            int64_t high = at + step < length ? at + step : length;
            for (int64_t left = high - at - 1; left > 0;) { /* at is below the key, high is not */
                int64_t half = (left + 1) / 2;
                if (known[at + half] < key) {
                    at += half;
                    left -= half;
                } else left = half - 1;
            }
            at++;
        }
        out[i] = at < length && known[at] == key ? table_rows[at] : 0;
    }
    return 0;
}

static inline uint64_t rotated(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

/* x mod divisor, given floor((2^64 - 1) / divisor): the product is at most two below the quotient. */
static inline uint64_t remainder_of(uint64_t x, uint64_t divisor, uint64_t inverse) {
    uint64_t rest = x - (uint64_t)((unsigned __int128)x * inverse >> 64) * divisor;
    rest -= rest >= divisor ? divisor : 0;
    return rest - (rest >= divisor ? divisor : 0);
}

/* Table row 1 + XXH64(key, seed) mod (rows - 1) of each key, as 4 little-endian bytes; 0 of key 0 (data/hashing.py). Of
 * several seeds the rows stand side by side. */
EXPORT int64_t dqrm_hash_ids(const uint32_t *keys, int64_t count, const uint64_t *seeds, int64_t functions, int64_t rows,
                             int32_t *out) {
    const uint64_t p1 = 0x9E3779B185EBCA87u, p2 = 0xC2B2AE3D27D4EB4Fu, p3 = 0x165667B19E3779F9u, p5 = 0x27D4EB2F165667C5u;
    uint64_t least = (uint64_t)rows - 1, inverse = ~(uint64_t)0 / least;
    for (int64_t i = 0; i < count; i++)
        for (int64_t f = 0; f < functions; f++) {
            uint64_t hash = (seeds[f] + p5 + 4) ^ (keys[i] * p1);
            hash = rotated(hash, 23) * p2 + p3;
            hash = (hash ^ hash >> 33) * p2;
            hash = (hash ^ hash >> 29) * p3;
            hash ^= hash >> 32;
            out[i * functions + f] = keys[i] ? (int32_t)remainder_of(hash, least, inverse) + 1 : 0;
        }
    return 0;
}

/* out[i, column] = table_rows[codes[i]], or codes[i] where there are no table rows, of a matrix of `width` columns. */
EXPORT int64_t dqrm_put_column(const void *codes, int64_t bytes, int64_t count, const int32_t *table_rows, int32_t *out,
                               int64_t column, int64_t width) {
    out += column;
    if (!table_rows) for (int64_t i = 0; i < count; i++) out[i * width] = ((const int32_t *)codes)[i];
    else if (bytes == 1) for (int64_t i = 0; i < count; i++) out[i * width] = table_rows[((const uint8_t *)codes)[i]];
    else if (bytes == 2) for (int64_t i = 0; i < count; i++) out[i * width] = table_rows[((const uint16_t *)codes)[i]];
    else for (int64_t i = 0; i < count; i++) out[i * width] = table_rows[((const uint32_t *)codes)[i]];
    return 0;
}
