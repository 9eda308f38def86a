#include "kvc_routes.h"

#include "kvc_options.h"

#include "server-common.h"
#include "server-context.h"
#include "server-http.h"

#include "ui.h"

#if defined(LLAMA_UI_HAS_ASSETS)
static const bool built_in = true;
#else
static const bool built_in = false;
#endif

using handler = server_http_context::handler_t;

static handler says(int status, const std::string & type, const std::string & text) {
    return [=](const server_http_req &) {
        auto res = std::make_unique<server_http_res>();
        res->status       = status;
        res->content_type = type + "; charset=utf-8";
        res->data         = text;
        return res;
    };
}

static handler refuses(const std::string & what) {
    const json error = format_error_response(what + " made of all tokens of a text, and this server evicts (--kv-policy): start one "
        "without it", ERROR_TYPE_NOT_SUPPORTED);
    return says(error.at("code").get<int>(), "application/json", safe_json_to_str({ { "error", error } }));
}

// Who opens a server that was built without the page in a browser is told how to get it. The page asks for the server's
// tools: it is told where there are none, as llama.cpp's 403 would be an error in the browser's console.
static void page(const server_http_context & http, const common_params & params) {
    const bool has_page = built_in || !params.public_path.empty();
    if (!params.ui) {
        return;
    }
    if (!has_page) {
        const char * how = "This build is without llama.cpp's web page: `make webui` in a checkout of pykvc adds it (with "
                           "npm), and --path FOLDER serves one that was built elsewhere.";
        SRV_INF("%s\n", how);
        http.get("/", says(501, "text/plain", std::string(how) + "\n")); // of a 404 llama.cpp writes the body
    }
    if (has_page && params.server_tools.empty() && params.mcp_servers_config.empty() && params.mcp_servers_json.empty()) {
        http.get ("/tools", says(200, "application/json", "[]"));
        http.post("/tools", says(200, "application/json", R"({"error": "this server has no tools"})"));
    }
}

void kvc_routes(const server_http_context & http, server_routes & routes, const common_params & params) {
    page(http, params);
    if (kvc_options::of_environment().evicts()) {
        routes.post_embeddings = routes.post_embeddings_oai = refuses("Embeddings are");
        routes.post_rerank = refuses("Rerank scores are");
    }
}
