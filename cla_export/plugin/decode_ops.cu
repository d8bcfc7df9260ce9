// The products and small steps of a decoder around ClaAttention, for a few tokens at a time on a GPU.
//
// decode_ops.py specialises this source by macros:
//   BF16    1: bfloat16, 0: float16
//   TOKENS  tokens of a call of `linear`, 1 to 4
//
// At one token a product is a stream of its weight, so what counts is that memory never rests. Every kernel lets
// the next one start at once and waits for the one before it only when it needs its values; `linear` has the first
// rows of its weight on their way by then. RMSNorm is done by whoever reads its output, from the same few numbers,
// and the residual is added where a product is written, so neither costs a kernel.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr int WARPS = 8;
constexpr int CHUNK = 8;    // numbers of a 16-byte load
constexpr int AHEAD = 8;    // loads of a lane in flight

DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE float2 widen(u32 two) {
    float2 r;
#if BF16
    r.x = __uint_as_float(two << 16);
    r.y = __uint_as_float(two & 0xffff0000u);
#else
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(r.x), "=f"(r.y) : "r"(two));
#endif
    return r;
}

DEVICE float widen(u16 one) { return widen((u32)one).x; }

DEVICE u32 narrow(float low, float high) {
    u32 r;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}

DEVICE u16 narrow(float one) { return (u16)narrow(one, 0.0f); }

DEVICE float round_once(float x) { return widen(narrow(x)); }

DEVICE float sum_of_warp(float x) {
    UNROLL for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// The sum over the block's threads, known to all of them. `scratch` holds a number a warp.
DEVICE float sum_of_block(float x, float* scratch) {
    x = sum_of_warp(x);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) total += scratch[i];
    __syncthreads();
    return total;
}

DEVICE uint4 stream(const uint4* p) {  // read once: no place in L1
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}

DEVICE float dot(const uint4& w, const float* x, float sum) {
    const u32 parts[4] = {w.x, w.y, w.z, w.w};
    const float4 low = *(const float4*)x, high = *(const float4*)(x + 4);
    const float xs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    UNROLL for (int i = 0; i < 4; i++) {
        const float2 two = widen(parts[i]);
        sum = fmaf(two.x, xs[2 * i], sum);
        sum = fmaf(two.y, xs[2 * i + 1], sum);
    }
    return sum;
}

// One row of w against every token: sums of the whole warp. The first AHEAD chunks are there already.
DEVICE void multiply_row(const uint4* row, const uint4 (&first)[AHEAD], const float* x, int k, float (&sums)[TOKENS]) {
    const int lane = threadIdx.x & 31, chunks = k / CHUNK;
    UNROLL for (int t = 0; t < TOKENS; t++) sums[t] = 0;
    UNROLL for (int i = 0; i < AHEAD; i++) {
        const int c = lane + 32 * i;
        if (c < chunks) UNROLL for (int t = 0; t < TOKENS; t++) sums[t] = dot(first[i], x + t * k + c * CHUNK, sums[t]);
    }
    for (int base = 32 * AHEAD; base < chunks; base += 32 * AHEAD) {
        uint4 next[AHEAD];
        UNROLL for (int i = 0; i < AHEAD; i++) {
            const int c = base + lane + 32 * i;
            if (c < chunks) next[i] = stream(row + c);
        }
        UNROLL for (int i = 0; i < AHEAD; i++) {
            const int c = base + lane + 32 * i;
            if (c < chunks) UNROLL for (int t = 0; t < TOKENS; t++) sums[t] = dot(next[i], x + t * k + c * CHUNK, sums[t]);
        }
    }
    UNROLL for (int t = 0; t < TOKENS; t++) sums[t] = sum_of_warp(sums[t]);
}

DEVICE void load_first(const uint4* row, int k, uint4 (&first)[AHEAD]) {
    const int lane = threadIdx.x & 31, chunks = k / CHUNK;
    UNROLL for (int i = 0; i < AHEAD; i++) {
        const int c = lane + 32 * i;
        if (c < chunks) first[i] = stream(row + c);
    }
}

