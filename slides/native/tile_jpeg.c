/* Baseline JPEG tiles to RGB: the fast path of slides/decode.py. `python -m slides.native` compiles it (clang, as zig cc).
 *
 * Answers to the bit what libjpeg-turbo answers with its accurate integer DCT, scaled by 1/1, 1/2, 1/4 or 1/8 (the arithmetic is that of
 * its jidctint.c, jidctred.c and jdcolor.c), for the plain files that encoders write: sequential, Huffman coded, 8 bits, one scan, no
 * restarts, grey or YCbCr, no component to be enlarged. Whatever else it meets, a damaged file above all, it declines, and the library
 * decides. It is faster because codes are read from 64 bits at a time, with one look into a table for code, sign and size, and because
 * the blocks before are transformed while the processor waits for the next codes.
 *
 * This software is based in part on the work of the Independent JPEG Group, whose arithmetic it repeats.
 *
 * The bytes are not to be trusted. Every index is bounded by construction: table indices by their number of bits, places in a block by
 * ZIGZAG's 64 + 16 entries, reading by a tail of zeros that is longer than all that two MCUs can take, with a look at the end after
 * each two. Compile with -fwrapv: what damaged files make of numbers wraps around, as it does in libjpeg-turbo.
 */
#include "codes.h"
#include "samples.h"

#include <stdlib.h>

enum { MOST_COMPONENTS = 3, MOST_BLOCKS = 6 };
enum { TAIL_BYTES = 2 * MOST_BLOCKS * 64 * MOST_BYTES_OF_CODE + 64 };

typedef struct {
    int id, h, v, quant, dc, ac;
    int scaled;    /* side of its blocks in the result: 8, 4, 2, 1 */
    int32_t level; /* DC so far */
    uint8_t *plane;
    int stride;
} component;

typedef struct {
    int width, height, components, most_h, most_v;
    component of[MOST_COMPONENTS];
    uint16_t quant[4][64]; /* in zigzag order */
    int quant_defined[4];
    huffman dc[4], ac[4];
} image;

/* ---- markers ---------------------------------------------------------------------------------------------------------- */

static int two(const uint8_t *at) { return at[0] << 8 | at[1]; }

static int read_quant(image *im, const uint8_t *at, const uint8_t *end) {
    for (; at < end; at += 65) {
        if (end - at < 65 || at[0] > 3) return DECLINED; /* 16 bits are for 12-bit files */
        for (int k = 0; k < 64; k++) im->quant[at[0]][k] = at[1 + k];
        im->quant_defined[at[0]] = 1;
    }
    return OK;
}

static int read_huffman(image *im, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        int number = 0, ac = at[0] >> 4;
        if (end - at < 17 || ac > 1 || (at[0] & 15) > 3) return DECLINED;
        for (int i = 1; i <= 16; i++) number += at[i];
        if (number > 256 || end - at < 17 + number) return DECLINED;
        huffman *table = ac ? &im->ac[at[0] & 3] : &im->dc[at[0] & 3];
        if (define_huffman(table, at + 1, at + 17, ac)) return DECLINED;
        at += 17 + number;
    }
    return OK;
}

static int read_frame(image *im, const uint8_t *at, int length) {
    if (im->components || length < 6 || at[0] != 8) return DECLINED;
    im->height = two(at + 1), im->width = two(at + 3);
    int number = at[5];
    if ((number != 1 && number != 3) || length != 6 + 3 * number || !im->height || !im->width) return DECLINED;
    im->most_h = im->most_v = 1;
    int blocks = 0;
    for (int i = 0; i < number; i++) {
        component *c = &im->of[i];
        const uint8_t *of = at + 6 + 3 * i;
        c->id = of[0], c->h = of[1] >> 4, c->v = of[1] & 15, c->quant = of[2];
        if (c->id != i + 1 || c->h < 1 || c->h > 2 || c->v < 1 || c->v > 2 || c->quant > 3) return DECLINED;
        if (number == 1 && (c->h != 1 || c->v != 1)) return DECLINED;
        if (c->h > im->most_h) im->most_h = c->h;
        if (c->v > im->most_v) im->most_v = c->v;
        blocks += c->h * c->v;
    }
    im->components = number;
    return blocks <= MOST_BLOCKS ? OK : DECLINED;
}

