// A matrix product of a few tokens on tensor cores, for a GPU with clusters; follows decode_numbers.cu.
//
// compile.py specialises this source by macros:
//   BF16    1: bfloat16, 0: float16
//   TOKENS  columns of a tile: 8, 16, 32, or for Hopper 64; a call has no more tokens than that
//   STAGES  depth of a block's ring
//
// Such a product is a stream of its weight, so what counts is that memory never rests. A cluster takes a tile of
// weight rows and its blocks a range of columns each: parts of equal size, all of which run at a time. A block has the
// first stages of its part on their way before it waits for the kernel in front of it, and it lets the one behind it
// start at once. (Nothing is __restrict__, so that reads of activations stay behind that wait.) Sums of a tile are
// added up across the cluster in a fixed order, through shared memory.

#define WARPGROUP (TOKENS == 64)
constexpr int ROWS = 64;                         // of a weight, in a tile
constexpr int CHUNK = 64;                        // columns of a stage
constexpr int ROW_WARPS = 4;                     // that share a tile's rows
constexpr int COLUMN_WARPS = WARPGROUP ? 1 : 2;  // that share a stage's columns
constexpr int THREADS = ROW_WARPS * COLUMN_WARPS * 32;
constexpr int PIECES = CHUNK / 8;                // of 16 bytes, in a row of a stage
constexpr int STEPS = CHUNK / 16 / COLUMN_WARPS; // of a multiplication, 16 columns each
constexpr int STAGE_BYTES = (ROWS + TOKENS) * CHUNK * 2;
constexpr int MOST_BLOCKS = 8;                   // of a cluster
constexpr int PITCH = ROWS + (WARPGROUP ? 8 : 4);  // floats of a token in the buffer of sums

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Where a piece of a row lies in a stage, so that 8 rows never meet in a bank.
DEVICE u32 place(int row, int piece) { return row * (CHUNK * 2) + ((piece ^ (row & 7)) << 4); }

DEVICE void copy_async(u32 to, const void* from, bool there) {  // zeros where it is not there
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

#if BF16
#define OPERAND "bf16"
#else
#define OPERAND "f16"
#endif

#if WARPGROUP
// The sums of a warp group: tokens are its 64 rows, rows of the weight its columns. Stages are read where they lie.
constexpr int SUMS = ROWS / 2;

DEVICE unsigned long long tile_at(u32 address) {  // rows of 128 bytes, swizzled, 8 of them every 1024
    return 1ull << 62 | 64ull << 32 | 1ull << 16 | (address & 0x3ffff) >> 4;
}

#define SUMS_8(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), \
                  "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])

DEVICE void multiply_stage(float (&s)[SUMS], u32 stage) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    UNROLL for (int i = 0; i < STEPS; i++)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERAND "." OPERAND " "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
                     : SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24)
                     : "l"(tile_at(stage + ROWS * CHUNK * 2 + i * 32)), "l"(tile_at(stage + i * 32)) : "memory");
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Before the barrier behind which a stage is multiplied, and the one before it is written again.
DEVICE void finish_stage(float (&s)[SUMS]) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;"
                 : SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24) :: "memory");
}

DEVICE void leave(const float (&s)[SUMS], float* buffer) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    UNROLL for (int i = 0; i < SUMS; i += 2) {
        const int token = warp * 16 + (i >> 1 & 1) * 8 + (lane >> 2), row = i / 4 * 8 + (lane & 3) * 2;
        *(float2*)(buffer + token * PITCH + row) = make_float2(s[i], s[i + 1]);
    }
}
#else
// The sums of a warp: tiles of 16 rows of the weight and 8 tokens.
constexpr int ROW_TILES = ROWS / 16 / ROW_WARPS, TOKEN_TILES = TOKENS / 8;
constexpr int SUMS = ROW_TILES * TOKEN_TILES * 4;

DEVICE void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

