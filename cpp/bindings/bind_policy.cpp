// The host half: the table, specs, scores and plans over numpy arrays, and policies written in Python.

#include "bind_policy.h"

#include "select.h"
#include "spans.h"

#include <pybind11/stl.h>

#include <stdexcept>

namespace py = pybind11;

namespace kvc {

const char * decode_name(decode_mode mode) {
    switch (mode) {
        case decode_mode::whole:     return "whole";
        case decode_mode::generated: return "generated";
        default:                     return "none";
    }
}

static decode_mode decode_from(const std::string & name) {
    for (const auto mode : { decode_mode::none, decode_mode::whole, decode_mode::generated }) {
        if (name == decode_name(mode)) {
            return mode;
        }
    }
    throw std::invalid_argument("decode is 'none', 'whole' or 'generated', not '" + name + "'");
}

py::dict arrays_of(const layer_view & v) {
    const auto f32 = [](const float * p, std::vector<py::ssize_t> shape) -> py::object {
        if (!p) {
            return py::none();
        }
        f32_array res(shape);
        std::copy(p, p + res.size(), res.mutable_data());
        return std::move(res);
    };
    py::dict d;
    d["il"] = v.il; d["n_query"] = v.n_query;
    d["pos"]  = to_numpy(std::vector<int32_t>(v.pos, v.pos + (size_t) v.n_head_kv*v.n_kv), { v.n_head_kv, v.n_kv });
    d["attn"] = f32(v.attn, { v.n_head, v.n_kv });
    d["sums"] = f32(v.sums, { v.n_head_kv, v.n_kv });
    d["keys"] = f32(v.keys, { v.n_head_kv, v.n_kv, v.head_dim });
    d["q_mean"] = f32(v.q_mean, { v.n_head, v.head_dim });
    d["q_cov"]  = f32(v.q_cov,  { v.n_head, v.head_dim, v.head_dim });
    d["v_norm"] = f32(v.v_norm, { v.n_head_kv, v.n_kv });
    d["o_norm"] = f32(v.o_norm, { v.n_head, v.n_kv });
    d["attn_rows"]  = f32(v.attn_rows,  { v.n_head, v.n_query, v.n_kv });
    d["value_rows"] = f32(v.value_rows, { v.n_head_kv, v.n_kv, v.value_dim });
    return d;
}

static py::dict request_dict(const request & r) {
    py::list layers, spans;
    for (const auto & l : r.layers) {
        const size_t n = (size_t) l.n_kv*r.n_head_kv;
        py::dict d;
        d["n_kv"]     = l.n_kv;
        d["n_frozen"] = l.n_frozen;
        d["pos"]      = to_numpy(std::vector<int32_t>(l.pos, l.pos + n), { r.n_head_kv, l.n_kv });
        d["score"]    = to_numpy(std::vector<float>(l.score, l.score + n), { r.n_head_kv, l.n_kv });
        layers.append(d);
    }
    for (const auto & s : r.spans) {
        spans.append(py::make_tuple(s.begin, s.end));
    }
    py::dict res;
    res["prompt"] = r.prompt;
    res["room"]   = r.room;
    res["budget"] = r.budget;
    res["layers"] = layers;
    res["spans"]  = spans;
    return res;
}

// A subclass of pykvc.Policy, asked under the GIL.
class py_policy : public policy {
public:
    explicit py_policy(py::object obj) : obj(std::move(obj)) {
        nd.window = this->obj.attr("window").cast<int32_t>();
        nd.newest = this->obj.attr("newest").cast<float>();
        nd.sums   = this->obj.attr("sums").cast<bool>();
        nd.keys   = this->obj.attr("keys").cast<bool>();
        nd.future = this->obj.attr("future").cast<int32_t>();
        nd.values = this->obj.attr("values").cast<bool>();
        nd.outputs = this->obj.attr("outputs").cast<bool>();
        nd.attn_rows  = this->obj.attr("attn_rows").cast<bool>();
        nd.value_rows = this->obj.attr("value_rows").cast<bool>();
        nd.spans  = this->obj.attr("spans").cast<bool>();
        sinks     = this->obj.attr("sinks").cast<int32_t>();
        recent    = this->obj.attr("recent").cast<int32_t>();
        differ    = this->obj.attr("heads_differ").cast<bool>();
        share.over = share_from(this->obj.attr("share").cast<std::string>());
        has_budgets = this->obj.attr("_overrides").contains("budgets");
        has_keep    = this->obj.attr("_overrides").contains("keep");
        if (nd.window < 0 || nd.future < 0 || sinks < 0 || recent < 0) {
            throw std::invalid_argument("window, future, sinks and recent of a policy are token counts >= 0");
        }
    }