// y [tokens, n] = norm(x [tokens, k]) w [n, k]^T + residual; norm and residual may be null. Gated: w is [2n, k], and
// y is silu(first half) * second half.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
linear(const uint4* __restrict__ w, const u32* __restrict__ x, const u32* __restrict__ norm,
       const u16* __restrict__ residual, u16* __restrict__ y, int n, int k, int gated, float eps) {
    extern __shared__ __align__(16) float staged[];  // [TOKENS][k]
    __shared__ float scratch[WARPS];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, chunks = k / CHUNK;
    const int stride = gridDim.x * WARPS;
    int row = blockIdx.x * WARPS + warp;
    let_next_kernel_start();
    uint4 first[AHEAD];
    if (row < n) load_first(w + (i64)row * chunks, k, first);
    wait_for_previous_kernel();
    UNROLL for (int t = 0; t < TOKENS; t++) {
        float squares = 0;
        for (int i = threadIdx.x; i < k / 2; i += WARPS * 32) {
            const float2 two = widen(x[t * (k / 2) + i]);
            *(float2*)(staged + t * k + 2 * i) = two;
            squares += two.x * two.x + two.y * two.y;
        }
        if (norm) {
            const float factor = rsqrtf(sum_of_block(squares, scratch) / k + eps);
            for (int i = threadIdx.x; i < k / 2; i += WARPS * 32) {
                const float2 two = *(float2*)(staged + t * k + 2 * i), weight = widen(norm[i]);
                *(float2*)(staged + t * k + 2 * i) =
                    make_float2(round_once(two.x * factor * weight.x), round_once(two.y * factor * weight.y));
            }
        }
    }
    __syncthreads();
    for (; row < n; row += stride) {
        float sums[TOKENS];
        multiply_row(w + (i64)row * chunks, first, staged, k, sums);
        if (gated) {
            float ups[TOKENS];
            load_first(w + (i64)(n + row) * chunks, k, first);
            multiply_row(w + (i64)(n + row) * chunks, first, staged, k, ups);
            UNROLL for (int t = 0; t < TOKENS; t++) {
                const float gate = round_once(sums[t]);
                sums[t] = round_once(gate / (1.0f + __expf(-gate))) * round_once(ups[t]);
            }
        }
        if (row + stride < n) load_first(w + (i64)(row + stride) * chunks, k, first);
        UNROLL for (int t = 0; t < TOKENS; t++)
            if (lane == t) {
                float value = sums[t];
                if (residual) value = round_once(value) + widen(residual[(i64)t * n + row]);
                y[(i64)t * n + row] = narrow(value);
            }
    }
}

// y [tokens, k] = norm(x); a block a token, every thread with up to HELD chunks of it in registers.
constexpr int HELD = 4;
extern "C" __global__ void __launch_bounds__(WARPS * 32)
rms_norm(const uint4* __restrict__ x, const uint4* __restrict__ norm, uint4* __restrict__ y, int k, float eps) {
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

// y [tokens, n] = silu(both [tokens, :n]) * both [tokens, n:].
extern "C" __global__ void swiglu(const u32* __restrict__ both, u32* __restrict__ y, int n, int tokens) {
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
extern "C" __global__ void rotate(const u32* __restrict__ qkv, const float2* __restrict__ cosines,
                                  const float2* __restrict__ sines, const i64* __restrict__ starts,
                                  u32* __restrict__ q, u32* __restrict__ keys, u32* __restrict__ values, int heads,
                                  int kv_heads, int dim, int queries, int capacity, int positions) {
    let_next_kernel_start();
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
        if (!waited) wait_for_previous_kernel();
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
extern "C" __global__ void swap(const u16* __restrict__ from, u16* __restrict__ to, int a, int b, int dim) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const i64 row = blockIdx.x, batch = row / ((i64)a * b), i = row / b % a, j = row % b;
    const i64 target = (batch * b + j) * a + i;
    for (int d = threadIdx.x; d < dim; d += blockDim.x) to[target * dim + d] = from[row * dim + d];
}
