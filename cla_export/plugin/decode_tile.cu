// A tile of a product of a few tokens: its copies into shared memory, and its multiplication where weights have 16
// bits; follows common.cu, and decode_product.cu follows it, with decode_packed.cu in between for fewer bits.
//
// compile.py specialises these sources by macros:
//   BF16    1: bfloat16, 0: float16
//   BITS    of a weight: 16, 8 or 4
//   ROWS    of a weight, in a tile: 64 or 256; 64 with 16 bits
//   TOKENS  columns of a tile: 8, 16, 32 or 64; a call has no more tokens than that
//   STAGES  depth of a block's ring
//   GROUPS  1: warp groups multiply (Hopper's) 64 tokens, 0: warps do

// Where a piece of 16 bytes lies in a stage whose rows have 128, so that 8 rows never meet in a bank.
DEVICE u32 place(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

DEVICE void copy_word_async(u32 to, const void* from, int bytes) {  // and zeros behind them
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

constexpr int CHUNK = 1024 / BITS;               // columns of a stage, 128 bytes of a row
constexpr int ROW_WARPS = ROWS / 16;             // that share a tile's rows
constexpr int COLUMN_WARPS = BITS == 16 && !GROUPS ? 2 : 1;  // that share a stage's columns
constexpr int WARPS = ROW_WARPS * COLUMN_WARPS, THREADS = WARPS * 32;
constexpr int PIECES = 128 / 16;                 // of 16 bytes, in a row of a stage
constexpr int SCALES = BITS == 16 ? 0 : CHUNK / 32;              // of a row of a stage
constexpr int SCALE_WORDS = BITS == 16 ? 0 : SCALES / 2 + 1;     // that hold them, wherever the first begins
constexpr int TOKENS_AT = ROWS * 128, SCALES_AT = TOKENS_AT + TOKENS * CHUNK * 2;  // in a stage
constexpr int STAGE_BYTES = (SCALES_AT + ROWS * SCALE_WORDS * 4 + 1023) / 1024 * 1024;
constexpr int PITCH = ROWS + (BITS == 16 && GROUPS ? 8 : 4);  // floats of a token in the buffer of sums

// Where a piece of 16 bytes of a token lies, which is 8 of its columns: 64 of them make a row of 128 bytes.
DEVICE u32 place_token(int token, int piece) {
    return TOKENS_AT + piece / 8 * (TOKENS * 128) + place(token, piece % 8);
}

// A thread's copies of a weight: the same piece of some rows, of one stage after the other. `row_of` gives a row's
// number in the weight.
struct WeightCopies {
    static constexpr int AT_ONCE = THREADS / PIECES, COUNT = ROWS / AT_ONCE;
    const unsigned char* from[COUNT];
    int left;  // bytes of a row from here on
    u32 to;

    template <typename Row>
    DEVICE WeightCopies(const unsigned char* w, int chunk, int row_bytes, Row row_of) {
        const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES, byte = chunk * 128 + piece * 16;
        UNROLL for (int i = 0; i < COUNT; i++) from[i] = w + (i64)row_of(i * AT_ONCE + row) * row_bytes + byte;
        left = row_bytes - byte;
        to = place(row, piece);
    }

    DEVICE void fetch(u32 stage) {
        UNROLL for (int i = 0; i < COUNT; i++) {
            copy_async(stage + to + i * AT_ONCE * 128, from[i], left > 0);
            from[i] += 128;
        }
        left -= 128;
    }
};

// The sums of a thread: tiles of 16 rows of the weight and 8 tokens; or of 64 tokens, which are the rows of a warp
// group's product with 16 bits, and 8 rows of the weight.
#if BITS == 16 && GROUPS
constexpr int SUMS = ROWS / 2;
#else
// Warps with packed weights have two of each, where there is room, so that multiplications wait less for each other.
constexpr int TOKEN_TILES = TOKENS / 8, PARTS = TOKEN_TILES * 4;
constexpr int OTHER = BITS < 16 && !GROUPS && TOKENS < 64 ? PARTS : 0, SUMS = PARTS + OTHER;
#endif

#if BITS == 16
struct Masks {
    DEVICE explicit Masks(int) {}
};
#endif

#if GROUPS
static_assert(SUMS == 32, "a warp group multiplies tiles of 64 by 64");
#define SUMS_8(i) \
    "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), \
    "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
#define ALL_SUMS SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24)
#define ALL_PLACES \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

DEVICE unsigned long long tile_at(u32 address) {  // rows of 128 bytes, swizzled, 8 of them every 1024
    return 1ull << 62 | 64ull << 32 | 1ull << 16 | (address & 0x3ffff) >> 4;
}

DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT>
DEVICE void wait_for_products(float (&s)[SUMS]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : ALL_SUMS : "n"(LEFT) : "memory");
}

// Before the barrier behind which a stage is multiplied, and the one before it is written again.
DEVICE void finish_stage(float (&s)[SUMS]) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    wait_for_products<0>(s);
}
#else
DEVICE void finish_stage(float (&)[SUMS]) {}
#endif

