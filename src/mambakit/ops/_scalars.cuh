// How numbers lie in memory, what they are computed in, and the scan's functions of one number.
// Included by _cuda.cuh.
//
// A dtype is a C++ type that a kernel may be given by -D: float, double, bf16, fp16.
#pragma once

struct bf16 {
    unsigned short bits;
};
struct fp16 {
    unsigned short bits;
};

// Arithmetic is in float, for double in double.
template <class T> struct WideOf {
    typedef float type;
};
template <> struct WideOf<double> {
    typedef double type;
};
template <class T> using Wide = typename WideOf<T>::type;

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float((unsigned int)x.bits << 16); }
DEVICE float widen(fp16 x) { return fp16_to_float(x.bits); }

template <class T> struct Narrow;
template <> struct Narrow<float> {
    static METHOD float from(float x) { return x; }
};
template <> struct Narrow<double> {
    static METHOD double from(double x) { return x; }
};
template <> struct Narrow<bf16> {
    static METHOD bf16 from(float x) {
        return bf16{(unsigned short)pack_bf16(x, 0.0f)};
    }
};
template <> struct Narrow<fp16> {
    static METHOD fp16 from(float x) {
        return fp16{(unsigned short)pack_fp16(x, 0.0f)};
    }
};
// Round to the dtype T: narrow<bf16>(1.5f).
template <class T> DEVICE T narrow(Wide<T> x) { return Narrow<T>::from(x); }

// The two numbers in a word.
DEVICE void unpack(unsigned int word, bf16, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}
DEVICE void unpack(unsigned int word, fp16, float& low, float& high) {
    low = fp16_to_float((unsigned short)word);
    high = fp16_to_float((unsigned short)(word >> 16));
}
DEVICE unsigned int pack(float low, float high, bf16) { return pack_bf16(low, high); }
DEVICE unsigned int pack(float low, float high, fp16) { return pack_fp16(low, high); }

// Against the bias of the hardware's 2^x, which is low on average. One step would not show it, but
// a state is a product of many. The constant goes into the multiplication before. It is too small
// to move 2^0 from 1, so a step of no duration still changes no state.
constexpr float EXP2_BIAS = 2e-8f;

// c + log(1 + u) for 0 <= u <= 1, the logarithm to 2e-7 of itself: u times a polynomial fitted to
// log(1 + u) / u for the least relative error, 3e-8 before rounding. One that went through
// log2(1 + u) would lose all but a few bits of a small u, and steps are small.
DEVICE float add_log1p(float u, float c) {
    float p = 0.005232693627476692f;
    p = fmaf(p, u, -0.02950523979961872f);
    p = fmaf(p, u, 0.07822596281766891f);
    p = fmaf(p, u, -0.13663247227668762f);
    p = fmaf(p, u, 0.19106008112430573f);
    p = fmaf(p, u, -0.2484298199415207f);
    p = fmaf(p, u, 0.3331909775733948f);
    p = fmaf(p, u, -0.4999949336051941f);
    p = fmaf(p, u, 0.9999999403953552f);
    return fmaf(p, u, c);
}

// How many numbers of T sixteen bytes hold, and those numbers widened or narrowed.
template <class T> struct Sixteen {
    static constexpr int COUNT = 8;
    static METHOD void widen(uint4 v, float* out) {
        unpack(v.x, T{}, out[0], out[1]);
        unpack(v.y, T{}, out[2], out[3]);
        unpack(v.z, T{}, out[4], out[5]);
        unpack(v.w, T{}, out[6], out[7]);
    }
    static METHOD uint4 narrow(const float* in) {
        return make_uint4(
            pack(in[0], in[1], T{}), pack(in[2], in[3], T{}), pack(in[4], in[5], T{}),
            pack(in[6], in[7], T{})
        );
    }
};
template <> struct Sixteen<float> {
    static constexpr int COUNT = 4;
    static METHOD void widen(uint4 v, float* out) {
        out[0] = __uint_as_float(v.x);
        out[1] = __uint_as_float(v.y);
        out[2] = __uint_as_float(v.z);
        out[3] = __uint_as_float(v.w);
    }
    static METHOD uint4 narrow(const float* in) {
        return make_uint4(
            __float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]),
            __float_as_uint(in[3])
        );
    }
};
template <> struct Sixteen<double> {
    static constexpr int COUNT = 2;
    static METHOD double join(unsigned int low, unsigned int high) {
        return __longlong_as_double((long long)(((unsigned long long)high << 32) | low));
    }
    static METHOD void widen(uint4 v, double* out) {
        out[0] = join(v.x, v.y);
        out[1] = join(v.z, v.w);
    }
    static METHOD uint4 narrow(const double* in) {
        unsigned long long a = (unsigned long long)__double_as_longlong(in[0]);
        unsigned long long b = (unsigned long long)__double_as_longlong(in[1]);
        return make_uint4(
            (unsigned int)a, (unsigned int)(a >> 32), (unsigned int)b, (unsigned int)(b >> 32)
        );
    }
};
