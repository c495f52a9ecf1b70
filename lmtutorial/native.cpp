// One step of a decoder-only Transformer on a CPU: what lmtutorial/models/transformer.py computes with a cache.
//
// At batch 1 a step reads every weight once and does two operations with it, so that its time is that of
// reading memory, if nothing else gets in the way: no dispatch of operations, no temporary tensors, one
// parallel region for the whole step. lmtutorial/native.py compiles this file and calls `step`.
//
// Rows are the (batch, time) positions of a step. Matrices are as PyTorch keeps them, (out, in), row after row.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

struct Linear {
    const float* weight;   // (out, in), or null where the weights are int8
    const int8_t* int8;    // (out, in)
    const float* scale;    // (out): weight = int8 * scale
    const float* bias;     // (out), or null
    int64_t out, in;
};

struct Norm {
    const float *weight, *bias;  // bias null: RMSNorm
};

struct Block {
    Norm attention_norm, mlp_norm;
    Linear qkv, mix, up, down;
    const float *q_norm, *k_norm;  // null where queries and keys are not normalized
};

struct Model {
    int64_t layers, width, heads, kv_heads, size, hidden, mlp;  // mlp: 0 gelu, 1 swiglu, 2 relu2
    float eps;
    const float *embedding, *positions;  // positions null: rotary
    const float *cos, *sin;              // (context, size / 2)
    Norm norm;
    Linear head;
    const Block* blocks;
};

struct Cache {
    float *keys, *values;    // (layers, batch, kv heads, max_len, size)
    const int64_t* lengths;  // (batch): how many tokens each row holds
    int64_t batch, max_len;
};

#ifdef __AVX512F__
#include <immintrin.h>
const int LANES = 16, TILE = 4;  // floats in a Vec, and how many columns of y are computed at a time
#else
const int LANES = 8, TILE = 2;   // so that a tile's sums fit the registers
#endif
const int TALL = 6;  // how many rows of y at a time, if there are few,
const int FEW = 8;   // up to so many; if there are more, LANES at a time

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

template <class T>
struct Array {  // aligned, because vectors that straddle two cache lines are read at half speed
    T* at;
    explicit Array(int64_t size) : at(new (std::align_val_t(64)) T[size]) {}
    ~Array() { ::operator delete[](at, std::align_val_t(64)); }
    Array(const Array&) = delete;
};

