// Every kernel table against the scalar one, on random matrices of odd shapes: products of packed weights are the same
// floats, bit for bit; sums across lanes agree within rounding, attention with double precision.
//
// Built and run by tests/test_kernels.py, also with AddressSanitizer and UndefinedBehaviorSanitizer, and for Arm under
// qemu. Outputs start as NaN; weights of columns that are not listed have NaN scales, so that reading one shows.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "half.h"
#include "kernels.h"

using namespace pennyweight;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
int failures = 0;

void expect_same(const std::string& what, const float* found, const float* wanted, int n) {
    for (int i = 0; i < n; i++)
        if (std::memcmp(found + i, wanted + i, sizeof(float)) != 0 && !(found[i] == 0 && wanted[i] == 0)) {
            std::printf("%s: element %d of %d is %.9g, the scalar kernel says %.9g\n", what.c_str(), i, n, found[i],
                        wanted[i]);
            failures++;
            return;
        }
}

// Exactly as many bytes as promised, so that the sanitizer sees a read past the end.
std::unique_ptr<std::uint8_t[]> random_bytes(std::size_t n, std::mt19937& random) {
    auto bytes = std::make_unique<std::uint8_t[]>(n);
    for (std::size_t i = 0; i < n; i++) bytes[i] = std::uint8_t(random());
    return bytes;
}

void put_half(std::uint8_t* at, float value, Half kind) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    std::uint16_t half = std::uint16_t(bits >> 16);
    if (kind == Half::float16) {  // normal values only, rounded down
        const int exponent = int(bits >> 23 & 255) - 127 + 15;
        half = std::isnan(value) ? 0x7e00 : std::uint16_t((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
    }
    std::memcpy(at, &half, 2);
}

std::vector<float> activations(int n, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float& v : x) v = normal(random) * (random() % 200 == 0 ? 12.0f : 1.0f);
    for (int i = 0; i < n; i += 7) x[i] = 0;
    return x;
}

struct Quantised {
    std::vector<std::int8_t> codes;
    std::vector<float> scale, sum;
    std::vector<std::int32_t> minus8;
    Activations view() const { return {codes.data(), scale.data(), minus8.data(), sum.data()}; }
};

Quantised quantised(const Kernels& k, const std::vector<float>& x) {
    const int n = int(x.size());
    Quantised q{std::vector<std::int8_t>(n), std::vector<float>(n / 32), std::vector<float>(n / 32),
                std::vector<std::int32_t>(n / 32)};
    k.quantise(x.data(), n, q.codes.data(), q.scale.data(), q.minus8.data(), q.sum.data());
    return q;
}

void check_rows(const Kernels& k, std::mt19937& random) {
    const Kernels& scalar = kernels_scalar();
    for (int bits : {3, 4, 5, 6, 8})
        for (bool affine : {false, true})
            for (int group : {32, 64, 128})
                for (int rows : {1, 16, 33})
                    for (int cols : {1, 32, 63, 257})
                        for (int count : {1, 2, 3, 7, 13}) {
                            Rows w{rows, cols, bits, group, affine, random() % 2 ? Half::bfloat16 : Half::float16};
                            auto data = random_bytes(w.bytes(), random);
                            w.data = data.get();
                            for (int tile = 0; tile < w.tiles(); tile++)
                                for (int g = 0; g < w.groups(); g++)
                                    for (int i = 0; i < (affine ? 2 : 1) * Rows::kTile; i++)
                                        put_half(data.get() + tile * w.tile_bytes() + (g + 1) * w.group_bytes() -
                                                     2 * ((affine ? 2 : 1) * Rows::kTile - i),
                                                 0.01f + 0.001f * float(random() % 64), w.half);
                            std::vector<Quantised> kept;
                            std::vector<Activations> x;
                            for (int t = 0; t < count; t++)
                                kept.push_back(quantised(scalar, activations(w.padded_cols(), random)));
                            for (auto& q : kept) x.push_back(q.view());
                            const int padded = w.tiles() * Rows::kTile;
                            std::vector<float> wanted(padded * count, kNaN), found(padded * count, kNaN);
                            scalar.rows_times(w, x.data(), count, wanted.data(), padded, 0, w.tiles());
                            k.rows_times(w, x.data(), count, found.data(), padded, 0, w.tiles());
                            expect_same(std::string(k.name) + " rows_times, " + std::to_string(bits) + " bits, group " +
                                            std::to_string(group) + (affine ? ", affine, " : ", ") +
                                            std::to_string(rows) + " x " + std::to_string(cols) + ", " +
                                            std::to_string(count) + " tokens",
                                        found.data(), wanted.data(), padded * count);
                        }
}

