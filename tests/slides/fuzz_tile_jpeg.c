/* For slides/native, by hand, with clang and its runtime (Debian: clang, libclang-rt-14-dev), from the checkout:
 *
 *   clang -g -O2 -march=haswell -fwrapv -fsanitize=address,undefined,fuzzer -fno-sanitize=shift -o runs/fuzz tests/slides/fuzz_tile_jpeg.c
 *   mkdir -p runs/corpus && cp SOME_SMALL.jpg runs/corpus && runs/fuzz -max_len=20000 -max_total_time=600 runs/corpus
 *
 * The last byte of an input chooses the factor. It must neither crash nor be reported by a sanitizer.
 */
#include "../../slides/native/tile_jpeg.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t width = 0, height = 0;
    int denominator = size ? 1 << (data[size - 1] & 3) : 1;
    for (size_t i = 2; i + 9 < size && !width; i++)
        if (data[i] == 0xFF && (data[i + 1] == 0xC0 || data[i + 1] == 0xC1))
            height = (size_t)two(data + i + 5), width = (size_t)two(data + i + 7);
    if (!width || !height || width * height > 1 << 20) return 0;
    size_t rows = (height + denominator - 1) / denominator, columns = (width + denominator - 1) / denominator;
    uint8_t *copy = malloc(size), *rgb = malloc(rows * columns * 3); /* of exactly this size, so that a step beyond is seen */
    memcpy(copy, data, size);
    clotline_tile_jpeg(copy, size, denominator, (int)width, (int)height, rgb);
    free(copy);
    free(rgb);
    return 0;
}
