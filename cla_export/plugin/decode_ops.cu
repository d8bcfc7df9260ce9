// The small steps of a decoder around ClaAttention and the products, on a GPU; follows common.cu.
//
// Every kernel lets the next one start while it runs, and waits for the one before it only when it needs its values.
// Nothing is: to the compiler, such reads could be made before that wait.

constexpr int WARPS = 8;
constexpr int CHUNK = 8;    // numbers of a 16-byte load

DEVICE float sum_of_warp(float x) {
    UNROLL for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// y [tokens, k] = norm(x); a block a token, every thread with up to HELD chunks of it in registers.
constexpr int HELD = 4;
extern "C" __global__ void __launch_bounds__(WARPS * 32)
rms_norm(const uint4* x, const uint4* norm, uint4* y, int k, float eps) {
    __shared__ float scratch[WARPS];
    const int chunks = k / CHUNK, threads = WARPS * 32;
    uint4 weights[HELD], numbers[HELD];
    let_next_kernel_start();
    UNROLL for (int i = 0; i < HELD; i++) {
        const int c = threadIdx.x + i * threads;
        if (c < chunks) weights[i] = norm[c];
    }
    wait_for_previous_kernel();
    x += (i64)blockIdx.x * chunks;
    y += (i64)blockIdx.x * chunks;
    UNROLL for (int i = 0; i < HELD; i++) {
        const int c = threadIdx.x + i * threads;
        if (c < chunks) numbers[i] = x[c];
    }
    float squares = 0;
    UNROLL for (int i = 0; i < HELD; i++) {
        if ((int)threadIdx.x + i * threads >= chunks) continue;
        const u32 parts[4] = {numbers[i].x, numbers[i].y, numbers[i].z, numbers[i].w};
        UNROLL for (int j = 0; j < 4; j++) {
            const float2 two = widen(parts[j]);
            squares += two.x * two.x + two.y * two.y;
        }
    }
    squares = sum_of_warp(squares);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = squares;
    __syncthreads();
    float total = 0;
    UNROLL for (int i = 0; i < WARPS; i++) total += scratch[i];
    const float factor = rsqrtf(total / k + eps);
    UNROLL for (int i = 0; i < HELD; i++) {
        const int c = threadIdx.x + i * threads;
        if (c >= chunks) continue;
        const u32 parts[4] = {numbers[i].x, numbers[i].y, numbers[i].z, numbers[i].w};
        const u32 scales[4] = {weights[i].x, weights[i].y, weights[i].z, weights[i].w};
        u32 made[4];
        UNROLL for (int j = 0; j < 4; j++) {
            const float2 two = widen(parts[j]), scale = widen(scales[j]);
            made[j] = narrow(two.x * factor * scale.x, two.y * factor * scale.y);
        }
        y[c] = make_uint4(made[0], made[1], made[2], made[3]);
    }
}

// w [rows, k] from packed weights, as MatMulNBits has them: blocks of 32 columns, padded at a row's end, in `bits` bits,
// and a scale each. A thread makes 8 columns.
extern "C" __global__ void unpack(const unsigned char* packed, const u16* scales, u16* w, int rows, int k, int bits) {
    let_next_kernel_start();
    const int eights = (k + CHUNK - 1) / CHUNK, blocks = (k + 31) / 32;
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = i / eights;
    const int column = (int)(i % eights) * CHUNK;
    u32 made[CHUNK / 2];
    if (row < rows) {
        const float scale = widen(scales[row * blocks + column / 32]);
        const u32* words = (const u32*)(packed + (row * blocks * 32 + column) * bits / 8);
        const u32 low = words[0], high = bits == 8 ? words[1] : low >> 16;
        UNROLL for (int j = 0; j < CHUNK / 2; j++) {
            const u32 two = (j < 2 ? low : high) >> j % 2 * 2 * bits;
            const int first = two & (1 << bits) - 1, second = two >> bits & (1 << bits) - 1, zero = 1 << bits - 1;
            made[j] = narrow((first - zero) * scale, (second - zero) * scale);
        }
    }
    wait_for_previous_kernel();  // which may still read what was unpacked before
    if (row >= rows) return;
    w += row * k + column;
    if (k % CHUNK == 0) *(uint4*)w = make_uint4(made[0], made[1], made[2], made[3]);
    else
        UNROLL for (int j = 0; j < CHUNK; j++)
            if (column + j < k) w[j] = (u16)(made[j / 2] >> j % 2 * 16);
}

// y [tokens, n] = silu(both [tokens, :n]) * both [tokens, n:].
extern "C" __global__ void swiglu(const u32* both, u32* y, int n, int tokens) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const i64 half = n / 2, i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= half * tokens) return;
    const i64 at = i / half * n + i % half;
    const float2 gate = widen(both[at]), up = widen(both[at + half]);
    y[i] = narrow(round_once(gate.x / (1.0f + __expf(-gate.x))) * up.x, round_once(gate.y / (1.0f + __expf(-gate.y))) * up.y);
}

