// Weights of 8 or 4 bits as MatMulNBits has them, a scale for each 32 columns of a row; follows decode_tile.cu.
//
// An integer is made a number of 16 bits, which holds it exactly, in the registers that multiply it; the sum over 32
// columns is scaled in float32. Sums do not care which columns a thread takes, as long as it takes the same ones of
// weights and tokens: with 8 bits it has 4 that follow each other, twice in 32, with 4 bits 8.

// Tokens are read in pieces of 16 or 8 bytes, 4 threads next to each other: neighbours are laid half a line apart.
DEVICE u32 place_token(int token, int piece) {
    return token * (CHUNK * 2) + ((piece ^ ((token & 1) << 2 | (token & 2))) << 4);
}

// The scales of a stage's rows: as many words as hold them, since a row's first one may be a word's second half.
// `row_of` gives a row's number in the weight, -1: it is not there.
template <typename Row>
DEVICE void fetch_scales(u32 to, const u16* scales, int chunk, int k, Row row_of) {
    const int blocks = k / 32;
    UNROLL for (int j = 0; j < (ROWS * SCALE_WORDS + THREADS - 1) / THREADS; j++) {
        const int i = j * THREADS + threadIdx.x;
        if (ROWS * SCALE_WORDS % THREADS && i >= ROWS * SCALE_WORDS) break;
        const i64 row = row_of(i / SCALE_WORDS);
        const i64 first = (row * blocks + chunk * SCALES & ~1ll) + i % SCALE_WORDS * 2;
        const i64 left = row < 0 ? 0 : (row + 1) * blocks - first;
        copy_word_async(to + i * 4, scales + (left > 0 ? first : 0), left > 1 ? 4 : left > 0 ? 2 : 0);
    }
}

DEVICE float load_scale(u32 address) {
    u16 scale;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale) : "r"(address) : "memory");
    return widen(scale);
}

DEVICE void load_words(u32 (&r)[2], u32 address) {
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}

DEVICE void load_words(u32 (&r)[4], u32 address) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// a * b + c of two numbers of 16 bits each.
DEVICE u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn." OPERAND "x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Of a word of a row, its integers two by two, less 128 or 8: those of a thread's columns, as `load_columns` has them.
constexpr int PAIRS = BITS == 8 ? 2 : 4;
DEVICE void unpack(u32 (&pairs)[PAIRS], u32 word) {
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
        pairs[i] = multiply_add(word >> i * 4 & 0x000f000f | 0x43004300, 0x3f803f80, 0xc308c308);
#else  // 1024 + it, less 1032; or 1024 + 16 times it, a sixteenth of that, less 72
    UNROLL for (int i = 0; i < PAIRS; i += 2) {
        pairs[i] = multiply_add(word & 0x000f000f | 0x64006400, 0x3c003c00, 0xe408e408);
        pairs[i + 1] = multiply_add(word & 0x00f000f0 | 0x64006400, 0x2c002c00, 0xd480d480);
        word >>= 8;
    }
#endif
}

// Of a token and a block of 32 columns, the thread's eight: 4t to 4t + 3 and 16 behind them, in order; or 8t to 8t + 7,
// each beside the one four behind it.
DEVICE void load_columns(u32 (&pairs)[4], u32 tokens, int token, int block) {
    const int t = threadIdx.x & 3;
#if BITS == 8
    UNROLL for (int half = 0; half < 2; half++) {
        u32 two[2];
        load_words(two, tokens + place_token(token, block * 4 + half * 2 + (t >> 1)) + (t & 1) * 8);
        pairs[half * 2] = two[0], pairs[half * 2 + 1] = two[1];
    }
#else
    u32 two[4];
    load_words(two, tokens + place_token(token, block * 4 + t));
    UNROLL for (int i = 0; i < 4; i++)
        pairs[i] = __byte_perm(two[i / 2], two[i / 2 + 2], i % 2 ? 0x7632 : 0x5410);
#endif
}

DEVICE void multiply_stage(float (&sums)[SUMS], u32 stage, int k) {
    constexpr int BLOCKS = SCALES / COLUMN_WARPS / STEPS;  // of 32 columns, in a step
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, odd = k / 32 & 1;
    const int first_row = warp % ROW_WARPS * ROW_TILES * 16;
    UNROLL for (int i = 0; i < STEPS; i++) {
        const int step = warp / ROW_WARPS * STEPS + i;
        u32 words[ROW_TILES][4];  // of rows from 0 and 8, in the first 16 bytes and the second
        UNROLL for (int r = 0; r < ROW_TILES; r++)
            load_matrices(words[r], stage + place(first_row + r * 16 + (lane & 15), step * 2 + (lane >> 4)));
        UNROLL for (int b = 0; b < BLOCKS; b++) {
            const int block = step * BLOCKS + b;
            u32 weights[ROW_TILES][2][4];  // of the block's halves
            float scales[ROW_TILES][2];
            UNROLL for (int r = 0; r < ROW_TILES; r++)
                UNROLL for (int j = 0; j < 2; j++) {
                    const int row = first_row + r * 16 + j * 8 + (lane >> 2);
                    scales[r][j] = load_scale(stage + SCALES_AT + row * SCALE_WORDS * 4 + ((row & odd) + block) * 2);
                    UNROLL for (int h = 0; h < 4 / PAIRS; h++) {
                        u32 pairs[PAIRS];
                        unpack(pairs, words[r][BITS == 8 ? h * 2 + j : b * 2 + j]);
                        UNROLL for (int p = 0; p < PAIRS; p++) {
                            const int at = h * PAIRS + p;
                            weights[r][at / 2][at % 2 * 2 + j] = pairs[p];
                        }
                    }
                }
            UNROLL for (int t = 0; t < TOKEN_TILES; t++) {
                u32 columns[4];
                load_columns(columns, stage + TOKENS_AT, t * 8 + (lane >> 2), block);
                UNROLL for (int r = 0; r < ROW_TILES; r++) {
                    float sum[4] = {}, *to = sums + (r * TOKEN_TILES + t) * 4;
                    UNROLL for (int h = 0; h < 2; h++)
                        multiply(sum, weights[r][h], columns[h * 2], columns[h * 2 + 1]);
                    UNROLL for (int j = 0; j < 4; j++) to[j] += sum[j] * scales[r][j / 2];
                }
            }
        }
    }
}
