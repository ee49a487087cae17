/* A step of Image GPT's decoder on a CPU: decoder_step.py prepares it and calls it.

   Every sum runs over its inputs in their order, so that no sample depends on how many there are, nor on the number of
   threads. B samples, T positions, D width, H heads, K head width. Compiled for weights and kept keys and values in
   float32, or with -DBF16 in bf16; all else is float32. */

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 }; /* of a vector; of a tile, whose sums fill the registers */
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 3 };
#else
enum { LANES = 4, ROWS = 2 };
#endif
enum { PANEL = 32, BLOCK = 16, STRIDE = 16, MANY = 16 };

typedef float vec __attribute__((vector_size(4 * LANES)));

#ifdef BF16
typedef uint16_t number;
static inline vec load(const number *from)
{
    typedef number halves __attribute__((vector_size(2 * LANES)));
    typedef uint32_t words __attribute__((vector_size(4 * LANES)));
    halves x;
    memcpy(&x, from, sizeof x);
    return (vec)(__builtin_convertvector(x, words) << 16);
}
static inline number stored(float x) /* to the nearest, ties to even */
{
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
#else
typedef float number;
static inline vec load(const number *from)
{
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}
static inline number stored(float x) { return x; }
#endif

struct step {
    /* matrices of all layers [L, out / PANEL, in, PANEL]; keys [L, B, H, T / BLOCK, K, BLOCK], values
       [L, B, H, K / BLOCK, T, BLOCK], T and the K of values rounded up to BLOCK */
    number *qkv, *proj, *fc, *out, *head, *keys, *values;
    float *h, *heads, *attended, *inner, *logits; /* [B, columns(D)], of 3 D, D, 4 D, V */
    float *embeddings, *places, *uniform;         /* of colours [V, D], of positions [T, D]; in [0, 1), [B, T] */
    int64_t *tokens;                              /* [B, T] */
    int32_t n_layer, n_head, d_model, n_vocab, n_ctx, batch, threads;
    int32_t wild; /* whether logits were met that are infinite, or no number */
    float eps, temperature;
};

static int rounded(int n, int to) { return (n + to - 1) / to * to; }
static size_t columns(int n) { return rounded(n, PANEL) + STRIDE; } /* rows do not share the sets of a cache */

static inline float exponential(float x) /* to 2e-7 of itself; x is taken into -87 .. 88, and stays if no number */
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f), y = 1.9875691500e-4f;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    int32_t power = ((int32_t)(n < 128.0f ? n : 128.0f) + 127) << 23; /* the latter if no number */
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

/* 1 / sqrt(mean(h^2) + eps) of rows of h. */
static void scales(const struct step *s, int first, int last, float *scale)
{
    for (int row = first; row < last; row++) {
        const float *h = s->h + row * columns(s->d_model);
        float sum[BLOCK] = {0}, total = 0;
        for (int i = 0; i < s->d_model; i += BLOCK) /* what is beyond the width is 0 */
            for (int j = 0; j < BLOCK; j++)
                sum[j] += h[i + j] * h[i + j];
        for (int j = 0; j < BLOCK; j++)
            total += sum[j];
        scale[row - first] = 1.0f / sqrtf(total / s->d_model + s->eps);
    }
}

typedef vec tile[PANEL / LANES];

/* `rows` of x, a constant, times a panel. A function for each, which has all registers to itself. */
#define MULTIPLY(rows)                                                                                              \
    static __attribute__((noinline)) void multiply_##rows(int in, const float *x, size_t stride, const number *w,   \
                                                          tile *result)                                             \
    {                                                                                                               \
        tile sum[rows] = {0};                                                                                       \
        for (int k = 0; k < in; k++, x++)                                                                           \
            for (int v = 0; v < PANEL / LANES; v++, w += LANES) {                                                   \
                vec weights = load(w);                                                                              \
                for (int row = 0; row < rows; row++)                                                                \
                    sum[row][v] += weights * x[row * stride];                                                       \
            }                                                                                                       \
        memcpy(result, sum, sizeof sum);                                                                            \
    }
MULTIPLY(1)
MULTIPLY(2)
MULTIPLY(3)
MULTIPLY(4)
MULTIPLY(8)

enum then { SET, ADD, SET_SILU };

struct part { /* of the work of a step: these rows, and of a matrix's panels this share */
    int first, last, share, shares;
};

/* Many samples are shared out, so that no thread waits; else the outputs of each matrix are. */
static struct part part_of(const struct step *s, int thread, int n)
{
    if (s->batch < n * MANY)
        return (struct part){0, s->batch, thread, n};
    return (struct part){s->batch * thread / n, s->batch * (thread + 1) / n, 0, 1};
}

static void wait_for_all(struct part p)
{
    if (p.shares > 1) {
#pragma omp barrier
    }
}

