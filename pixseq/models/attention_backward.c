/* The way back through attention on a CPU, see attention.py. B images, T positions, D width, H heads, K head width.

   A head of an image is one thread's work, so sums are the same whatever the number of threads. It is done in float32,
   in tiles of SIDE queries and as many keys, whose weights are computed anew from the logarithms of their sums. Compiled
   for gradients and activations in float32, or with -DBF16 in bf16. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 }; /* of a vector; of a tile of sums, which fills the registers */
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 4 };
#endif
enum { WIDE = 2 * LANES, SIDE = 64, PAD = 32, ALIGNED = 64 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

#ifdef BF16
typedef uint16_t number;
static inline float load(number x)
{
    uint32_t word = (uint32_t)x << 16;
    float y;
    memcpy(&y, &word, sizeof y);
    return y;
}
static inline number stored(float x) /* to the nearest, ties to even */
{
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
#else
typedef float number;
static inline float load(number x) { return x; }
static inline number stored(float x) { return x; }
#endif

static size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

static inline vec exponential(vec x) /* to 2e-7 of itself, of x up to 0 or little more; below -87 it is 0 */
{
    vec turns = x * 1.44269504f + 12582912.0f; /* rounded to a whole number */
    ints power = (ints)turns << 23;
    turns -= 12582912.0f;
    vec r = x - turns * 0.693359375f + turns * 2.12194440e-4f;
    vec y = 4.1665795894e-2f + r * (8.3334519073e-3f + r * (1.3981999507e-3f + r * 1.9875691500e-4f));
    y = 1.0f + (r + r * r * (5.0000001201e-1f + r * (1.6666665459e-1f + r * y)));
    y = (vec)((ints)y + power);
    return (vec)((ints)y & (x > -87.0f));
}

/* c [rows, columns] += a [rows, inner] b [inner, columns]: a lies by any steps, rows of b and c by theirs. */
static inline void product(int rows, int columns, int inner, const float *a, size_t down, size_t along, const float *b,
                           size_t b_step, float *c, size_t c_step)
{
    for (int column = 0; column < columns; column += WIDE)
        for (int row = 0; row < rows; row += ROWS) {
            vec sum[ROWS][2], left, right;
            float *to = c + row * c_step + column;
            for (int i = 0; i < ROWS; i++)
                memcpy(sum[i], to + i * c_step, sizeof sum[i]);
            const float *from = b + column, *each = a + row * down;
            for (int k = 0; k < inner; k++, from += b_step, each += along) {
                memcpy(&left, from, sizeof left);
                memcpy(&right, from + LANES, sizeof right);
                for (int i = 0; i < ROWS; i++) {
                    sum[i][0] += each[i * down] * left;
                    sum[i][1] += each[i * down] * right;
                }
            }
            for (int i = 0; i < ROWS; i++)
                memcpy(to + i * c_step, sum[i], sizeof sum[i]);
        }
}

struct work {
    const number *qkv, *y, *dy; /* [B, T, 3 D], [B, T, D], [B, T, D] */
    const float *logsumexp;     /* [B, H, T] */
    number *dqkv;               /* [B, T, 3 D] */
    int32_t batch, positions, heads, size, causal, threads;
};

struct head { /* in float32, positions and K rounded up by zeros */
    float *q, *k, *v, *dy, *k_t, *v_t, *dq, *dk, *dv, *logsumexp, *delta;
};

static void read_rows(const number *from, size_t step, int positions, int size, float scale, int width, float *to)
{
    for (int t = 0; t < positions; t++)
        for (int i = 0; i < size; i++)
            to[t * width + i] = scale * load(from[t * step + i]);
}

static void write_rows(const float *from, float scale, int positions, int size, int width, number *to, size_t step)
{
    for (int t = 0; t < positions; t++)
        for (int i = 0; i < size; i++)
            to[t * step + i] = stored(scale * from[t * width + i]);
}

static void transpose(const float *from, int rows, int columns, float *to)
{
    for (int first = 0; first < rows; first += LANES)
        for (int column = 0; column < columns; column++)
            for (int row = first; row < first + LANES; row++)
                to[(size_t)column * rows + row] = from[row * columns + column];
}

/* Of SIDE queries from `first` on and SIDE keys from `key` on. */
static void tile(const struct head *h, int first, int key, int width, int all, int causal, int positions)
{
    float weights[SIDE * SIDE] __attribute__((aligned(ALIGNED))) = {0};
    float gradient[SIDE * SIDE] __attribute__((aligned(ALIGNED))) = {0};
    const float *q = h->q + first * width, *dy = h->dy + first * width;
    product(SIDE, SIDE, width, q, width, 1, h->k_t + key, all, weights, SIDE);
    product(SIDE, SIDE, width, dy, width, 1, h->v_t + key, all, gradient, SIDE);
    for (int row = 0; row < SIDE; row++) {
        float *p = weights + row * SIDE, *d = gradient + row * SIDE;
        int seen = causal ? first + row + 1 : positions;
        for (int i = 0; i < SIDE; i += LANES) {
            vec x, dx;
            memcpy(&x, p + i, sizeof x);
            memcpy(&dx, d + i, sizeof dx);
            x = exponential(x - h->logsumexp[first + row]);
            for (int j = 0; key + i + LANES > seen && j < LANES; j++)
                x[j] = key + i + j < seen ? x[j] : 0;
            dx = x * (dx - h->delta[first + row]);
            memcpy(p + i, &x, sizeof x);
            memcpy(d + i, &dx, sizeof dx);
        }
    }
    product(SIDE, width, SIDE, weights, 1, SIDE, dy, width, h->dv + key * width, width);
    product(SIDE, width, SIDE, gradient, 1, SIDE, q, width, h->dk + key * width, width);
    product(SIDE, width, SIDE, gradient, SIDE, 1, h->k + key * width, width, h->dq + first * width, width);
}

static void one_head(const struct work *w, int image, int number_of, float *room)
{
    int positions = w->positions, size = w->size, all = rounded(positions, SIDE), width = rounded(size, PAD);
    size_t d = (size_t)w->heads * size, plane = (size_t)all * width;
    struct head h = {room,
                     room + plane,
                     room + 2 * plane,
                     room + 3 * plane,
                     room + 4 * plane,
                     room + 5 * plane,
                     room + 6 * plane,
                     room + 7 * plane,
                     room + 8 * plane,
                     room + 9 * plane,
                     room + 9 * plane + all};
    memset(room, 0, (9 * plane + 2 * all) * sizeof *room);
    const number *qkv = w->qkv + (size_t)image * positions * 3 * d + number_of * size;
    const number *y = w->y + (size_t)image * positions * d + number_of * size, *dy = w->dy + (y - w->y);
    number *dqkv = w->dqkv + (qkv - w->qkv);
    float scale = 1.0f / sqrtf(size);
    read_rows(qkv, 3 * d, positions, size, scale, width, h.q);
    read_rows(qkv + d, 3 * d, positions, size, 1, width, h.k);
    read_rows(qkv + 2 * d, 3 * d, positions, size, 1, width, h.v);
    read_rows(dy, d, positions, size, 1, width, h.dy);
    transpose(h.k, all, width, h.k_t);
    transpose(h.v, all, width, h.v_t);
    for (int t = 0; t < positions; t++) {
        float sum = 0;
        for (int i = 0; i < size; i++)
            sum += load(y[t * d + i]) * h.dy[t * width + i];
        h.delta[t] = sum;
        h.logsumexp[t] = w->logsumexp[((size_t)image * w->heads + number_of) * positions + t];
    }
    for (int first = 0; first < all; first += SIDE)
        for (int key = 0; key < (w->causal ? first + SIDE : all); key += SIDE)
            tile(&h, first, key, width, all, w->causal, positions);
    write_rows(h.dq, scale, positions, size, width, dqkv, 3 * d);
    write_rows(h.dk, 1, positions, size, width, dqkv + d, 3 * d); /* q was scaled */
    write_rows(h.dv, 1, positions, size, width, dqkv + 2 * d, 3 * d);
}

/* Returns whether there was memory. */
int backward(const struct work *w)
{
    size_t numbers = (9 * rounded(w->size, PAD) + 2) * rounded(w->positions, SIDE);
    int done = 1;
#pragma omp parallel num_threads(w->threads)
    {
        float *room = aligned_alloc(ALIGNED, rounded(numbers * sizeof *room, ALIGNED));
        if (!room)
#pragma omp atomic write
            done = 0;
#pragma omp for schedule(dynamic)
        for (int i = 0; i < w->batch * w->heads; i++)
            if (room)
                one_head(w, i / w->heads, i % w->heads, room);
        free(room);
    }
    return done;
}
