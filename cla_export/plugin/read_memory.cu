// Reads memory as fast as it delivers, for the floor under a decode step.
//
// Blocks of THREADS threads take tiles in turn; a thread has LOADS loads of 16 bytes of a tile under
// way at once, that caches are not to keep. All that it reads ends in one word, and is written
// nowhere but where that word is the needle: so no load can be left out, and memory full of zeros
// costs no write.

extern "C" __global__ void __launch_bounds__(THREADS, 2)
read_memory(const uint4 *data, int tiles, unsigned needle, int *found)
{
    unsigned seen = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint4 *at = data + (size_t)tile * (THREADS * LOADS) + threadIdx.x;
        uint4 part[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            part[i] = __ldcs(at + i * THREADS);
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            seen |= part[i].x | part[i].y | part[i].z | part[i].w;
    }
    if (seen == needle)
        *found = 1;
}