// Products with trellis codes, in ranges of 16 rows.
void check_trellis(const Kernels& k, std::mt19937& random) {
    const Kernels& scalar = kernels_scalar();
    for (int bits = 2; bits <= 6; bits++)
        for (int group : {32, 64, 128})
            for (int rows : {1, 64, 150})
                for (int cols : {1, 32, 63, 257})
                    for (int count : {1, 2, 4, 5, 13}) {
                        Trellis w{rows, cols, bits, group};
                        auto data = random_bytes(w.bytes(), random);
                        w.data = data.get();
                        for (int tile = 0; tile < w.tiles(); tile++)
                            for (int r = 0; r < Trellis::kTile; r++) {
                                const float factor = 1e-6f * float(1 + random() % 64);
                                std::memcpy(data.get() + (tile + 1) * w.tile_bytes() - sizeof(float) * (Trellis::kTile - r),
                                            &factor, sizeof(float));
                            }
                        std::vector<Quantised> kept;
                        std::vector<Activations> x;
                        for (int t = 0; t < count; t++) kept.push_back(quantised(scalar, activations(w.padded_cols(), random)));
                        for (auto& q : kept) x.push_back(q.view());
                        const int first = rows > 64 ? 2 : 0, last = (rows + Rows::kTile - 1) / Rows::kTile;
                        const int made = Rows::kTile * (last - first);
                        std::vector<float> wanted(made * count, kNaN), found(made * count, kNaN);
                        scalar.trellis_times(w, x.data(), count, wanted.data(), made, first, last);
                        k.trellis_times(w, x.data(), count, found.data(), made, first, last);
                        expect_same(std::string(k.name) + " trellis_times, " + std::to_string(bits) + " bits, group " +
                                        std::to_string(group) + ", " + std::to_string(rows) + " x " + std::to_string(cols) +
                                        ", " + std::to_string(count) + " tokens",
                                    found.data(), wanted.data(), made * count);
                    }
}

