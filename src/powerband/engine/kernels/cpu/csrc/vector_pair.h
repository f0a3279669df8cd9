// Sixteen lanes as two vectors of 32 bytes, with the operators of a built-in vector: what simd.h's types are on AVX2.
// (There the compiler keeps a 64-byte vector in memory as soon as it lives from one iteration to the next, and compares
// it lane by lane.)
#pragma once

#include <cstdint>

namespace powerband {

template <class T>
struct Pair {
    typedef T Half __attribute__((vector_size(32)));
    static constexpr int kHalf = 32 / sizeof(T);

    Half low, high;

    Pair() = default;
    POWERBAND_INLINE Pair(T x) : low(Half{} + x), high(low) {}
    POWERBAND_INLINE Pair(Half l, Half h) : low(l), high(h) {}
    template <class... Rest>
        requires(sizeof...(Rest) == 2 * kHalf - 2)
    POWERBAND_INLINE Pair(T first, T second, Rest... rest) {
        const T values[] = {first, second, static_cast<T>(rest)...};
        __builtin_memcpy(this, values, sizeof values);
    }

    POWERBAND_INLINE T operator[](int i) const { return i < kHalf ? low[i] : high[i - kHalf]; }
    POWERBAND_INLINE T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }

    POWERBAND_INLINE Pair operator-() const { return {-low, -high}; }
    POWERBAND_INLINE Pair operator~() const { return {~low, ~high}; }
    POWERBAND_INLINE friend Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
    POWERBAND_INLINE friend Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
    POWERBAND_INLINE friend Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
    POWERBAND_INLINE friend Pair operator/(Pair a, Pair b) { return {a.low / b.low, a.high / b.high}; }
    POWERBAND_INLINE friend Pair operator&(Pair a, Pair b) { return {a.low & b.low, a.high & b.high}; }
    POWERBAND_INLINE friend Pair operator|(Pair a, Pair b) { return {a.low | b.low, a.high | b.high}; }
    POWERBAND_INLINE friend Pair operator^(Pair a, Pair b) { return {a.low ^ b.low, a.high ^ b.high}; }
    POWERBAND_INLINE friend Pair operator<<(Pair a, int bits) { return {a.low << bits, a.high << bits}; }
    POWERBAND_INLINE friend Pair operator>>(Pair a, int bits) { return {a.low >> bits, a.high >> bits}; }
    POWERBAND_INLINE Pair& operator+=(Pair b) { return *this = *this + b; }
    POWERBAND_INLINE Pair& operator-=(Pair b) { return *this = *this - b; }
    POWERBAND_INLINE Pair& operator*=(Pair b) { return *this = *this * b; }
    POWERBAND_INLINE Pair& operator/=(Pair b) { return *this = *this / b; }
    POWERBAND_INLINE Pair& operator&=(Pair b) { return *this = *this & b; }
    POWERBAND_INLINE Pair& operator|=(Pair b) { return *this = *this | b; }
    POWERBAND_INLINE Pair& operator^=(Pair b) { return *this = *this ^ b; }

    typedef Pair<int32_t> Mask;  // of 32-bit lanes: all bits where it holds
    POWERBAND_INLINE friend Mask operator<(Pair a, Pair b) { return {a.low < b.low, a.high < b.high}; }
    POWERBAND_INLINE friend Mask operator>(Pair a, Pair b) { return {a.low > b.low, a.high > b.high}; }
    POWERBAND_INLINE friend Mask operator<=(Pair a, Pair b) { return {a.low <= b.low, a.high <= b.high}; }
    POWERBAND_INLINE friend Mask operator>=(Pair a, Pair b) { return {a.low >= b.low, a.high >= b.high}; }
    POWERBAND_INLINE friend Mask operator==(Pair a, Pair b) { return {a.low == b.low, a.high == b.high}; }
    POWERBAND_INLINE friend Mask operator!=(Pair a, Pair b) { return {a.low != b.low, a.high != b.high}; }
};

}  // namespace powerband
