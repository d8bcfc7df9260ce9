// A token for each row of logits, on a GPU; follows decode_numbers.cu. A block a row, so that nothing of a row depends
// on the others.
//
// What is drawn, and by which random numbers, is as in draw.py: a seed gives the tokens here that it gives there, but
// where two tokens finish a race within the rounding of an exponential or a sum.

typedef unsigned long long u64;

constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr int BLOCK = 256;                 // tokens that race together
constexpr int MOST_BLOCKS = 4096;          // of a vocabulary
constexpr int MOST_CANDIDATES = 4096;      // to be the k-th largest
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

// The k-th largest of n numbers, bit by bit. All threads call it, and get it.
DEVICE float kth_of(const float* numbers, int n, int k) {
    u32 found = 0;
    for (u32 bit = 1u << 31; bit; bit >>= 1) {
        int reach = 0;
        for (int i = 0; i < n; i += THREADS) {
            const int at = i + threadIdx.x;
            reach += __syncthreads_count(at < n && rank_of(numbers[at]) >= (found | bit));
        }
        if (reach >= k) found |= bit;
    }
    return of_rank(found);
}

// The k-th largest of a row: only numbers can be it that reach the k-th largest of every thread's own maximum, and
// these are few unless many are equal.
DEVICE float kth_largest(const float* row, int vocab, int k) {
    __shared__ float candidates[MOST_CANDIDATES];
    __shared__ int count;
    if (k > THREADS) return kth_of(row, vocab, k);
    float top = -INFINITE;
    for (int i = threadIdx.x; i < vocab; i += THREADS) top = fmaxf(top, row[i]);
    if (threadIdx.x == 0) count = 0;
    candidates[threadIdx.x] = top;
    __syncthreads();
    const float limit = kth_of(candidates, THREADS, k);
    __syncthreads();
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const float x = row[i];
        if (x < limit) continue;
        const int place = atomicAdd(&count, 1);
        if (place < MOST_CANDIDATES) candidates[place] = x;
    }
    __syncthreads();
    const int found = count;
    return found <= MOST_CANDIDATES ? kth_of(candidates, found, k) : kth_of(row, vocab, k);
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

// Logits of a row as float32, into `row` if they are needed again; the likeliest, or that some are not numbers.
DEVICE bool read_row(const u16* logits, float* row, int vocab, bool keep, Best& best) {
    bool bad = false;
    auto take = [&](float x, int i) {
        bad |= !(x < INFINITE);  // infinity, or no number
        best = better(best, {x, i});
    };
    const int chunks = vocab % 8 ? 0 : vocab / 8;  // of 16 bytes
    for (int c = threadIdx.x; c < chunks; c += THREADS) {
        const uint4 eight = ((const uint4*)logits)[c];
        const u32 parts[4] = {eight.x, eight.y, eight.z, eight.w};
        float x[8];
        UNROLL for (int j = 0; j < 4; j++) {
            const float2 two = widen(parts[j]);
            x[2 * j] = two.x, x[2 * j + 1] = two.y;
        }
        UNROLL for (int j = 0; j < 8; j++) take(x[j], c * 8 + j);
        if (keep) {
            ((float4*)row)[2 * c] = make_float4(x[0], x[1], x[2], x[3]);
            ((float4*)row)[2 * c + 1] = make_float4(x[4], x[5], x[6], x[7]);
        }
    }
    for (int i = chunks * 8 + threadIdx.x; i < vocab; i += THREADS) {
        const float x = widen(logits[i]);
        take(x, i);
        if (keep) row[i] = x;
    }
    best = best_of_block(best);
    return __syncthreads_or(bad) || best.value == -INFINITE;
}