// Products of one tile with several tokens, in ranges of units, also beyond what fits one table; every token must get
// what it gets alone.
void check_zigzag(const Kernels& k, std::mt19937& random) {
    const Kernels& scalar = kernels_scalar();
    const float infinity = std::numeric_limits<float>::infinity();
    for (Scales scales : {Scales::symmetric, Scales::affine, Scales::super})
        for (int group : {32, 64, 128})
            for (int tile_rows : {128, 384, 2176})
                for (int cols : {1, 3, 4, 15, 17, 64})
                    for (auto [threshold, tokens] : {std::pair{-1.0f, 1}, {-1.0f, 2}, {-1.0f, 35}, {0.0f, 1}, {0.7f, 1},
                                                     {0.7f, 3}, {infinity, 1}}) {
                        if (tile_rows == 2176 && tokens == 35 && cols != 17) continue;  // the scalar kernel is slow
                        if (scales == Scales::super && group != 32) continue;
                        if (scales == Scales::super) tile_rows = round_up(tile_rows, 256);
                        Zigzag w{tile_rows + 5, cols, tile_rows, group, scales};
                        auto data = random_bytes(w.bytes(), random);
                        w.data = data.get();
                        auto x = activations(cols, random);
                        std::vector<std::int32_t> index(cols + 16);
                        std::vector<float> value(cols + 16);
                        const int count = scalar.collect(x.data(), nullptr, threshold, cols, index.data(), value.data());
                        const int tile = 1, units = tile_rows / Zigzag::kUnitRows, first = units > 2 ? w.whole_units() : 0;
                        const int last = units;
                        for (int j = 0; j < cols; j++) {
                            const bool listed = std::find(index.begin(), index.begin() + count, j) != index.begin() + count;
                            std::uint8_t* chunk = data.get() + tile * w.tile_bytes() + j * w.chunk_bytes();
                            // Of eight halves of a block of super scales the first two are factors, the others codes.
                            for (int i = 0; i < int(w.scale_bytes()) / 2; i++)
                                if (scales != Scales::super || i % 8 < 2)
                                    put_half(chunk + 2 * i, listed ? 0.01f + 0.001f * float(random() % 64) : kNaN, Half::float16);
                        }
                        std::vector<std::vector<float>> values{{value.begin(), value.begin() + count}};
                        for (int t = 1; t < tokens; t++) values.push_back(activations(count, random));
                        std::vector<const float*> at;
                        for (auto& v : values) at.push_back(v.data());
                        const int rows = Zigzag::kUnitRows * (last - first), stride = rows + 3;
                        std::vector<float> wanted(stride * tokens, 7.0f), found(stride * tokens, 7.0f);
                        for (int t = 0; t < tokens; t++)
                            for (int r = 0; r < rows; r++) wanted[t * stride + r] = found[t * stride + r] = kNaN;
                        for (int t = 0; t < tokens; t++)
                            scalar.zigzag_times(w, tile, first, last, index.data(), at.data() + t, 1, count,
                                                wanted.data() + t * stride, stride);
                        k.zigzag_times(w, tile, first, last, index.data(), at.data(), tokens, count, found.data(), stride);
                        for (float v : wanted)
                            if (std::isnan(v)) {
                                std::printf("scalar zigzag_times read a column that is not listed\n");
                                failures++;
                                break;
                            }
                        expect_same(std::string(k.name) + " zigzag_times, group " + std::to_string(group) +
                                        ", scales " + std::to_string(int(scales)) + ", " + std::to_string(tile_rows) + " x " +
                                        std::to_string(cols) + ", " + std::to_string(count) + " columns, " +
                                        std::to_string(tokens) + " tokens",
                                    found.data(), wanted.data(), stride * tokens);
                    }
}

void check_quantise_and_collect(const Kernels& k, std::mt19937& random) {
    const Kernels& scalar = kernels_scalar();
    for (int n : {32, 64, 224, 4096}) {
        const auto x = activations(n, random);
        const Quantised wanted = quantised(scalar, x), found = quantised(k, x);
        expect_same(std::string(k.name) + " quantise, scale", found.scale.data(), wanted.scale.data(), n / 32);
        expect_same(std::string(k.name) + " quantise, sum", found.sum.data(), wanted.sum.data(), n / 32);
        if (found.codes != wanted.codes || found.minus8 != wanted.minus8) {
            std::printf("%s quantise: other codes\n", k.name);
            failures++;
        }
    }
    for (int n : {1, 3, 15, 16, 17, 63, 257, 4096})
        for (float threshold : {-1.0f, 0.0f, 0.5f, std::numeric_limits<float>::infinity()})
            for (bool weighted : {false, true}) {
                const auto x = activations(n, random);
                const std::vector<float> weight(n, 0.5f);
                std::vector<std::int32_t> wanted(n + 16, -1), found(n + 16, -1);
                std::vector<float> wanted_x(n + 16, kNaN), found_x(n + 16, kNaN);
                const float* by = weighted ? weight.data() : nullptr;
                const int a = scalar.collect(x.data(), by, threshold, n, wanted.data(), wanted_x.data());
                const int b = k.collect(x.data(), by, threshold, n, found.data(), found_x.data());
                if (a != b || !std::equal(wanted.begin(), wanted.begin() + a, found.begin())) {
                    std::printf("%s collect: %d columns of %d above %g, the scalar kernel finds %d\n", k.name, b, n,
                                double(threshold), a);
                    failures++;
                }
                expect_same(std::string(k.name) + " collect", found_x.data(), wanted_x.data(), a);
            }
}

