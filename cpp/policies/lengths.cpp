// Budgets as whole numbers of slots, and as whole blocks of them.

#include "select.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace kvc {

std::vector<int32_t> whole_budgets(const request & r, const std::vector<double> & ideal, int32_t n_min) {
    const int32_t n_layer = (int32_t) r.layers.size();

    std::vector<int32_t> n_keep(n_layer);
    int64_t n_slots = 0;
    int64_t n_given = 0;
    for (int32_t il = 0; il < n_layer; ++il) {
        const int32_t n_kv = r.layers[il].n_kv;
        // The nudge keeps a whole number whole, however the compiler contracts the arithmetic before it.
        const double whole = std::floor(ideal[il] + 1e-6);
        n_keep[il] = (int32_t) std::min<double>(std::max<double>(whole, n_min), n_kv);
        n_slots += n_kv;
        n_given += n_keep[il];
    }

    int64_t n_left = std::min((int64_t) n_layer * r.budget, n_slots) - n_given;
    while (n_left > 0) { // ends: there is room for n_left slots
        for (int32_t il = 0; il < n_layer && n_left > 0; ++il) {
            if (n_keep[il] < r.layers[il].n_kv) {
                ++n_keep[il];
                --n_left;
            }
        }
    }
    while (n_left < 0) {
        const int64_t n_before = n_left;
        for (int32_t il = n_layer - 1; il >= 0 && n_left < 0; --il) {
            if (n_keep[il] > n_min) {
                --n_keep[il];
                ++n_left;
            }
        }
        if (n_left == n_before) {
            throw std::invalid_argument("a budget of " + std::to_string(r.budget) +
                " tokens is too small: the least that works is " + std::to_string(n_min));
        }
    }
    return n_keep;
}

// The largest number, less than a block below n_base, from which all parts can differ by whole blocks. Where some hold
// few slots, not every number will do.
static int32_t base_of_blocks(int32_t n_base, const std::vector<int32_t> & n_has, const std::vector<int32_t> & n_least, int32_t n_block) {
    const auto fits = [&](int32_t base) {
        for (size_t i = 0; i < n_has.size(); ++i) {
            const int32_t n_most = std::min(base, n_has[i] - ((n_has[i] - base) % n_block + n_block) % n_block);
            if (n_most < n_least[i]) {
                return false;
            }
        }
        return true;
    };
    for (int32_t base = n_base; base > std::max(0, n_base - n_block); --base) {
        if (fits(base)) {
            return base;
        }
    }
    throw std::invalid_argument("off the CPU what layers and heads keep differs by whole blocks of " + std::to_string(n_block) +
            " rows, and some hold too few for that: keep the cache on the CPU (n_gpu_layers 0, or offload_kqv off)");
}

int32_t off_blocks(int32_t n_base, const std::vector<int32_t> & n_held, int32_t n_block) {
    const auto found = std::find_if(n_held.begin(), n_held.end(), [&](int32_t n) { return (n_base - n) % n_block != 0; });
    return found == n_held.end() ? -1 : *found;
}

// in_blocks() of any parts of a cache: n_has slots are there of each, and n_least of them have to stay.
static std::vector<int32_t> parts_in_blocks(const std::vector<int32_t> & n_keep, const std::vector<int32_t> & n_has, const std::vector<int32_t> & n_least,
        int32_t n_block) {
    const size_t n_part = n_keep.size();
    const int32_t n_base = base_of_blocks(*std::max_element(n_keep.begin(), n_keep.end()), n_has, n_least, n_block);
    std::vector<int32_t> res(n_part);
    std::vector<size_t> order(n_part); // those that round down lose least first
    int64_t n_more = 0; // than n_keep
    for (size_t i = 0; i < n_part; ++i) {
        const int32_t gap = std::max(0, n_base - n_keep[i]), need = std::max(0, n_base - n_has[i]);
        res[i]   = n_base - std::max(gap/n_block, (need + n_block - 1)/n_block)*n_block;
        order[i] = i;
        n_more += res[i] - n_keep[i];
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return res[a] - n_keep[a] > res[b] - n_keep[b]; });
    for (const size_t i : order) {
        if (n_more >= n_block && res[i] - n_block >= n_least[i]) {
            res[i] -= n_block;
            n_more -= n_block;
        }
    }
    int64_t n_all = (std::max<int64_t>(n_more, 0) + (int64_t) n_part - 1)/(int64_t) n_part; // what is left is less of every part
    for (size_t i = 0; i < n_part; ++i) {
        n_all = std::min<int64_t>(n_all, std::max(0, res[i] - n_least[i]));
    }
    for (int32_t & n : res) {
        n -= (int32_t) n_all;
    }
    return res;
}

std::vector<int32_t> in_blocks(const request & r, const std::vector<int32_t> & n_keep, int32_t n_block, int32_t n_least) {
    std::vector<int32_t> has, least;
    for (size_t il = 0; il < n_keep.size(); ++il) {
        has.push_back(r.layers[il].n_kv);
        least.push_back(std::min(n_keep[il], std::max(1, r.layers[il].n_frozen + n_least)));
    }
    return parts_in_blocks(n_keep, has, least, n_block);
}

std::vector<std::vector<int32_t>> heads_in_blocks(const request & r, std::vector<std::vector<int32_t>> heads, int32_t n_block, int32_t n_least) {
    std::vector<int32_t> all, has, least;
    for (size_t il = 0; il < heads.size(); ++il) {
        const layer_plan & lp = r.layers[il];
        for (int32_t h = 0; h < r.n_head_kv; ++h) {
            const int32_t n = heads[il][h];
            all.push_back(n);
            has.push_back(lp.n_kv - first_slot(lp.pos + (size_t) h*lp.n_kv, lp.n_kv));
            least.push_back(std::min(n, std::max(1, lp.n_frozen + n_least)));
        }
    }
    if (!all.empty()) {
        all = parts_in_blocks(all, has, least, n_block);
    }
    for (size_t i = 0; i < all.size(); ++i) {
        heads[i/r.n_head_kv][i % r.n_head_kv] = all[i];
    }
    return heads;
}

} // namespace kvc