    ~py_policy() override {
        auto * object = obj.release().ptr();
        if (Py_IsInitialized()) { // else it went with the interpreter
            py::gil_scoped_acquire gil;
            Py_DECREF(object);
        }
    }

    needs   need() const override { return nd; }
    int32_t n_sink() const override { return sinks; }
    int32_t n_recent(int32_t) const override { return recent; }
    int32_t min_budget() const override { return sinks + recent + 1; }
    bool    on_any_thread() const override { return false; }
    bool    heads_differ() const override { return differ || share.heads_differ(); }

    std::vector<int32_t> budgets(const request & r) const override {
        if (!has_budgets) {
            return policy::budgets(r);
        }
        py::gil_scoped_acquire gil;
        return obj.attr("_budgets")(request_dict(r)).cast<std::vector<int32_t>>();
    }

    void score(const layer_view & v, float * out) const override {
        py::gil_scoped_acquire gil;
        py::dict d = arrays_of(v);
        d["n_layer"] = v.n_layer; d["n_kv"] = v.n_kv; d["n_head"] = v.n_head; d["n_head_kv"] = v.n_head_kv;
        d["head_dim"] = v.head_dim; d["value_dim"] = v.value_dim; d["budget"] = v.budget;
        const auto res = obj.attr("_score")(d).cast<f32_array>();
        copy_checked(res, "score", v.n_head_kv, v.n_kv, out);
    }

    void keep(const request & r, int32_t il, int32_t n_keep, int32_t * out) const override {
        if (!has_keep) {
            policy::keep(r, il, n_keep, out);
            return;
        }
        py::gil_scoped_acquire gil;
        const auto res = obj.attr("_keep")(request_dict(r), il, n_keep).cast<i32_array>();
        copy_checked(res, "keep", r.n_head_kv, n_keep, out);
    }

private:
    template <typename A, typename T>
    static void copy_checked(const A & a, const char * what, int32_t n0, int32_t n1, T * out) {
        if (a.ndim() != 2 || a.shape(0) != n0 || a.shape(1) != n1) {
            throw std::invalid_argument(std::string(what) + "() must return [" + std::to_string(n0) + ", " + std::to_string(n1) + "]");
        }
        std::copy(a.data(), a.data() + a.size(), out);
    }

