// Weights of 8 or 4 bits as MatMulNBits has them, a scale for each 32 columns of a row; follows decode_tile.cu.
//
// An integer is made a number of 16 bits, which holds it exactly, and is multiplied by its scale: that rounds once. It
// happens in the registers that are multiplied, once for all tokens. A thread holds columns that follow each other, so
// those of the tokens are laid in the order that a multiplication takes them from its threads.

struct ScaleCopies {  // of a row and a stage: as many words as hold them, as a row's first may be a word's second half
    static constexpr int COUNT = (ROWS * SCALE_WORDS + THREADS - 1) / THREADS;
    const u16* from[COUNT];
    int left[COUNT];  // bytes of the row's scales from here on

    template <typename Row>
    DEVICE ScaleCopies(const u16* scales, int chunk, int k, Row row_of) {
        const int blocks = k / 32;
        UNROLL for (int j = 0; j < COUNT; j++) {
            const int i = j * THREADS + threadIdx.x, row = min(i / SCALE_WORDS, ROWS - 1);
            const i64 begin = (i64)row_of(row) * blocks;
            const i64 first = (begin & ~1ll) + chunk * SCALES + i % SCALE_WORDS * 2;
            from[j] = scales + first;
            left[j] = i < ROWS * SCALE_WORDS ? (int)(begin + blocks - first) * 2 : -1;
        }
    }

    DEVICE void fetch(u32 stage) {
        UNROLL for (int j = 0; j < COUNT; j++) {
            const int i = j * THREADS + threadIdx.x;
            if (ROWS * SCALE_WORDS % THREADS && j == COUNT - 1 && i >= ROWS * SCALE_WORDS) break;
            copy_word_async(stage + SCALES_AT + i * 4, from[j], max(0, min(4, left[j])));
            from[j] += SCALES;
            left[j] -= SCALES * 2;
        }
    }
};

DEVICE void load_words(u32 (&r)[4], u32 address) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

DEVICE void store_word(u32 address, u32 a) { asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(a) : "memory"); }

DEVICE void store_words(u32 address, u32 a, u32 b) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" :: "r"(address), "r"(a), "r"(b) : "memory");
}

// A warp copies 32 columns of 8 tokens at a time, a thread 8 columns of one; tokens are dealt so that no banks meet.
struct TokenCopies {
    static constexpr int ALL = TOKENS / 8 * SCALES, COUNT = ALL / WARPS;
    static_assert(ALL % WARPS == 0, "every warp has as many copies");
    static constexpr int IN_TURN = WARPS < SCALES ? SCALES / WARPS : 1;   // copies of the same tokens
    static constexpr int AT_ONCE = WARPS > SCALES ? WARPS / SCALES : 1;   // tokens, by eights
    const u16* from;
    int token, left;  // columns from here on
    u32 at, to;       // of a stage: where they are copied, and where they belong

