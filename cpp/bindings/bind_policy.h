#pragma once

#include "engine.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace kvc {

using i32_array = pybind11::array_t<int32_t, pybind11::array::c_style | pybind11::array::forcecast>;
using f32_array = pybind11::array_t<float,   pybind11::array::c_style | pybind11::array::forcecast>;

// A spec string, or an object with pykvc.Policy's protocol, and its budgets.
std::shared_ptr<const config> config_from_python(const pybind11::object & policy, const std::string & budget, const std::string & decode_budget,
        const std::string & cells);

template <typename T>
pybind11::array_t<T> to_numpy(const std::vector<T> & v, std::vector<pybind11::ssize_t> shape) {
    pybind11::array_t<T> res(shape);
    std::copy(v.begin(), v.end(), res.mutable_data());
    return res;
}

// What Python sees of a layer's signals: copies of the arrays, None where the policy did not ask for one.
pybind11::dict arrays_of(const layer_view & v);

const char * decode_name(decode_mode mode);

} // namespace kvc