    py::object obj;
    needs   nd;
    int32_t sinks = 0, recent = 0;
    bool    differ = false, has_budgets = false, has_keep = false;
};

std::shared_ptr<const config> config_from_python(const py::object & pol, const std::string & kv_budget, const std::string & kv_decode_budget,
        const std::string & kv_cells) {
    if (py::isinstance<py::str>(pol)) {
        return make_config(pol.cast<std::string>(), kv_budget, kv_decode_budget, kv_cells, false);
    }
    return make_config(std::make_shared<py_policy>(pol), pol.attr("name").cast<std::string>(), decode_from(pol.attr("decode").cast<std::string>()),
            kv_budget, kv_decode_budget, kv_cells);
}

static py::dict needs_dict(const needs & nd) {
    py::dict n;
    n["window"] = nd.window; n["newest"] = nd.newest; n["sums"] = nd.sums; n["keys"] = nd.keys; n["spans"] = nd.spans;
    n["future"] = nd.future; n["values"] = nd.values; n["outputs"] = nd.outputs; n["attn_rows"] = nd.attn_rows; n["value_rows"] = nd.value_rows;
    n["probe"] = nd.probe == probe::none ? "none" : nd.probe == probe::mean ? "mean" : "max";
    return n;
}

static py::list table() {
    py::list res;
    for (const auto & info : policy_table()) {
        const auto pol = info.make_policy(parse_spec(info.name).p);
        py::dict d;
        py::list params;
        for (const auto & p : info.all_params()) {
            py::dict x;
            x["name"] = p.name; x["value"] = p.value; x["doc"] = p.doc; x["min"] = p.min; x["max"] = p.max;
            x["choices"] = p.choices; x["integer"] = p.integer;
            params.append(x);
        }
        d["name"] = info.name; d["title"] = info.title; d["paper"] = info.paper; d["decode"] = decode_name(info.decode);
        d["layers_differ"] = info.layers_differ || pol->share.layers_differ(); d["recommended"] = std::string(info.name) == recommended;
        d["values"] = info.values ? py::object(py::str(info.values)) : py::none();
        d["share"] = info.share ? py::object(py::str(info.share)) : py::none();
        d["heads_differ"] = pol->heads_differ(); d["needs"] = needs_dict(pol->need()); d["params"] = params;
        res.append(d);
    }
    return res;
}

static std::unique_ptr<policy> made(const std::string & text) {
    const auto sp = parse_spec(text);
    return sp.info->make_policy(sp.p);
}

static void check_2d(const py::array & a, const char * name) {
    if (a.ndim() != 2) {
        throw std::invalid_argument(std::string(name) + " must be [n_head_kv, n_kv]");
    }
}

static py::array_t<float> score(const std::string & text, const i32_array & pos, int32_t il, int32_t n_layer, int32_t n_head, int32_t n_query,
        int32_t head_dim, const py::object & attn, const py::object & sums, const py::object & keys, const py::object & probed,
        const py::object & q_mean, const py::object & q_cov, const py::object & v_norm, const py::object & o_norm, const py::object & attn_rows,
        const py::object & value_rows, int32_t budget) {
    check_2d(pos, "pos");
    const auto sp = parse_spec(text);
    const auto pol = sp.info->make_policy(sp.p);
    const int32_t n_hkv = (int32_t) pos.shape(0), n_kv = (int32_t) pos.shape(1);
    f32_array a, s, k, p, m, c, n, o, r, w;
    const auto ptr = [](const py::object & o, f32_array & hold, size_t n, const char * name) -> const float * {
        if (o.is_none()) {
            return nullptr;
        }
        hold = o.cast<f32_array>();
        if ((size_t) hold.size() != n) {
            throw std::invalid_argument(std::string(name) + " has " + std::to_string(hold.size()) + " elements, expected " + std::to_string(n));
        }
        return hold.data();
    };
    n_head   = n_head   > 0 ? n_head   : attn.is_none() ? n_hkv : (int32_t) attn.cast<f32_array>().shape(0);
    head_dim = head_dim > 0 ? head_dim : keys.is_none() ? 0     : (int32_t) keys.cast<f32_array>().shape(2);
    const int32_t value_dim = value_rows.is_none() ? head_dim : (int32_t) value_rows.cast<f32_array>().shape(2);
    const auto nd = pol->need();
    n_query = n_query > 0 ? n_query : nd.window;
    layer_view v = { il, n_layer, n_kv, n_head, n_hkv, head_dim, n_query, value_dim, budget > 0 ? std::min(budget, n_kv) : n_kv, pos.data(),
        ptr(attn, a, (size_t) n_head*n_kv, "attn"), ptr(sums, s, (size_t) n_hkv*n_kv, "sums"), ptr(keys, k, (size_t) n_hkv*n_kv*head_dim, "keys"),
        ptr(probed, p, (size_t) n_hkv*n_kv, "probed"), ptr(q_mean, m, (size_t) n_head*head_dim, "q_mean"),
        ptr(q_cov, c, (size_t) n_head*head_dim*head_dim, "q_cov"), ptr(v_norm, n, (size_t) n_hkv*n_kv, "v_norm"),
        ptr(o_norm, o, (size_t) n_head*n_kv, "o_norm"), ptr(attn_rows, r, (size_t) n_head*n_query*n_kv, "attn_rows"),
        ptr(value_rows, w, (size_t) n_hkv*n_kv*value_dim, "value_rows") };
    const bool fit = nd.future > 0, window = nd.window > 0 && !fit && !nd.attn_rows;
    if ((window && !v.attn && !v.probed) || (nd.sums && !v.sums) || (nd.keys && !v.keys) || (fit && (!v.q_mean || !v.q_cov)) || (nd.values && !v.v_norm) ||
            (nd.outputs && !v.o_norm) || (nd.attn_rows && !v.attn_rows) || (nd.value_rows && !v.value_rows)) {
        throw std::invalid_argument(text + " needs " + (window ? "attn " : "") + (nd.sums ? "sums " : "") + (nd.keys ? "keys " : "") +
                (fit ? "q_mean q_cov " : "") + (nd.values ? "v_norm " : "") + (nd.outputs ? "o_norm " : "") +
                (nd.attn_rows ? "attn_rows " : "") + (nd.value_rows ? "value_rows" : ""));
    }
    f32_array out({ (py::ssize_t) n_hkv, (py::ssize_t) n_kv });
    pol->score(v, out.mutable_data());
    return std::move(out);
}

static py::list plan(const std::string & text, const std::vector<i32_array> & pos, const std::vector<f32_array> & score, int32_t budget, bool prompt,
        const py::object & n_frozen, const std::vector<std::pair<int32_t, int32_t>> & spans, bool room, int32_t n_block) {
    const auto sp = parse_spec(text);
    const auto pol = sp.info->make_policy(sp.p);
    if (pos.empty() || pos.size() != score.size()) {
        throw std::invalid_argument("pos and score must hold one array per layer");
    }
    const auto frozen = n_frozen.is_none() ? std::vector<int32_t>(pos.size(), 0) : n_frozen.cast<std::vector<int32_t>>();
    request r;
    r.prompt = prompt;
    r.room   = room;
    r.budget = budget;
    r.n_head_kv = (int32_t) pos[0].shape(0);
    for (size_t l = 0; l < pos.size(); ++l) {
        check_2d(pos[l], "pos");
        check_2d(score[l], "score");
        if (pos[l].shape(0) != r.n_head_kv || score[l].shape(0) != r.n_head_kv || score[l].shape(1) != pos[l].shape(1)) {
            throw std::invalid_argument("pos and score of a layer must have one shape, [n_head_kv, n_kv]");
        }
        r.layers.push_back({ (int32_t) pos[l].shape(1), frozen.at(l), pos[l].data(), score[l].data() });
    }
    for (const auto & s : spans) {
        r.spans.push_back({ s.first, s.second });
    }
    check_spans(r.spans);
    for (const auto & layer : r.layers) {
        if (layer.n_frozen < 0 || layer.n_frozen > layer.n_kv) {
            throw std::invalid_argument("n_frozen is 0 to the slots of a layer, " + std::to_string(layer.n_kv));
        }
    }
    py::list res;
    r.heads = heads_in_blocks(r, pol->heads(r), n_block, pol->min_budget());
    const auto n_keep = in_blocks(r, pol->budgets(r), n_block, pol->min_budget());
    for (size_t l = 0; l < pos.size(); ++l) {
        i32_array slots({ (py::ssize_t) r.n_head_kv, (py::ssize_t) n_keep[l] });
        pol->keep(r, (int32_t) l, n_keep[l], slots.mutable_data());
        res.append(slots);
    }
    return res;
}

} // namespace kvc

