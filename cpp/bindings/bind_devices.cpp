// What llama.cpp can run on: devices of this machine, and those of its RPC servers.

#include "bind_model.h"

#include "ggml-backend.h"
#ifdef PYKVC_RPC
#include "ggml-rpc.h"
#endif

#include <string>
#include <tuple>
#include <vector>

namespace kvc {

static std::string kind_of(ggml_backend_dev_t dev) {
    switch (ggml_backend_dev_type(dev)) {
        case GGML_BACKEND_DEVICE_TYPE_CPU:   return "CPU";
        case GGML_BACKEND_DEVICE_TYPE_GPU:   return "GPU";
        case GGML_BACKEND_DEVICE_TYPE_IGPU:  return "IGPU";
        case GGML_BACKEND_DEVICE_TYPE_ACCEL: return "ACCEL";
        default:                             return "other";
    }
}

// Each endpoint has to answer: where nobody does, llama.cpp aborts.
static std::vector<ggml_backend_dev_t> devices_of_server(const std::string & endpoint) {
    auto * rpc = ggml_backend_reg_by_name("RPC");
    if (!rpc) {
        throw std::invalid_argument("rpc_servers: this build knows no RPC; build it with -C cmake.define.PYKVC_RPC=ON");
    }
    const auto add = (ggml_backend_reg_t (*)(const char *)) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server");
    auto * server = add(endpoint.c_str());
    std::vector<ggml_backend_dev_t> res;
    for (size_t i = 0; server && i < ggml_backend_reg_dev_count(server); ++i) {
        res.push_back(ggml_backend_reg_dev_get(server, i));
    }
    return res;
}

// In llama.cpp's order: servers first, then GPUs. They are not registered, so that another model does not get them.
std::vector<ggml_backend_dev_t> devices_of(const std::vector<std::string> & rpc_servers) {
    std::vector<ggml_backend_dev_t> res;
    for (const auto & endpoint : rpc_servers) {
        const auto found = devices_of_server(endpoint);
        res.insert(res.end(), found.begin(), found.end());
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        if (auto * dev = ggml_backend_dev_get(i); ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU) {
            res.push_back(dev);
        }
    }
    res.push_back(nullptr);
    return res;
}

} // namespace kvc

namespace py = pybind11;

void bind_devices(py::module_ & m) {
    using namespace kvc;
    using namespace py::literals;

    m.def("devices", []() {
        std::vector<std::tuple<std::string, std::string, std::string>> res;
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            auto * dev = ggml_backend_dev_get(i);
            res.emplace_back(ggml_backend_dev_name(dev), ggml_backend_dev_description(dev), kind_of(dev));
        }
        return res;
    }, "Name, description and kind (CPU, GPU, IGPU, ACCEL) of what this build can run on.");
    m.def("device_memory", []() {
        std::vector<std::tuple<std::string, std::string, size_t, size_t>> res;
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            auto * dev = ggml_backend_dev_get(i);
            size_t free = 0, total = 0;
            ggml_backend_dev_memory(dev, &free, &total);
            res.emplace_back(ggml_backend_dev_name(dev), kind_of(dev), free, total);
        }
        return res;
    }, "Name, kind, free and total bytes of each; of the CPU both are what ggml says, which is no measure of what is free.");
#ifdef PYKVC_RPC
    m.attr("RPC_VERSION") = RPC_PROTO_MAJOR_VERSION;
#else
    m.attr("RPC_VERSION") = py::none();
#endif
}