static inline float sum(Vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

static inline float exp_(float x) {  // e^x to 2e-7, as a loop that compilers make vectors of (Cephes, expf)
    x = x < -87 ? -87 : x > 88 ? 88 : x;  // written so that NaN stays NaN
    float n = std::floor(x * 1.44269504f + 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return (p * r * r + r + 1) * power;
}

// R rows of x times N rows of w: y[r * stride + n]. Each number that is loaded takes part in several products.
template <int R, int N>
static inline void dots(const float* x, const float* w, int64_t in, float* y, int64_t stride) {
    Vec sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = Vec{};
    int64_t k = 0;
    for (; k + LANES <= in; k += LANES)
        for (int n = 0; n < N; n++) {
            __builtin_prefetch(w + (N + n) * in + k);
            Vec weights = *(const Vec*)(w + n * in + k);
            for (int r = 0; r < R; r++) sums[r][n] += weights * *(const Vec*)(x + r * in + k);
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float total = sum(sums[r][n]);
            for (int64_t rest = k; rest < in; rest++) total += x[r * in + rest] * w[n * in + rest];
            y[r * stride + n] = total;
        }
}

// N columns of y, from column n on, for R rows.
template <int R, int N>
static void tile(const Linear& l, const float* x, int64_t n, float* y, bool add) {
    float out[R * N];
    dots<R, N>(x, l.weight + n * l.in, l.in, out, N);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) {
            float* to = y + r * l.out + n + i;
            *to = out[r * N + i] + (l.bias ? l.bias[n + i] : 0) + (add ? *to : 0);
        }
}

// N columns of y, for a few rows.
template <int N>
static void columns(const Linear& l, const float* x, int64_t rows, int64_t n, float* y, bool add) {
    static void (*const of_height[])(const Linear&, const float*, int64_t, float*, bool) = {
        nullptr, tile<1, N>, tile<2, N>, tile<3, N>, tile<4, N>, tile<5, N>, tile<6, N>};
    int64_t pieces = (rows + TALL - 1) / TALL;
    for (int64_t p = 0, row = 0; p < pieces; p++) {  // as even as they can be
        int64_t height = (rows - row) / (pieces - p);
        of_height[height](l, x + row * l.in, n, y + row * l.out, add);
        row += height;
    }
}

// N columns of y for many rows, which lie in `turned` as (rows / LANES, in, LANES): one row a lane, so that nothing
// is left to sum.
template <int N>
static void columns_of_many(const Linear& l, const float* turned, int64_t rows, int64_t n, float* y, bool add) {
    const float* w = l.weight + n * l.in;
    for (int64_t row = 0; row < rows; row += LANES) {
        Vec sums[N];
        for (int i = 0; i < N; i++) sums[i] = Vec{};
        for (int64_t k = 0; k < l.in; k++)
            for (int i = 0; i < N; i++) sums[i] += *(const Vec*)(turned + (row * l.in) + k * LANES) * w[i * l.in + k];
        for (int i = 0; i < N; i++)
            for (int64_t r = 0; r < LANES && row + r < rows; r++) {
                float* to = y + (row + r) * l.out + n + i;
                *to = sums[i][r] + (l.bias ? l.bias[n + i] : 0) + (add ? *to : 0);
            }
    }
}

// int8 weights meet activations rounded to 16 bits or a little less, so that a sum fits 32: integer products,
// many at once on every CPU, and as good as exact (8 bits would spoil large activations).
struct Scratch {
    Array<int16_t> x;     // (rows, in), rounded
    Array<float> scale;   // (rows)
    Array<float> turned;  // (rows / LANES, in, LANES)
};

static void round_row(const float* x, int64_t in, int16_t* to, float* scale) {
    float largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t k = 0; k < in; k++) {
        largest = std::fabs(x[k]) > largest ? std::fabs(x[k]) : largest;
        poison += x[k] * 0;  // NaN if there is NaN or infinity
    }
    int64_t fits = INT32_MAX / (127 * in);
    float limit = fits < 32767 ? fits : 32767, inverse = largest > 0 ? limit / largest : 0;
    for (int64_t k = 0; k < in; k++) to[k] = int16_t(std::nearbyint(x[k] * inverse));
    *scale = largest / limit + poison;
}

template <int N, class A, class B>  // one row of `one` times N rows of `several`
static inline void int_dots(const A* one, const B* several, int64_t in, int32_t* y) {
    int32_t a = 0, b = 0, c = 0, d = 0;
    for (int64_t k = 0; k < in; k++) {
        int32_t x = one[k];
        a += x * int16_t(several[k]);
        if (N == 4) b += x * int16_t(several[in + k]), c += x * int16_t(several[2 * in + k]), d += x * int16_t(several[3 * in + k]);
    }
    y[0] = a;
    if (N == 4) y[1] = b, y[2] = c, y[3] = d;
}

static inline void put(const Linear& l, const Scratch& x, int32_t total, int64_t row, int64_t n, float* y, bool add) {
    float* to = y + row * l.out + n;
    *to = total * (x.scale.at[row] * l.scale[n]) + (l.bias ? l.bias[n] : 0) + (add ? *to : 0);
}

template <int N>
static void int8_columns(const Linear& l, const Scratch& x, int64_t rows, int64_t n, int16_t* wide, float* y, bool add) {
    int32_t totals[4];
    if (rows == 1) {
        int_dots<N>(x.x.at, l.int8 + n * l.in, l.in, totals);
        for (int i = 0; i < N; i++) put(l, x, totals[i], 0, n + i, y, add);
        return;
    }
    for (int64_t column = n; column < n + N; column++) {
        for (int64_t k = 0; k < l.in; k++) wide[k] = l.int8[column * l.in + k];
        for (int64_t row = 0; row < rows; row += row + 4 <= rows ? 4 : 1) {
            if (row + 4 <= rows) int_dots<4>(wide, x.x.at + row * l.in, l.in, totals);
            else int_dots<1>(wide, x.x.at + row * l.in, l.in, totals);
            for (int i = 0; i < (row + 4 <= rows ? 4 : 1); i++) put(l, x, totals[i], row + i, column, y, add);
        }
    }
}