void expect_near(const std::string& what, const std::vector<float>& found, const std::vector<float>& wanted,
                 double relative) {
    double error = 0, size = 0;
    for (std::size_t i = 0; i < wanted.size(); i++) {
        error += std::pow(double(found[i]) - wanted[i], 2);
        size += std::pow(double(wanted[i]), 2);
    }
    if (!(std::sqrt(error) <= relative * std::sqrt(size))) {
        std::printf("%s: relative error %.3g, allowed %.3g\n", what.c_str(), std::sqrt(error / size), relative);
        failures++;
    }
}

double gated(Activation activation, double gate, double up) {
    switch (activation) {
        case Activation::silu: return gate / (1 + std::exp(-gate)) * up;
        case Activation::gelu_tanh:
            return 0.5 * gate * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (gate + 0.044715 * std::pow(gate, 3)))) * up;
        case Activation::relu2: return std::pow(std::max(gate, 0.0), 2) * up;
        case Activation::clamped:
            gate = std::min(gate, 7.0);
            return gate / (1 + std::exp(-1.702 * gate)) * (std::clamp(up, -7.0, 7.0) + 1);
    }
    return 0;
}

void check_floats(const Kernels& k, std::mt19937& random) {
    const Kernels& scalar = kernels_scalar();
    const std::string name = k.name;
    for (int n : {1, 3, 15, 16, 17, 63, 257, 2048}) {
        const auto x = activations(n, random), y = activations(n, random);
        std::vector<float> wanted(n, kNaN), found(n, kNaN);
        scalar.rms_norm(x.data(), y.data(), 1e-5f, n, wanted.data());
        k.rms_norm(x.data(), y.data(), 1e-5f, n, found.data());
        expect_near(name + " rms_norm of " + std::to_string(n), found, wanted, 1e-6);
        for (int a = 0; a < kActivations; a++) {
            const std::string what = name + " gate " + std::to_string(a) + " of " + std::to_string(n);
            scalar.gate[a](x.data(), y.data(), n, wanted.data());
            k.gate[a](x.data(), y.data(), n, found.data());
            expect_near(what, found, wanted, 1e-6);
            for (int i = 0; i < n; i++) wanted[i] = float(gated(Activation(a), x[i], y[i]));
            expect_near(what + " against libm", found, wanted, 1e-6);
            const std::vector<float> broken(n, kNaN);
            for (auto [gate, up] : {std::pair{&broken, &y}, {&x, &broken}}) {
                k.gate[a](gate->data(), up->data(), n, found.data());
                if (!std::all_of(found.begin(), found.end(), [](float v) { return std::isnan(v); }))
                    std::printf("%s: NaN comes out as a number\n", what.c_str()), failures++;
            }
        }
        std::vector<float> a = x, b = x;
        scalar.add(a.data(), y.data(), n);
        k.add(b.data(), y.data(), n);
        expect_near(name + " add", b, a, 0);
        for (float bound : {0.0f, 0.5f, 30.0f}) {
            b = x;
            k.cap(b.data(), 0.25f, bound, n);
            for (int i = 0; i < n; i++) a[i] = bound > 0 ? bound * std::tanh(double(x[i]) / 4 / bound) : x[i] / 4;
            expect_near(name + " cap", b, a, 1e-6 * std::max(1.0f, bound));
        }
        std::vector<std::uint16_t> halves(n), others(n);
        scalar.to_half(x.data(), n, halves.data());
        k.to_half(x.data(), n, others.data());
        if (halves != others) std::printf("%s to_half: other bits\n", k.name), failures++;
        if (n % 2 == 0) {
            a = b = x;
            scalar.rotate(a.data(), y.data(), wanted.data(), n / 2);
            k.rotate(b.data(), y.data(), wanted.data(), n / 2);
            expect_near(name + " rotate", b, a, 1e-6);
        }
        for (int count : {1, 5}) {
            const int rows = 7;
            std::vector<std::vector<float>> tokens;
            std::vector<const float*> at;
            for (int t = 0; t < count; t++) tokens.push_back(activations(n, random));
            for (auto& t : tokens) at.push_back(t.data());
            std::vector<float> wanted_y(rows * count, kNaN), found_y(rows * count, kNaN);
            for (auto type : {Wide::Type::float16, Wide::Type::bfloat16, Wide::Type::float32}) {
                Wide w{rows, n, type, nullptr};
                auto weights = random_bytes(rows * w.row_bytes(), random);
                w.data = weights.get();
                for (int i = 0; i < rows * n; i++)
                    if (const float v = 0.5f + float(random() % 1000) * 0.001f; type == Wide::Type::float32)
                        std::memcpy(weights.get() + 4 * i, &v, 4);
                    else
                        put_half(weights.get() + 2 * i, v, type == Wide::Type::float16 ? Half::float16 : Half::bfloat16);
                scalar.wide_times(w, at.data(), count, wanted_y.data(), rows, 0, rows);
                k.wide_times(w, at.data(), count, found_y.data(), rows, 0, rows);
                expect_near(name + " wide_times", found_y, wanted_y, 1e-5);
            }
        }
    }
}

