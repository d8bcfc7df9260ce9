// ClaAttention: attention over a key/value cache that it only reads. See contract.py for what it computes. Follows
// common.cu.
//
// compile.py specialises this source by macros:
//   HEAD_DIM  elements of a head, even, at most 512
//   BF16      1: bfloat16, 0: float16
//   SOFTCAP   1: scores go through cap * tanh(score / cap)
//   CHUNK     1: more than one query position a call, so masks differ from row to row
//   WARPS, STAGES, CLUSTER   warps a block, depth of each warp's ring, blocks that merge through shared memory
//   SHARED_KEYS  1: a block's warps have a tile of rows each and one ring together (long chunks; CLUSTER is 1)
//
// The query rows of one kv head (its query heads, times the positions of a chunk) fill tiles of 16 rows, the M
// dimension of mma.m16n8k16. A work item is one tile of rows against one share of its keys, done by one cluster:
// each warp streams 16 keys at a time through a ring of its own, so no barrier stands in the loop. Items come from
// the lengths, read on the device: long rows are split into more of them. An item that covers its row writes y;
// otherwise partial sums go to a workspace and cla_attention_merge adds them in a fixed order.

#define ROLLED _Pragma("unroll 1")

constexpr int KEYS = 16;  // of a tile
constexpr int ROWS = 16;
constexpr int UNIT = 64;  // keys; shares of long rows are counted in these
constexpr int THREADS = WARPS * 32;
constexpr int MERGE_WARPS = 8;
constexpr int ORDERS = 16;  // lengths that an ordered launch tells apart

constexpr DEVICE int round_up(int x, int to) { return (x + to - 1) / to * to; }
constexpr int PADDED = round_up(HEAD_DIM, 16);
// The accumulators of more than 256 columns do not fit the registers: such values are done in slices.
constexpr int SLICES = PADDED <= 256 ? 1 : (PADDED + 191) / 192;
constexpr int COLUMNS = round_up((PADDED + SLICES - 1) / SLICES, 16);
constexpr int GRANULE = HEAD_DIM % 8 == 0 ? 16 : HEAD_DIM % 4 == 0 ? 8 : 4;  // bytes a copy moves
constexpr bool QUERY_IN_REGISTERS = PADDED <= 128;
constexpr int PACK = SHARED_KEYS ? 4 : 1;  // key tiles of a stage
constexpr int RINGS = SHARED_KEYS ? 1 : WARPS;
constexpr int BLOCK_ROWS = SHARED_KEYS ? WARPS * ROWS : ROWS;
constexpr int SCRATCH = COLUMNS + 4;  // floats of a row in the merge's buffer

// A tile in shared memory: rows of 16-byte chunks, placed so that 8 rows never meet in a bank.
template <int WIDTH, int COPIES>  // COPIES: of a row, GRANULE bytes each
struct Tile {
    static constexpr int PER_ROW = COPIES;
    static constexpr bool SWIZZLED = WIDTH % 64 == 0;
    static constexpr int PITCH = WIDTH * 2 + (SWIZZLED ? 0 : 16);
    static constexpr int BYTES = 16 * PITCH;
    DEVICE static u32 chunk(int row, int index) {
        return row * PITCH + ((SWIZZLED ? index ^ (row & 7) : index) << 4);
    }
};
using KeyTile = Tile<PADDED, HEAD_DIM * 2 / GRANULE>;
using ValueTile = Tile<COLUMNS, (SLICES == 1 ? HEAD_DIM : COLUMNS) * 2 / GRANULE>;
constexpr int STAGE_BYTES = KeyTile::BYTES + ValueTile::BYTES;
constexpr int RING_BYTES = STAGES * PACK * STAGE_BYTES;
static_assert(RING_BYTES >= ROWS * SCRATCH * 4, "a ring is the merge's buffer too");
static_assert(!SHARED_KEYS || (CHUNK && CLUSTER == 1 && QUERY_IN_REGISTERS), "shared keys are for chunks");
static_assert(HEAD_DIM % 2 == 0 && HEAD_DIM <= 512, "head dim");