// y = x W^T + b, or y += that. All threads call it, each does its share of the columns.
static void linear(const Linear& l, const float* x, int64_t rows, float* y, bool add, Scratch& scratch) {
    if (l.int8) {
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            round_row(x + row * l.in, l.in, scratch.x.at + row * l.in, &scratch.scale.at[row]);
        Array<int16_t> wide(l.in);
#pragma omp for
        for (int64_t n = 0; n < l.out; n += 4)
            if (n + 4 <= l.out) int8_columns<4>(l, scratch, rows, n, wide.at, y, add);
            else for (int64_t rest = n; rest < l.out; rest++) int8_columns<1>(l, scratch, rows, rest, wide.at, y, add);
    } else if (rows <= FEW) {
#pragma omp for
        for (int64_t n = 0; n < l.out; n += 2 * TILE)
            if (n + 2 * TILE > l.out) for (int64_t rest = n; rest < l.out; rest++) columns<1>(l, x, rows, rest, y, add);
            else if (rows == 1) tile<1, 2 * TILE>(l, x, n, y, add);
            else columns<TILE>(l, x, rows, n, y, add), columns<TILE>(l, x, rows, n + TILE, y, add);
    } else {
        float* turned = scratch.turned.at;
#pragma omp for
        for (int64_t k = 0; k < l.in; k++)
            for (int64_t row = 0; row < (rows + LANES - 1) / LANES * LANES; row++)
                turned[(row / LANES * l.in + k) * LANES + row % LANES] = row < rows ? x[row * l.in + k] : 0;
#pragma omp for
        for (int64_t n = 0; n < l.out; n += 8)
            if (n + 8 <= l.out) columns_of_many<8>(l, turned, rows, n, y, add);
            else for (int64_t rest = n; rest < l.out; rest++) columns_of_many<1>(l, turned, rows, rest, y, add);
    }
}

static void normalize(const Norm& norm, const float* x, int64_t size, float eps, float* y) {
    float mean = 0, squares = 0;
    if (norm.bias) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < size; i++) mean += x[i];
        mean /= size;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / std::sqrt(squares / size + eps);
    for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
}

static void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float one = x[i], other = x[i + half];
        x[i] = one * cos[i] - other * sin[i];
        x[i + half] = other * cos[i] + one * sin[i];
    }
}

static void activate(int64_t mlp, const float* up, int64_t hidden, float* y) {
    if (mlp == 0)
        for (int64_t i = 0; i < hidden; i++) {
            float u = up[i], inner = 0.7978845608f * (u + 0.044715f * u * u * u);
            y[i] = u / (1 + exp_(-2 * inner));  // u (1 + tanh(inner)) / 2
        }
    else if (mlp == 1)
        for (int64_t i = 0; i < hidden; i++) y[i] = up[i] / (1 + exp_(-up[i])) * up[hidden + i];
    else
        for (int64_t i = 0; i < hidden; i++) y[i] = up[i] > 0 ? up[i] * up[i] : up[i] * 0;
}

// What one query gathers from the first `length` keys and values of its head.
static void attend(const float* q, const float* keys, const float* values, int64_t length, int64_t size, float* scores,
                   float* y) {
    float largest = -INFINITY, total = 0, scale = 1 / std::sqrt(float(size));
    int64_t j = 0;
    for (; j + 4 <= length; j += 4) dots<1, 4>(q, keys + j * size, size, scores + j, 0);
    for (; j < length; j++) dots<1, 1>(q, keys + j * size, size, scores + j, 0);
#pragma omp simd reduction(max : largest)
    for (j = 0; j < length; j++) {
        scores[j] *= scale;
        largest = scores[j] > largest ? scores[j] : largest;
    }
#pragma omp simd reduction(+ : total)
    for (j = 0; j < length; j++) total += scores[j] = exp_(scores[j] - largest);
    std::memset(y, 0, size * sizeof(float));
    for (j = 0; j < length; j++)
        for (int64_t i = 0; i < size; i++) y[i] += scores[j] * values[j * size + i];
    for (int64_t i = 0; i < size; i++) y[i] /= total;
}

