// A token for each row of logits, on a GPU; follows common.cu. A block a row, so that nothing of a row depends
// on the others.
//
// What is drawn, and by which random numbers, is as in draw.py: a seed gives the tokens here that it gives there, but
// where two tokens finish a race within the rounding of an exponential or a sum.

typedef unsigned long long u64;

constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr int EIGHT = 8;                   // tokens that a thread reads at a time
constexpr int BLOCK = 32 * EIGHT;          // tokens that race together: those of a warp
constexpr int MOST_BLOCKS = 4096;          // of a vocabulary
constexpr int MOST_CANDIDATES = 4096;      // to be the k-th largest
constexpr float LOG2_E = 1.44269504f;
#define INFINITE __int_as_float(0x7f800000)

struct Pick {
    double top_p;
    u64 key;                               // of the random numbers
    float temperature, lowest;             // 0: the likeliest; ln(min_p)
    float repetition, inverse, presence, frequency;
    int top_k;                             // 0: all
    int biased, seen, barred, end;         // where the row's changes of each kind begin
    int unused;
};

struct Change {
    int token;
    float value;                           // added; or how often the output has it; or nothing
};

struct Best {
    float value;
    int at;
};

DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a; }

DEVICE Best best_of_warp(Best mine) {
    UNROLL for (int i = 16; i; i >>= 1)
        mine = better(mine, {__shfl_xor_sync(~0u, mine.value, i), __shfl_xor_sync(~0u, mine.at, i)});
    return mine;
}

// The best of all threads, known to all of them; of equals the first.
DEVICE Best best_of_block(Best mine) {
    __shared__ Best room[WARPS];
    mine = best_of_warp(mine);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = mine;
    __syncthreads();
    return best_of_warp(room[threadIdx.x & 31]);
}

DEVICE double sum_of_block(double mine) {
    __shared__ double room[WARPS];
    UNROLL for (int i = 16; i; i >>= 1) mine += __shfl_xor_sync(~0u, mine, i);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = mine;
    __syncthreads();
    mine = room[threadIdx.x & 31];
    UNROLL for (int i = 16; i; i >>= 1) mine += __shfl_xor_sync(~0u, mine, i);
    return mine;
}