// Bias, penalties, and tokens that may not be chosen; the likeliest after them.
DEVICE Best change(float* row, int vocab, const Pick& pick, const Change* changes) {
    for (int i = pick.biased + threadIdx.x; i < pick.seen; i += THREADS) row[changes[i].token] += changes[i].value;
    __syncthreads();
    for (int i = pick.seen + threadIdx.x; i < pick.barred; i += THREADS) {
        const float times = changes[i].value;
        float x = row[changes[i].token];
        x = __fmul_rn(x, x > 0 ? pick.inverse : pick.repetition);
        x = __fsub_rn(x, __fmul_rn(pick.frequency, times));
        row[changes[i].token] = times > 0 ? __fsub_rn(x, pick.presence) : x;
    }
    __syncthreads();
    for (int i = pick.barred + threadIdx.x; i < pick.end; i += THREADS) row[changes[i].token] = -INFINITE;
    __syncthreads();
    Best best = {-INFINITE, vocab};
    for (int i = threadIdx.x; i < vocab; i += THREADS) best = better(best, {row[i], i});
    return best_of_block(best);
}

// Give every token of a row a new weight; sums of blocks into `sums`, and the sum of all.
template <typename Weigh>
DEVICE double reweigh(float* row, float* sums, int blocks, Weigh weigh) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int b = warp; b < blocks; b += WARPS) {
        float sum = 0;
        UNROLL for (int j = 0; j < BLOCK / 32; j++) {
            const int i = b * BLOCK + j * 32 + lane;
            const float w = weigh(i);
            row[i] = w;
            sum += w;
        }
        UNROLL for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
        if (lane == 0) sums[b] = sum;
    }
    __syncthreads();
    double total = 0;
    for (int b = threadIdx.x; b < blocks; b += THREADS) total += sums[b];
    return sum_of_block(total);
}

// A token by weights, of which the largest is 1: see draw.py.
DEVICE int race(float* row, float* sums, int blocks, const Pick& pick, double total) {
    double left = total;
    for (u64 round = 0;; round++) {
        Best first = {-1, 0};
        for (int b = threadIdx.x; b < blocks; b += THREADS)
            first = better(first, {sums[b] / time_of(pick.key, round, b), b});
        const int block = best_of_block(first).at;
        first = {-1, 0};
        if (threadIdx.x < BLOCK)
            first = {row[block * BLOCK + threadIdx.x] / time_of(pick.key, round, blocks + threadIdx.x), (int)threadIdx.x};
        const int token = block * BLOCK + best_of_block(first).at;
        const float weight = row[token];
        if (pick.top_p == 1 || weight == 1 || weight > (1 - pick.top_p) * total) return token;
        __syncthreads();  // all have read it
        left = reweigh(row, sums, blocks, [&](int i) { return row[i] > weight ? row[i] : 0.0f; });
        if (left < pick.top_p * total) return token;
    }
}

// tokens [rows]; -1: the row's logits are not numbers. scratch [rows, vocab, rounded up to whole blocks], 16-byte
// aligned; null where every row takes the likeliest of its logits as they are.
extern "C" __global__ void __launch_bounds__(THREADS)
choose_tokens(const u16* logits, const Pick* picks, const Change* changes, float* scratch, i64* tokens, int vocab) {
    __shared__ float sums[MOST_BLOCKS];
    const Pick pick = picks[blockIdx.x];
    const int blocks = (vocab + BLOCK - 1) / BLOCK;
    const bool changed = pick.biased < pick.end, drawn = pick.temperature > 0;
    float* row = scratch + (i64)blockIdx.x * blocks * BLOCK;
    Best best = {-INFINITE, vocab};
    const bool bad = read_row(logits + (i64)blockIdx.x * vocab, row, vocab, changed || drawn, best);
    int token = best.at;
    if (!bad && changed) {
        best = change(row, vocab, pick, changes);
        token = best.at < vocab ? best.at : 0;
    }
    if (!bad && drawn && best.value > -INFINITE) {
        __syncthreads();
        float lowest = pick.lowest;
        if (pick.top_k > 0 && pick.top_k < vocab)
            lowest = fmaxf(lowest, (kth_largest(row, vocab, pick.top_k) - best.value) / pick.temperature);
        const double total = reweigh(row, sums, blocks, [&](int i) {
            const float score = i < vocab ? (row[i] - best.value) / pick.temperature : -INFINITE;
            return i < vocab && score >= lowest ? expf(score) : 0.0f;
        });
        token = race(row, sums, blocks, pick, total);
    }
    if (threadIdx.x == 0) tokens[blockIdx.x] = bad ? -1 : token;
}