// Spread vectors have the dot products, and so the lengths, of plain ones; what is large in one channel, or alike in all, is
// found in many.
void check_spread(std::mt19937& random) {
    for (int n : {1, 2, 3, 8, 24, 64, 80, 96, 112, 128, 257})
        for (int large : {0, n / 2, n - 1, n}) {
            auto x = activations(n, random), y = activations(n, random);
            for (int i = 0; i < n; i++) x[i] += i == large || large == n ? 100 : 0;
            const auto dot = [&](const std::vector<float>& a, const std::vector<float>& b) {
                double sum = 0;
                for (int i = 0; i < n; i++) sum += double(a[i]) * b[i];
                return float(sum);
            };
            const float before = dot(x, y), length = dot(x, x);
            spread(x.data(), n);
            spread(y.data(), n);
            const std::string what = "spread " + std::to_string(n) + " with " + std::to_string(large) + " large";
            expect_near(what, {dot(x, y), dot(x, x)}, {before, length}, 1e-6);
            float most = 0;
            for (float v : x) most = std::max(most, std::fabs(v));
            const float share = most * std::sqrt(float(n) / length);  // of a channel, if all had the same
            if (n >= 8 && share > 4) std::printf("%s: a channel of %g times the mean\n", what.c_str(), double(share)), failures++;
        }
}

// Codes and their scale: within half a step, of which 127 make the largest; NaN where a number is none.
void check_encode(std::mt19937& random) {
    for (float size : {1e-20f, 1.0f, 1e30f})
        for (int n : {1, 3, 63, 128}) {
            auto x = activations(n, random);
            x[n - 1] = 3;
            for (float& v : x) v *= size;
            std::vector<std::int8_t> codes(2 * n, 99);
            const auto at = [&](int i) -> std::int8_t& { return codes[2 * i]; };
            const float scale = from_bfloat16(encode(x.data(), n, at));
            float most = 0;
            for (float v : x) most = std::max(most, std::fabs(v));
            bool holds = scale >= most / 127 && scale <= most / 127 * 1.008f;
            for (int i = 0; i < n; i++) holds = holds && std::fabs(codes[2 * i] * scale - x[i]) <= 0.5001f * scale && codes[2 * i + 1] == 99;
            if (!holds) std::printf("encode %d numbers of %g: codes are off\n", n, double(size)), failures++;
            for (float none : {kNaN, -std::numeric_limits<float>::infinity()}) {
                x[n / 2] = none;
                if (!std::isnan(from_bfloat16(encode(x.data(), n, at))))
                    std::printf("encode: %g has a scale\n", double(none)), failures++;
            }
            std::fill(x.begin(), x.end(), 0.0f);
            if (encode(x.data(), n, at) != 0 || codes[0] != 0) std::printf("encode: zeros are not\n"), failures++;
        }
}