DEVICE void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Copies GRANULE bytes, or writes zeros where `bytes` is 0.
DEVICE void copy_granule_async(u32 to, const void* from, int bytes) {
    if constexpr (GRANULE == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(to), "l"(from), "n"(GRANULE), "r"(bytes) : "memory");
}

#if CLUSTER > 1
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

DEVICE float2 load_from_block(u32 address, int rank) {
    u32 there;
    float2 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
    return v;
}
#endif

// Queues a warp's copy of 16 rows of a cache, `width` bytes of each; rows from `limit` on become zeros.
template <class Layout>
DEVICE void copy_tile(u32 to, const char* from, int width, int limit) {
    constexpr int PER_ROW = Layout::PER_ROW, COPIES = KEYS * PER_ROW;
    const int lane = threadIdx.x & 31;
    auto copy = [&](int i, bool full) {
        const int index = i * 32 + lane;
        const int key = 32 % PER_ROW == 0 ? i * (32 / PER_ROW) + lane / PER_ROW : index / PER_ROW;
        const int at = (32 % PER_ROW == 0 ? lane : index) % PER_ROW * GRANULE;
        if ((COPIES % 32 && index >= COPIES) || at >= width) return;
        const u32 there = to + Layout::chunk(key, at >> 4) + (at & 15);
        const bool valid = full || key < limit;
        copy_granule_async(there, from + (valid ? key : 0) * (HEAD_DIM * 2) + at, valid ? GRANULE : 0);
    };
    if (limit >= KEYS)
        UNROLL for (int i = 0; i < (COPIES + 31) / 32; i++) copy(i, true);
    else
        ROLLED for (int i = 0; i < (COPIES + 31) / 32; i++) copy(i, false);
}

struct Problem {
    const int* lengths;
    int batch, kv_heads, group, queries, capacity;  // group: query heads of a kv head
    int window;                                     // 0: none
    int extra;  // items that the lengths share out, beyond one for each row of the batch
    int ordered;  // 1, without extra items: long rows go first, so that short ones fill the gaps at the end

    DEVICE int rows() const { return CHUNK ? group * queries : group; }
    DEVICE int query(int row) const { return CHUNK ? row / group : 0; }
    DEVICE int head(int row) const { return CHUNK ? row % group : row; }
    DEVICE int length(int b) const { return min(max(lengths[b], 0), capacity); }

    DEVICE u32 units(int b) const {  // what a batch row weighs
        if (b >= batch) return 0;
        int end = length(b), begin = window > 0 ? max(end - queries - window + 1, 0) : 0;
        return max((end - begin + UNIT - 1) / UNIT, 1);
    }

    // Shares of a row of `n` units: at least one, at most one for every key tile of each warp. Together they are no
    // more than batch + extra.
    DEVICE u32 splits(u32 n, u32 total) const {
        constexpr u32 LEAST = CLUSTER * WARPS * KEYS > UNIT ? CLUSTER * WARPS * KEYS / UNIT : 1;
        return n ? min(1 + extra * n / total, max(n / LEAST, 1u)) : 0;
    }
};

struct Share {
    int batch, splits;
    int first;  // item that has the first share of the batch row
};

// The searches below are done by every warp alone, each lane with a batch row of its own.

// The batch row that has item `item` (BY_ROW: that is row `item`), where rows are split; batch < 0: none.
template <bool BY_ROW>
DEVICE Share find_share(const Problem& p, int item) {
    const int lane = threadIdx.x & 31;
    u32 total = 0;
    for (int b = lane; b < p.batch; b += 32) total += p.units(b);
    UNROLL for (int i = 16; i; i >>= 1) total += __shfl_xor_sync(~0u, total, i);
    int before = 0;
    for (int base = 0; base < p.batch; base += 32) {
        const int splits = p.splits(p.units(base + lane), total);
        int through = splits;
        UNROLL for (int i = 1; i < 32; i <<= 1) {
            int other = __shfl_up_sync(~0u, through, i);
            if (lane >= i) through += other;
        }
        const u32 found = __ballot_sync(~0u, BY_ROW ? base + lane == item : item < before + through);
        if (found) {
            const int at = __ffs(found) - 1;
            const int first = __shfl_sync(~0u, before + through - splits, at);
            return {base + at, __shfl_sync(~0u, splits, at), first};
        }
        before += __shfl_sync(~0u, through, 31);
    }
    return {-1, 1, 0};
}