/* y = or += or = silu of scale * x W, of rows x [B, columns(in)] and a matrix; no scale: 1. */
static void product(struct part p, const number *w, int in, int out, const float *x, const float *scale, float *y,
                    enum then then)
{
    int panels = rounded(out, PANEL) / PANEL;
    size_t stride = columns(in), width = columns(out);
    for (int panel = panels * p.share / p.shares; panel < panels * (p.share + 1) / p.shares; panel++)
        for (int row = p.first, rows; row < p.last; row += rows) {
            tile sums[ROWS];
            const number *weights = w + (size_t)panel * in * PANEL;
            const float *from = x + row * stride;
            int left = p.last - row;
            if (LANES == 16 && left >= 8)
                multiply_8(in, from, stride, weights, sums), rows = 8;
            else if (LANES == 16 && left >= 4)
                multiply_4(in, from, stride, weights, sums), rows = 4;
            else if (LANES == 8 && left >= 3)
                multiply_3(in, from, stride, weights, sums), rows = 3;
            else if (left >= 2)
                multiply_2(in, from, stride, weights, sums), rows = 2;
            else
                multiply_1(in, from, stride, weights, sums), rows = 1;
            for (int r = 0; r < rows; r++) {
                float *to = y + (row + r) * width + panel * PANEL, sum[PANEL], by = scale ? scale[row - p.first + r] : 1;
                memcpy(sum, sums[r], sizeof sum);
                for (int i = 0; i < PANEL; i++) {
                    sum[i] *= by;
                    if (then == SET_SILU)
                        sum[i] /= 1.0f + exponential(-sum[i]);
                    to[i] = then == ADD ? to[i] + sum[i] : sum[i];
                }
            }
        }
}

/* Scores of n positions, a multiple of BLOCK -> their exponentials over that of the highest; returns the sum. */
static float exponentials(float *p, int n)
{
    float most[BLOCK], total[BLOCK] = {0}, sum = 0;
    memcpy(most, p, sizeof most);
    for (int i = BLOCK; i < n; i += BLOCK)
        for (int j = 0; j < BLOCK; j++)
            most[j] = p[i + j] > most[j] ? p[i + j] : most[j];
    for (int j = 1; j < BLOCK; j++)
        most[0] = most[j] > most[0] ? most[j] : most[0];
    for (int i = 0; i < n; i += BLOCK)
        for (int j = 0; j < BLOCK; j++) {
            p[i + j] = exponential(p[i + j] - most[0]);
            total[j] += p[i + j];
        }
    for (int j = 0; j < BLOCK; j++)
        sum += total[j];
    return sum;
}

/* Keep the new key and value of a head, and attend to all so far: q, k, v [K] -> y [K]. */
static void attend(const float *q, const float *k, const float *v, int size, int t, int places, number *keys,
                   number *values, float *y)
{
    int seen = rounded(t + 1, BLOCK);
    float p[seen], block[BLOCK];
    number *key = keys + (size_t)(t / BLOCK) * size * BLOCK + t % BLOCK, *value = values + (size_t)t * BLOCK;
    for (int i = 0; i < size; i++) {
        key[i * BLOCK] = stored(k[i]);
        value[(size_t)(i / BLOCK) * places * BLOCK + i % BLOCK] = stored(v[i]);
    }
    for (int i = 0; i < seen; i += BLOCK) {
        vec score[BLOCK / LANES] = {0};
        for (int c = 0; c < size; c++, keys += BLOCK)
            for (int j = 0; j < BLOCK / LANES; j++)
                score[j] += load(keys + j * LANES) * q[c];
        memcpy(p + i, score, sizeof score);
    }
    for (int i = t + 1; i < seen; i++)
        p[i] = -INFINITY;
    float sum = exponentials(p, seen);
    for (int i = t + 1; i < seen; i++)
        p[i] = 0;
    for (int c = 0; c < size; c += BLOCK, values += (size_t)places * BLOCK) {
        vec part[4][BLOCK / LANES] = {0}; /* of every fourth position: sums that need not wait for each other */
        for (int i = 0; i < seen; i += 4)
            for (int each = 0; each < 4; each++)
                for (int j = 0; j < BLOCK / LANES; j++)
                    part[each][j] += load(values + (size_t)(i + each) * BLOCK + j * LANES) * p[i + each];
        for (int j = 0; j < BLOCK / LANES; j++)
            part[0][j] = ((part[0][j] + part[1][j]) + (part[2][j] + part[3][j])) / sum;
        memcpy(block, part[0], sizeof block);
        memcpy(y + c, block, sizeof(float) * (size - c < BLOCK ? size - c : BLOCK));
    }
}

