/* Coefficients to samples, and YCbCr to RGB: libjpeg-turbo's arithmetic in vectors of eight 32-bit lanes. */
#ifndef CLOTLINE_SAMPLES_H
#define CLOTLINE_SAMPLES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int32_t lanes __attribute__((vector_size(32)));
typedef int16_t halves __attribute__((vector_size(16)));
typedef uint8_t bytes8 __attribute__((vector_size(8)));
#define FIX(x) ((int32_t)((x) * 8192 + 0.5))

static inline lanes row_of(const int16_t *block, int row) {
    halves loaded;
    memcpy(&loaded, block + 8 * row, sizeof loaded);
    return __builtin_convertvector(loaded, lanes);
}

static inline lanes rounded(lanes x, int bits) { return (x + (1 << (bits - 1))) >> bits; }

static inline lanes limited(lanes x, int32_t least, int32_t most) {
    lanes low = (lanes){0} + least, high = (lanes){0} + most;
    return __builtin_elementwise_min(__builtin_elementwise_max(x, low), high);
}

static inline uint8_t clamped(int32_t x) { return (uint8_t)(x < 0 ? 0 : x > 255 ? 255 : x); }

static inline lanes sample(lanes x) { return limited(x + 128, 0, 255); }

/* As libjpeg-turbo's vector code, which keeps 16 bits between the passes. */
static inline lanes kept(lanes x) { return limited(x, -32768, 32767); }