static int read_scan(image *im, const uint8_t *at, int length) {
    if (!im->components || length != 4 + 2 * im->components || at[0] != im->components) return DECLINED;
    for (int i = 0; i < im->components; i++) {
        component *c = &im->of[i];
        c->dc = at[2 + 2 * i] >> 4, c->ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != c->id || c->dc > 3 || c->ac > 3 || !im->dc[c->dc].defined || !im->ac[c->ac].defined ||
            !im->quant_defined[c->quant])
            return DECLINED;
    }
    at += 1 + 2 * im->components;
    return at[0] == 0 && at[1] == 63 && at[2] == 0 ? OK : DECLINED;
}

/* Up to the first scan; its place in the file, or 0. */
static size_t read_header(image *im, const uint8_t *data, size_t size) {
    size_t at = 2;
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return 0;
    while (at + 4 <= size && data[at] == 0xFF) {
        int marker = data[at + 1], length = two(data + at + 2) - 2, wrong = 0;
        const uint8_t *segment = data + at + 4;
        if (length < 0 || (size_t)length > size - at - 4) return 0;
        at += 4 + (size_t)length;
        switch (marker) {
        case 0xDB: wrong = read_quant(im, segment, segment + length); break;
        case 0xC4: wrong = read_huffman(im, segment, segment + length); break;
        case 0xC0: case 0xC1: wrong = read_frame(im, segment, length); break;
        case 0xDD: wrong = length != 2 || two(segment); break; /* restart markers */
        case 0xEE: /* Adobe's transform: 1 is YCbCr */
            wrong = length >= 12 && !memcmp(segment, "Adobe", 5) && segment[11] != 1;
            break;
        case 0xDA: return read_scan(im, segment, length) ? 0 : at;
        default: wrong = marker != 0xFE && (marker < 0xE0 || marker > 0xEF);
        }
        if (wrong) return 0;
    }
    return 0;
}

/* ---- the scan --------------------------------------------------------------------------------------------------------- */

/* The scan without stuffing, with a tail of zeros behind it; its length, or -1 if anything but the end of the image follows. */
static ptrdiff_t unstuffed(const uint8_t *from, const uint8_t *end, uint8_t *to) {
    uint8_t *begin = to;
    for (;;) {
        const uint8_t *mark = memchr(from, 0xFF, (size_t)(end - from));
        if (!mark || mark + 1 >= end) return -1;
        memcpy(to, from, (size_t)(mark - from));
        to += mark - from;
        if (mark[1] == 0xD9) break;
        if (mark[1]) return -1;
        *to++ = 0xFF;
        from = mark + 2;
    }
    memset(to, 0, TAIL_BYTES);
    return to - begin;
}

/* Blocks of two MCUs side by side: of each component, row of blocks, block; and the last place of each that is not 0. */
typedef struct {
    int16_t block[MOST_COMPONENTS][2][4][64];
    int last[MOST_COMPONENTS][2][4];
} mcu_pair;

static inline int read_pair(reader *r, image *im, mcu_pair *pair, int mcus) {
    for (int m = 0; m < mcus; m++)
        for (int i = 0; i < im->components; i++) {
            component *c = &im->of[i];
            for (int v = 0; v < c->v; v++)
                for (int h = 0; h < c->h; h++) {
                    int last = read_block(r, &im->dc[c->dc], &im->ac[c->ac], im->quant[c->quant], &c->level,
                                          pair->block[i][v][m * c->h + h]);
                    if (last < 0) return DECLINED;
                    pair->last[i][v][m * c->h + h] = last;
                }
        }
    return OK;
}

static inline void put_mcus(image *im, mcu_pair *pair, int x) {
    for (int i = 0; i < im->components; i++) {
        component *c = &im->of[i];
        for (int v = 0; v < c->v; v++)
            for (int h = 0; h < c->h; h++) {
                uint8_t *out = c->plane + (size_t)v * c->scaled * c->stride + (size_t)(x * c->h + 2 * h) * c->scaled;
                put_pair(pair->block[i][v] + 2 * h, pair->last[i][v] + 2 * h, c->scaled, out, c->stride);
                pair->last[i][v][2 * h] = pair->last[i][v][2 * h + 1] = 0;
            }
    }
}

