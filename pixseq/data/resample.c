/* Pictures resized to the very bytes of Pillow, see resample.py. A pass resamples every line along itself and writes what
   it makes turned on its side, so that the second pass, along the columns, is the first one again.

   Weights are whole numbers of BITS bits, too wide for the multipliers of 16 bits that processors have most of: they are
   cut in an upper and a lower part of PART bits, and each multiplied with two neighbouring pixels at once. All sums are
   modulo 2^32 and so do not depend on their order. Doubles do: this is compiled without contraction. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif !defined(__aarch64__)
#error "Pillow is as fast without vectors of whole numbers"
#endif
#if defined(__AVX512BW__)
enum { LANES = 16 }; /* sums of a vector: of four colours (the last is nothing) in LANES / 4 lines, or of LANES greys */
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { BITS = 22, PART = 15, GROUPS = LANES / 4, ALIGNED = 64, ROOM = 32 };
enum { BOX, BILINEAR, HAMMING, BICUBIC, LANCZOS };

typedef uint8_t quad __attribute__((vector_size(16)));
typedef uint32_t fours __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES))); /* sums, or pairs of int16 */

#define BY_COLOUR ((quad){0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15})

/* sum + the products of pairs. */
static inline ints dot(ints sum, ints pixels, int32_t pair)
{
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)pixels, _mm512_set1_epi32(pair));
#elif defined(__AVX512BW__)
    return sum + (ints)_mm512_madd_epi16((__m512i)pixels, _mm512_set1_epi32(pair));
#elif defined(__AVX2__)
    return sum + (ints)_mm256_madd_epi16((__m256i)pixels, _mm256_set1_epi32(pair));
#else
    return sum + (pixels & 0xff) * (int16_t)pair + (pixels >> 16) * (pair >> 16);
#endif
}

/* How `out` values come from the pixels [first, last) of a line of `in`: each from as many `pairs` from pair `starts` on,
   counted from `first`. A pair of weights has its upper parts in one word and the lower ones in the next. */
struct axis {
    int in, out, first, last, pairs;
    int *starts;
    int32_t (*weights)[2];
};

static inline double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

