#include "spec.h"

#include "policy.h"

#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace kvc {

static std::string trim(const std::string & s) {
    const char * blank = " \t\r\n";
    const size_t begin = s.find_first_not_of(blank);
    return begin == std::string::npos ? "" : s.substr(begin, s.find_last_not_of(blank) - begin + 1);
}

static std::string join(const std::vector<std::string> & words) {
    std::string s;
    for (const std::string & w : words) {
        s += (s.empty() ? "" : ", ") + w;
    }
    return s;
}

bool read_number(const std::string & s, double & value) {
    if (s.empty() || s.find_first_not_of("0123456789.eE+-") != std::string::npos) {
        return false;
    }
    std::istringstream in(s);
    in.imbue(std::locale::classic());
    return in >> value && in.peek() == EOF && std::isfinite(value);
}

std::string write_number(double value) {
    if (value == std::floor(value) && std::fabs(value) < 1e15) {
        return std::to_string((long long) value);
    }
    std::string s;
    for (int n_digits = 1; n_digits <= 17; ++n_digits) {
        std::ostringstream o;
        o.imbue(std::locale::classic());
        o.precision(n_digits);
        o << value;
        s = o.str();
        double back = 0;
        if (read_number(s, back) && back == value) {
            break;
        }
    }
    return s;
}

// Edits that turn a into b (Levenshtein).
static size_t distance(const std::string & a, const std::string & b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) {
        row[j] = j;
    }
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t above = row[j];
            row[j] = std::min({ above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1]) });
            diagonal = above;
        }
    }
    return row[b.size()];
}

// " (did you mean 'x'?)" for the closest word, or nothing if none is close.
static std::string did_you_mean(const std::string & word, const std::vector<std::string> & words) {
    std::string best;
    size_t      d_best = std::max<size_t>(2, word.size() / 3) + 1;
    for (const std::string & w : words) {
        const bool   begins = word.size() >= 3 && w.compare(0, word.size(), word) == 0;
        const size_t d      = begins ? 1 : distance(word, w);
        if (d < d_best && d < w.size()) {
            best   = w;
            d_best = d;
        }
    }
    return best.empty() ? "" : " (did you mean '" + best + "'?)";
}

const policy_info & find_policy(const std::string & name) {
    std::vector<std::string> names;
    for (const policy_info & info : policy_table()) {
        if (name == info.name) {
            return info;
        }
        names.push_back(info.name);
    }
    throw std::invalid_argument((name.empty() ? "no policy is named" : "unknown policy '" + name + "'" +
        did_you_mean(name, names)) + ": the policies are " + join(names));
}

static std::vector<std::string> sharing_policies() {
    std::vector<std::string> names;
    for (const policy_info & info : policy_table()) {
        if (info.share) {
            names.push_back(info.name);
        }
    }
    return names;
}

static const std::string & value_of(const params & p, const std::string & key) {
    const auto it = p.values.find(key);
    if (it == p.values.end()) {
        throw std::invalid_argument("the policy has no parameter '" + key + "'");
    }
    return it->second;
}

double params::f(const std::string & key) const {
    double value = 0;
    if (!read_number(value_of(*this, key), value)) {
        throw std::invalid_argument("parameter '" + key + "' is no number: '" + value_of(*this, key) + "'");
    }
    return value;
}

int32_t params::i(const std::string & key) const {
    return (int32_t) f(key);
}

const std::string & params::s(const std::string & key) const {
    return value_of(*this, key);
}

// The value as canonical() writes it.
static std::string checked_value(const param_info & info, const std::string & text, const std::string & where) {
    if (!info.choices.empty()) {
        const std::string weights = info.name == "share" ? written_weights(text) : "";
        if (!weights.empty()) {
            return weights;
        }
        if (std::find(info.choices.begin(), info.choices.end(), text) == info.choices.end()) {
            throw std::invalid_argument(where + " is '" + text + "': it is one of " + join(info.choices));
        }
        return text;
    }
    double value = 0;
    const bool valid = read_number(text, value) && value >= info.min && value <= info.max;
    if (!valid || (info.integer && value != std::floor(value))) {
        throw std::invalid_argument(where + " is '" + text + "': it is a " + (info.integer ? "whole " : "") +
            "number from " + write_number(info.min) + " to " + write_number(info.max));
    }
    return write_number(value);
}