void bind_policy(py::module_ & m) {
    using namespace kvc;
    using namespace py::literals;
    m.def("policies", &table, "The policy table: name, title, paper, decode, layers_differ, heads_differ, needs, params.");
    m.def("architectures", &architectures, "Names of all that llama.cpp knows.");
    m.def("parse_spec", [](const std::string & s) { return parse_spec(s).canonical(); }, "spec"_a,
            "The canonical form of a spec: every parameter, in declared order. ValueError names what is valid.");
    m.def("needs", [](const std::string & s) {
        return needs_dict(made(s)->need());
    }, "spec"_a, "What a policy with these parameters is given, as the table has it for the default ones.");
    m.def("lacks", [](const std::string & has, const std::string & wants) {
        return lacks(*made(has), *made(wants));
    }, "has"_a, "wants"_a, "Why Context.set_policy(wants) is refused in a context that was made for `has`; '' where it is not.");
    m.def("parse_budget", [](const std::string & s, const std::string & name) {
        const auto b = parse_budget(s, name.c_str());
        return py::make_tuple(b.kind == budget::none ? "none" : b.kind == budget::tokens ? "tokens" : "ratio", b.value);
    }, "text"_a, "name"_a = "kv_budget", "('none' | 'tokens' | 'ratio', value).");
    m.def("score", &score, "spec"_a, "pos"_a, py::kw_only(), "il"_a = 0, "n_layer"_a = 1, "n_head"_a = 0, "n_query"_a = 0, "head_dim"_a = 0,
            "attn"_a = py::none(), "sums"_a = py::none(), "keys"_a = py::none(), "probed"_a = py::none(),
            "q_mean"_a = py::none(), "q_cov"_a = py::none(), "v_norm"_a = py::none(), "o_norm"_a = py::none(),
            "attn_rows"_a = py::none(), "value_rows"_a = py::none(), "budget"_a = 0, "score() of a policy over host arrays: F32 [n_head_kv, n_kv].");
    m.def("plan", &plan, "spec"_a, "pos"_a, "score"_a, "budget"_a, py::kw_only(), "prompt"_a = true, "n_frozen"_a = py::none(),
            "spans"_a = std::vector<std::pair<int32_t, int32_t>>(), "room"_a = false, "n_block"_a = 1,
            "budgets() and keep() of a policy: slots kept a layer, I32 [n_head_kv, n_keep], -1 where a head keeps fewer. n_block: layers "
            "and heads differ by whole blocks of so many slots, 256 on a GPU.");
}
