// A matrix product of a few tokens on tensor cores, for a GPU with clusters; follows decode_tile.cu, which has the
// macros, and of packed weights decode_packed.cu.
//
// Such a product is a stream of its weight, so what counts is that memory never rests. A cluster takes a tile of
// weight rows and its blocks a range of columns each: parts of equal size, all of which run at a time. A block has the
// first stages of its part on their way before it waits for the kernel in front of it, and it lets the one behind it
// start at once. (Nothing is __restrict__, so that reads of activations stay behind that wait.) Sums of a tile are
// added up across the cluster in a fixed order, through shared memory.

constexpr int MOST_BLOCKS = 8;  // of a cluster
#if BITS < 16 && TOKENS >= 32
#define BOUNDS __launch_bounds__(THREADS, 512 / THREADS)  // else wide tiles take registers that two have room for
#else
#define BOUNDS __launch_bounds__(THREADS)
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
// silu(first half) * second half. Packed, w has `scales` [rows, k / 32], and k is a multiple of 32; else it is one of 8.
// n is a multiple of 4. Grid: blocks of a cluster, tiles of rows.
extern "C" __global__ void BOUNDS
product(const unsigned char* w, const u16* scales, const u16* x, const u16* residual, u16* y, int tokens, int n, int k,
        int gated) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int blocks = gridDim.x, rank = blockIdx.x;
    const int made = gated ? ROWS / 2 : ROWS;  // rows of y that a tile makes
    const int first_row = blockIdx.y * made;
    const int chunks = (k + CHUNK - 1) / CHUNK;
    const int first_chunk = chunks * rank / blocks, last_chunk = chunks * (rank + 1) / blocks;
    const u32 ring = shared_address(shared);
    let_next_kernel_start();

    auto row_of = [&](int row) {  // of the weight; where there is none, the last
        const int up = row >= made, at = first_row + row - (up ? made : 0);
        return min(at, n - 1) + (up ? n : 0);
    };
    WeightCopies weights(w, first_chunk, k / 8 * BITS, row_of);
    ScaleCopies factors(scales, first_chunk, k, row_of);
    TokenCopies columns(x, first_chunk, k);
    UNROLL for (int i = 0; i < STAGES - 1; i++) {
        if (first_chunk + i >= last_chunk) break;
        weights.fetch(ring + i * STAGE_BYTES);
        factors.fetch(ring + i * STAGE_BYTES);
    }
    wait_for_previous_kernel();
    UNROLL for (int i = 0; i < STAGES - 1; i++) {
        if (first_chunk + i < last_chunk) columns.fetch(ring + i * STAGE_BYTES, tokens, k);
        commit_copies();
    }

    // The block will finish some tokens of its cluster's tile, four rows at a time; the first residual is fetched now.
    const int quads = made / 4, last_item = tokens * (rank + 1) / blocks * quads;
    const int first_item = tokens * rank / blocks * quads + threadIdx.x, first_quad = first_row + first_item % quads * 4;
    uint2 before = {};
    if (residual && first_item < last_item && first_quad < n)
        before = ((const uint2*)residual)[((i64)(first_item / quads) * n + first_quad) / 4];

    const Masks masks(tokens >> 31);
    float sums[SUMS] = {};
    constexpr u32 LAST_STAGE = (STAGES - 1) * STAGE_BYTES;
    u32 stage = ring;
    for (int chunk = first_chunk; chunk < last_chunk; chunk++) {
        wait_for_copies<STAGES - 2>();
        columns.arrange(stage);
        finish_stage(sums);
        __syncthreads();
        if (chunk + STAGES - 1 < last_chunk) {
            const u32 free = stage == ring ? ring + LAST_STAGE : stage - STAGE_BYTES;
            weights.fetch(free);
            factors.fetch(free);
            columns.fetch(free, tokens, k);
        }
        commit_copies();
        multiply_stage(sums, stage, k, masks);
        stage = stage == ring + LAST_STAGE ? ring : stage + STAGE_BYTES;
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
