// Where the units of a text begin and end; pykvc/spans.py counts in characters what is bytes here.

#include "spans.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

namespace py = pybind11;

static std::vector<std::pair<int32_t, int32_t>> pairs(const std::vector<kvc::span> & spans) {
    std::vector<std::pair<int32_t, int32_t>> res;
    for (const auto & s : spans) {
        res.push_back({ s.begin, s.end });
    }
    return res;
}

void bind_spans(py::module_ & m) {
    using namespace py::literals;
    m.def("sentence_spans", [](const std::string & text) { return pairs(kvc::sentence_spans(text)); }, "text"_a,
            "Sentences of a UTF-8 text, in bytes.");
    m.def("separator_spans", [](const std::string & text, const std::string & separator) { return pairs(kvc::separator_spans(text, separator)); },
            "text"_a, "separator"_a, "Pieces of a UTF-8 text, each with the separator that ends it, in bytes.");
}