static int decode_scan(image *im, const uint8_t *scan, ptrdiff_t scan_bytes, int denominator, uint8_t *rgb) {
    int mcu_w = im->most_h * 8, mcu_h = im->most_v * 8;
    int across = (im->width + mcu_w - 1) / mcu_w, down = (im->height + mcu_h - 1) / mcu_h;
    int out_w = (im->width + denominator - 1) / denominator, out_h = (im->height + denominator - 1) / denominator;
    int rows = mcu_h / denominator;
    mcu_pair pair[2];
    reader r = {scan, 0, 0};
    memset(pair, 0, sizeof pair);
    for (int y = 0; y < down; y++) {
        int now = 0;
        for (int x = 0; x < across; x += 2, now ^= 1) {
            if (read_pair(&r, im, &pair[now], x + 1 < across ? 2 : 1)) return DECLINED;
            if (r.next - scan > scan_bytes + 8) return DECLINED;
            if (x) put_mcus(im, &pair[now ^ 1], x - 2);
        }
        put_mcus(im, &pair[now ^ 1], (across - 1) & ~1);
        for (int row = 0; row < rows && y * rows + row < out_h; row++) {
            const uint8_t *plane[MOST_COMPONENTS];
            for (int i = 0; i < im->components; i++) plane[i] = im->of[i].plane + (size_t)row * im->of[i].stride;
            uint8_t *out = rgb + (size_t)(y * rows + row) * out_w * 3;
            if (im->components == 3)
                to_rgb(plane[0], plane[1], plane[2], out, out_w);
            else
                for (int x = 0; x < out_w; x++) out[3 * x] = out[3 * x + 1] = out[3 * x + 2] = plane[0][x];
        }
    }
    ptrdiff_t taken_bits = (r.next - scan) * 8 - r.count;
    return taken_bits <= scan_bytes * 8 && scan_bytes * 8 - taken_bits < 8 ? OK : DECLINED;
}

#ifndef SOURCE
#define SOURCE ""
#endif
/* SHA-256 of the source, as told by whoever compiled it: a library of another source is not used. */
const char *clotline_tile_jpeg_source(void) { return SOURCE; }

/* Decode a whole file.
 *
 * data, size: the file. denominator: 1, 2, 4 or 8. width, height: of the file, as its caller read them.
 * rgb: ceil(height / denominator) x ceil(width / denominator) x 3 bytes, written if the answer is 0.
 */
int clotline_tile_jpeg(const uint8_t *data, size_t size, int denominator, int width, int height, uint8_t *rgb) {
    int answer = DECLINED;
    image *im = calloc(1, sizeof *im);
    uint8_t *memory = NULL;
    size_t scan = im ? read_header(im, data, size) : 0;
    if (!scan || im->width != width || im->height != height) goto end;
    size_t padded = ((size_t)width + 32) & ~(size_t)31, plane_bytes = (padded + 64) * 16 + 64;
    memory = malloc(size - scan + TAIL_BYTES + MOST_COMPONENTS * plane_bytes);
    if (!memory) goto end;
    for (int i = 0; i < im->components; i++) {
        component *c = &im->of[i];
        c->scaled = im->most_h * 8 / denominator / c->h;
        if ((c->scaled != 1 && c->scaled != 2 && c->scaled != 4 && c->scaled != 8) ||
            c->scaled * c->h * denominator != im->most_h * 8 || c->scaled * c->v * denominator != im->most_v * 8)
            goto end;
        c->stride = (int)padded + 64;
        c->plane = memory + (size_t)i * plane_bytes;
    }
    uint8_t *bare = memory + MOST_COMPONENTS * plane_bytes;
    ptrdiff_t bytes = unstuffed(data + scan, data + size, bare);
    if (bytes >= 0) answer = decode_scan(im, bare, bytes, denominator, rgb);
end:
    free(memory);
    free(im);
    return answer;
}