// Rotate the query heads of each token, and its key heads into the cache, where its values go too. qkv is
// [batch * queries, (heads + 2 kv_heads) * dim], or the heads alone where kv_heads is 0. A block a token, two numbers
// of each half a thread; what was there before the step began is read before anything is waited for.
extern "C" __global__ void rotate(const u32* qkv, const float2* cosines,
                                  const float2* sines, const i64* starts,
                                  u32* q, u32* keys, u32* values, int heads,
                                  int kv_heads, int dim, int queries, int capacity, int positions) {
    const int b = blockIdx.x / queries, s = blockIdx.x % queries, pairs = dim / 4, width = dim / 2;
    const i64 place = starts[b] + s;
    const i64 position = place < positions ? place : positions - 1;
    const int rotated = (heads + kv_heads) * pairs, all = rotated + kv_heads * width;
    qkv += (i64)blockIdx.x * (heads + 2 * kv_heads) * width;
    bool waited = false;
    for (int i = threadIdx.x; i < all || !waited; i += blockDim.x) {
        const int head = i / pairs, d = i % pairs;
        float2 cos, sin;
        if (i < rotated) {
            cos = cosines[position * pairs + d];
            sin = sines[position * pairs + d];
        }
        if (!waited) {
            wait_for_previous_kernel();
            let_next_kernel_start();  // attention's merge reads lengths at once: they are there by now
        }
        waited = true;
        if (i >= all || (head >= heads && place >= capacity)) continue;
        if (i >= rotated) {
            const int v = i - rotated;
            values[(((i64)b * kv_heads + v / width) * capacity + place) * width + v % width] =
                qkv[(heads + kv_heads) * width + v];
            continue;
        }
        const float2 a = widen(qkv[head * width + d]), c = widen(qkv[head * width + d + pairs]);
        cos = make_float2(round_once(cos.x), round_once(cos.y));
        sin = make_float2(round_once(sin.x), round_once(sin.y));
        u32* to = head < heads ? q + ((i64)blockIdx.x * heads + head) * width
                               : keys + (((i64)b * kv_heads + head - heads) * capacity + place) * width;
        to[d] = narrow(a.x * cos.x - c.x * sin.x, a.y * cos.y - c.y * sin.y);
        to[d + pairs] = narrow(c.x * cos.x + a.x * sin.x, c.y * cos.y + a.y * sin.y);
    }
}

// [batch, a, b, dim] to [batch, b, a, dim]; a block a row of `dim`.
extern "C" __global__ void swap(const u16* from, u16* to, int a, int b, int dim) {
    wait_for_previous_kernel();
    let_next_kernel_start();  // as in rotate
    const i64 row = blockIdx.x, batch = row / ((i64)a * b), i = row / b % a, j = row % b;
    const i64 target = (batch * b + j) * a + i;
    for (int d = threadIdx.x; d < dim; d += blockDim.x) to[target * dim + d] = from[row * dim + d];
}
