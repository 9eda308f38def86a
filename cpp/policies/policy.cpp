#include "critical.h"
#include "select.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace kvc {

std::string lacks(const policy & has, const policy & wants) {
    const needs a = has.need(), b = wants.need();
    return b.sums && !a.sums           ? "needs attention summed over all queries" :
        b.future > 0 && a.future == 0  ? "needs a fit of the queries to come" :
        b.probe != probe::none && b.probe != a.probe ? "asks questions of its own" :
        b.probe != probe::none && (b.chunk != a.chunk || b.plus != a.plus || (b.chunk && wants.n_sink() != has.n_sink())) ?
                "hears the repetition in another way (softmax, plus, sinks)" :
        b.outputs && !a.outputs        ? "needs the norms of what values become behind the output projection" :
        wants.heads_differ() && !has.heads_differ() ? "gives heads different budgets" :
        b.window > a.window ? "needs the last " + std::to_string(b.window) + " queries, and this context keeps " + std::to_string(a.window) : "";
}

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

} // namespace kvc