static inline double bilinear(double x)
{
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static inline double hamming(double x)
{
    x = fabs(x);
    double turn = x * M_PI;
    return x == 0.0 ? 1.0 : x < 1.0 ? sin(turn) / turn * (0.54f + 0.46f * cos(turn)) : 0.0;
}

static inline double bicubic(double x)
{
    x = fabs(x);
    double near = (1.5 * x - 2.5) * x * x + 1.0, far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

static inline double sinc(double x) { return x == 0.0 ? 1.0 : sin(x * M_PI) / (x * M_PI); }

static inline double lanczos(double x) { return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

static const double SUPPORTS[] = {[BOX] = 0.5, [BILINEAR] = 1.0, [HAMMING] = 1.0, [BICUBIC] = 2.0, [LANCZOS] = 3.0};

#define EACH(filter)                                                                                                    \
    for (int x = 0; x < n; x++)                                                                                         \
        weights[x] = filter((low + x - centre + 0.5) * inverse)

/* n weights of the pixels from `low` on. */
static void weigh(double *weights, int n, int filter, int low, double centre, double inverse)
{
    switch (filter) {
    case BOX: EACH(box); break;
    case BILINEAR: EACH(bilinear); break;
    case HAMMING: EACH(hamming); break;
    case BICUBIC: EACH(bicubic); break;
    default: EACH(lanczos);
    }
    double sum = 0.0;
    for (int x = 0; x < n; x++)
        sum += weights[x];
    if (sum != 0.0)
        for (int x = 0; x < n; x++)
            weights[x] /= sum;
}

/* The region [from, to) of a line of `in` pixels to `out` values. 0: no memory. */
static int plan(struct axis *axis, int in, int out, float from, float to, int filter)
{
    double scale = (double)(to - from) / out, wide = fmax(scale, 1.0), support = SUPPORTS[filter] * wide;
    int most = 2 * (int)ceil(support) + 1;
    axis->in = in, axis->out = out, axis->pairs = most / 2 + 1;
    axis->starts = malloc(out * sizeof(int));
    axis->weights = calloc((size_t)out * axis->pairs, sizeof *axis->weights);
    double *weights = malloc(most * sizeof(double));
    for (int i = 0; i < out && axis->starts && axis->weights && weights; i++) {
        double centre = from + (i + 0.5) * scale;
        int low = centre - support + 0.5, high = centre + support + 0.5;
        low = low < 0 ? 0 : low, high = high > in ? in : high;
        weigh(weights, high - low, filter, low, centre, 1.0 / wide);
        if (i == 0)
            axis->first = low;
        axis->last = high;
        axis->starts[i] = (low - axis->first) / 2;
        int odd = (low - axis->first) % 2;
        int16_t *parts = (int16_t *)axis->weights[(size_t)i * axis->pairs];
        for (int x = 0; x < high - low; x++) {
            int32_t weight = (int)((weights[x] < 0 ? -0.5 : 0.5) + weights[x] * (1 << BITS));
            int16_t *part = parts + (x + odd) / 2 * 4 + (x + odd) % 2;
            part[0] = weight >> PART, part[2] = weight & ((1 << PART) - 1);
        }
    }
    free(weights);
    return axis->starts && axis->weights && weights;
}

/* Lines of pixels of `depth` bytes: pixel x of line l is at from + line * l + step * x, for `across` lines. They are rows,
   or columns (`down`). Nothing is read from `end` on. */
struct lines {
    const uint8_t *from, *end;
    size_t line, step;
    int across, depth, down;
};

/* Four bytes; zeros from `end` on. */
static inline uint32_t four(const uint8_t *from, const uint8_t *end)
{
    uint32_t read = 0;
    if (end - from < 4)
        memcpy(&read, from, end - from);
    else
        memcpy(&read, from, 4);
    return read;
}

/* What is put in order by `neighbours`, as pairs. */
static inline void split(ints pairs[2], const quad *x)
{
#if defined(__AVX512BW__)
    __m256i low = _mm256_set_m128i((__m128i)x[1], (__m128i)x[0]), high = _mm256_set_m128i((__m128i)x[3], (__m128i)x[2]);
    ints all = (ints)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#elif defined(__AVX2__)
    ints all = (ints)_mm256_set_m128i((__m128i)x[1], (__m128i)x[0]);
#else
    ints all = (ints)x[0];
#endif
    pairs[0] = all & 0xff00ff;
    pairs[1] = (all >> 8) & 0xff00ff;
}

/* Pixels x, x + 2, x + 1 and x + 3 of each of four lanes: of four grey lines, or of one line's colours. */
static inline __attribute__((always_inline)) quad neighbours(const uint8_t *const *at, size_t x, int depth)
{
    quad read;
    if (depth == 1) {
        fours parts;
        for (int k = 0; k < 4; k++)
            memcpy(&parts[k], at[k] + x, 4);
        return __builtin_shuffle((quad)parts, (quad){0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15});
    }
    memcpy(&read, *at + depth * x, 16);
    if (depth == 3)
        return __builtin_shuffle(read, (quad){0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11});
    return __builtin_shuffle(read, BY_COLOUR);
}

/* n pixels of each of the lines from `l` on that fill the lanes, as pairs. */
static inline __attribute__((always_inline)) void along(ints *pairs, const struct lines *of, int l, int n, int depth,
                                                        uint8_t *spare)
{
    const int lanes = depth == 1 ? LANES : GROUPS, each = depth == 1 ? 4 : 1;
    const size_t size = (size_t)n * depth;
    const uint8_t *at[LANES];
    for (int k = 0; k < lanes; k++)
        at[k] = of->from + of->line * (l + k < of->across ? l + k : of->across - 1);
    if (at[lanes - 1] + size + ROOM > of->end)
        for (int k = 0; k < lanes; k++)
            at[k] = memcpy(spare + (size + ROOM) * k, at[k], size);
    for (size_t x = 0; x < (size_t)n; x += 4, pairs += 2) {
        quad read[GROUPS];
        for (int g = 0; g < GROUPS; g++)
            read[g] = neighbours(at + g * each, x, depth);
        split(pairs, read);
    }
}

/* The same of columns. */
static void down(ints *pairs, const struct lines *of, int l, int n)
{
    const int each = of->depth == 1 ? 4 : 1;
    for (int x = 0; x < n; x += 4, pairs += 2) {
        quad read[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            fours parts = {};
            for (int k = 0; k < 4 && x + k < n && l + g * each < of->across; k++)
                parts[k] = four(of->from + of->step * (x + k) + of->line * (l + g * each), of->end);
            read[g] = __builtin_shuffle((quad)parts, BY_COLOUR);
        }
        split(pairs, read);
    }
}

/* Sums as values, none below 0 or above 255. */
static inline void narrow(uint8_t *to, ints x)
{
#if defined(__AVX512BW__)
    __m512i above = _mm512_max_epi32((__m512i)x, _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8(above));
#elif defined(__AVX2__)
    __m128i both = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(both, both));
#else
    for (int l = 0; l < LANES; l++)
        to[l] = x[l] < 0 ? 0 : x[l] > 255 ? 255 : x[l];
#endif
}

/* Where value i of line l goes: to + value * i + line * l. Pixels of the `last` pass have three bytes, and four are written
   where a later one follows; those in between have one or four, and room for a vector after the last line. */
struct made {
    uint8_t *to;
    size_t value, line;
    int last;
};

/* Pixels of `lanes` lines: of three bytes at the end of a row (`ends`). */
static inline void put(uint8_t *to, size_t apart, const uint32_t *pixels, int lanes, int ends)
{
    if (ends)
        for (int k = 0; k < lanes; k++)
            memcpy(to + apart * k, &pixels[k], 3);
    else
        for (int k = 0; k < lanes; k++)
            memcpy(to + apart * k, &pixels[k], 4);
}

static void pass(const struct axis *axis, ints *pairs, uint8_t *spare, const struct lines *of, const struct made *made)
{
    const int n = axis->last - axis->first, together = of->depth == 1 ? LANES : GROUPS;
    const int out = axis->out, count = axis->pairs, depth = of->depth, last = made->last;
    const size_t value = made->value;
    for (int l = 0; l < of->across; l += together) {
        const int lanes = of->across - l < together ? of->across - l : together;
        if (of->down)
            down(pairs, of, l, n);
        else if (of->depth == 1)
            along(pairs, of, l, n, 1, spare);
        else if (of->depth == 3)
            along(pairs, of, l, n, 3, spare);
        else
            along(pairs, of, l, n, 4, spare);
        uint8_t *to = made->to + made->line * l;
        const int32_t(*weights)[2] = axis->weights;
        for (int i = 0; i < out; i++, to += value, weights += count) {
            const ints *x = pairs + axis->starts[i];
            ints high = {}, low = (1 << (BITS - 1)) - (ints){};
            for (int p = 0; p < count; p++) {
                high = dot(high, x[p], weights[p][0]);
                low = dot(low, x[p], weights[p][1]);
            }
            ints made_of = ((high << PART) + low) >> BITS;
            if (!last) {
                narrow(to, made_of);
                continue;
            }
            uint8_t values[LANES];
            uint32_t pixels[LANES];
            narrow(values, made_of);
            if (depth == 1)
                for (int k = 0; k < LANES; k++)
                    pixels[k] = 0x010101 * values[k];
            else
                memcpy(pixels, values, LANES);
            put(to, made->line, pixels, lanes, value == 3 ? i == out - 1 : l + lanes == of->across);
        }
    }
}

/* `count` pictures of height x width pixels of `depth` bytes to as many of tall x wide pixels of three, grey in all of
   them: each of the region (left, upper, right, lower), `down` the columns first. */
struct task {
    const uint8_t *pixels;
    uint8_t *to;
    int32_t count, height, width, depth, tall, wide, filter, down;
    float region[4];
};

/* 0: no memory. What is between the passes lies there by columns, or by rows if those are made `down`. */
int resample(const struct task *t)
{
    struct axis x = {}, y = {};
    int done = plan(&x, t->width, t->wide, t->region[0], t->region[2], t->filter) &&
               plan(&y, t->height, t->tall, t->region[1], t->region[3], t->filter);
    const struct axis *first = t->down ? &y : &x, *second = t->down ? &x : &y;
    const int between = t->depth == 1 ? 1 : 4, lines = second->last - second->first;
    const size_t depth = t->depth, row = depth * t->width, made = 3 * (size_t)t->wide;
    const size_t line = (size_t)(lines + LANES - 1) / LANES * LANES * between;
    const int longest = x.last - x.first > y.last - y.first ? x.last - x.first : y.last - y.first;
    uint8_t *spare = malloc(((size_t)longest * 4 + ROOM) * LANES);
    ints *pairs = aligned_alloc(ALIGNED, (longest / 2 + x.pairs + y.pairs + 2) * (size_t)ALIGNED);
    uint8_t *middle = malloc(line * first->out + ROOM);
    done = done && pairs && middle && spare;
    for (int i = 0; i < t->count && done; i++) {
        const uint8_t *picture = t->pixels + row * t->height * i;
        uint8_t *to = t->to + made * t->tall * i;
        struct lines source = {picture + row * y.first + (size_t)t->depth * x.first, picture + row * t->height,
                               t->down ? depth : row, t->down ? row : depth, lines, t->depth, t->down};
        struct lines half = {middle, middle + line * first->out + ROOM, line, between, first->out, between, 0};
        pass(first, pairs, spare, &source, &(struct made){middle, line, between, 0});
        pass(second, pairs, spare, &half, &(struct made){to, t->down ? 3 : made, t->down ? made : 3, 1});
    }
    free(x.starts), free(x.weights), free(y.starts), free(y.weights), free(pairs), free(middle), free(spare);
    return done;
}
