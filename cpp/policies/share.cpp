#include "share.h"

#include "policy.h"
#include "select.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace kvc {

static const std::vector<std::string> WORDS = { "head", "layers", "layer", "all" }; // in the order of share_over

void settle_share(params & p, bool layers) {
    const auto it = p.values.find("share");
    if (it != p.values.end() && it->second == "auto") {
        it->second = layers ? "layers" : "head";
    }
}

std::vector<param_info> share_params(const std::string & over) {
    auto words = WORDS;
    if (over == "auto") {
        words.push_back("auto");
    }
    return {
        { "share", over,   "how far one ranking reaches that decides how much each head keeps" + std::string(over == "auto" ?
            "; auto: layers, with kv_cells where that can be, else head" : "") + "; or a weight for each layer, as 2/1/1", 0, 0, words },
    };
}

share_over share_from(const std::string & word) {
    const auto it = std::find(WORDS.begin(), WORDS.end(), word);
    if (it == WORDS.end()) {
        throw std::invalid_argument("share is 'head', 'layers', 'layer' or 'all', not '" + word + "'");
    }
    return (share_over) (it - WORDS.begin());
}

static std::vector<double> read_weights(const std::string & text) {
    std::vector<double> weights;
    for (size_t begin = 0; text.find('/') != std::string::npos && begin <= text.size();) {
        const size_t end = std::min(text.find('/', begin), text.size());
        const std::string one = text.substr(begin, end - begin);
        double value = 0;
        if (!read_number(one, value) || value <= 0 || value > 1e6) {
            throw std::invalid_argument("share is '" + text + "': weights are numbers above 0 and up to 1000000, one for each layer, as 2/1/1");
        }
        weights.push_back(value);
        begin = end + 1;
    }
    return weights;
}

std::string written_weights(const std::string & text) {
    std::string s;
    for (const double weight : read_weights(text)) {
        s += (s.empty() ? "" : "/") + write_number(weight);
    }
    return s;
}

sharing read_sharing(const params & p) {
    params settled = p;
    settle_share(settled, true);
    const std::string word = settled.s("share");
    const auto weights = read_weights(word);
    return { weights.empty() ? share_from(word) : share_over::weights, weights };
}

void check_weights(const sharing & share, size_t n_layer) {
    if (share.over == share_over::weights && share.weights.size() != n_layer) {
        throw std::invalid_argument("share has " + std::to_string(share.weights.size()) + " weights, but " + std::to_string(n_layer) +
            " layers of this model evict, and each has one");
    }
}

// A slot that competes. Of equal scores the older slot is first, then the lower layer, then the lower head.
struct rival {
    uint64_t key;  // rank_key()
    int32_t  head; // layer*n_head_kv + head

    bool operator<(const rival & other) const { return key != other.key ? key > other.key : head < other.head; }
};

// The last slots of a layer that are always kept, beside a frozen prompt.
static int32_t n_last(const policy & pol, const request & r, const layer_plan & lp) {
    return pol.n_recent(std::max(0, r.budget - lp.n_frozen));
}

// What a head keeps whatever its score.
static int32_t n_always(const policy & pol, const request & r, const layer_plan & lp, int32_t h) {
    const int32_t first = first_slot(lp.pos + (size_t) h*lp.n_kv, lp.n_kv);
    const int32_t n     = lp.n_kv - first;
    return std::min(n, std::max(pol.n_sink(), lp.n_frozen) + n_last(pol, r, lp));
}

static void add_rivals(const policy & pol, const request & r, int32_t il, std::vector<rival> & out) {
    const layer_plan & lp = r.layers[il];
    if (out.empty()) { // layers are about as long
        out.reserve(r.layers.size()*r.n_head_kv*lp.n_kv);
    }
    for (int32_t h = 0; h < r.n_head_kv; ++h) {
        const size_t  at    = (size_t) h*lp.n_kv;
        const int32_t begin = first_slot(lp.pos + at, lp.n_kv) + std::max(pol.n_sink(), lp.n_frozen);
        const int32_t end   = lp.n_kv - n_last(pol, r, lp);
        for (int32_t j = begin; j < end; ++j) {
            out.push_back({ rank_key(lp.score[at + j], j), il*r.n_head_kv + h });
        }
    }
}

// Of heads that keep nothing whatever its score the best rival is kept already.
static void drop_first(const std::vector<bool> & kept_already, std::vector<rival> & rivals) {
    std::map<int32_t, rival> best;
    for (const rival & x : rivals) {
        if (kept_already[x.head]) {
            const auto it = best.emplace(x.head, x).first;
            it->second = std::min(it->second, x);
        }
    }
    rivals.erase(std::remove_if(rivals.begin(), rivals.end(), [&](const rival & x) {
        return kept_already[x.head] && best.at(x.head).key == x.key;
    }), rivals.end());
}

