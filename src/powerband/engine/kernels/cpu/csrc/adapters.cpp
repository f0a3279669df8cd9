// What LoRA adapters add to a projection: x @ A.T @ B.T, the scale being in B, each for the rows of its requests. All
// adapters of a step in two loops over the threads, because each of them alone has too little to do.
//
//     a   [rank, in]  in panels as weights are: packed[rank / 16][in / 2][16][2]
//     b   [out, rank] likewise, but only as deep as the rank, rounded up to 4: packed[out / 16][depth / 2][16][2]
//
// In decode steps this reads A and B once, at the memory's speed.
#include "adapters.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "common.h"
#include "gemm_bf16.h"
#include "linear_epilogue.h"
#include "scratch.h"

namespace powerband {
namespace {

constexpr int64_t kPanel = 16;
constexpr int64_t kDepthStep = 4;
constexpr int64_t kTaskBytes = 32 << 10;
// B's panels are too short for a product to fetch ahead within them: fetched are those 4 KB further on (measured: with
// 2 and 8 KB less is gained).
constexpr int64_t kFetched = (4 << 10) / sizeof(bf16);

}  // namespace

// Several where our projection is several in the checkpoint: each has its own outputs.
struct AdapterDelta {
    struct Piece {
        Tensor a, b;
        int64_t rank, start, size;

        int64_t depth() const { return ceil_div(rank, kDepthStep) * kDepthStep; }
    };
    std::vector<Piece> pieces;
    int64_t in_features, out_features;
};

namespace {

// inner [rows][stride] = x @ A.T, with zeros between the rank and the stride
struct StoreInner {
    bf16* inner;
    int64_t stride, rank, first_row;

    void prepare(int64_t, int64_t) const {}

    void operator()(int64_t row, int64_t column, f32x16 left, f32x16 right) const {
        if (column + kPanel >= rank) right = f32x16{};
        store_pair(inner + (row - first_row) * stride + column, left, right, 2 * kPanel);
    }
};

// One piece of one adapter, for its rows.
struct Unit {
    const AdapterDelta::Piece* piece;
    int64_t first, rows;
    bf16* inner;

    int64_t stride() const { return padded_k(piece->rank); }

    PanelPair pair(const Tensor& packed, int64_t columns, int64_t depth, int64_t i) const {
        const bf16* left = static_cast<const bf16*>(packed.data_ptr()) + i * 2 * kPanel * depth;
        return {left, (2 * i + 1) * kPanel < columns ? left + kPanel * depth : left};
    }

    void multiply_a(const Activations& x, int64_t i) const {
        const PanelProduct product(x.data, x.features, first, rows, x.features);
        const StoreInner store{inner, stride(), piece->rank, first};
        product.multiply(pair(piece->a, piece->rank, x.features, i), nullptr, i * 2 * kPanel, store);
    }

    void multiply_b(const Result& out, int64_t i) const {
        alignas(64) float sums[kMaxVectorRows * 32];
        const int64_t column = i * 2 * kPanel, count = std::min<int64_t>(piece->size - column, 2 * kPanel);
        const PanelPair panels = pair(piece->b, piece->size, piece->depth(), i);
        for (int64_t line = 0; line < piece->depth(); ++line) prefetch(panels.left + kFetched + line * 2 * kPanel);
        for (int64_t row = 0; row < rows; row += kMaxVectorRows) {
            const int64_t num = std::min(kMaxVectorRows, rows - row);
            multiply_vectors(inner + row * stride(), stride(), num, piece->depth(), panels, nullptr, sums);
            for (int64_t j = 0; j < num; ++j) {
                bf16* to = out.data + (first + row + j) * out.features + piece->start + column;
                f32x16 left, right;
                load_pair(to, count, left, right);
                store_pair(to, left + load(sums + j * 32), right + load(sums + j * 32 + 16), count);
            }
        }
    }
};

// Some pairs of panels of one unit.
struct Share {
    int64_t unit, first, end;
};

// pairs_of(unit), pair_bytes(unit) → shares of all units, of some kTaskBytes each
template <class Pairs, class Bytes>
std::vector<Share> shares(const std::vector<Unit>& units, const Pairs& pairs_of, const Bytes& pair_bytes) {
    std::vector<Share> found;
    for (int64_t unit = 0; unit < static_cast<int64_t>(units.size()); ++unit) {
        const int64_t pairs = pairs_of(units[unit]);
        const int64_t each = std::max<int64_t>(kTaskBytes / std::max<int64_t>(pair_bytes(units[unit]), 1), 1);
        for (int64_t i = 0; i < pairs; i += each) found.push_back({unit, i, std::min(i + each, pairs)});
    }
    return found;
}

// Deltas by number, until they are freed.
class Deltas {
   public:
    static Deltas& instance() {
        static Deltas* deltas = new Deltas;
        return *deltas;
    }

    int64_t add(std::shared_ptr<const AdapterDelta> delta) {
        const std::lock_guard guard(mutex_);
        deltas_.emplace(++last_, std::move(delta));
        return last_;
    }

    std::shared_ptr<const AdapterDelta> get(int64_t number) {
        const std::lock_guard guard(mutex_);
        const auto found = deltas_.find(number);
        check(found != deltas_.end(), "there is no such adapter");
        return found->second;
    }

    void free(int64_t number) {
        const std::lock_guard guard(mutex_);
        deltas_.erase(number);
    }