DEVICE void multiply(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." OPERAND "." OPERAND ".f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void multiply_stage(float (&sums)[SUMS], u32 stage) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    UNROLL for (int i = 0; i < STEPS; i++) {
        const int piece = (warp / ROW_WARPS * STEPS + i) * 2;  // the first of 16 columns
        u32 weights[ROW_TILES][4], columns[(TOKEN_TILES + 1) / 2][4];
        UNROLL for (int r = 0; r < ROW_TILES; r++) {
            const int row = (warp % ROW_WARPS * ROW_TILES + r) * 16 + (lane & 15);
            load_matrices(weights[r], stage + place(row, piece + (lane >> 4)));
        }
        UNROLL for (int t = 0; t < TOKEN_TILES; t += 2) {
            const int token = t * 8 + (TOKENS > 8 ? lane >> 4 : 0) * 8 + (lane & 7);
            load_matrices(columns[t / 2], stage + ROWS * CHUNK * 2 + place(token, piece + (lane >> 3 & 1)));
        }
        UNROLL for (int r = 0; r < ROW_TILES; r++)
            UNROLL for (int t = 0; t < TOKEN_TILES; t++)
                multiply(sums + (r * TOKEN_TILES + t) * 4, weights[r], columns[t / 2][t % 2 * 2],
                         columns[t / 2][t % 2 * 2 + 1]);
    }
}

DEVICE void finish_stage(float (&)[SUMS]) {}

DEVICE void leave(const float (&sums)[SUMS], float* buffer) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    buffer += warp / ROW_WARPS * TOKENS * PITCH;
    UNROLL for (int i = 0; i < SUMS; i++) {
        const int tile = i / 4 / TOKEN_TILES + warp % ROW_WARPS * ROW_TILES;
        const int row = tile * 16 + (i >> 1 & 1) * 8 + (lane >> 2);
        const int token = i / 4 % TOKEN_TILES * 8 + (lane & 3) * 2 + (i & 1);
        buffer[token * PITCH + row] = sums[i];
    }
}
#endif

#if __CUDA_ARCH__ >= 900
DEVICE void meet_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

DEVICE float4 load_from_block(u32 address, int rank) {
    u32 there;
    float4 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there));
    return v;
}
#else  // a cluster is a block
DEVICE void meet_cluster() { __syncthreads(); }
DEVICE float4 load_from_block(u32 address, int) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}
#endif

DEVICE float swiglu(float gate, float up) {
    gate = round_once(gate);
    return round_once(gate / (1.0f + __expf(-gate))) * round_once(up);
}