// The batch row that comes at place `item` when rows are sorted by length, roughly, the longest first.
DEVICE int find_ordered(const Problem& p, int item) {
    const int lane = threadIdx.x & 31;
    u32 most = 1;
    for (int b = lane; b < p.batch; b += 32) most = max(most, p.units(b));
    UNROLL for (int i = 16; i; i >>= 1) most = max(most, __shfl_xor_sync(~0u, most, i));
    const float scale = ORDERS / (most + 1.0f);
    int before = 0;
    for (int order = ORDERS - 1; order >= 0; order--)
        for (int base = 0; base < p.batch; base += 32) {
            const u32 n = p.units(base + lane);
            const bool here = n && (int)(n * scale) == order;
            const u32 rows = __ballot_sync(~0u, here);
            const int place = before + __popc(rows & ((1u << lane) - 1));
            const u32 found = __ballot_sync(~0u, here && place == item);
            if (found) return base + __ffs(found) - 1;
            before += __popc(rows);
        }
    return -1;
}

// What a lane of work covers: a tile of rows of one kv head, and a slice of the value's columns.
struct Place {
    int head, first_row, slice;
};

DEVICE Place place_of(u32 head, u32 lane, u32 lanes) {
    const u32 slice = lane % SLICES, tile = lane / SLICES;
    return {(int)head, (int)(lanes / SLICES - 1 - tile) * BLOCK_ROWS, (int)slice};  // a chunk's longest first
}

