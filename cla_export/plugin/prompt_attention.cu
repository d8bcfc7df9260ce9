// ClaAttention over a prompt, for Hopper: many query rows, on warp groups. See contract.py for what it computes, and
// cla_attention.cu for the kernel of fewer rows, other head dims and other GPUs. Follows common.cu.
//
// prompt.py specialises this source by macros:
//   HEAD_DIM  64, 128 or 256
//   BF16      1: bfloat16, 0: float16
//   SOFTCAP   1: scores go through cap * tanh(score / cap)
//   TURNS     1: the two groups that multiply have the same rows, and take turns with the tiles of keys
//   SLOTS     of the ring
//
// The query rows of a kv head (its query heads, times the positions of the chunk) fill blocks. In a block one warp
// group copies: keys and values, a tile after the other, each into a slot of a ring. Two multiply, 64 rows each: scores
// from shared memory, weights times values from registers. Slots go back and forth by barriers in shared memory, so
// nobody waits for all. What multiplies should never rest while weights are made of scores: a group's products with one
// tile's values run beside its scores of the next, and the two groups queue their products in turn.

constexpr int WARP_GROUP = 128;                  // threads
constexpr int THREADS = 3 * WARP_GROUP;
constexpr int GROUP_ROWS = 64;                   // query rows of a group that multiplies
constexpr int ROWS = TURNS ? GROUP_ROWS : 2 * GROUP_ROWS;
constexpr int KEYS = HEAD_DIM > 128 ? 64 : 128;  // of a tile
// A tile lies in shared memory as panels of 64 columns, 128 bytes a row.
constexpr int QUERY_BYTES = ROWS * HEAD_DIM * 2;
constexpr int SLOT_BYTES = KEYS * HEAD_DIM * 2;
constexpr int SCORES = KEYS / 2, SUMS = HEAD_DIM / 2;  // of a thread: two rows' shares
constexpr float LEAST = -1e30f;                  // maximum of no scores: finite, so that differences are too
constexpr float LOG2E = 1.4426950408889634f;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "head dim");
static_assert(SUMS * WARP_GROUP * 4 <= SLOT_BYTES * 2, "the ring is the buffer of the merge too");

// ---- barriers in shared memory, and copies

DEVICE void init_barrier(u32 at, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(at), "r"(arrivals) : "memory");
}

DEVICE void arrive(u32 at) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(at) : "memory"); }

DEVICE void wait(u32 at, u32 parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again;\n}"
                 :: "r"(at), "r"(parity) : "memory");
}

DEVICE bool passed(u32 at, u32 parity) {
    u32 yes;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(yes) : "r"(at), "r"(parity) : "memory");
    return yes;
}

// Waits until but LEFT groups of copies are there, and lets the multiplying groups see them.
template <int LEFT>
DEVICE void finish_copies() {
    asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;" :: "n"(LEFT) : "memory");
}

// Where a piece of 16 bytes lies in a tile of so many rows, as 128-byte swizzling has it.
DEVICE u32 place(int row, int piece, int rows) {
    return (piece >> 3) * rows * 128 + row * 128 + ((piece ^ row) & 7) * 16;
}

// ---- matrix products of a warp group

#define REGISTERS_32 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define REGISTERS_64 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define REGISTERS_128 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
    "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
    "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"
#define FLOATS_8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), \
                       "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define FLOATS_32(x, i) FLOATS_8(x, i), FLOATS_8(x, i + 8), FLOATS_8(x, i + 16), FLOATS_8(x, i + 24)