// y [tokens, n] = x [tokens, k] w [n, k]^T + residual, which may be null. Gated: w is [2n, k], and y is
// silu(first half) * second half. k is a multiple of 8, n of 4. Grid: blocks of a cluster, tiles of rows.
extern "C" __global__ void __launch_bounds__(THREADS)
product(const u16* w, const u16* x, const u16* residual, u16* y, int tokens, int n, int k, int gated) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int blocks = gridDim.x, rank = blockIdx.x;
    const int made = gated ? ROWS / 2 : ROWS;  // rows of y that a tile makes
    const int first_row = blockIdx.y * made;
    const int chunks = (k + CHUNK - 1) / CHUNK;
    const int first_chunk = chunks * rank / blocks, last_chunk = chunks * (rank + 1) / blocks;
    const u32 ring = shared_address(shared);
    let_next_kernel_start();

    const int piece = threadIdx.x % PIECES, row_of_thread = threadIdx.x / PIECES;
    constexpr int ROWS_AT_ONCE = THREADS / PIECES;
    auto fetch_weight = [&](int chunk) {
        if (chunk >= last_chunk) return;
        const u32 to = ring + (chunk - first_chunk) % STAGES * STAGE_BYTES;
        const int column = chunk * CHUNK + piece * 8;
        UNROLL for (int i = 0; i < ROWS / ROWS_AT_ONCE; i++) {
            const int row = i * ROWS_AT_ONCE + row_of_thread;
            const int up = row >= made, at = first_row + row - (up ? made : 0);
            const bool there = at < n && column < k;
            copy_async(to + place(row, piece), w + (there ? (i64)(at + (up ? n : 0)) * k + column : 0), there);
        }
    };
    auto fetch_tokens = [&](int chunk) {
        if (chunk >= last_chunk) return;
        const u32 to = ring + (chunk - first_chunk) % STAGES * STAGE_BYTES + ROWS * CHUNK * 2;
        const int column = chunk * CHUNK + piece * 8;
        UNROLL for (int i = 0; i < (TOKENS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; i++) {
            const int token = i * ROWS_AT_ONCE + row_of_thread;
            if (TOKENS % ROWS_AT_ONCE && token >= TOKENS) break;
            const bool there = token < tokens && column < k;
            copy_async(to + place(token, piece), x + (there ? (i64)token * k + column : 0), there);
        }
    };
    UNROLL for (int i = 0; i < STAGES - 1; i++) fetch_weight(first_chunk + i);
    wait_for_previous_kernel();
    UNROLL for (int i = 0; i < STAGES - 1; i++) {
        fetch_tokens(first_chunk + i);
        commit_copies();
    }

    // The block will finish some tokens of its cluster's tile, four rows at a time; the first residual is fetched now.
    const int quads = made / 4, last_item = tokens * (rank + 1) / blocks * quads;
    const int first_item = tokens * rank / blocks * quads + threadIdx.x, first_quad = first_row + first_item % quads * 4;
    uint2 before = {};
    if (residual && first_item < last_item && first_quad < n)
        before = ((const uint2*)residual)[((i64)(first_item / quads) * n + first_quad) / 4];

    float sums[SUMS] = {};
    for (int chunk = first_chunk; chunk < last_chunk; chunk++) {
        wait_for_copies<STAGES - 2>();
        finish_stage(sums);
        __syncthreads();
        fetch_weight(chunk + STAGES - 1);
        fetch_tokens(chunk + STAGES - 1);
        commit_copies();
        multiply_stage(sums, ring + (chunk - first_chunk) % STAGES * STAGE_BYTES);
    }
    wait_for_copies<0>();
    finish_stage(sums);
    __syncthreads();
    static_assert(COLUMN_WARPS * TOKENS * PITCH * 4 <= STAGES * STAGE_BYTES, "the ring is the buffer of sums too");
    leave(sums, (float*)shared);  // [COLUMN_WARPS][TOKENS][PITCH]
    meet_cluster();
    auto sum_up = [&](int token, int row) {
        const u32 at = ring + (token * PITCH + row) * 4;
        float4 parts[MOST_BLOCKS][COLUMN_WARPS], sum = {};
        UNROLL for (int r = 0; r < MOST_BLOCKS; r++)
            UNROLL for (int c = 0; c < COLUMN_WARPS; c++)
                if (r < blocks) parts[r][c] = load_from_block(at + c * TOKENS * PITCH * 4, r);
        UNROLL for (int r = 0; r < MOST_BLOCKS; r++)
            UNROLL for (int c = 0; c < COLUMN_WARPS; c++)
                if (r < blocks) {
                    sum.x += parts[r][c].x, sum.y += parts[r][c].y;
                    sum.z += parts[r][c].z, sum.w += parts[r][c].w;
                }
        return sum;
    };
    for (int item = first_item; item < last_item; item += THREADS) {
        const int token = item / quads, local = item % quads * 4, row = first_row + local;
        if (row >= n) continue;
        const i64 at = ((i64)token * n + row) / 4;
        if (residual && item != first_item) before = ((const uint2*)residual)[at];
        float4 value = sum_up(token, local);
        if (gated) {
            const float4 up = sum_up(token, made + local);
            value.x = swiglu(value.x, up.x), value.y = swiglu(value.y, up.y);
            value.z = swiglu(value.z, up.z), value.w = swiglu(value.w, up.w);
        }
        if (residual) {
            const float2 low = widen(before.x), high = widen(before.y);
            value.x = round_once(value.x) + low.x, value.y = round_once(value.y) + low.y;
            value.z = round_once(value.z) + high.x, value.w = round_once(value.w) + high.y;
        }
        ((uint2*)y)[at] = make_uint2(narrow(value.x, value.y), narrow(value.z, value.w));
    }
    meet_cluster();  // no block leaves while another reads its memory
}
