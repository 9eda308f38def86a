#include "kvc_compress.h"

#include "kvc_fields.h"

#include "server-common.h"
#include "server-http.h"
#include "server-queue.h"

static void fail(server_http_res & res, const json & error) {
    res.status = json_value(error, "code", 500);
    res.data   = safe_json_to_str({ { "error", error } });
}

static void refuse(server_http_res & res, const std::string & why) {
    fail(res, format_error_response(why, ERROR_TYPE_INVALID_REQUEST));
}

bool kvc_compress(const server_http_req & req, server_response_reader & rd, server_http_res & res, bool evicts) {
    const std::string action = req.get_param("action");
    if (action != "compress") {
        if (!evicts || action == "save" || action == "restore" || action == "erase") {
            return false;
        }
        refuse(res, "Invalid action: it is save, restore, erase or compress");
        return true;
    }
    server_task task(SERVER_TASK_TYPE_SLOT_ERASE);
    task.id = rd.get_new_id();
    try {
        task.slot_action.id_slot = std::stoi(req.get_param("id_slot"));
    } catch (const std::exception &) {
        refuse(res, "Invalid slot ID");
        return true;
    }
    try {
        task.params.kv = kvc_read_fields(req.body);
    } catch (const std::invalid_argument & err) {
        refuse(res, err.what());
        return true;
    }
    task.params.kv.compress = true;
    rd.post_task(std::move(task));

    const auto result = rd.next(req.should_stop);
    if (!result) {
        return true; // the client has gone
    }
    if (result->is_error()) {
        fail(res, result->to_json());
    } else {
        res.data = safe_json_to_str(result->to_json());
    }
    return true;
}
