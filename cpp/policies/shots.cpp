#include "shots.h"

#include <algorithm>

namespace kvc {

shot_policy::shot_policy(const params & p) :
    window(p.i("window")), sinks(p.i("sinks")), recent(p.i("recent")), skip(p.s("fit") == "skip") {}

needs shot_policy::need() const {
    needs n;
    n.window = window;
    n.spans  = true;
    return n;
}

std::vector<param_info> shot_params() {
    return {
        { "window", "32",   "last queries whose attention counts, and last prompt tokens always kept", 1, 1024 },
        { "sinks",  "4",    "first tokens always kept", 0, 4096 },
        { "recent", "32",   "last generated tokens always kept", 1, 65536 },
        { "fit",    "skip", "a shot that does not fit: skip it for the next that does, or trim it and stop", 0, 0,
            { "skip", "trim" } },
        interval_param(),
    };
}

// What both phases promise.
int32_t shot_policy::n_recent(int32_t budget) const {
    return std::min({ budget, window, recent });
}

void shot_policy::score(const layer_view & v, float * out) const {
    mean_over_group(v, v.attn, out);
}

// The slots of a span are neighbours: positions ascend, and all heads hold the same ones.
static std::vector<unit> find_shots(const request & r, const layer_plan & lp) {
    std::vector<unit> res;
    for (const span & s : r.spans) {
        const int32_t begin = (int32_t) (std::lower_bound(lp.pos, lp.pos + lp.n_kv, s.begin) - lp.pos);
        const int32_t end   = (int32_t) (std::lower_bound(lp.pos, lp.pos + lp.n_kv, s.end)   - lp.pos);
        res.push_back({ begin, end, 0 });
    }
    return res;
}

slot_marks shot_policy::always(const request & r, int32_t il, bool outside, bool unfinished, int32_t & n_outside) const {
    const layer_plan & lp = r.layers[il];
    const auto shots = find_shots(r, lp);
    slot_marks marks(lp.n_kv, outside);
    for (size_t i = 0; i < shots.size(); ++i) {
        const bool grows = unfinished && r.spans[i].end > lp.pos[lp.n_kv - 1] + 1;
        std::fill(marks.begin() + shots[i].begin, marks.begin() + shots[i].end, grows);
    }
    n_outside = count_marked(marks);
    mark_range(marks, 0, std::max(sinks, lp.n_frozen));
    mark_range(marks, lp.n_kv - window, lp.n_kv);
    return marks;
}

std::vector<int32_t> shot_policy::budgets(const request & r) const {
    auto n_keep = policy::budgets(r);
    int32_t n_always = 0, n_outside;
    for (int32_t il = 0; r.prompt && r.at_least && il < (int32_t) r.layers.size(); ++il) {
        n_always = std::max(n_always, count_marked(always(r, il, true, false, n_outside)));
    }
    for (size_t il = 0; il < n_keep.size(); ++il) {
        n_keep[il] = std::min(std::max(n_keep[il], n_always), r.layers[il].n_kv);
    }
    return n_keep;
}

void shot_policy::keep(const request & r, int32_t il, int32_t n_keep, int32_t * out) const {
    const layer_plan & lp = r.layers[il];

    const std::vector<float> token = token_scores(r, il);

    slot_marks marks(lp.n_kv, 0);
    if (!r.prompt) {
        mark_range(marks, 0, lp.n_frozen);
        mark_range(marks, lp.n_kv - std::min(recent, n_keep - lp.n_frozen), lp.n_kv);
        mark_best(marks, token.data(), 0, lp.n_kv, n_keep - count_marked(marks));
    } else {
        std::vector<unit> shots = find_shots(r, lp);
        int32_t n_outside = 0;
        const auto mark_always = [&](bool outside, bool unfinished) {
            marks = always(r, il, outside, unfinished, n_outside);
            return count_marked(marks) <= n_keep;
        };
        // In mid-prompt a shot whose end is still to come is kept if it fits; then what is outside every shot, if that fits.
        if (!(r.room && mark_always(true, true)) && !mark_always(true, false) && r.room) {
            mark_always(false, false);
            shots.clear();
            mark_best(marks, token.data(), 0, lp.n_kv, n_keep - count_marked(marks));
        }
        const int32_t n_left = count_left(marks, n_keep, std::to_string(n_outside) + " outside every span, the first " +
            std::to_string(sinks) + " and the last " + std::to_string(window));

        for (size_t i = 0; i < shots.size(); ++i) {
            shots[i].score = shot_score(r.spans[i], mean_score(marks, shots[i], token));
        }
        mark_units(marks, shots, token, n_left, skip);
    }

    for (int32_t h = 0; h < r.n_head_kv; ++h) {
        write_marked(marks, n_keep, out + (size_t) h * n_keep);
    }
}

} // namespace kvc