// The heads that share key-value head `g` in batch row `b`: first all new keys and values, then the queries.
static void group(const Model& m, const Block& block, const Cache& c, int64_t layer, int64_t b, int64_t g, int64_t time,
                  float* qkv, float* scores, float* y) {
    int64_t size = m.size, wide = (m.heads + 2 * m.kv_heads) * size, shared = m.heads / m.kv_heads;
    int64_t start = ((layer * c.batch + b) * m.kv_heads + g) * c.max_len * size;
    float *keys = c.keys + start, *values = c.values + start;
    auto ready = [&](float* x, const float* norm, int64_t position) {
        if (norm) normalize({norm, nullptr}, x, size, m.eps, x);
        if (m.cos) rotate(x, m.cos + position * size / 2, m.sin + position * size / 2, size / 2);
    };
    for (int64_t t = 0; t < time; t++) {
        int64_t position = c.lengths[b] + t;
        float* k = qkv + (b * time + t) * wide + (m.heads + g) * size;
        ready(k, block.k_norm, position);
        std::memcpy(keys + position * size, k, size * sizeof(float));
        std::memcpy(values + position * size, k + m.kv_heads * size, size * sizeof(float));
    }
    for (int64_t t = 0; t < time; t++)
        for (int64_t head = g * shared; head < (g + 1) * shared; head++) {
            int64_t row = b * time + t, position = c.lengths[b] + t;
            float* q = qkv + row * wide + head * size;
            ready(q, block.q_norm, position);
            attend(q, keys, values, position + 1, size, scores, y + row * m.width + head * size);
        }
}

// Reads `tokens` (batch, time) after what the cache holds; writes `logits` (batch, time, vocab) and the cache.
// Returns 0, or having done nothing, 1 for an unknown token and 2 where the cache is full.
extern "C" int step(const Model& m, const Cache& c, const int64_t* tokens, int64_t time, float* logits, int threads) {
    for (int64_t b = 0; b < c.batch; b++)
        if (c.lengths[b] + time > c.max_len) return 2;
    for (int64_t i = 0; i < c.batch * time; i++)
        if (tokens[i] < 0 || tokens[i] >= m.head.out) return 1;
    int64_t rows = c.batch * time, width = m.width, wide = (m.heads + 2 * m.kv_heads) * m.size;
    int64_t ups = m.hidden * (m.mlp == 1 ? 2 : 1), longest = width > m.hidden ? width : m.hidden;
    Array<float> stream(rows * width), normed(rows * width), qkv(rows * wide), mixed(rows * width);
    Array<float> up(rows * ups), hidden(rows * m.hidden);
    Scratch scratch{Array<int16_t>(rows * longest), Array<float>(rows), Array<float>((rows + LANES) * longest)};
    float* x = stream.at;
#pragma omp parallel num_threads(threads)
    {
        Array<float> scores(c.max_len);
        auto norm = [&](const Norm& n) {
#pragma omp for
            for (int64_t row = 0; row < rows; row++)
                normalize(n, x + row * width, width, m.eps, normed.at + row * width);
        };
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            int64_t position = c.lengths[row / time] + row % time;
            for (int64_t i = 0; i < width; i++)
                x[row * width + i] = m.embedding[tokens[row] * width + i] + (m.positions ? m.positions[position * width + i] : 0);
        }
        for (int64_t layer = 0; layer < m.layers; layer++) {
            const Block& block = m.blocks[layer];
            norm(block.attention_norm);
            linear(block.qkv, normed.at, rows, qkv.at, false, scratch);
#pragma omp for collapse(2)
            for (int64_t b = 0; b < c.batch; b++)
                for (int64_t g = 0; g < m.kv_heads; g++)
                    group(m, block, c, layer, b, g, time, qkv.at, scores.at, mixed.at);
            linear(block.mix, mixed.at, rows, x, true, scratch);
            norm(block.mlp_norm);
            linear(block.up, normed.at, rows, up.at, false, scratch);
#pragma omp for
            for (int64_t row = 0; row < rows; row++) activate(m.mlp, up.at + row * ups, m.hidden, hidden.at + row * m.hidden);
            linear(block.down, hidden.at, rows, x, true, scratch);
        }
        norm(m.norm);
        linear(m.head, normed.at, rows, logits, false, scratch);
    }
    return 0;
}