static void check_least(const policy & pol, const request & r, bool fits) {
    if (!fits) {
        throw std::invalid_argument("a budget of " + std::to_string(r.budget) + " tokens does not hold what every head always keeps: the least "
            "that works is " + std::to_string(pol.min_budget()));
    }
}

// The n best; all if there are no more. Of most the leading bits of the key say on which side they are: only those that
// share theirs with the n-th are compared.
static void cut_rivals(std::vector<rival> & rivals, int64_t n) {
    n = std::min<int64_t>(std::max<int64_t>(n, 0), (int64_t) rivals.size());
    std::vector<int64_t> counts(1 << 16, 0);
    for (const rival & x : rivals) {
        counts[x.key >> 48]++;
    }
    uint64_t least = counts.size(); // these bits and greater ones are kept
    for (int64_t n_kept = 0; least > 0 && n_kept + counts[least - 1] <= n; --least) {
        n_kept += counts[least - 1];
    }
    const auto kept = std::partition(rivals.begin(), rivals.end(), [&](const rival & x) { return x.key >> 48 >= least; });
    const auto last = std::partition(kept, rivals.end(), [&](const rival & x) { return (x.key >> 48) + 1 == least; });
    if (last != kept) {
        std::nth_element(kept, rivals.begin() + n, last);
    }
    rivals.resize(n);
}

std::vector<int32_t> layer_lengths(const policy & pol, const request & r) {
    const int32_t n_layer = (int32_t) r.layers.size();
    std::vector<double> ideal(n_layer, 0);
    std::vector<rival> rivals;
    int64_t n_left = (int64_t) n_layer*r.n_head_kv*r.budget;
    int32_t n_least = 1;
    for (int32_t il = 0; il < n_layer; ++il) {
        for (int32_t h = 0; h < r.n_head_kv; ++h) {
            const int32_t n = n_always(pol, r, r.layers[il], h);
            ideal[il] += (double) n/r.n_head_kv;
            n_left    -= n;
            n_least    = std::max(n_least, n);
        }
        add_rivals(pol, r, il, rivals);
    }
    check_least(pol, r, n_left >= 0);
    cut_rivals(rivals, n_left);
    for (const rival & x : rivals) {
        ideal[x.head/r.n_head_kv] += 1.0/r.n_head_kv;
    }
    return whole_budgets(r, ideal, n_least);
}

std::vector<int32_t> weighted_lengths(const policy & pol, const request & r) {
    const size_t n_layer = r.layers.size();
    check_weights(pol.share, n_layer);
    double sum_frozen = 0, sum_weights = 0;
    int32_t n_least = 1;
    for (size_t il = 0; il < n_layer; ++il) {
        sum_frozen  += r.layers[il].n_frozen;
        sum_weights += pol.share.weights[il];
        for (int32_t h = 0; h < r.n_head_kv; ++h) {
            n_least = std::max(n_least, n_always(pol, r, r.layers[il], h));
        }
    }
    std::vector<double> ideal;
    for (size_t il = 0; il < n_layer; ++il) {
        ideal.push_back(r.layers[il].n_frozen + (r.budget*(double) n_layer - sum_frozen)*pol.share.weights[il]/sum_weights);
    }
    return whole_budgets(r, ideal, n_least);
}

// Of the heads of layers [first, last): their best scores until they hold the budget together.
static void fill_heads(const policy & pol, const request & r, int32_t first, int32_t last, std::vector<std::vector<int32_t>> & heads) {
    std::vector<rival> rivals;
    std::vector<bool> kept_already((size_t) last*r.n_head_kv, false);
    int64_t n_held = 0;
    for (int32_t il = first; il < last; ++il) {
        for (int32_t h = 0; h < r.n_head_kv; ++h) {
            const int32_t n = n_always(pol, r, r.layers[il], h);
            kept_already[(size_t) il*r.n_head_kv + h] = n == 0;
            heads[il][h] = std::max(1, n); // attention needs something to look at
            n_held += heads[il][h];
        }
        add_rivals(pol, r, il, rivals);
    }
    drop_first(kept_already, rivals);
    const int64_t n_all = (int64_t) (last - first)*r.budget*r.n_head_kv;
    check_least(pol, r, n_held <= n_all);
    cut_rivals(rivals, n_all - n_held);
    for (const rival & x : rivals) {
        heads[x.head/r.n_head_kv][x.head % r.n_head_kv]++;
    }
}

std::vector<std::vector<int32_t>> head_lengths(const policy & pol, const request & r) {
    const int32_t n_layer = (int32_t) r.layers.size();
    if (!pol.share.heads_differ()) {
        return {};
    }
    std::vector<std::vector<int32_t>> heads(n_layer, std::vector<int32_t>(r.n_head_kv));
    if (pol.share.over == share_over::all) {
        fill_heads(pol, r, 0, n_layer, heads);
    }
    for (int32_t il = 0; pol.share.over == share_over::layer && il < n_layer; ++il) {
        fill_heads(pol, r, il, il + 1, heads);
    }
    return heads;
}

} // namespace kvc