    DEVICE TokenCopies(const u16* x, int chunk, int k) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = lane & 3, block = warp % SCALES;
        const int column = chunk * CHUNK + block * 32 + t * 8;
        token = warp / SCALES * 8 + (lane >> 3 | lane & 4);
        from = x + (i64)token * k + column;
        left = k - column;
        at = place_token(token, block * 4 + t);
        to = BITS == 8 ? place_token(token, block * 4 + (t & 2)) + (t & 1) * 8 : place_token(token, block * 4) + t * 4;
    }

    static constexpr DEVICE int tokens_before(int i) { return i / IN_TURN * AT_ONCE * 8; }
    static constexpr DEVICE int columns_before(int i) { return i % IN_TURN * WARPS * 32; }
    static constexpr DEVICE int offset(int i) { return tokens_before(i) * 128 + columns_before(i) / 64 * TOKENS * 128; }

    DEVICE void fetch(u32 stage, int tokens, int k) {
        UNROLL for (int i = 0; i < COUNT; i++) {
            const bool there = token + tokens_before(i) < tokens && left > columns_before(i);
            copy_async(stage + at + offset(i), there ? from + tokens_before(i) * k + columns_before(i) : from, there);
        }
        from += CHUNK;
        left -= CHUNK;
    }

    // Lay what has come as `unpack` has the weight: thread t's columns of a multiplication are the t-th two of its first
    // 8, and of its last. With 8 bits these are 4t to 4t + 3 of 16; with 4 bits they come from 8t to 8t + 7 of 32, each
    // beside the one four behind it.
    DEVICE void arrange(u32 stage) const {
        constexpr int BATCH = COUNT < 4 ? COUNT : 4;
        UNROLL for (int first = 0; first < COUNT; first += BATCH) {
            u32 two[BATCH][4];
            UNROLL for (int i = 0; i < BATCH; i++) load_words(two[i], stage + at + offset(first + i));
            __syncwarp();
            UNROLL for (int i = 0; i < BATCH; i++) {
                const u32 there = offset(first + i);
#if BITS == 8
                UNROLL for (int half = 0; half < 2; half++)
                    store_words((stage + to ^ half * 16) + there, two[i][half], two[i][half + 2]);
#else
                UNROLL for (int j = 0; j < 4; j++)
                    store_word((stage + to ^ j * 16) + there,
                               __byte_perm(two[i][j / 2], two[i][j / 2 + 2], j % 2 ? 0x7632 : 0x5410));
#endif
            }
        }
    }
};

DEVICE u32 load_scale(u32 address) {  // twice
    u16 scale;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale) : "r"(address) : "memory");
    return scale * 0x10001u;
}

// Of two numbers of 16 bits each: a * b + c, and a * b.
DEVICE u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn." OPERAND "x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

DEVICE u32 multiply_both(u32 a, u32 b) {
    u32 r;
    asm("mul.rn." OPERAND "x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// Masks in registers: they stand beside another constant, and an instruction has room for one. `zero` is one that the
// assembler does not know, else it makes them anew for each use.
struct Masks {
    u32 low, high;
    DEVICE explicit Masks(int zero) : low(0x000f000f | zero), high(0x00f000f0 | zero) {}
};

DEVICE u32 take_bits(u32 word, u32 mask, u32 set) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "r"(mask), "r"(set));
    return r;
}

// Of a word of a row, its integers two by two, less 128 or 8, times their scale.
constexpr int PAIRS = BITS == 8 ? 2 : 4;
DEVICE void unpack(u32 (&pairs)[PAIRS], u32 word, u32 scale, const Masks& masks) {
#if BITS == 8
    UNROLL for (int i = 0; i < PAIRS; i++) {
#if BF16  // 128 + its 7 low bits, less 128 where the eighth is set, else 256
        const u32 two = __byte_perm(word, 0, i ? 0x4342 : 0x4140);
        pairs[i] = multiply_add(two & 0x00800080 ^ 0x43804380, 0xbf80bf80, two & 0x007f007f | 0x43004300);
#else  // 1024 + it, less 1152
        pairs[i] = multiply_add(__byte_perm(word, 0x64646464, i ? 0x4342 : 0x4140), 0x3c003c00, 0xe480e480);
#endif
    }
#elif BF16  // 128 + it, less 136
    UNROLL for (int i = 0; i < PAIRS; i++)
        pairs[i] = multiply_add(take_bits(word >> i * 4, masks.low, 0x43004300), 0x3f803f80, 0xc308c308);
#else  // 1024 + it, less 1032; or 1024 + 16 times it, a sixteenth of that, less 72
    UNROLL for (int i = 0; i < PAIRS; i += 2) {
        pairs[i] = multiply_add(take_bits(word, masks.low, 0x64006400), 0x3c003c00, 0xe408e408);
        pairs[i + 1] = multiply_add(take_bits(word, masks.high, 0x64006400), 0x2c002c00, 0xd480d480);
        word >>= 8;
    }
#endif
    UNROLL for (int i = 0; i < PAIRS; i++) pairs[i] = multiply_both(pairs[i], scale);
}