// A head's keys or values as a cache has them: blocks of 16 positions of n numbers, all NaN to begin with.
struct Kept {
    Kept(Cache cache, int n, int blocks, bool transposed)
        : cache(cache), n(n), transposed(transposed), bytes(blocks * Cached::block_bytes(cache, n)) {
        for (int i = 0; i < blocks * Cached::kBlock; i++) put(i, std::vector<float>(n, kNaN));
    }

    // Returns what is kept of x.
    std::vector<float> put(int position, std::vector<float> x) {
        const int place = position % Cached::kBlock, first = transposed ? place : place * n, stride = transposed ? Cached::kBlock : 1;
        std::uint8_t* block = bytes.data() + position / Cached::kBlock * Cached::block_bytes(cache, n);
        if (cache == Cache::int8) {
            const auto code = [&](int d) -> std::int8_t& {
                return reinterpret_cast<std::int8_t*>(block)[transposed ? Cached::key_at(d, place, n) : Cached::value_at(d, place, n)];
            };
            const std::uint16_t scale = encode(x.data(), n, code);
            reinterpret_cast<std::uint16_t*>(block + Cached::kBlock * n)[place] = scale;
            for (int i = 0; i < n; i++) x[i] = code(i) * from_bfloat16(scale);
        } else if (cache == Cache::float16) {
            for (int i = 0; i < n; i++) {
                reinterpret_cast<std::uint16_t*>(block)[first + i * stride] = to_float16(x[i]);
                x[i] = from_float16(to_float16(x[i]));
            }
        } else {
            for (int i = 0; i < n; i++) reinterpret_cast<float*>(block)[first + i * stride] = x[i];
        }
        return x;
    }

    Cache cache;
    int n;
    bool transposed;
    std::vector<std::uint8_t> bytes;
};

// Against attention in double precision, with caches full of NaN where no position is seen.
void check_attend(const Kernels& k, std::mt19937& random) {
    for (Cache cache : {Cache::float16, Cache::int8, Cache::float32})
        for (auto [head_dim, value_dim] : {std::pair{8, 8}, {64, 64}, {80, 80}, {128, 128}, {24, 40}, {72, 16}, {21, 24}, {640, 16}})
            for (auto [first, last] : {std::pair{0, 1}, {0, 16}, {0, 37}, {5, 37}, {40, 75}})
                for (int count : {1, 3, 4, 6, 9})
                    for (bool sinks : {false, true}) {
                        const int blocks = 4, places = blocks * Cached::kBlock;  // a ring
                        const float cap = count % 3 ? 0 : 1.5f, scale = 0.4f / std::sqrt(float(head_dim));
                        Kept keys(cache, head_dim, blocks, true), values(cache, Cached::padded(value_dim), blocks, false);
                        std::vector<std::vector<float>> key(last), value(last);
                        for (int p = first; p < last; p++) {
                            key[p] = keys.put(p % places, activations(head_dim, random));
                            auto own = activations(value_dim, random);
                            own.resize(values.n);
                            value[p] = values.put(p % places, own);
                        }
                        std::vector<float> scratch(Cached::scratch_floats(head_dim), kNaN);
                        Cached a{keys.bytes.data(), values.bytes.data(), cache, head_dim, value_dim, blocks, first, last, scale,
                                 cap, scratch.data()};
                        std::vector<std::vector<float>> queries;
                        std::vector<const float*> query;
                        std::vector<float> found(count * value_dim, kNaN), wanted(count * value_dim), sink(count, 0.7f);
                        std::vector<float*> out;
                        for (int m = 0; m < count; m++) queries.push_back(activations(head_dim, random));
                        for (int m = 0; m < count; m++) {
                            query.push_back(queries[m].data());
                            out.push_back(found.data() + m * value_dim);
                            double total = sinks ? std::exp(0.7) : 0;
                            std::vector<double> mixed(value_dim);
                            for (int p = first; p < last; p++) {
                                double dot = 0;
                                for (int d = 0; d < head_dim; d++) dot += double(queries[m][d]) * key[p][d];
                                const double weight = std::exp(cap > 0 ? cap * std::tanh(scale * dot / cap) : scale * dot);
                                total += weight;
                                for (int d = 0; d < value_dim; d++) mixed[d] += weight * value[p][d];
                            }
                            for (int d = 0; d < value_dim; d++) wanted[m * value_dim + d] = float(mixed[d] / total);
                        }
                        // In one piece, and as two segments that are merged.
                        const int cut = last - first > 20 ? first + 20 : last;
                        std::vector<Share> share(2 * count);
                        std::vector<float> rest(count * value_dim, kNaN);
                        std::vector<float*> out_rest;
                        for (int m = 0; m < count; m++) out_rest.push_back(rest.data() + m * value_dim);
                        a.last = cut;
                        k.attend(a, query.data(), count, share.data(), out.data());
                        if (cut < last) {
                            a.first = cut;
                            a.last = last;
                            k.attend(a, query.data(), count, share.data() + count, out_rest.data());
                        }
                        for (int m = 0; m < count; m++) {
                            std::vector<float> both(found.begin() + m * value_dim, found.begin() + (m + 1) * value_dim);
                            both.insert(both.end(), rest.begin() + m * value_dim, rest.begin() + (m + 1) * value_dim);
                            merge(share.data() + m, count, both.data(), value_dim, cut < last ? 2 : 1,
                                  sinks ? sink.data() + m : nullptr, value_dim, out[m]);
                        }
                        expect_near(std::string(k.name) + " attend, heads of " + std::to_string(head_dim) + " and " +
                                        std::to_string(value_dim) + ", positions " + std::to_string(first) + " to " + std::to_string(last) + ", cache " + std::to_string(int(cache)),
                                    found, wanted, cache == Cache::int8 ? 5e-4 : 2e-6);  // queries and weights of 16 bits
                    }
}

