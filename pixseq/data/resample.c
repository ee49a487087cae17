/* Pictures resized to the very bytes of Pillow, see resample.py.

   A pass resamples lines along themselves, TOGETHER of them at a time, and writes what it makes turned on its side: so
   the second pass, along the columns, is the first one again. Weights are whole numbers of BITS bits, rounded from
   doubles that are Pillow's only without contraction. They are taken in two parts of 16 bits, since processors multiply
   such numbers and add the products of neighbours in one instruction. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { TOGETHER = 16 };
#elif defined(__AVX2__)
enum { TOGETHER = 8 };
#else
enum { TOGETHER = 4 };
#endif
enum { BITS = 22, LOW = 11 };

typedef int32_t ints __attribute__((vector_size(4 * TOGETHER), may_alias)); /* a number of each line */
typedef int32_t fours __attribute__((vector_size(16), may_alias));
typedef uint8_t quad __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* gcc has that from 12 on */
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

static double box(double x) { return x > -0.5 && x <= 0.5; }

static double bilinear(double x) { return fabs(x) < 1.0 ? 1.0 - fabs(x) : 0.0; }

static double hamming(double x)
{
    double turn = fabs(x) * M_PI;
    return x == 0.0 ? 1.0 : fabs(x) < 1.0 ? sin(turn) / turn * (0.54f + 0.46f * cos(turn)) : 0.0;
}