// Two neighbouring columns of y, rounded; columns beyond the head are padding.
DEVICE void store_pair(void* y, const Problem& p, int b, const Place& at, int row, int column, float low, float high) {
    column += at.slice * COLUMNS;
    if (column >= HEAD_DIM) return;
    row += at.first_row;
    const i64 head = ((i64)b * p.kv_heads + at.head) * p.group + p.head(row);
    ((u32*)y)[((head * p.queries + p.query(row)) * HEAD_DIM + column) / 2] = narrow(low, high);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
cla_attention(const u32* q, const char* keys, const char* values, const int* __restrict__ lengths, void* y,
              float* partial, float2* partial_sums, int batch, int kv_heads, int group, int queries, int capacity,
              int window, int extra, int ordered, float scale, float softcap) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float2 warp_sums[WARPS][ROWS];   // maximum (in powers of two), sum
    __shared__ float warp_weights[WARPS][ROWS];
    __shared__ float2 block_sums[ROWS];

    const Problem p{lengths, batch, kv_heads, group, queries, capacity, window, extra, ordered};
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int rank = blockIdx.x % CLUSTER, item = blockIdx.z;
    let_next_kernel_start();
    wait_for_previous_kernel();
    const Share share = extra ? find_share<false>(p, item) : Share{ordered ? find_ordered(p, item) : item, 1, item};
    if (share.batch < 0) return;
    const int b = share.batch;
    Place place = place_of(blockIdx.x / CLUSTER, blockIdx.y, gridDim.y);
    const i64 slot = (i64)(place.head * gridDim.y + blockIdx.y) * (batch + extra) + item;

    // Keys [begin, end) are seen by some row of the block.
    const int before = p.length(b) - queries;  // position of the first query
    const int block_rows = min(p.rows() - place.first_row, BLOCK_ROWS);
    const int end = max(before + p.query(place.first_row + block_rows - 1) + 1, 0);
    const int begin = window > 0 ? max(before + p.query(place.first_row) - window + 1, 0) : 0;
    if (SHARED_KEYS) place.first_row += warp * ROWS;
    const int rows = min(p.rows() - place.first_row, ROWS);  // of the warp, or none
    const int oldest = before + p.query(place.first_row), newest = before + p.query(place.first_row + rows - 1);
    const u32 tiles = end > begin ? (u32)(end - begin + KEYS - 1) / KEYS : 0;
    const bool whole = share.splits == 1;
    const u32 parts = share.splits * CLUSTER, part = (item - share.first) * CLUSTER + rank;
    const u32 each = whole ? tiles / CLUSTER : tiles / parts, rest = tiles - each * parts;
    const int first_tile = each * part + min(part, rest), last_tile = first_tile + each + (part < rest);

    const i64 cache = (((i64)b * kv_heads + place.head) * capacity + begin) * (HEAD_DIM * 2);
    const char* key_rows = keys + cache;
    const char* value_rows = values + cache + place.slice * COLUMNS * 2;
    const u32 ring = shared_address(shared) + (SHARED_KEYS ? 0 : warp * RING_BYTES);
    const int width = SLICES == 1 ? HEAD_DIM * 2 : (HEAD_DIM - place.slice * COLUMNS) * 2;  // bytes of a value

    auto fetch_tile = [&](int tile, u32 to, bool want_keys, bool want_values) {
        if (tile >= last_tile) return;
        const i64 offset = (i64)tile * (KEYS * HEAD_DIM * 2);
        const int limit = end - begin - tile * KEYS;
        if (want_keys) copy_tile<KeyTile>(to, key_rows + offset, HEAD_DIM * 2, limit);
        if (want_values) copy_tile<ValueTile>(to + KeyTile::BYTES, value_rows + offset, width, limit);
    };
    auto fetch = [&](int step) {
        const u32 stage = ring + step % STAGES * (PACK * STAGE_BYTES);
        if (SHARED_KEYS)  // each warp copies its part
            for (int i = warp; i < PACK * 2; i += WARPS)
                fetch_tile(first_tile + step * PACK + i % PACK, stage + i % PACK * STAGE_BYTES, i < PACK, i >= PACK);
        else
            fetch_tile(first_tile + warp + step * WARPS, stage, true, true);
        commit_copies();
    };

    if constexpr (HEAD_DIM < PADDED) {  // padding of a key meets a zero of the query: it must be a number
        constexpr int WORDS = PADDED > HEAD_DIM ? (PADDED - HEAD_DIM) / 2 : 1;
        for (int i = threadIdx.x; i < RINGS * STAGES * PACK * KEYS * WORDS; i += THREADS) {
            const int tile = i / (KEYS * WORDS), key = i / WORDS % KEYS, at = HEAD_DIM * 2 + i % WORDS * 4;
            *(u32*)(shared + tile * STAGE_BYTES + KeyTile::chunk(key, at >> 4) + (at & 15)) = 0;
        }
        __syncthreads();
    }
    UNROLL for (int i = 0; i < STAGES - 1; i++) fetch(i);

    // The query, as the mma's A operand: lane / 4 is the row, and 8 more.
    const int row_low = lane >> 2, row_high = row_low + 8;
    auto query_words = [&](int row) {
        row = min(row, rows - 1) + place.first_row;
        const i64 head = ((i64)b * kv_heads + place.head) * group + p.head(row);
        return q + (head * queries + p.query(row)) * (HEAD_DIM / 2);
    };
    constexpr int STEPS = PADDED / 16;
    u32 query[QUERY_IN_REGISTERS ? STEPS : 1][4];
    const u32 query_tile = shared_address(shared) + RINGS * RING_BYTES;
    if constexpr (QUERY_IN_REGISTERS) {
        const u32 *low = query_words(row_low), *high = query_words(row_high);
        UNROLL for (int k = 0; k < STEPS; k++)
            UNROLL for (int half = 0; half < 2; half++) {
                const int word = k * 8 + half * 4 + (lane & 3);
                const bool inside = PADDED == HEAD_DIM || word < HEAD_DIM / 2;
                query[k][half * 2] = inside && row_low < rows ? low[word] : 0;
                query[k][half * 2 + 1] = inside && row_high < rows ? high[word] : 0;
            }
    } else {
        for (int i = threadIdx.x; i < ROWS * PADDED / 2; i += THREADS) {
            const int row = i / (PADDED / 2), word = i % (PADDED / 2);
            const u32 pair = row < rows && word < HEAD_DIM / 2 ? query_words(row)[word] : 0;
            *(u32*)(shared + RINGS * RING_BYTES + KeyTile::chunk(row, word >> 2) + (word & 3) * 4) = pair;
        }
        __syncthreads();
    }
    const int position_low = before + p.query(place.first_row + row_low);
    const int position_high = before + p.query(place.first_row + row_high);

    constexpr int PANELS = COLUMNS / 16;            // of the output
    constexpr int BATCH = PADDED <= 128 ? 8 : 4;  // fragments loaded together
    constexpr float LOG2E = 1.4426950408889634f;
    const float to_scores = SOFTCAP ? 2 * LOG2E * scale / softcap : LOG2E * scale, cap = softcap * LOG2E;
    float out[PANELS * 2][4];
    UNROLL for (int i = 0; i < PANELS * 2; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0;
    float max_low = -1e30f, max_high = -1e30f, sum_low = 0, sum_high = 0;
    const int matrix = lane >> 3, matrix_row = lane & 7;

    auto attend = [&](u32 key_tile, int first_key) {
        const u32 value_tile = key_tile + KeyTile::BYTES;

        // scores = query . keys: two halves of 8 keys, each summed in two chains
        float sums[2][2][4] = {};
        UNROLL for (int k0 = 0; k0 < STEPS; k0 += BATCH) {
            u32 fragments[BATCH][4], rows_of_query[BATCH][4];
            UNROLL for (int k = 0; k < BATCH; k++)
                if (k0 + k < STEPS) {
                    const int key = (matrix >> 1) * 8 + matrix_row;
                    load_matrices(fragments[k], key_tile + KeyTile::chunk(key, (k0 + k) * 2 + (matrix & 1)));
                    if constexpr (!QUERY_IN_REGISTERS) {
                        const int row = (matrix & 1) * 8 + matrix_row;
                        load_matrices(rows_of_query[k], query_tile + KeyTile::chunk(row, (k0 + k) * 2 + (matrix >> 1)));
                    }
                }
            UNROLL for (int k = 0; k < BATCH; k++)
                if (k0 + k < STEPS)
                    UNROLL for (int half = 0; half < 2; half++) {
                        const u32 low = fragments[k][half * 2], high = fragments[k][half * 2 + 1];
                        if constexpr (QUERY_IN_REGISTERS)
                            multiply(sums[k & 1][half], query[k0 + k], low, high);
                        else
                            multiply(sums[k & 1][half], rows_of_query[k], low, high);
                    }
        }
        u32 fragments[BATCH][4];
        auto load_values = [&](int panel0) {
            UNROLL for (int j = 0; j < BATCH; j++)
                if (panel0 + j < PANELS) {
                    const int key = (matrix & 1) * 8 + matrix_row;
                    load_matrices_transposed(fragments[j],
                                             value_tile + ValueTile::chunk(key, (panel0 + j) * 2 + (matrix >> 1)));
                }
        };
        load_values(0);

        float score[2][4];
        UNROLL for (int half = 0; half < 2; half++)
            UNROLL for (int i = 0; i < 4; i++) {
                float x = (sums[0][half][i] + sums[1][half][i]) * to_scores;
                if (SOFTCAP) x = cap - 2 * cap * reciprocal(1 + exp2_fast(x));
                score[half][i] = x;
            }
        if (CHUNK ? first_key + KEYS - 1 > oldest || (window > 0 && first_key <= newest - window)
                  : first_key + KEYS > end)
            UNROLL for (int half = 0; half < 2; half++)
                UNROLL for (int i = 0; i < 4; i++) {
                    const int key = first_key + half * 8 + (lane & 3) * 2 + (i & 1);
                    const int position = CHUNK ? (i < 2 ? position_low : position_high) : end - 1;
                    if (key > position || (CHUNK && window > 0 && key <= position - window))
                        score[half][i] = -__int_as_float(0x7f800000);
                }

        // running maximum and sum, in powers of two
        float top_low = fmaxf(fmaxf(score[0][0], score[0][1]), fmaxf(score[1][0], score[1][1]));
        float top_high = fmaxf(fmaxf(score[0][2], score[0][3]), fmaxf(score[1][2], score[1][3]));
        UNROLL for (int i = 1; i < 4; i <<= 1) {
            top_low = fmaxf(top_low, __shfl_xor_sync(~0u, top_low, i));
            top_high = fmaxf(top_high, __shfl_xor_sync(~0u, top_high, i));
        }
        if (__any_sync(~0u, top_low > max_low || top_high > max_high)) {
            const float new_low = fmaxf(max_low, top_low), new_high = fmaxf(max_high, top_high);
            const float shrink_low = exp2_fast(max_low - new_low), shrink_high = exp2_fast(max_high - new_high);
            max_low = new_low, max_high = new_high;
            sum_low *= shrink_low, sum_high *= shrink_high;
            UNROLL for (int i = 0; i < PANELS * 2; i++) {
                out[i][0] *= shrink_low, out[i][1] *= shrink_low;
                out[i][2] *= shrink_high, out[i][3] *= shrink_high;
            }
        }
        UNROLL for (int half = 0; half < 2; half++)
            UNROLL for (int i = 0; i < 4; i++)
                score[half][i] = exp2_fast(score[half][i] - (i < 2 ? max_low : max_high));
        sum_low += score[0][0] + score[0][1] + score[1][0] + score[1][1];
        sum_high += score[0][2] + score[0][3] + score[1][2] + score[1][3];
        const u32 weights[4] = {narrow(score[0][0], score[0][1]), narrow(score[0][2], score[0][3]),
                                narrow(score[1][0], score[1][1]), narrow(score[1][2], score[1][3])};
        UNROLL for (int panel0 = 0; panel0 < PANELS; panel0 += BATCH) {
            if (panel0) load_values(panel0);
            UNROLL for (int j = 0; j < BATCH; j++)
                if (panel0 + j < PANELS) {
                    multiply(out[(panel0 + j) * 2], weights, fragments[j][0], fragments[j][1]);
                    multiply(out[(panel0 + j) * 2 + 1], weights, fragments[j][2], fragments[j][3]);
                }
        }
    };

    if constexpr (SHARED_KEYS) {
        for (int step = 0; first_tile + step * PACK < last_tile; step++) {
            wait_for_copies<STAGES - 2>();
            __syncthreads();
            fetch(step + STAGES - 1);
            ROLLED for (int i = 0; i < PACK; i++) {
                const int first_key = begin + (first_tile + step * PACK + i) * KEYS;
                const bool seen = first_key <= newest && (window == 0 || first_key + KEYS > oldest - window + 1);
                if (rows > 0 && seen) attend(ring + (step % STAGES * PACK + i) * STAGE_BYTES, first_key);
            }
        }
    } else {
        for (int step = 0; first_tile + warp + step * WARPS < last_tile; step++) {
            wait_for_copies<STAGES - 2>();
            __syncwarp();
            fetch(step + STAGES - 1);
            attend(ring + step % STAGES * STAGE_BYTES, begin + (first_tile + warp + step * WARPS) * KEYS);
        }
    }
    wait_for_copies<0>();
    __syncwarp();

    UNROLL for (int i = 1; i < 4; i <<= 1) {
        sum_low += __shfl_xor_sync(~0u, sum_low, i);
        sum_high += __shfl_xor_sync(~0u, sum_high, i);
    }
    if constexpr (SHARED_KEYS) {  // a warp's rows are its own
        const float norm_low = sum_low > 0 ? reciprocal(sum_low) : 0;
        const float norm_high = sum_high > 0 ? reciprocal(sum_high) : 0;
        UNROLL for (int i = 0; i < PANELS * 2; i++) {
            const int column = i * 8 + (lane & 3) * 2;
            if (row_low < rows)
                store_pair(y, p, b, place, row_low, column, out[i][0] * norm_low, out[i][1] * norm_low);
            if (row_high < rows)
                store_pair(y, p, b, place, row_high, column, out[i][2] * norm_high, out[i][3] * norm_high);
        }
        return;
    }

    // Merge the warps: each leaves its rows in its own ring.
    if ((lane & 3) == 0) {
        warp_sums[warp][row_low] = make_float2(max_low, sum_low);
        warp_sums[warp][row_high] = make_float2(max_high, sum_high);
    }
    float* buffer = (float*)(shared + warp * RING_BYTES);
    UNROLL for (int i = 0; i < PANELS * 2; i++) {
        const int column = i * 8 + (lane & 3) * 2;
        if (row_low < rows) *(float2*)(buffer + row_low * SCRATCH + column) = make_float2(out[i][0], out[i][1]);
        if (row_high < rows) *(float2*)(buffer + row_high * SCRATCH + column) = make_float2(out[i][2], out[i][3]);
    }
    __syncthreads();
    if (threadIdx.x < ROWS) {
        const int row = threadIdx.x;
        float top = -1e30f, sum = 0, weight[WARPS];
        UNROLL for (int i = 0; i < WARPS; i++) top = fmaxf(top, warp_sums[i][row].x);
        UNROLL for (int i = 0; i < WARPS; i++) {
            weight[i] = exp2_fast(warp_sums[i][row].x - top);
            sum += weight[i] * warp_sums[i][row].y;
        }
        const float norm = CLUSTER == 1 && whole ? (sum > 0 ? reciprocal(sum) : 0) : 1;
        UNROLL for (int i = 0; i < WARPS; i++) warp_weights[i][row] = weight[i] * norm;
        block_sums[row] = make_float2(top, sum);
        if (CLUSTER == 1 && !whole) partial_sums[slot * ROWS + row] = block_sums[row];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (COLUMNS / 4); i += THREADS) {
        const int row = i / (COLUMNS / 4), column = i % (COLUMNS / 4) * 4;
        float4 sum = {};
        UNROLL for (int w = 0; w < WARPS; w++) {
            const float4 x = *(float4*)((float*)(shared + w * RING_BYTES) + row * SCRATCH + column);
            const float weight = warp_weights[w][row];
            sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
        }
        if (CLUSTER > 1) {
            *(float4*)((float*)shared + row * SCRATCH + column) = sum;
        } else if (whole) {
            store_pair(y, p, b, place, row, column, sum.x, sum.y);
            store_pair(y, p, b, place, row, column + 2, sum.z, sum.w);
        } else {
            *(float4*)(partial + (slot * ROWS + row) * COLUMNS + column) = sum;
        }
    }
#if CLUSTER > 1
    // Merge the blocks: each takes a part of the elements, and reads it from all of them.
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    for (int i = rank * THREADS + threadIdx.x; i < rows * (COLUMNS / 2); i += CLUSTER * THREADS) {
        const int row = i / (COLUMNS / 2), column = i % (COLUMNS / 2) * 2;
        float2 sums[CLUSTER], parts[CLUSTER], total = {};
        UNROLL for (int r = 0; r < CLUSTER; r++) {
            sums[r] = load_from_block(shared_address(block_sums + row), r);
            parts[r] = load_from_block(shared_address((float*)shared + row * SCRATCH + column), r);
        }
        float top = -1e30f, sum = 0;
        UNROLL for (int r = 0; r < CLUSTER; r++) top = fmaxf(top, sums[r].x);
        UNROLL for (int r = 0; r < CLUSTER; r++) {
            const float weight = exp2_fast(sums[r].x - top);
            sum += weight * sums[r].y;
            total.x += weight * parts[r].x, total.y += weight * parts[r].y;
        }
        if (whole) {
            const float norm = sum > 0 ? reciprocal(sum) : 0;
            store_pair(y, p, b, place, row, column, total.x * norm, total.y * norm);
        } else {
            *(float2*)(partial + (slot * ROWS + row) * COLUMNS + column) = total;
            if (column == 0) partial_sums[slot * ROWS + row] = make_float2(top, sum);
        }
    }
    __syncwarp();
    cluster_arrive();  // no block leaves while another reads its memory
    cluster_wait();
#endif
}

// Adds the shares of split rows, in their order: a block goes through some rows of one lane of work.
extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32, 1)
cla_attention_merge(const int* __restrict__ lengths, void* y, const float* partial, const float2* partial_sums,
                    int batch, int kv_heads, int group, int queries, int capacity, int window, int extra) {
    __shared__ float4 sums_of_warp[MERGE_WARPS][COLUMNS / 4];
    __shared__ float sum_of_warp[MERGE_WARPS];
    const Problem p{lengths, batch, kv_heads, group, queries, capacity, window, extra, 0};
    const int b = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const Share share = find_share<true>(p, b);
    const u32 lanes = gridDim.z / kv_heads;
    const Place place = place_of(blockIdx.z / lanes, blockIdx.z % lanes, lanes);
    let_next_kernel_start();
    wait_for_previous_kernel();  // every block: this kernel must not end before that one
    if (share.splits == 1) return;

    const i64 first = (i64)blockIdx.z * (batch + extra) + share.first;
    for (int row = blockIdx.y; row < ROWS && place.first_row + row < p.rows(); row += gridDim.y) {
        float top = -1e30f;
        for (int i = lane; i < share.splits; i += 32) top = fmaxf(top, partial_sums[(first + i) * ROWS + row].x);
        UNROLL for (int i = 16; i; i >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));

        constexpr int QUADS = (COLUMNS / 4 + 31) / 32;  // columns of a lane, in fours
        float4 total[QUADS] = {};
        float sum = 0;
        _Pragma("unroll 4") for (int i = warp; i < share.splits; i += MERGE_WARPS) {
            const float2 one = partial_sums[(first + i) * ROWS + row];
            const float weight = exp2_fast(one.x - top);
            sum += weight * one.y;
            const float4* from = (const float4*)(partial + ((first + i) * ROWS + row) * COLUMNS);
            UNROLL for (int c = 0; c < QUADS; c++)
                if (COLUMNS % 128 == 0 || c * 32 + lane < COLUMNS / 4) {
                    const float4 x = from[c * 32 + lane];
                    total[c].x += weight * x.x, total[c].y += weight * x.y;
                    total[c].z += weight * x.z, total[c].w += weight * x.w;
                }
        }
        UNROLL for (int c = 0; c < QUADS; c++)
            if (COLUMNS % 128 == 0 || c * 32 + lane < COLUMNS / 4) sums_of_warp[warp][c * 32 + lane] = total[c];
        if (lane == 0) sum_of_warp[warp] = sum;
        __syncthreads();
        if (threadIdx.x < COLUMNS / 4) {
            float4 t = {};
            float s = 0;
            UNROLL for (int w = 0; w < MERGE_WARPS; w++) {
                const float4 x = sums_of_warp[w][threadIdx.x];
                t.x += x.x, t.y += x.y, t.z += x.z, t.w += x.w;
                s += sum_of_warp[w];
            }
            const float norm = s > 0 ? reciprocal(s) : 0;
            const int column = threadIdx.x * 4;
            store_pair(y, p, b, place, row, column, t.x * norm, t.y * norm);
            store_pair(y, p, b, place, row, column + 2, t.z * norm, t.w * norm);
        }
        __syncthreads();  // the next row's sums go to the same place
    }
}
