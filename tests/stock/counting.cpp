// A device that is not the host, played by the CPU: memory of a buffer type of its own, which only set, get and the
// device's graphs touch, and which counts what crosses. Tests load it (tests/counting.py) and register it as a GPU.

#include "ggml-backend-impl.h"
#include "ggml-backend.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

static std::atomic<int64_t> n_read{ 0 }, n_written{ 0 }, n_graphs{ 0 }, n_allocated{ 0 };
static std::set<std::string> lacks; // ops it does not run

//
// buffers
//

static void buffer_free(ggml_backend_buffer_t b) {
    n_allocated -= (int64_t) b->size;
    std::free(b->context);
}

static void * buffer_base(ggml_backend_buffer_t b) { return b->context; }

static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *) t->data + offset, value, size);
}

static void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
    n_written += (int64_t) size;
}

static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
    n_read += (int64_t) size;
}

static bool buffer_copy(ggml_backend_buffer_t b, const ggml_tensor * src, ggml_tensor * dst) {
    if (src->buffer->buft != b->buft) {
        return false; // through the host
    }
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

static void buffer_clear(ggml_backend_buffer_t b, uint8_t value) { memset(b->context, value, b->size); }

static const char * type_name(ggml_backend_buffer_type_t) { return "Counting"; }
static size_t type_alignment(ggml_backend_buffer_type_t) { return 256; }
static bool type_is_host(ggml_backend_buffer_type_t) { return false; }

static ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, size_t size) {
    const size_t n = (size + 255)/256*256 + 256;
    void * data = std::aligned_alloc(256, n);
    if (!data) {
        return nullptr;
    }
    memset(data, 0xff, n); // what is read before it is written is not a number
    n_allocated += (int64_t) size;
    static const ggml_backend_buffer_i iface = { buffer_free, buffer_base, nullptr, buffer_memset, buffer_set, buffer_get, nullptr, nullptr, buffer_copy,
        buffer_clear, nullptr };
    return ggml_backend_buffer_init(type, iface, data, size);
}

//
// backend: graphs are the CPU's
//

static const char * backend_name(ggml_backend_t) { return "Counting"; }

static void backend_free(ggml_backend_t b) {
    ggml_backend_free((ggml_backend_t) b->context);
    delete b;
}

static ggml_status backend_compute(ggml_backend_t b, ggml_cgraph * graph) {
    ++n_graphs;
    return ggml_backend_graph_compute((ggml_backend_t) b->context, graph);
}

static ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 0x6b, 0x76, 0x63, 0x2d, 0x63, 0x6f, 0x75, 0x6e, 0x74, 0x69, 0x6e, 0x67, 0x2d, 0x64, 0x65, 0x76 };
    ggml_backend_i iface = {};
    iface.get_name      = backend_name;
    iface.free          = backend_free;
    iface.graph_compute = backend_compute;
    return new ggml_backend{ &guid, iface, dev, ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
}

//
// device
//

static ggml_backend_buffer_type buffer_type;

static const char * device_name(ggml_backend_dev_t) { return "Counting"; }
static enum ggml_backend_dev_type type_of(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }
static ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return &buffer_type; }
static void memory_of(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = (size_t) 8 << 30; }

static void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name = props->description = device_name(dev);
    props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
    memory_of(dev, &props->memory_free, &props->memory_total);
}

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const bool own = op->op == GGML_OP_CUSTOM || op->op == GGML_OP_MAP_CUSTOM1 || op->op == GGML_OP_MAP_CUSTOM2 || op->op == GGML_OP_MAP_CUSTOM3;
    auto * cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return !own && !lacks.count(ggml_op_name(op->op)) && ggml_backend_dev_supports_op(cpu, op);
}

static bool device_supports_type(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return type == &buffer_type; }

//
// registry
//

static const char * reg_name(ggml_backend_reg_t) { return "Counting"; }
static size_t reg_count(ggml_backend_reg_t) { return 1; }

static ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t) {
    static ggml_backend_device device = { { device_name, device_name, memory_of, type_of, device_props, device_init, device_buffer_type, nullptr,
        nullptr, device_supports_op, device_supports_type, nullptr, nullptr, nullptr, nullptr }, reg, nullptr };
    buffer_type = { { type_name, type_alloc, type_alignment, nullptr, nullptr, type_is_host }, &device, nullptr };
    return &device;
}

static ggml_backend_reg registry = { GGML_BACKEND_API_VERSION, { reg_name, reg_count, reg_device, nullptr }, nullptr };

extern "C" {
    void counting_register() { ggml_backend_register(&registry); }
    void counting_unload()   { ggml_backend_unload(&registry); }
    void counting_lacks(const char * op) { if (op) { lacks.insert(op); } else { lacks.clear(); } }
    void counting_reset() { n_read = n_written = n_graphs = 0; }
    int64_t counting_read()      { return n_read; }      // bytes from the device to the host
    int64_t counting_written()   { return n_written; }   // and back
    int64_t counting_graphs()    { return n_graphs; }
    int64_t counting_allocated() { return n_allocated; } // bytes of all its buffers
}