// Add the products of 16 rows of the weight, which a warp has in registers, and all tokens: of two times 16 columns,
// from `piece` on.
#if GROUPS
typedef unsigned long long Tokens;
DEVICE Tokens tokens_of(u32 stage) { return tile_at(stage + TOKENS_AT); }

DEVICE void multiply_one(float (&s)[SUMS], const u32 (&a)[4], Tokens tokens, int piece) {
    const Tokens tile = tokens + (place_token(0, piece) - TOKENS_AT) / 16;
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERAND "." OPERAND " "
                 ALL_PLACES ", {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                 : ALL_SUMS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile) : "memory");
}

DEVICE void multiply_two(float (&sums)[SUMS], const u32 (&first)[4], const u32 (&second)[4], Tokens tokens, int piece) {
    begin_products();
    multiply_one(sums, first, tokens, piece);
    multiply_one(sums, second, tokens, piece + 2);
    commit_products();
    wait_for_products<1>(sums);  // more in flight would take more registers
}
#else
typedef u32 Tokens;
DEVICE Tokens tokens_of(u32 stage) {  // where a thread reads the first
    const int lane = threadIdx.x & 31;
    const int token = TOKENS == 8 ? lane & 7 : lane >> 1 & 8 | lane & 7;
    return stage + place_token(token, TOKENS == 8 ? lane >> 3 : lane >> 3 & 1);
}

DEVICE void multiply_two(float (&sums)[SUMS], const u32 (&first)[4], const u32 (&second)[4], Tokens tokens, int piece) {
    UNROLL for (int i = 0; i < (TOKENS == 8 ? 1 : 2); i++)
        UNROLL for (int t = 0; t < TOKEN_TILES; t += 2) {
            u32 columns[4];
            const int at = piece + i * 2;
            load_matrices(columns, (tokens ^ at % 8 * 16) + at / 8 * (TOKENS * 128) + t * 1024);
            if (TOKENS == 8) {
                multiply(sums, first, columns[0], columns[1]);
                multiply(sums + OTHER, second, columns[2], columns[3]);
            } else
                UNROLL for (int j = 0; j < 2; j++)
                    multiply(sums + i * OTHER + (t + j) * 4, i ? second : first, columns[j * 2], columns[j * 2 + 1]);
        }
}
#endif

DEVICE void multiply_stage(float (&sums)[SUMS], u32 stage, int k, const Masks& masks) {
    const int warp = (threadIdx.x >> 5) % ROW_WARPS, lane = threadIdx.x & 31;
    const int row = warp * 16 + (lane >> 2), odd = k / 32 & 1;
    const u32 scales = stage + SCALES_AT + row * (SCALE_WORDS * 4) + (row & odd) * 2;  // and 8 rows below
    const u32 first = stage + place(warp * 16 + (lane & 15), lane >> 4);
    const Tokens tokens = tokens_of(stage);
    UNROLL for (int i = 0; i < PIECES; i += 2) {
        u32 words[4];  // of rows from 0 and 8, in a piece of 16 bytes and the next
        load_matrices(words, first ^ i * 16);
        UNROLL for (int b = 0; b < SCALES * 2 / PIECES; b++) {  // blocks of 32 columns
            const int block = i * SCALES / PIECES + b;
            u32 weights[2][4];  // of the block's halves
            UNROLL for (int j = 0; j < 2; j++) {
                const u32 scale = load_scale(scales + j * (SCALE_WORDS * 32) + block * 2);
                UNROLL for (int h = 0; h < 4 / PAIRS; h++) {
                    u32 pairs[PAIRS];
                    unpack(pairs, words[(BITS == 8 ? h : b) * 2 + j], scale, masks);
                    UNROLL for (int p = 0; p < PAIRS; p++) {
                        const int at = h * PAIRS + p;
                        weights[at / 2][at % 2 * 2 + j] = pairs[p];
                    }
                }
            }
            multiply_two(sums, weights[0], weights[1], tokens, block * 4);
        }
    }
#if GROUPS
    wait_for_products<0>(sums);
#endif
}