#define FLOATS_64(x, i) FLOATS_32(x, i), FLOATS_32(x, i + 32)
#if HEAD_DIM == 64
#define VALUES_SHAPE "m64n64k16"
#define SUM_REGISTERS REGISTERS_32
#define SUM_FLOATS(x) FLOATS_32(x, 0)
#define VALUES_OPERANDS "{%32,%33,%34,%35}, %36"
#elif HEAD_DIM == 128
#define VALUES_SHAPE "m64n128k16"
#define SUM_REGISTERS REGISTERS_64
#define SUM_FLOATS(x) FLOATS_64(x, 0)
#define VALUES_OPERANDS "{%64,%65,%66,%67}, %68"
#else
#define VALUES_SHAPE "m64n256k16"
#define SUM_REGISTERS REGISTERS_128
#define SUM_FLOATS(x) FLOATS_64(x, 0), FLOATS_64(x, 64)
#define VALUES_OPERANDS "{%128,%129,%130,%131}, %132"
#endif
#if HEAD_DIM > 128
#define KEYS_SHAPE "m64n64k16"
#define SCORE_REGISTERS REGISTERS_32
#define SCORE_FLOATS(x) FLOATS_32(x, 0)
#define KEYS_OPERANDS "%32, %33"
#define KEYS_ADD "%34"
#else
#define KEYS_SHAPE "m64n128k16"
#define SCORE_REGISTERS REGISTERS_64
#define SCORE_FLOATS(x) FLOATS_64(x, 0)
#define KEYS_OPERANDS "%64, %65"
#define KEYS_ADD "%66"
#endif

// A matrix in swizzled panels: 8 rows every 1,024 bytes. Columns go on in the next panel, `panel` bytes behind, where
// they are what an instruction's width runs along.
DEVICE u64 matrix_at(u32 address, int panel) {
    return 1ull << 62 | 64ull << 32 | (u64)(panel >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Registers that a product reads or adds to are written before these.
DEVICE void begin_scores(float (&s)[SCORES]) {
    asm volatile("wgmma.fence.sync.aligned;" : SCORE_FLOATS(s) :: "memory");
}
DEVICE void begin_sums(float (&o)[SUMS], u32 (&weights)[KEYS / 16][4]) {
    UNROLL for (int i = 0; i < KEYS / 16; i++)
        asm volatile("" : "+r"(weights[i][0]), "+r"(weights[i][1]), "+r"(weights[i][2]), "+r"(weights[i][3]));
    asm volatile("wgmma.fence.sync.aligned;" : SUM_FLOATS(o) :: "memory");
}
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// scores = query . keys, 16 columns of both; added to what is there, or in its place
DEVICE void multiply_keys(float (&s)[SCORES], u64 query, u64 keys, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " KEYS_ADD ", 0;\n"
                 "wgmma.mma_async.sync.aligned." KEYS_SHAPE ".f32." OPERAND "." OPERAND " "
                 SCORE_REGISTERS ", " KEYS_OPERANDS ", p, 1, 1, 0, 0;\n}"
                 : SCORE_FLOATS(s) : "l"(query), "l"(keys), "r"(add));
}

// sums += weights . values, of 16 keys
DEVICE void multiply_values(float (&o)[SUMS], const u32 (&weights)[4], u64 values) {
    asm volatile("wgmma.mma_async.sync.aligned." VALUES_SHAPE ".f32." OPERAND "." OPERAND " "
                 SUM_REGISTERS ", " VALUES_OPERANDS ", 1, 1, 1, 1;"
                 : SUM_FLOATS(o) : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
}

DEVICE void wait_for_scores(float (&s)[SCORES]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : SCORE_FLOATS(s) :: "memory");
}
DEVICE void wait_for_scores_alone(float (&s)[SCORES]) {  // while values are multiplied
    asm volatile("wgmma.wait_group.sync.aligned 1;" : SCORE_FLOATS(s) :: "memory");
}
DEVICE void wait_for_sums(float (&o)[SUMS]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : SUM_FLOATS(o) :: "memory");
}

// ---- the kernel

struct Shape {
    int kv_heads, group, queries, capacity, window;
    i64 head, token;  // elements of q, and of y, from one head, and one position, to the next

    DEVICE int rows() const { return group * queries; }
    DEVICE i64 at(int b, int kv_head, int row) const {  // of a row of q
        return (i64)b * kv_heads * group * queries * HEAD_DIM + (kv_head * group + row % group) * head +
               row / group * token;
    }
};