   private:
    std::mutex mutex_;
    std::map<int64_t, std::shared_ptr<const AdapterDelta>> deltas_;
    int64_t last_ = 0;
};

void check_panels(const Tensor& packed, int64_t columns, int64_t depth) {
    pointer<bf16>(packed, "an adapter's matrix");
    check(packed.dim() == 4 && packed.size(2) == kPanel && packed.size(3) == 2,
          "an adapter's matrix must be [panels, k / 2, 16, 2]");
    check(packed.size(0) == ceil_div(columns, kPanel) && packed.size(1) * 2 == depth,
          "an adapter's matrix must have its panels");
}

}  // namespace

std::vector<AdapterRows> adapter_rows(
    const int64_t* deltas, const std::vector<int64_t>& starts, const std::vector<int64_t>& ends) {
    std::vector<AdapterRows> groups;
    for (size_t i = 0; i < starts.size(); ++i)
        if (deltas[i] != 0) groups.push_back({Deltas::instance().get(deltas[i]), starts[i], ends[i]});
    return groups;
}

void add_adapters(const std::vector<AdapterRows>& groups, const Activations& x, const Result& out) {
    if (groups.empty()) return;
    std::vector<Unit> units;
    int64_t size = 0;
    for (const AdapterRows& group : groups) {
        check(0 <= group.first && group.first <= group.end && group.end <= x.rows, "an adapter's rows must exist");
        check(group.delta->in_features == x.features && group.delta->out_features <= out.features,
              "an adapter must be of its projection's size");
        for (const AdapterDelta::Piece& piece : group.delta->pieces) {
            units.push_back({&piece, group.first, group.end - group.first, nullptr});
            size += units.back().rows * units.back().stride();
        }
    }
    thread_local Scratch<bf16> scratch;
    bf16* inner = scratch.get(size);
    for (Unit& unit : units) {
        unit.inner = inner;
        inner += unit.rows * unit.stride();
    }
    constexpr int64_t kPairBytes = 2 * kPanel * sizeof(bf16);
    const auto a_shares = shares(
        units, [](const Unit& unit) { return ceil_div(unit.piece->rank, 2 * kPanel); },
        [&](const Unit&) { return kPairBytes * x.features; });
    run_tasks(static_cast<int64_t>(a_shares.size()), [&](int64_t task) {
        const Share& share = a_shares[task];
        for (int64_t i = share.first; i < share.end; ++i) units[share.unit].multiply_a(x, i);
    });
    const auto b_shares = shares(
        units, [](const Unit& unit) { return ceil_div(unit.piece->size, 2 * kPanel); },
        [](const Unit& unit) { return kPairBytes * unit.piece->depth(); });
    run_tasks(static_cast<int64_t>(b_shares.size()), [&](int64_t task) {
        const Share& share = b_shares[task];
        for (int64_t i = share.first; i < share.end; ++i) units[share.unit].multiply_b(out, i);
    });
}

namespace {

// ---- operators

int64_t adapter_delta(std::vector<Tensor> a, std::vector<Tensor> b, std::vector<int64_t> ranks,
                      std::vector<int64_t> starts, std::vector<int64_t> sizes, int64_t in_features,
                      int64_t out_features) {
    check(a.size() == b.size() && a.size() == ranks.size() && a.size() == starts.size() && a.size() == sizes.size(),
          "adapter_delta: there must be as many of each");
    check(in_features > 0 && in_features % kStep == 0, "adapter_delta: in_features must be a multiple of 32");
    auto delta = std::make_shared<AdapterDelta>();
    delta->in_features = in_features, delta->out_features = out_features;
    for (size_t i = 0; i < a.size(); ++i) {
        AdapterDelta::Piece piece{a[i], b[i], ranks[i], starts[i], sizes[i]};
        check(piece.rank > 0 && piece.start >= 0 && piece.size > 0 && piece.size <= out_features - piece.start,
              "adapter_delta: a piece must lie within the outputs");
        check_panels(piece.a, piece.rank, in_features);
        check_panels(piece.b, piece.size, piece.depth());
        delta->pieces.push_back(std::move(piece));
    }
    return Deltas::instance().add(std::move(delta));
}

void free_adapter_deltas(std::vector<int64_t> deltas) {
    for (const int64_t number : deltas) Deltas::instance().free(number);
}

void add_adapter_deltas(
    std::vector<int64_t> deltas, std::vector<int64_t> starts, std::vector<int64_t> ends, Tensor x, Tensor out) {
    check(deltas.size() == starts.size() && deltas.size() == ends.size(), "there must be rows for each adapter");
    const Activations rows = activations(x);
    add_adapters(adapter_rows(deltas.data(), starts, ends), rows, residual_of(out, rows));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def(
        "adapter_delta(Tensor[] a, Tensor[] b, int[] ranks, int[] starts, int[] sizes, int in_features, "
        "int out_features) -> int");
    m.def("free_adapter_deltas(int[] deltas) -> ()");
    m.def("add_adapter_deltas(int[] deltas, int[] starts, int[] ends, Tensor x, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) {
    m.impl("adapter_delta", TORCH_BOX(&adapter_delta));
    m.impl("add_adapter_deltas", TORCH_BOX(&add_adapter_deltas));
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CompositeExplicitAutograd, m) {
    m.impl("free_adapter_deltas", TORCH_BOX(&free_adapter_deltas));
}

}  // namespace powerband