spec parse_spec(const std::string & text) {
    const size_t colon = text.find(':');

    spec out;
    out.info = &find_policy(trim(text.substr(0, colon)));

    const std::string             name     = out.info->name;
    const std::vector<param_info> declared = out.info->all_params();

    std::vector<std::string> keys;
    for (const param_info & info : declared) {
        keys.push_back(info.name);
        out.p.values[info.name] = info.value;
    }

    std::vector<std::string> seen;
    size_t begin = colon == std::string::npos ? text.size() + 1 : colon + 1;
    while (begin <= text.size()) {
        const size_t      end   = std::min(text.find(',', begin), text.size());
        const std::string item  = trim(text.substr(begin, end - begin));
        const size_t      equal = item.find('=');
        const std::string key   = trim(item.substr(0, equal));
        begin = end + 1;

        if (equal == std::string::npos || key.empty()) {
            throw std::invalid_argument("'" + item + "' in '" + text + "' is not key=value: a policy is written "
                "name:key=value,key=value");
        }
        const auto it = std::find(keys.begin(), keys.end(), key);
        if (it == keys.end() && key == "share") {
            throw std::invalid_argument(name + " cannot share: it does not rank the tokens of a head by a score; these can: " + join(sharing_policies()));
        }
        if (it == keys.end()) {
            throw std::invalid_argument(name + " has no parameter '" + key + "'" + did_you_mean(key, keys) + ": " +
                (keys.empty() ? "it takes none" : "its parameters are " + join(keys)));
        }
        if (std::find(seen.begin(), seen.end(), key) != seen.end()) {
            throw std::invalid_argument(name + ": '" + key + "' is given twice");
        }
        seen.push_back(key);
        out.p.values[key] = checked_value(declared[it - keys.begin()], trim(item.substr(equal + 1)), name + ": '" + key + "'");
    }

    out.info->make_policy(out.p); // what only the policy knows: parameters that do not go together
    return out;
}

std::string spec::canonical() const {
    std::string s = info->name;
    char        before = ':';
    for (const param_info & d : info->all_params()) {
        if (info->is_own(d, p)) {
            continue; // where nothing is shared, or as the policy does by itself
        }
        s += before + d.name + '=' + p.s(d.name);
        before = ',';
    }
    return s;
}

int32_t budget::of(int32_t n) const {
    switch (kind) {
        case none:   return n;
        case tokens: return (int32_t) value;
        case ratio:  break;
    }
    return std::max<int32_t>(1, (int32_t) std::floor(value * n + 0.5));
}

std::string budget::str() const {
    switch (kind) {
        case none:   return "";
        case tokens: return write_number(value);
        case ratio:  break;
    }
    const std::string s = write_number(value);
    return s.find_first_of(".e") == std::string::npos ? s + ".0" : s; // "1" would be one token
}

budget parse_budget(const std::string & text, const char * name) {
    const std::string s = trim(text);
    if (s.empty()) {
        return {};
    }

    const bool percent = s.back() == '%';
    const bool whole   = !percent && s.find_first_of(".eE") == std::string::npos;

    budget b;
    b.kind = whole ? budget::tokens : budget::ratio;

    const bool number = read_number(percent ? trim(s.substr(0, s.size() - 1)) : s, b.value);
    if (percent) {
        b.value /= 100;
    }
    if (!number || b.value <= 0 || b.value > (whole ? 2147483647.0 : 1.0)) {
        throw std::invalid_argument(std::string(name) + " is '" + s + "': it is a number of tokens, as 512, or the share of "
            "the tokens to keep, above 0 and up to 1, as 0.25 or 25%");
    }
    return b;
}

} // namespace kvc
