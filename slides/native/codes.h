/* Huffman codes of a scan, read from 64 bits at a time (ITU-T T.81, annex F.2.2). */
#ifndef CLOTLINE_CODES_H
#define CLOTLINE_CODES_H

#include <stdint.h>
#include <string.h>

enum { OK = 0, DECLINED = 1 };
enum { LOOK_BITS = 10, MOST_BYTES_OF_CODE = 4 };

typedef struct {
    uint32_t look[1 << LOOK_BITS]; /* of the next bits: see entry(); 0: a longer code */
    uint32_t all[256];             /* entries in the order of codes */
    int32_t end[17];               /* of codes of each length, left-aligned in 16 bits, the first that is too large */
    int32_t first[17];             /* number of the first code of that length, less the code itself */
    int defined;
} huffman;

typedef struct {
    const uint8_t *next;
    uint64_t bits; /* left-aligned */
    unsigned count;
} reader;

/* Place in a block of the k-th coefficient; what a damaged file puts behind the 64th falls on the last one, and is declined. */
static const uint8_t ZIGZAG[64 + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

/* bits in all | bits of the code << 8 | bits of the value << 16 | zeros before it << 24 */
static uint32_t entry(int length, int symbol) {
    int size = symbol & 15;
    return (uint32_t)(length + size) | (uint32_t)length << 8 | (uint32_t)size << 16 | (uint32_t)(symbol >> 4) << 24;
}

/* Sizes of more than 11 bits (DC) and 10 (AC) belong to 12-bit files; without them a refill lasts for two codes and their values. */
static int define_huffman(huffman *table, const uint8_t *counts, const uint8_t *symbols, int ac) {
    int most_size = ac ? 10 : 11, most_symbol = ac ? 255 : 11;
    int32_t code = 0;
    int place = 0;
    memset(table, 0, sizeof *table);
    for (int length = 1; length <= 16; length++) {
        table->first[length] = place - code;
        for (int i = 0; i < counts[length - 1]; i++, place++, code++) {
            if ((symbols[place] & 15) > most_size || symbols[place] > most_symbol) return DECLINED;
            table->all[place] = entry(length, symbols[place]);
            if (length <= LOOK_BITS) {
                if (code >= 1 << length) return DECLINED;
                for (int j = 0; j < 1 << (LOOK_BITS - length); j++)
                    table->look[code << (LOOK_BITS - length) | j] = table->all[place];
            }
        }
        if (code > 1 << length) return DECLINED;
        table->end[length] = code << (16 - length);
        code <<= 1;
    }
    table->defined = 1;
    return OK;
}

static inline void refill(reader *r) {
    uint64_t word;
    memcpy(&word, r->next, 8);
    r->bits |= __builtin_bswap64(word) >> r->count;
    r->next += (63 - r->count) >> 3;
    r->count |= 56;
}

/* An entry of a code of more than LOOK_BITS; 0 where there is none. */
static uint32_t long_code(const huffman *table, uint64_t bits) {
    int32_t code = (int32_t)(bits >> 48);
    for (int length = LOOK_BITS + 1; length <= 16; length++)
        if (code < table->end[length]) return table->all[(table->first[length] + (code >> (16 - length))) & 255];
    return 0;
}

static inline uint32_t take(reader *r, const huffman *table, int32_t *value) {
    uint32_t found = table->look[r->bits >> (64 - LOOK_BITS)];
    if (__builtin_expect(!found, 0)) found = long_code(table, r->bits);
    unsigned size = found >> 16 & 15;
    int64_t rest = (int64_t)(r->bits << (found >> 8 & 31));
    /* ITU-T T.81, F.2.2.1: a value that begins with a 0 is negative. */
    *value = (int32_t)(((uint64_t)rest >> 1) >> (63 - size)) + (int32_t)(~(rest >> 63) & (1 - (1 << size)));
    r->bits <<= found & 63;
    r->count -= found & 63;
    return found;
}

/* One block, dequantised by `quant` (in zigzag order), into zeros; `level` is the DC coefficient so far. Returns the last place in
 * zigzag order that is not 0, or -1: no such code, more than 64 coefficients, or one beyond +- 2047, which no 8-bit samples have
 * (the largest is 1024, and half a step of the quantiser): there libjpeg-turbo's own variants differ from one another. */
static inline int read_block(reader *r, const huffman *dc, const huffman *ac, const uint16_t *quant, int32_t *level,
                             int16_t *block) {
    int32_t value;
    refill(r);
    if (__builtin_expect(!take(r, dc, &value), 0)) return -1;
    *level += value;
    int32_t coefficient = *level * quant[0];
    uint32_t odd = (uint32_t)(coefficient + 2048) | (uint32_t)(*level + 2048);
    block[0] = (int16_t)coefficient;
    int k = 1, last = 0;
    for (;;) {
        uint32_t found;
#define COEFFICIENT                                                                  \
    found = take(r, ac, &value);                                                     \
    if (!(found >> 16 & 15)) {                                                       \
        if (!found) return -1;                                                       \
        if (found >> 24 != 15) break; /* end of block */                             \
        k += 16;                                                                     \
    } else {                                                                         \
        k += (int)(found >> 24);                                                     \
        coefficient = value * quant[k & 63];                                         \
        odd |= (uint32_t)(coefficient + 2048);                                       \
        block[ZIGZAG[k]] = (int16_t)coefficient;                                     \
        last = k++;                                                                  \
    }                                                                                \
    if (k >= 64) break;
        COEFFICIENT
        refill(r);
        COEFFICIENT
#undef COEFFICIENT
    }
    return k <= 64 && odd < 4096 ? last : -1;
}

#endif