static inline void transpose(lanes *m) {
    lanes a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = __builtin_shufflevector(m[2 * i], m[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[2 * i + 1] = __builtin_shufflevector(m[2 * i], m[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + j + 2] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        m[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        m[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* jidctint.c: one pass over eight columns at once. */
static inline void pass8(lanes *x, int bits) {
    lanes z1 = (x[2] + x[6]) * FIX(0.541196100);
    lanes t2 = z1 + x[6] * -FIX(1.847759065), t3 = z1 + x[2] * FIX(0.765366865);
    lanes t0 = (x[0] + x[4]) << 13, t1 = (x[0] - x[4]) << 13;
    lanes t10 = t0 + t3, t13 = t0 - t3, t11 = t1 + t2, t12 = t1 - t2;
    t0 = x[7], t1 = x[5], t2 = x[3], t3 = x[1];
    lanes z2 = t1 + t2, z3 = t0 + t2, z4 = t1 + t3, z5 = (z3 + z4) * FIX(1.175875602);
    z1 = (t0 + t3) * -FIX(0.899976223);
    z2 = z2 * -FIX(2.562915447);
    z3 = z3 * -FIX(1.961570560) + z5;
    z4 = z4 * -FIX(0.390180644) + z5;
    t0 = t0 * FIX(0.298631336) + z1 + z3;
    t1 = t1 * FIX(2.053119869) + z2 + z4;
    t2 = t2 * FIX(3.072711026) + z2 + z3;
    t3 = t3 * FIX(1.501321110) + z1 + z4;
    x[0] = rounded(t10 + t3, bits), x[7] = rounded(t10 - t3, bits);
    x[1] = rounded(t11 + t2, bits), x[6] = rounded(t11 - t2, bits);
    x[2] = rounded(t12 + t1, bits), x[5] = rounded(t12 - t1, bits);
    x[3] = rounded(t13 + t0, bits), x[4] = rounded(t13 - t0, bits);
}

static void idct8(const int16_t *block, uint8_t *out, int stride) {
    lanes x[8];
    for (int i = 0; i < 8; i++) x[i] = row_of(block, i);
    pass8(x, 11);
    for (int i = 0; i < 8; i++) x[i] = kept(x[i]);
    transpose(x);
    pass8(x, 18);
    transpose(x);
    for (int i = 0; i < 8; i++) {
        bytes8 row = __builtin_convertvector(sample(x[i]), bytes8);
        memcpy(out + (size_t)i * stride, &row, 8);
    }
}

/* jidctred.c, 4 x 4: x[0..7] to x[0..3]; the fifth is not used. */
static inline void pass4(lanes *x, int bits) {
    lanes t0 = x[0] << 14, t2 = x[2] * FIX(1.847759065) + x[6] * -FIX(0.765366865);
    lanes t10 = t0 + t2, t12 = t0 - t2;
    t0 = x[7] * -FIX(0.211164243) + x[5] * FIX(1.451774981) + x[3] * -FIX(2.172734803) + x[1] * FIX(1.061594337);
    t2 = x[7] * -FIX(0.509795579) + x[5] * -FIX(0.601344887) + x[3] * FIX(0.899976223) + x[1] * FIX(2.562915447);
    x[0] = rounded(t10 + t2, bits), x[3] = rounded(t10 - t2, bits);
    x[1] = rounded(t12 + t0, bits), x[2] = rounded(t12 - t0, bits);
}

/* Two blocks side by side in the result, whose second passes share lanes. */
static void idct4x2(const int16_t *left, const int16_t *right, uint8_t *out, int stride) {
    lanes a[8], b[8], x[8];
    for (int i = 0; i < 8; i++) a[i] = row_of(left, i), b[i] = row_of(right, i);
    pass4(a, 12);
    pass4(b, 12);
    for (int i = 0; i < 4; i++) x[i] = kept(a[i]), x[i + 4] = kept(b[i]);
    transpose(x); /* x[column], lanes: rows 0..3 of the left block, of the right one */
    pass4(x, 19);
    lanes s[4];
    for (int i = 0; i < 4; i++) s[i] = sample(x[i]);
    lanes p = s[0] | s[1] << 8 | s[2] << 16 | s[3] << 24; /* little-endian: a lane is a row of four bytes */
    for (int i = 0; i < 4; i++) {
        uint32_t row[2] = {(uint32_t)p[i], (uint32_t)p[i + 4]};
        memcpy(out + (size_t)i * stride, row, 8);
    }
}

/* jidctred.c, 2 x 2. */
static void idct2(const int16_t *block, uint8_t *out, int stride) {
    lanes r[8], top, bottom;
    for (int i = 0; i < 8; i++) r[i] = row_of(block, i);
    lanes t = r[7] * -FIX(0.720959822) + r[5] * FIX(0.850430095) + r[3] * -FIX(1.272758580) + r[1] * FIX(3.624509785);
    top = kept(rounded((r[0] << 15) + t, 13)), bottom = kept(rounded((r[0] << 15) - t, 13));
    for (int i = 0; i < 2; i++) {
        lanes w = i ? bottom : top;
        int32_t odd = w[7] * -FIX(0.720959822) + w[5] * FIX(0.850430095) + w[3] * -FIX(1.272758580) + w[1] * FIX(3.624509785);
        int32_t even = w[0] * (1 << 15);
        out[(size_t)i * stride] = clamped(((even + odd + (1 << 19)) >> 20) + 128);
        out[(size_t)i * stride + 1] = clamped(((even - odd + (1 << 19)) >> 20) + 128);
    }
}

static void flat(int32_t dc, int side, uint8_t *out, int stride) {
    for (int i = 0; i < side; i++) memset(out + (size_t)i * stride, clamped(((dc + 4) >> 3) + 128), (size_t)side);
}

/* Blocks beside one another, to samples; `last` as of read_block. They are zeros afterwards. */
static inline void put_pair(int16_t (*block)[64], const int *last, int side, uint8_t *out, int stride) {
    if (side == 4 && (last[0] | last[1]))
        idct4x2(block[0], block[1], out, stride);
    else
        for (int i = 0; i < 2; i++) {
            uint8_t *at = out + i * side;
            if (!last[i] || side == 1)
                flat(block[i][0], side, at, stride);
            else if (side == 8)
                idct8(block[i], at, stride);
            else
                idct2(block[i], at, stride);
        }
    for (int i = 0; i < 2; i++)
        if (last[i])
            memset(block[i], 0, 64 * sizeof(int16_t));
        else
            block[i][0] = 0;
}

/* jdcolor.c */
static void to_rgb(const uint8_t *restrict y, const uint8_t *restrict cb, const uint8_t *restrict cr, uint8_t *restrict rgb,
                   int width) {
    for (int x = 0; x < width; x++) {
        int32_t luma = y[x], blue = cb[x] - 128, red = cr[x] - 128;
        rgb[3 * x] = clamped(luma + ((91881 * red + 32768) >> 16));
        rgb[3 * x + 1] = clamped(luma + ((-22554 * blue - 46802 * red + 32768) >> 16));
        rgb[3 * x + 2] = clamped(luma + ((116130 * blue + 32768) >> 16));
    }
}

#endif