// A key or a value that is no number, and is seen, leaves no number.
void check_attend_to_nan(const Kernels& k) {
    for (Cache cache : {Cache::float16, Cache::int8, Cache::float32})
        for (int broken : {3, -4, 17, 31, -31}) {  // below zero: a value
            const int dim = 16, count = 3;
            Kept keys(cache, dim, 2, true), values(cache, dim, 2, false);
            for (int p = 3; p < 32; p++) {
                keys.put(p, std::vector<float>(dim, p == broken ? kNaN : 1.0f));
                values.put(p, std::vector<float>(dim, p == -broken ? kNaN : 1.0f));
            }
            std::vector<float> scratch(Cached::scratch_floats(dim)), query(dim, 1.0f), out(dim * count);
            Cached a{keys.bytes.data(), values.bytes.data(), cache, dim, dim, 2, 3, 32, 1.0f, 0, scratch.data()};
            const float* queries[] = {query.data(), query.data(), query.data()};
            float* outs[] = {&out[0], &out[dim], &out[2 * dim]};
            Share share[count];
            k.attend(a, queries, count, share, outs);
            if (!std::all_of(out.begin(), out.end(), [](float v) { return std::isnan(v); }))
                std::printf("%s attend, cache %d: NaN comes out as a number\n", k.name, int(cache)), failures++;
        }
}

}  // namespace

int main() {
    std::mt19937 random(1);
    check_floats(kernels_scalar(), random);
    check_spread(random);
    check_encode(random);
    check_attend(kernels_scalar(), random);
    check_attend_to_nan(kernels_scalar());
    for (const Kernels* k : {kernels_avx512(), kernels_avx2(), kernels_neon()}) {
        if (!k) continue;
        check_floats(*k, random);
        check_attend(*k, random);
        check_attend_to_nan(*k);
        check_quantise_and_collect(*k, random);
        check_rows(*k, random);
        check_trellis(*k, random);
        check_zigzag(*k, random);
        std::printf("%s checked\n", k->name);
    }
    if (failures) std::printf("%d differences\n", failures);
    return failures ? 1 : 0;
}
