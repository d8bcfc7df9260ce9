// What the kernels around ClaAttention have in common: numbers of 16 bits, and how kernels overlap.
// BF16: 1: bfloat16, 0: float16

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

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
