// How slots are ranked, marked and picked.

#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace kvc {

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

} // namespace kvc
