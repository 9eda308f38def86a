#include "critical.h"
#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>

namespace kvc {

// Every layer keeps its frozen slots and the same number D of others: D = r.budget where nothing is frozen. After a
// pyramid the layers' frozen parts differ, and D = r.budget - their mean, which is whole when the prompt's budgets
// met their mean exactly; it is rounded so that no other history can break it.
std::vector<int32_t> policy::budgets(const request & r) const {
    if (!r.heads.empty()) {
        std::vector<int32_t> longest;
        for (const auto & heads : r.heads) {
            longest.push_back(*std::max_element(heads.begin(), heads.end()));
        }
        return longest;
    }
    if (share.over == share_over::layers) {
        return layer_lengths(*this, r);
    }
    if (share.over == share_over::weights) {
        return weighted_lengths(*this, r);
    }
    double sum_frozen = 0;
    for (const layer_plan & lp : r.layers) {
        sum_frozen += lp.n_frozen;
    }
    const double  mean_frozen = r.layers.empty() ? 0 : sum_frozen / r.layers.size();
    const int32_t n_other     = std::max<int32_t>(0, std::lround(r.budget - mean_frozen));

    std::vector<int32_t> n_keep;
    for (const layer_plan & lp : r.layers) {
        n_keep.push_back((int32_t) std::min<int64_t>((int64_t) lp.n_frozen + n_other, lp.n_kv));
    }
    return n_keep;
}

void policy::keep(const request & r, int32_t il, int32_t n_keep, int32_t * out) const {
    const layer_plan & lp = r.layers[il];

    for (int32_t h = 0; h < r.n_head_kv; ++h) {
        const int32_t n    = r.heads.empty() ? n_keep : std::min(r.heads[il][h], n_keep);
        const int32_t from = r.heads.empty() ? 0 : first_slot(lp.pos + (size_t) h * lp.n_kv, lp.n_kv);

        // Beside a frozen prompt, sinks that it is too short for and n_recent() are a matter of the generated tokens'
        // own budget, which may be smaller.
        const int32_t n_other = n - lp.n_frozen;
        const int32_t n_first = lp.n_frozen > 0 ? std::min(std::max(lp.n_frozen, n_sink()), n) : n_sink();
        const int32_t n_last  = lp.n_frozen > 0 ? std::min(n_recent(n_other), n - n_first) : n_recent(n_other);

        slot_marks marks(lp.n_kv, 0);
        mark_range(marks, from, from + n_first);
        mark_range(marks, std::max(from, lp.n_kv - n_last), lp.n_kv);
        mark_best(marks, lp.score + (size_t) h * lp.n_kv, from, lp.n_kv, count_left(marks, n,
            "the first " + std::to_string(n_first) + " and the last " + std::to_string(n_last)));

        std::fill(out, out + n_keep - n, -1);
        write_marked(marks, n, out + n_keep - n);
        out += n_keep;
    }
}

std::vector<param_info> policy_info::all_params() const {
    auto all = params();
    if (values) {
        all.push_back(values_param(values));
    }
    for (const auto & p : share ? share_params(share) : std::vector<param_info>()) {
        all.push_back(p);
    }
    return all;
}

std::unique_ptr<policy> policy_info::make_policy(const kvc::params & p) const {
    auto pol = make(p);
    if (values && p.s("values") == "wo") {
        pol = weigh_values(std::move(pol));
    }
    if (share) {
        pol->share = read_sharing(p);
    }
    return pol;
}

bool policy_info::is_own(const param_info & p, const kvc::params & given) const {
    return ((share && p.name == "share") || (values && p.name == "values")) && given.s(p.name) == p.value;
}

uint64_t rank_key(float score, int32_t slot) {
    if (std::isnan(score)) {
        score = -std::numeric_limits<float>::infinity();
    }
    score += 0.0f; // -0 and 0 are equal scores

    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u; // floats in order as unsigned integers

    return (uint64_t) bits << 32 | (0xffffffffu - (uint32_t) slot);
}

int32_t ranked_slot(uint64_t key) {
    return (int32_t) (0xffffffffu - (uint32_t) key);
}

int32_t first_slot(const int32_t * pos, int32_t n_kv) {
    int32_t j = 0;
    while (j < n_kv && pos[j] < 0) {
        ++j;
    }
    return j;
}

void mark_range(slot_marks & marks, int32_t begin, int32_t end) {
    const int32_t n = (int32_t) marks.size();
    for (int32_t j = std::max(begin, 0); j < std::min(end, n); ++j) {
        marks[j] = 1;
    }
}

int32_t count_marked(const slot_marks & marks) {
    int32_t n = 0;
    for (uint8_t m : marks) {
        n += m;
    }
    return n;
}

int32_t count_left(const slot_marks & marks, int32_t n_keep, const std::string & what) {
    const int32_t n_always = count_marked(marks);
    if (n_always > n_keep) {
        throw std::invalid_argument("a budget of " + std::to_string(n_keep) + " tokens does not hold the " +
            std::to_string(n_always) + " that are always kept (" + what + "): the least that works is " +
            std::to_string(n_always));
    }
    return n_keep - n_always;
}

void mark_best(slot_marks & marks, const float * score, int32_t begin, int32_t end, int32_t n_best) {
    if (n_best <= 0) {
        return;
    }
    std::vector<uint64_t> keys;
    keys.reserve(end - begin);
    for (int32_t j = begin; j < end; ++j) {
        if (!marks[j]) {
            keys.push_back(rank_key(score[j], j));
        }
    }
    n_best = std::min(n_best, (int32_t) keys.size());

    // Keys are distinct, so which slots come first does not depend on the library's nth_element.
    std::nth_element(keys.begin(), keys.begin() + n_best, keys.end(), std::greater<uint64_t>());
    for (int32_t i = 0; i < n_best; ++i) {
        marks[ranked_slot(keys[i])] = 1;
    }
}

static int32_t count_own(const slot_marks & marks, const unit & u) {
    int32_t n = 0;
    for (int32_t j = u.begin; j < u.end; ++j) {
        n += !marks[j];
    }
    return n;
}

float mean_score(const slot_marks & marks, const unit & u, const std::vector<float> & token) {
    double sum = 0;
    for (int32_t j = u.begin; j < u.end; ++j) {
        sum += marks[j] ? 0 : token[j];
    }
    return (float) (sum / std::max(count_own(marks, u), 1));
}

void mark_units(slot_marks & marks, const std::vector<unit> & units, const std::vector<float> & token, int32_t n_left,
                bool skip) {
    std::vector<uint64_t> keys;
    for (size_t i = 0; i < units.size(); ++i) {
        keys.push_back(rank_key(units[i].score, (int32_t) i));
    }
    std::sort(keys.begin(), keys.end(), std::greater<uint64_t>());

    const unit * part = nullptr;
    for (uint64_t key : keys) {
        const unit &  u     = units[ranked_slot(key)];
        const int32_t n_own = count_own(marks, u);
        if (n_own <= n_left) {
            mark_range(marks, u.begin, u.end);
            n_left -= n_own;
            continue;
        }
        part = part ? part : &u;
        if (!skip) {
            break;
        }
    }
    if (part) {
        mark_best(marks, token.data(), part->begin, part->end, n_left);
    }
}

void write_marked(const slot_marks & marks, int32_t n_keep, int32_t * out) {
    if (count_marked(marks) != n_keep) {
        throw std::logic_error("a policy marked " + std::to_string(count_marked(marks)) + " slots for a budget of " +
            std::to_string(n_keep));
    }
    for (int32_t j = 0; j < (int32_t) marks.size(); ++j) {
        if (marks[j]) {
            *out++ = j;
        }
    }
}

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

// in_blocks() of any parts of a cache: n_has slots are there of each, and n_least of them have to stay.
static std::vector<int32_t> parts_in_blocks(const std::vector<int32_t> & n_keep, const std::vector<int32_t> & n_has, const std::vector<int32_t> & n_least,
        int32_t n_block) {
    const size_t n_part = n_keep.size();
    const int32_t n_base = *std::max_element(n_keep.begin(), n_keep.end());
    std::vector<int32_t> res(n_part);
    std::vector<size_t> order(n_part); // those that round down lose least first
    int64_t n_more = 0; // than n_keep
    for (size_t i = 0; i < n_part; ++i) {
        const int32_t gap = n_base - n_keep[i], need = n_base - n_has[i];
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

void mean_over_group(const layer_view & v, const float * given, float * out) {
    const int32_t n_group = v.n_head / v.n_head_kv;

    for (int32_t h = 0; h < v.n_head_kv; ++h) {
        float * dst = out + (size_t) h * v.n_kv;
        std::fill(dst, dst + v.n_kv, 0.0f);
        for (int32_t g = 0; g < n_group; ++g) {
            const float * src = given + (size_t) (h * n_group + g) * v.n_kv;
            for (int32_t j = 0; j < v.n_kv; ++j) {
                dst[j] += src[j];
            }
        }
        for (int32_t j = 0; j < v.n_kv; ++j) {
            dst[j] /= n_group;
        }
    }
}

void mean_over_heads(const layer_view & v, float * out) {
    std::fill(out, out + v.n_kv, 0.0f);
    for (int32_t h = 0; h < v.n_head; ++h) {
        const float * src = v.attn + (size_t) h * v.n_kv;
        for (int32_t j = 0; j < v.n_kv; ++j) {
            out[j] += src[j];
        }
    }
    for (int32_t j = 0; j < v.n_kv; ++j) {
        out[j] /= v.n_head;
    }
    for (int32_t h = 1; h < v.n_head_kv; ++h) {
        std::copy(out, out + v.n_kv, out + (size_t) h * v.n_kv);
    }
}

std::vector<float> sum_over_heads(const request & r, int32_t il) {
    const layer_plan & lp = r.layers[il];

    std::vector<float> sum(lp.n_kv, 0.0f);
    for (int32_t h = 0; h < r.n_head_kv; ++h) {
        const float * src = lp.score + (size_t) h * lp.n_kv;
        for (int32_t j = 0; j < lp.n_kv; ++j) {
            sum[j] += src[j];
        }
    }
    return sum;
}

// Sums f(i) over [0, n) in eight partial sums: one running sum would wait for each addition, and the compiler may not
// reorder floats.
template <typename F>
static float sum_of(int32_t n, F f) {
    float s[8] = { 0 };
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int32_t k = 0; k < 8; ++k) {
            s[k] += f(i + k);
        }
    }
    for (; i < n; ++i) {
        s[0] += f(i);
    }
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

float sum(const float * a, int32_t n) {
    return sum_of(n, [=](int32_t i) { return a[i]; });
}

float dot(const float * a, const float * b, int32_t n) {
    return sum_of(n, [=](int32_t i) { return a[i] * b[i]; });
}

float distance_squared(const float * a, const float * b, int32_t n) {
    return sum_of(n, [=](int32_t i) { return (a[i] - b[i]) * (a[i] - b[i]); });
}

static uint64_t splitmix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

float hash_unit(uint64_t seed, uint64_t x) {
    return (float) (splitmix64(splitmix64(seed) ^ x) >> 40) / 16777216.0f;
}

float hash_slot(uint64_t seed, int32_t il, int32_t h, int32_t pos) {
    return hash_unit(seed, ((uint64_t) il << 48) ^ ((uint64_t) h << 36) ^ (uint32_t) pos);
}

} // namespace kvc