static double bicubic(double x)
{
    x = fabs(x);
    return x < 1.0 ? (1.5 * x - 2.5) * x * x + 1.0 : x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

static double sinc(double x) { return x == 0.0 ? 1.0 : sin(x * M_PI) / (x * M_PI); }

static double lanczos(double x) { return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

static const struct {
    double (*weight)(double);
    double support;
} FILTERS[] = {{box, 0.5}, {bilinear, 1.0}, {hamming, 1.0}, {bicubic, 2.0}, {lanczos, 3.0}};

/* Weights of two neighbours, the first in the lower 16 bits: high * 2^LOW + low. */
struct pair {
    int32_t high, low;
};

/* How `out` values come from the pixels [first, last) of a line: value i from `counts[i]` pairs of them, at most `most`,
   from pair starts[i] after first on. */
struct axis {
    int out, first, last, most;
    int *starts, *counts;
    struct pair *weights;
};

/* The region [from, to) of a line of `in` pixels as `out` values. 0: no memory. */
static int plan(struct axis *axis, int in, int out, float from, float to, int filter)
{
    double scale = (double)(to - from) / out, wide = fmax(scale, 1.0), support = FILTERS[filter].support * wide;
    int most = 2 * (int)ceil(support) + 1;
    axis->out = out, axis->most = most / 2 + 1;
    axis->starts = malloc(out * sizeof(int)), axis->counts = malloc(out * sizeof(int));
    axis->weights = calloc((size_t)out * axis->most, sizeof(struct pair));
    double *found = malloc(most * sizeof(double));
    int there = axis->starts && axis->counts && axis->weights && found;
    for (int i = 0; i < out && there; i++) {
        double centre = from + (i + 0.5) * scale, sum = 0.0;
        int low = fmax(centre - support + 0.5, 0.0), high = fmin(centre + support + 0.5, in);
        axis->first = i ? axis->first : low, axis->last = high;
        int start = low - axis->first;
        axis->starts[i] = start / 2, axis->counts[i] = (start % 2 + high - low + 1) / 2;
        for (int x = 0; x < high - low; x++)
            sum += found[x] = FILTERS[filter].weight((low + x - centre + 0.5) * (1.0 / wide));
        for (int x = 0; x < high - low; x++) {
            double weight = sum != 0.0 ? found[x] / sum : found[x];
            int whole = (weight < 0 ? -0.5 : 0.5) + weight * (1 << BITS), at = start % 2 + x;
            struct pair *pair = axis->weights + (size_t)i * axis->most + at / 2;
            pair->high |= (uint32_t)(whole >> LOW & 0xFFFF) << at % 2 * 16;
            pair->low |= (whole & ((1 << LOW) - 1)) << at % 2 * 16;
        }
    }
    free(found);
    return there;
}

/* Pixel x of line l, of `count`, is at from + step * x + line * l. */
struct lines {
    const uint8_t *from;
    size_t step, line;
    int count;
};

/* Value i of line l goes to to + value * i + line * l. */
struct made {
    uint8_t *to;
    size_t value, line;
};

/* Two neighbours of a line, of which numbers of 16 bits are made by a mask: red and green of both, blue of both. */
struct two {
    ints warm, blue;
};

/* A pixel of so many bytes as four. */
static inline uint32_t pixel(const uint8_t *from, const int depth)
{
    uint32_t read;
    if (depth == 4)
        memcpy(&read, from, 4);
    else
        read = depth == 1 ? 0x010101 * *from : from[0] | from[1] << 8 | from[2] << 16;
    return read;
}

/* Four pixels, of the 16 bytes that are read, or four where they are grey: two by two, as in struct two. */
static inline fours neighbours(const uint8_t *from, const int depth)
{
    quad read = {};
    memcpy(&read, from, depth == 1 ? 4 : 16);
    if (depth == 1)
        return (fours)SHUFFLE(quad, read, read, 0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3);
    return (fours)(depth == 3 ? SHUFFLE(quad, read, read, 0, 1, 3, 4, 2, 2, 5, 5, 6, 7, 9, 10, 8, 8, 11, 11)
                              : SHUFFLE(quad, read, read, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
}

/* Four neighbours of each of four lines to those lanes of four vectors. */
static inline void turn(fours *to, const uint8_t *from, size_t line, const int depth)
{
    fours a = neighbours(from, depth), b = neighbours(from + line, depth);
    fours c = neighbours(from + 2 * line, depth), d = neighbours(from + 3 * line, depth);
    fours ab = SHUFFLE(fours, a, b, 0, 4, 1, 5), cd = SHUFFLE(fours, c, d, 0, 4, 1, 5);
    to[0] = SHUFFLE(fours, ab, cd, 0, 1, 4, 5), to[TOGETHER / 4] = SHUFFLE(fours, ab, cd, 2, 3, 6, 7);
    ab = SHUFFLE(fours, a, b, 2, 6, 3, 7), cd = SHUFFLE(fours, c, d, 2, 6, 3, 7);
    to[TOGETHER / 2] = SHUFFLE(fours, ab, cd, 0, 1, 4, 5), to[3 * TOGETHER / 4] = SHUFFLE(fours, ab, cd, 2, 3, 6, 7);
}

/* n pixels of `lines` lines, two by two. */
static inline __attribute__((always_inline)) void gather(struct two *pixels, const uint8_t *from, struct lines of,
                                                         int lines, int n, const int depth)
{
    int turned = 0; /* the last pixels of three bytes are left out: 16 bytes would be beyond them */
    if (of.step == (size_t)depth && lines == TOGETHER)
        turned = (depth == 3 ? n - 2 : n) / 4 * 4;
    for (int k = 0; k < lines; k += 4)
        for (int x = 0; x < turned; x += 4)
            turn((fours *)(pixels + x / 2) + k / 4, from + of.line * k + (size_t)depth * x, of.line, depth);
    for (int k = 0; k < lines; k++)
        for (int x = turned; x < n; x += 2) {
            const uint8_t *at = from + of.line * k + of.step * x;
            uint32_t a = pixel(at, depth), b = x + 1 < n ? pixel(at + of.step, depth) : 0;
            ((uint32_t *)&pixels[x / 2].warm)[k] = (a & 0xFFFF) | b << 16;
            ((uint32_t *)&pixels[x / 2].blue)[k] = a >> 16 | (b & 0xFFFF0000);
        }
}

/* Values of 0 to 255. */
static inline ints clipped(ints sum)
{
    sum >>= BITS;
    sum &= ~(sum >> 31);
    return (sum | (sum > 255)) & 255;
}

/* The sum and both products of signed numbers of 16 bits. */
static inline ints plus(ints sum, ints pairs, int32_t weights)
{
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)pairs, _mm512_set1_epi32(weights));
#elif defined(__AVX512BW__)
    return sum + (ints)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi32(weights));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sum + (ints)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32(weights));
#elif defined(__SSE2__) && !defined(__AVX2__)
    return sum + (ints)_mm_madd_epi16((__m128i)pairs, _mm_set1_epi32(weights));
#else
    return sum + (pairs & 0xFFFF) * (int16_t)weights + (pairs >> 16) * (weights >> 16);
#endif
}