// Grid: kv heads, blocks of rows, rows of the batch. The heads and positions of q and y lie as `head` and `token` say.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
cla_prompt(const unsigned short* q, const char* keys, const char* values, const int* lengths, unsigned short* y,
           i64 head, i64 token, int kv_heads, int group, int queries, int capacity, int window, float scale,
           float softcap) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ u64 barriers[2 * SLOTS];
    __shared__ float2 states[TURNS ? WARP_GROUP : 1][2];

    const Shape shape{kv_heads, group, queries, capacity, window, head, token};
    const int worker = threadIdx.x / WARP_GROUP - 1, thread = threadIdx.x % WARP_GROUP;  // -1: it copies
    const int b = blockIdx.z, kv_head = blockIdx.x;
    const int first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;  // the longest first
    const u32 query = shared_address(shared), ring = query + QUERY_BYTES;
    auto filled = [&](int slot) { return shared_address(barriers + slot); };
    auto empty = [&](int slot) { return shared_address(barriers + SLOTS + slot); };
    if (threadIdx.x < SLOTS) {
        init_barrier(filled(threadIdx.x), WARP_GROUP);
        init_barrier(empty(threadIdx.x), 2 * WARP_GROUP / 32);
    }
    __syncthreads();
    let_next_kernel_start();
    wait_for_previous_kernel();

    // Keys [begin, end) are seen by some row of the block.
    const int rows = min(shape.rows() - first_row, ROWS);
    const int before = min(max(lengths[b], 0), capacity) - queries;  // position of the first query
    const int end = max(before + (first_row + rows - 1) / group + 1, 0);
    const int begin = window > 0 ? max(before + first_row / group - window + 1, 0) : 0;
    const int tiles = (max(end - begin, 0) + KEYS - 1) / KEYS;

    if (worker < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        constexpr int PIECES = HEAD_DIM / 8, AT_ONCE = WARP_GROUP / PIECES;  // of a row; rows
        const int row = thread / PIECES, piece = thread % PIECES;
        UNROLL for (int i = 0; i < ROWS / AT_ONCE; i++) {
            const int r = i * AT_ONCE + row;
            const bool there = r < rows;
            copy_async(query + place(r, piece, ROWS),
                       q + (there ? shape.at(b, kv_head, first_row + r) : 0) + piece * 8, there);
        }
        const i64 cache = (((i64)b * kv_heads + kv_head) * capacity + begin + row) * (HEAD_DIM * 2) + piece * 16;
        for (int i = 0; i < 2 * tiles; i++) {  // keys and values in turn
            const int slot = i % SLOTS, tile = i / 2, limit = end - begin - tile * KEYS;
            bool told = i == 0;  // that the one before is there
            if (!passed(empty(slot), i / SLOTS % 2 ^ 1)) {
                if (!told) {
                    finish_copies<0>();
                    arrive(filled((i - 1) % SLOTS));
                }
                told = true;
                wait(empty(slot), i / SLOTS % 2 ^ 1);
            }
            const char* from = (i % 2 ? values : keys) + cache + (i64)tile * SLOT_BYTES;
            const u32 to = ring + slot * SLOT_BYTES;
            if (limit >= KEYS)
                UNROLL for (int j = 0; j < KEYS / AT_ONCE; j++)
                    copy_async(to + place(j * AT_ONCE + row, piece, KEYS), from + j * AT_ONCE * HEAD_DIM * 2, true);
            else
                _Pragma("unroll 1") for (int j = 0; j < KEYS / AT_ONCE; j++) {
                    const bool there = j * AT_ONCE + row < limit;
                    copy_async(to + place(j * AT_ONCE + row, piece, KEYS),
                               there ? from + j * AT_ONCE * HEAD_DIM * 2 : keys, there);
                }
            commit_copies();
            if (told) continue;
            finish_copies<1>();
            arrive(filled((i - 1) % SLOTS));
        }
        finish_copies<0>();
        if (tiles) arrive(filled((2 * tiles - 1) % SLOTS));
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int warp = thread / 32, lane = thread % 32;
    const int offset = TURNS ? 0 : worker * GROUP_ROWS;  // of the group's rows in the block
    const int low = offset + warp * 16 + lane / 4, high = low + 8;  // the thread's rows
    const int position_low = before + (first_row + low) / group, position_high = before + (first_row + high) / group;
    const int own_rows = min(rows - offset, GROUP_ROWS);
    const int oldest = before + (first_row + offset) / group;
    const int newest = before + (first_row + offset + own_rows - 1) / group;
    const float to_scores = SOFTCAP ? 2 * LOG2E * scale / softcap : LOG2E * scale, cap = softcap * LOG2E;
    const float factor = SOFTCAP ? 1 : to_scores;  // of a score, once it is capped
    float sums[SUMS] = {}, max_low = LEAST, max_high = LEAST, sum_low = 0, sum_high = 0;
    const u64 rows_of_query = matrix_at(query + offset * 128, 16);

    // The tiles that the group sees, and by how many it goes on; the scores of one are made while the weights of the
    // one before meet its values.
    constexpr int STEP = TURNS ? 2 : 1;
    int first = window > 0 ? max((oldest - window + 1 - begin) / KEYS, 0) : 0;
    if (TURNS && first % 2 != worker) first++;
    int last = own_rows > 0 && newest >= begin ? min((newest - begin) / KEYS, tiles - 1) : -1;
    if (TURNS && last >= 0 && last % 2 != worker) last--;
    float scores[SCORES] = {};
    u32 weights[KEYS / 16][4];
    float shrink_low, shrink_high;

    auto slot_of = [&](int tile, int values) { return (2 * tile + values) % SLOTS; };
    auto wait_for = [&](int tile, int values) {
        wait(filled(slot_of(tile, values)), (2 * tile + values) / SLOTS % 2);
    };
    auto leave = [&](int tile, int values) {  // a slot is empty once both groups say so
        if (lane == 0) arrive(empty(slot_of(tile, values)));
    };
    // Named barriers, one for each group: it may queue products. With rows in common there is no need.
    auto await_turn = [&] {
        if (!TURNS) asm volatile("bar.sync %0, 256;" :: "r"(2 + worker) : "memory");
    };
    auto pass_turn = [&] {
        if (!TURNS) asm volatile("bar.arrive %0, 256;" :: "r"(3 - worker) : "memory");
    };
    if (worker == 1) pass_turn();

    auto skip = [&](int tile) {
        wait_for(tile, 0);
        await_turn(), pass_turn();
        wait_for(tile, 1);
        leave(tile, 0), leave(tile, 1);
    };
    auto begin_tile = [&](int tile) {
        wait_for(tile, 0);
        await_turn();
        begin_scores(scores);
        UNROLL for (int i = 0; i < HEAD_DIM / 16; i++)
            multiply_keys(scores, rows_of_query + ((i / 4 * ROWS * 128 + i % 4 * 32) >> 4),
                          matrix_at(ring + slot_of(tile, 0) * SLOT_BYTES + i / 4 * KEYS * 128 + i % 4 * 32, 16), i > 0);
        end_products();
    };
    auto add_values = [&](int tile) {
        wait_for(tile, 1);
        begin_sums(sums, weights);
        UNROLL for (int i = 0; i < KEYS / 16; i++)
            multiply_values(sums, weights[i],
                            matrix_at(ring + slot_of(tile, 1) * SLOT_BYTES + i * 2048, KEYS * 128));
        end_products();
    };
    auto finish_values = [&](int tile) {
        wait_for_sums(sums);
        leave(tile, 1);
    };
    auto weigh = [&](int tile) {  // running maximum and sum; scores become weights
        const int first_key = begin + tile * KEYS;
        if (SOFTCAP)
            UNROLL for (int i = 0; i < SCORES; i++)
                scores[i] = cap - 2 * cap * reciprocal(1 + exp2_fast(scores[i] * to_scores));
        if (first_key + KEYS - 1 > oldest || (window > 0 && first_key <= newest - window))
            UNROLL for (int i = 0; i < SCORES; i++) {
                const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
                const int position = i & 2 ? position_high : position_low;
                if (key > position || (window > 0 && key <= position - window))
                    scores[i] = -__int_as_float(0x7f800000);
            }
        float top_low = max_low, top_high = max_high;
        UNROLL for (int i = 0; i < SCORES; i += 4) {
            top_low = fmaxf(top_low, fmaxf(scores[i], scores[i + 1]));
            top_high = fmaxf(top_high, fmaxf(scores[i + 2], scores[i + 3]));
        }
        UNROLL for (int i = 1; i < 4; i <<= 1) {
            top_low = fmaxf(top_low, __shfl_xor_sync(~0u, top_low, i));
            top_high = fmaxf(top_high, __shfl_xor_sync(~0u, top_high, i));
        }
        shrink_low = exp2_fast((max_low - top_low) * factor), shrink_high = exp2_fast((max_high - top_high) * factor);
        max_low = top_low, max_high = top_high;
        const float from_low = max_low * factor, from_high = max_high * factor;
        UNROLL for (int i = 0; i < SCORES; i++)
            scores[i] = exp2_fast(scores[i] * factor - (i & 2 ? from_high : from_low));
        sum_low *= shrink_low, sum_high *= shrink_high;
        UNROLL for (int i = 0; i < SCORES; i += 4) {
            sum_low += scores[i] + scores[i + 1];
            sum_high += scores[i + 2] + scores[i + 3];
        }
    };
    auto pack_weights = [&] {
        UNROLL for (int i = 0; i < KEYS / 16; i++)
            UNROLL for (int j = 0; j < 4; j++) weights[i][j] = narrow(scores[i * 8 + j * 2], scores[i * 8 + j * 2 + 1]);
    };

    int tile = 0;
    for (; tile < min(first, tiles); tile++) skip(tile);
    if (first <= last) {
        begin_tile(first);
        pass_turn();
        wait_for_scores(scores);
        leave(first, 0);
        weigh(first);
        pack_weights();
        for (tile = first + STEP; tile <= last; tile += STEP) {
            if (TURNS) skip(tile - 1);
            begin_tile(tile);
            add_values(tile - STEP);
            pass_turn();
            wait_for_scores_alone(scores);
            leave(tile, 0);
            weigh(tile);
            finish_values(tile - STEP);
            UNROLL for (int i = 0; i < SUMS; i++) sums[i] *= i & 2 ? shrink_high : shrink_low;
            pack_weights();
        }
        add_values(last);
        finish_values(last);
        tile = last + 1;
    }
    for (; tile < tiles; tile++) skip(tile);

    UNROLL for (int i = 1; i < 4; i <<= 1) {
        sum_low += __shfl_xor_sync(~0u, sum_low, i);
        sum_high += __shfl_xor_sync(~0u, sum_high, i);
    }
    if (TURNS) {  // the second group leaves its part in the ring, which nobody reads any more; the first adds it
        auto meet = [] { asm volatile("bar.sync 1, 256;" ::: "memory"); };
        float* buffer = (float*)(shared + QUERY_BYTES);
        meet();
        if (worker == 1) {
            UNROLL for (int i = 0; i < SUMS; i++) buffer[i * WARP_GROUP + thread] = sums[i];
            states[thread][0] = make_float2(max_low, sum_low);
            states[thread][1] = make_float2(max_high, sum_high);
        }
        meet();
        if (worker == 1) return;
        const float2 other_low = states[thread][0], other_high = states[thread][1];
        const float top_low = fmaxf(max_low, other_low.x), top_high = fmaxf(max_high, other_high.x);
        const float mine_low = exp2_fast((max_low - top_low) * factor);
        const float mine_high = exp2_fast((max_high - top_high) * factor);
        const float its_low = exp2_fast((other_low.x - top_low) * factor);
        const float its_high = exp2_fast((other_high.x - top_high) * factor);
        sum_low = sum_low * mine_low + other_low.y * its_low;
        sum_high = sum_high * mine_high + other_high.y * its_high;
        UNROLL for (int i = 0; i < SUMS; i++)
            sums[i] = sums[i] * (i & 2 ? mine_high : mine_low) +
                      buffer[i * WARP_GROUP + thread] * (i & 2 ? its_high : its_low);
    }
    const float norm_low = sum_low > 0 ? reciprocal(sum_low) : 0, norm_high = sum_high > 0 ? reciprocal(sum_high) : 0;
    UNROLL for (int j = 0; j < 2; j++) {
        const int row = j ? high : low;
        if (row >= rows) continue;
        u32* to = (u32*)(y + shape.at(b, kv_head, first_row + row)) + lane % 4;
        const float norm = j ? norm_high : norm_low;
        UNROLL for (int i = 0; i < SUMS / 4; i++)
            to[i * 4] = narrow(sums[i * 4 + j * 2] * norm, sums[i * 4 + j * 2 + 1] * norm);
    }
}