// A number whose order is that of floats, and back.
DEVICE u32 rank_of(float x) {
    const u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DEVICE float of_rank(u32 rank) { return __uint_as_float(rank >> 31 ? rank ^ 0x80000000u : ~rank); }

// A row's logits: as they are, or in float32 where some were changed.
struct Row {
    const u16* logits;
    const float* changed;                  // null: none was
    int vocab;

    DEVICE float one(int i) const { return changed ? changed[i] : widen(logits[i]); }

    // Eight of them, from a place that is a multiple of eight; behind the last is no token.
    DEVICE void read(int at, float (&x)[EIGHT]) const {
        if (changed) {
            const float4 a = ((const float4*)changed)[at / 4], b = ((const float4*)changed)[at / 4 + 1];
            x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
        } else if (vocab % EIGHT == 0 && at < vocab) {
            const uint4 eight = ((const uint4*)logits)[at / EIGHT];
            const u32 parts[4] = {eight.x, eight.y, eight.z, eight.w};
            UNROLL for (int j = 0; j < 4; j++) {
                const float2 two = widen(parts[j]);
                x[2 * j] = two.x, x[2 * j + 1] = two.y;
            }
        } else {
            UNROLL for (int j = 0; j < EIGHT; j++) x[j] = at + j < vocab ? widen(logits[at + j]) : -INFINITE;
        }
    }

    // Every warp goes through blocks of its own: visit(place, eight numbers), then after(block).
    template <typename Visit, typename After>
    DEVICE void each(Visit visit, After after) const {
        const int blocks = (vocab + BLOCK - 1) / BLOCK;
        _Pragma("unroll 4") for (int b = threadIdx.x / 32; b < blocks; b += WARPS) {
            const int at = b * BLOCK + threadIdx.x % 32 * EIGHT;
            float x[EIGHT];
            read(at, x);
            visit(at, x);
            after(b);
        }
    }

    template <typename Visit>
    DEVICE void each(Visit visit) const { each(visit, [](int) {}); }
};

DEVICE Best best_of_row(const Row& row) {
    Best best = {-INFINITE, row.vocab};
    row.each([&](int at, float (&x)[EIGHT]) {
        UNROLL for (int j = 0; j < EIGHT; j++) best = better(best, {x[j], at + j});
    });
    return best_of_block(best);
}

// The k-th largest of n numbers, bit by bit. All threads call it, and get it.
template <typename Number>
DEVICE float kth_of(int n, int k, Number number) {
    u32 found = 0;
    for (u32 bit = 1u << 31; bit; bit >>= 1) {
        int reach = 0;
        for (int i = 0; i < n; i += THREADS) {
            const int at = i + threadIdx.x;
            reach += __syncthreads_count(at < n && rank_of(number(at)) >= (found | bit));
        }
        if (reach >= k) found |= bit;
    }
    return of_rank(found);
}

// The k-th largest of a row: only numbers can be it that reach the k-th largest of every thread's own maximum, and
// these are few unless many are equal.
DEVICE float kth_largest(const Row& row, int k) {
    __shared__ float candidates[MOST_CANDIDATES];
    __shared__ int count;
    auto any = [&](int i) { return row.one(i); };
    if (k > THREADS) return kth_of(row.vocab, k, any);
    float top = -INFINITE;
    row.each([&](int, float (&x)[EIGHT]) { UNROLL for (int j = 0; j < EIGHT; j++) top = fmaxf(top, x[j]); });
    if (threadIdx.x == 0) count = 0;
    const float limit = kth_of(THREADS, k, [&](int) { return top; });
    row.each([&](int at, float (&x)[EIGHT]) {
        UNROLL for (int j = 0; j < EIGHT; j++) {
            if (x[j] < limit || at + j >= row.vocab) continue;
            const int place = atomicAdd(&count, 1);
            if (place < MOST_CANDIDATES) candidates[place] = x[j];
        }
    });
    __syncthreads();
    if (count > MOST_CANDIDATES) return kth_of(row.vocab, k, any);
    return kth_of(count, k, [&](int i) { return candidates[i]; });
}

// The i-th time of a round: exponential, of rate 1. The mixer is SplitMix64's.
DEVICE float time_of(u64 key, u64 round, int i) {
    u64 mixed = ((round << 32) + i) * 0x9E3779B97F4A7C15ull + key;
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ull;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBull;
    mixed ^= mixed >> 31;
    const float uniform = ((float)(u32)(mixed >> 40) + 0.5f) * 0x1p-24f;
    return fmaxf(-logf(uniform), 0x1p-25f);
}

// Put a row's logits into `changed`, with bias, penalties, and tokens that may not be chosen.
DEVICE void change(const Row& row, float* changed, const Pick& pick, const Change* changes) {
    row.each([&](int at, float (&x)[EIGHT]) {
        ((float4*)changed)[at / 4] = make_float4(x[0], x[1], x[2], x[3]);
        ((float4*)changed)[at / 4 + 1] = make_float4(x[4], x[5], x[6], x[7]);
    });
    __syncthreads();
    for (int i = pick.biased + threadIdx.x; i < pick.seen; i += THREADS) changed[changes[i].token] += changes[i].value;
    __syncthreads();
    for (int i = pick.seen + threadIdx.x; i < pick.barred; i += THREADS) {
        const float times = changes[i].value;
        float x = changed[changes[i].token];
        x = __fmul_rn(x, x > 0 ? pick.inverse : pick.repetition);
        x = __fsub_rn(x, __fmul_rn(pick.frequency, times));
        changed[changes[i].token] = times > 0 ? __fsub_rn(x, pick.presence) : x;
    }
    __syncthreads();
    for (int i = pick.barred + threadIdx.x; i < pick.end; i += THREADS) changed[changes[i].token] = -INFINITE;
    __syncthreads();
}

// What a token weighs in the race, of which the likeliest has 1: nothing below `lowest`, or in weights up to `cut`.
struct Weight {
    float largest, scale, lowest, cut;

    DEVICE float operator()(float x) const {
        float w;
        asm("ex2.approx.f32 %0, %1;" : "=f"(w) : "f"((x - largest) * scale));
        return x >= lowest && w > cut ? w : 0.0f;
    }
};

// Sums of the weights of each block, and the sum of all.
DEVICE double sum_weights(const Row& row, const Weight& weight, float* sums) {
    float sum = 0;
    row.each(
        [&](int, float (&x)[EIGHT]) { UNROLL for (int j = 0; j < EIGHT; j++) sum += weight(x[j]); },
        [&](int b) {
            UNROLL for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
            if (threadIdx.x % 32 == 0) sums[b] = sum;
            sum = 0;
        });
    __syncthreads();
    double total = 0;
    for (int b = threadIdx.x; b * BLOCK < row.vocab; b += THREADS) total += sums[b];
    return sum_of_block(total);
}

// A token by its weight: see draw.py.
DEVICE int race(const Row& row, Weight weight, const Pick& pick) {
    __shared__ float sums[MOST_BLOCKS];
    const int blocks = (row.vocab + BLOCK - 1) / BLOCK;
    const double total = sum_weights(row, weight, sums);
    for (u64 round = 0;; round++) {
        Best first = {-1, 0};
        for (int b = threadIdx.x; b < blocks; b += THREADS)
            first = better(first, {sums[b] / time_of(pick.key, round, b), b});
        const int from = best_of_block(first).at * BLOCK, mine = from + threadIdx.x;
        first = {-1, from};
        if (threadIdx.x < BLOCK && mine < row.vocab)
            first = {weight(row.one(mine)) / time_of(pick.key, round, blocks + threadIdx.x), mine};
        const int token = best_of_block(first).at;
        weight.cut = weight(row.one(token));
        if (pick.top_p == 1 || weight.cut == 1 || weight.cut > (1 - pick.top_p) * total) return token;
        __syncthreads();  // all have read the sums
        if (sum_weights(row, weight, sums) < pick.top_p * total) return token;
    }
}

// tokens [rows]; -1: the row's logits are not numbers. scratch [rows, vocab rounded up to whole blocks], 16-byte
// aligned; null where nothing is changed of any row.
extern "C" __global__ void __launch_bounds__(THREADS)
choose_tokens(const u16* logits, const Pick* picks, const Change* changes, float* scratch, i64* tokens, int vocab) {
    const Pick pick = picks[blockIdx.x];
    Row row = {logits + (i64)blockIdx.x * vocab, nullptr, vocab};
    bool bad = false;
    Best best = {-INFINITE, vocab};
    row.each([&](int at, float (&x)[EIGHT]) {
        UNROLL for (int j = 0; j < EIGHT; j++) {
            bad |= !(x[j] < INFINITE);  // infinity, or no number
            best = better(best, {x[j], at + j});
        }
    });
    best = best_of_block(best);
    bad = __syncthreads_or(bad) || best.value == -INFINITE;
    if (!bad && pick.biased < pick.end) {
        float* changed = scratch + (i64)blockIdx.x * ((vocab + BLOCK - 1) / BLOCK * BLOCK);
        change(row, changed, pick, changes);
        row.changed = changed;
        best = best_of_row(row);
    }
    int token = min(best.at, vocab - 1);
    if (!bad && pick.temperature > 0 && best.value > -INFINITE) {
        float lowest = best.value + pick.lowest * pick.temperature;
        if (pick.top_k > 0 && pick.top_k < vocab) lowest = fmaxf(lowest, kth_largest(row, pick.top_k));
        token = race(row, {best.value, LOG2_E / pick.temperature, lowest, 0.0f}, pick);
    }
    if (threadIdx.x == 0) tokens[blockIdx.x] = bad ? -1 : token;
}