#if BITS == 16 && GROUPS
// Tokens are the 64 rows of a warp group's product, rows of the weight its columns. Stages are read where they lie.
DEVICE void multiply_stage(float (&s)[SUMS], u32 stage, int, const Masks&) {
    begin_products();
    UNROLL for (int i = 0; i < PIECES / 2; i++)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERAND "." OPERAND " "
                     ALL_PLACES ", %32, %33, 1, 1, 1, 0, 0;"
                     : ALL_SUMS
                     : "l"(tile_at(stage + TOKENS_AT + i * 32)), "l"(tile_at(stage + i * 32)) : "memory");
    commit_products();
}

DEVICE void leave(const float (&s)[SUMS], float* buffer) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    UNROLL for (int i = 0; i < SUMS; i += 2) {
        const int token = warp * 16 + (i >> 1 & 1) * 8 + (lane >> 2), row = i / 4 * 8 + (lane & 3) * 2;
        *(float2*)(buffer + token * PITCH + row) = make_float2(s[i], s[i + 1]);
    }
}
#else
DEVICE void leave(const float (&sums)[SUMS], float* buffer) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    buffer += warp / ROW_WARPS * TOKENS * PITCH;
    UNROLL for (int i = 0; i < PARTS; i++) {
        const int row = (warp % ROW_WARPS * 2 + (i >> 1 & 1)) * 8 + (lane >> 2);
        const int token = i / 4 * 8 + (lane & 3) * 2 + (i & 1);
        buffer[token * PITCH + row] = OTHER ? sums[i] + sums[i + OTHER] : sums[i];
    }
}
#endif

#if BITS == 16
struct TokenCopies {  // a thread's of a stage; it may have none
    const u16* x;
    int chunk;

    DEVICE TokenCopies(const u16* x, int chunk, int) : x(x), chunk(chunk) {}

    DEVICE void fetch(u32 stage, int tokens, int k) {
        constexpr int AT_ONCE = THREADS / PIECES;
        const int piece = threadIdx.x % PIECES, column = chunk * CHUNK + piece * 8;
        UNROLL for (int i = 0; i < (TOKENS + AT_ONCE - 1) / AT_ONCE; i++) {
            const int token = i * AT_ONCE + threadIdx.x / PIECES;
            if (TOKENS % AT_ONCE && token >= TOKENS) break;
            const bool there = token < tokens && column < k;
            copy_async(stage + place_token(token, piece), x + (there ? token * k + column : 0), there);
        }
        chunk++;
    }

    DEVICE void arrange(u32) const {}
};

struct ScaleCopies {
    template <typename Row>
    DEVICE ScaleCopies(const u16*, int, int, Row) {}
    DEVICE void fetch(u32) {}
};

#if !GROUPS
DEVICE void multiply_stage(float (&sums)[SUMS], u32 stage, int, const Masks&) {
    constexpr int STEPS = PIECES / 2 / COLUMN_WARPS;  // of a multiplication, 32 bytes of a row each
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    UNROLL for (int i = 0; i < STEPS; i++) {
        const int piece = (warp / ROW_WARPS * STEPS + i) * 2;  // the first of 16 columns
        u32 weights[4], columns[(TOKEN_TILES + 1) / 2][4];
        load_matrices(weights, stage + place(warp % ROW_WARPS * 16 + (lane & 15), piece + (lane >> 4)));
        UNROLL for (int t = 0; t < TOKEN_TILES; t += 2) {
            const int token = t * 8 + (TOKENS > 8 ? lane >> 4 : 0) * 8 + (lane & 7);
            load_matrices(columns[t / 2], stage + place_token(token, piece + (lane >> 3 & 1)));
        }
        UNROLL for (int t = 0; t < TOKEN_TILES; t++)
            multiply(sums + t * 4, weights, columns[t / 2][t % 2 * 2], columns[t / 2][t % 2 * 2 + 1]);
    }
}
#endif
#endif