/* A colour of 0 to 255, of the sums by both parts of the weights. */
static inline ints colour(ints high, ints low)
{
    return clipped((high << LOW) + low + (1 << (BITS - 1)));
}

/* Pixels of `depth` bytes to pixels of three, or of four where there is room for whole vectors. */
static inline __attribute__((always_inline)) void pass(const struct axis *axis, struct two *pixels, struct lines of,
                                                       struct made made, const int depth, const int three)
{
    const ints zero = {};
    for (int l = 0; l < of.count; l += TOGETHER) {
        const int lines = of.count - l < TOGETHER ? of.count - l : TOGETHER;
        gather(pixels, of.from + of.line * l, of, lines, axis->last - axis->first, depth);
        for (int i = 0; i < axis->out; i++) {
            const struct pair *weights = axis->weights + (size_t)i * axis->most;
            const struct two *from = pixels + axis->starts[i];
            ints r = zero, g = zero, b = zero, red = zero, green = zero, blue = zero;
            for (int x = 0; x < axis->counts[i]; x++) {
                const ints reds = from[x].warm & 0xFF00FF, greens = from[x].warm >> 8 & 0xFF00FF;
                const ints blues = from[x].blue & 0xFF00FF;
                const int32_t low = weights[x].low, high = weights[x].high;
                r = plus(r, reds, low), g = plus(g, greens, low), b = plus(b, blues, low);
                red = plus(red, reds, high), green = plus(green, greens, high), blue = plus(blue, blues, high);
            }
            ints values = colour(red, r) | colour(green, g) << 8 | colour(blue, b) << 16;
            uint8_t *to = made.to + made.value * i + made.line * l;
            if (three)
                for (int k = 0; k < lines; k++)
                    memcpy(to + made.line * k, (uint32_t *)&values + k, 3);
            else
                memcpy(to, &values, sizeof values);
        }
    }
}

/* As in Arrow's C data interface, as far as it is read. */
struct arrow {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct arrow **children;
};

/* `count` pictures of height x width pixels of `depth` bytes to as many of tall x wide pixels of three, grey in all of
   them: each of the region (left, upper, right, lower), along its rows first, or `down` its columns. They are at
   `pixels`, or `arrow` says where. */
struct task {
    const uint8_t *pixels;
    const struct arrow *arrow;
    uint8_t *to;
    int32_t count, height, width, depth, tall, wide, filter, down;
    float region[4];
};

/* 0: no memory. */
int resample(const struct task *t)
{
    const struct arrow *arrow = t->arrow && t->arrow->n_children ? *t->arrow->children : t->arrow;
    const uint8_t *all = arrow ? arrow->buffers[1] : t->pixels;
    struct axis x = {}, y = {};
    int done = plan(&x, t->width, t->wide, t->region[0], t->region[2], t->filter) &&
               plan(&y, t->height, t->tall, t->region[1], t->region[3], t->filter);
    const struct axis *first = t->down ? &y : &x, *second = t->down ? &x : &y;
    const int lines = second->last - second->first, along = first->last - first->first;
    const size_t depth = t->depth, row = depth * t->width, made = (size_t)3 * t->wide;
    const size_t line = (size_t)(lines + TOGETHER - 1) / TOGETHER * sizeof(ints); /* between the passes */
    const size_t most = (lines > along ? lines : along) / 2 + 1;
    struct two *pixels = done ? aligned_alloc(sizeof(ints), most * sizeof *pixels) : 0;
    uint8_t *middle = done ? malloc(line * first->out) : 0;
    done = pixels && middle;
    for (int i = 0; i < t->count && done; i++) {
        const uint8_t *from = all + row * t->height * i + row * y.first + depth * x.first;
        struct lines source = {from, t->down ? row : depth, t->down ? depth : row, lines};
        struct lines half = {middle, 4, line, first->out};
        struct made turned = {middle, line, 4};
        struct made whole = {t->to + made * t->tall * i, t->down ? 3 : made, t->down ? made : 3};
        if (depth == 1)
            pass(first, pixels, source, turned, 1, 0);
        else if (depth == 3)
            pass(first, pixels, source, turned, 3, 0);
        else
            pass(first, pixels, source, turned, 4, 0);
        pass(second, pixels, half, whole, 4, 1);
    }
    free(x.starts), free(x.counts), free(x.weights), free(y.starts), free(y.counts), free(y.weights);
    free(pixels), free(middle);
    return done;
}
