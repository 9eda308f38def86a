// The module: what is bound stands in bind_policy.cpp, bind_spans.cpp (no model needed), bind_devices.cpp,
// bind_llama.cpp and bind_sampler.cpp.

#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_policy(py::module_ & m);
void bind_spans (py::module_ & m);
void bind_devices(py::module_ & m);
void bind_llama (py::module_ & m);
void bind_sampler(py::module_ & m);

PYBIND11_MODULE(_core, m) {
    m.doc() = "libllama with pykvc's eviction engine, as thin classes. Users want pykvc.LLM.";
    bind_policy(m);
    bind_spans(m);
    bind_llama(m); // llama.cpp loads its devices
    bind_devices(m);
    bind_sampler(m);
}
