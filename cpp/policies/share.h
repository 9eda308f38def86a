#pragma once

// Sharing: how far one ranking of scores reaches when it decides how much each head keeps. A choice of its own beside
// the score (policy.h): "snapkv:share=layers" is snapkv's score, ranked over all layers.
//
//   head    every head of every layer keeps the same number: no ranking between heads
//   layers  one ranking over all layers and heads says how long each layer is; its heads keep equally many
//   layer   one ranking over the heads of each layer: heads differ (AdaKV 2407.11550, KVzip's "layerwise")
//   all     one ranking over all heads of all layers: heads differ (KVzip 2505.23416)
//   2/1/1   weights, one for each layer: its part of the budget, whatever the scores say (kvpress' PerLayerCompressionPress)
//   auto    layers; head where kv_cells has no pool that layers draw their rows from (pool.cpp)
//
// The mean over all heads is the budget, whatever the share, and so are the bytes: a head takes the rows it holds.

#include "spec.h"

#include <cstdint>
#include <vector>

namespace kvc {

class policy;
struct request;

enum class share_over { head, layers, layer, all, weights };

struct sharing {
    share_over over = share_over::head;
    std::vector<double> weights = {}; // [n_layer] of share_over::weights

    bool heads_differ()  const { return over == share_over::layer || over == share_over::all; }
    bool layers_differ() const { return over != share_over::head; }
};

// auto as head or layers.
void settle_share(params & p, bool layers);

// The parameters of a policy that can share, with its own default.
std::vector<param_info> share_params(const std::string & over);
sharing read_sharing(const params & p); // of a policy that declares them
share_over share_from(const std::string & word); // throws
void check_weights(const sharing & share, size_t n_layer); // throws: of another number of layers

// "2/1/1.50" -> "2/1/1.5", as it is always written; "" where the text is none. Throws: one is no number above 0.
std::string written_weights(const std::string & text);

// share=layers: slots of each layer, their mean is r.budget exactly.
std::vector<int32_t> layer_lengths(const policy & pol, const request & r);

// The same of weights: of what is not frozen each layer gets its part.
std::vector<int32_t> weighted_lengths(const policy & pol, const request & r);

// share=layer and all: slots of each head of each layer, [n_layer][n_head_kv]. Empty for other shares.
std::vector<std::vector<int32_t>> head_lengths(const policy & pol, const request & r);

} // namespace kvc
