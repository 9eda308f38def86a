#pragma once

// "name:key=value,key=value", the one way a policy is written: in Python, on the command line, in the environment.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace kvc {

// Digits, one dot, an exponent: no nan, inf or hex, no trailing text, and the same in every locale.
bool read_number(const std::string & s, double & value);

// The shortest text that reads back as the same number; whole numbers without an exponent.
std::string write_number(double value);

struct param_info {
    std::string name;
    std::string value;                 // the default, as it would be written
    std::string doc;                   // one sentence with the unit
    double      min = 0, max = 0;      // of a number; ignored where choices are given
    std::vector<std::string> choices = {}; // of a word; empty: a number
    bool        integer = true;
};

// Every declared parameter with its value, defaults filled in.
class params {
public:
    std::map<std::string, std::string> values;

    int32_t     i(const std::string & key) const;
    double      f(const std::string & key) const;
    const std::string & s(const std::string & key) const;
};

struct policy_info;

// A parsed spec. canonical() writes it with every parameter, in the declared order, but for a share and values that are
// the policy's own: two specs mean the same iff equal.
struct spec {
    const policy_info * info = nullptr;
    params              p;

    std::string canonical() const;
};

// Throws std::invalid_argument naming the valid names, keys, ranges or words.
spec parse_spec(const std::string & text);

// "512" tokens, "0.25" or "25%" retained ratio in (0, 1]; "" none.
struct budget {
    enum kind_t { none, tokens, ratio } kind = none;
    double value = 0;

    // tokens of n: max(1, round(r * n)) for a ratio
    int32_t of(int32_t n) const;
    std::string str() const;
};

budget parse_budget(const std::string & text, const char * name);

} // namespace kvc