/* Attention of a layer, of this share of the heads of these rows. */
static void attention(const struct step *s, struct part p, int layer, int position)
{
    int size = s->d_model / s->n_head, places = rounded(s->n_ctx, BLOCK);
    size_t key = (size_t)places * size, value = (size_t)places * rounded(size, BLOCK);
    int heads = (p.last - p.first) * s->n_head, first = p.first * s->n_head;
    for (int i = first + heads * p.share / p.shares; i < first + heads * (p.share + 1) / p.shares; i++) {
        int row = i / s->n_head, head = i % s->n_head;
        const float *q = s->heads + row * columns(3 * s->d_model) + head * size;
        size_t number = (size_t)layer * s->batch * s->n_head + i;
        attend(q, q + s->d_model, q + 2 * s->d_model, size, position, places, s->keys + number * key,
               s->values + number * value, s->attended + row * columns(s->d_model) + head * size);
    }
}

static size_t numbers(int in, int out) { return (size_t)in * rounded(out, PANEL); }

/* From h^0 of a position to its logits. */
static void work(const struct step *s, struct part p, int position)
{
    int d = s->d_model;
    float scale[p.last - p.first];
    for (int layer = 0; layer < s->n_layer; layer++) {
        scales(s, p.first, p.last, scale);
        product(p, s->qkv + layer * numbers(d, 3 * d), d, 3 * d, s->h, scale, s->heads, SET);
        wait_for_all(p);
        attention(s, p, layer, position);
        wait_for_all(p);
        product(p, s->proj + layer * numbers(d, d), d, d, s->attended, 0, s->h, ADD);
        wait_for_all(p);
        scales(s, p.first, p.last, scale);
        product(p, s->fc + layer * numbers(d, 4 * d), d, 4 * d, s->h, scale, s->inner, SET_SILU);
        wait_for_all(p);
        product(p, s->out + layer * numbers(4 * d, d), 4 * d, d, s->inner, 0, s->h, ADD);
        wait_for_all(p);
    }
    scales(s, p.first, p.last, scale);
    product(p, s->head, d, s->n_vocab, s->h, scale, s->logits, SET);
}

/* h^0 of a row at a position, from the token before it. */
static void embed(const struct step *s, int row, int position)
{
    const float *embedding = s->embeddings + s->tokens[(size_t)row * s->n_ctx + position - 1] * s->d_model;
    const float *place = s->places + (size_t)position * s->d_model;
    float *h = s->h + row * columns(s->d_model);
    for (int i = 0; i < s->d_model; i++)
        h[i] = embedding[i] + place[i];
}

/* A row's token at a position, by inversion of the cumulative distribution; at temperature 0 the likeliest. */
static void choose(struct step *s, int row, int position)
{
    float *p = s->logits + row * columns(s->n_vocab);
    size_t here = (size_t)row * s->n_ctx + position;
    int last = s->n_vocab - 1, token = 0, n = rounded(s->n_vocab, BLOCK), wild = 0;
    for (int i = 0; i <= last; i++)
        wild |= !(fabsf(p[i]) <= FLT_MAX);
    if (wild)
#pragma omp atomic write
        s->wild = 1;
    if (s->temperature == 0) {
        for (int i = 1; i <= last; i++)
            token = p[i] > p[token] ? i : token;
    } else {
        double sum = 0, target = 0;
        for (int i = 0; i <= last; i++)
            p[i] /= s->temperature;
        for (int i = last + 1; i < n; i++)
            p[i] = -INFINITY;
        exponentials(p, n);
        for (int i = 0; i <= last; i++)
            target += p[i];
        target *= s->uniform[here];
        while (token < last && (sum += p[token]) <= target)
            token++;
    }
    s->tokens[here] = token;
}

/* From h^0 of a position to its logits. */
void step(struct step *s, int position)
{
#pragma omp parallel num_threads(s->threads)
    work(s, part_of(s, omp_get_thread_num(), omp_get_num_threads()), position);
}

/* From logits to tokens of a position. */
void choose_all(struct step *s, int position)
{
    for (int row = 0; row < s->batch; row++)
        choose(s, row, position);
}

/* The tokens of positions first .. last - 1, from those before them. */
void draw(struct step *s, int first, int last)
{
#pragma omp parallel num_threads(s->threads)
    {
        int thread = omp_get_thread_num(), n = omp_get_num_threads();
        struct part p = part_of(s, thread, n);
        int begin = s->batch * thread / n, end = s->batch * (thread + 1) / n; /* whether rows are shared out or not */
        for (int position = first; position < last; position++) {
            for (int row = begin; row < end; row++)
                embed(s, row, position);
            wait_for_all(p);
            work(s, p, position);
            wait_for_all(p);
            for (int row = begin; row < end; row++)
                choose(s, row, position);
        }
    }
}
