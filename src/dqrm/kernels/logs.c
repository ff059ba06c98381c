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

/* Up to 8 hexadecimal digits at `at`, ended by `stop`; returns what follows, NULL if it is anything else. Nothing is 0. */
static inline const uint8_t *hex_field(const uint8_t *at, const uint8_t *end, uint8_t stop, uint32_t *out) {
    uint32_t value = 0;
    if (end - at > 8 && at[8] == stop) { /* as nearly all are */
        uint32_t wrong = 0;
        for (int i = 0; i < 8; i++) {
            uint32_t digit = DIGITS[at[i]];
            wrong |= digit;
            value = value << 4 | digit;
        }
        if (wrong < 16) {
            *out = value;
            return at + 9;
        }
        value = 0;
    }
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
