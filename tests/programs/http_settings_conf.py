"""A configuration with request hooks; RAISE names the one that raises."""

import json
import os

RAISES = os.environ.get("RAISE", "")


def pre_request(worker, req):
    seen = {
        "pid": worker.pid,
        "method": req.method,
        "uri": req.uri,
        "path": req.path,
        "query": req.query,
        "fragment": req.fragment,
        "version": list(req.version),
        "headers": req.headers,
        "scheme": req.scheme,
        "body": hasattr(req.body, "read"),
        "should_close": bool(req.should_close()),
        "remote": req.peer_addr if isinstance(req.peer_addr, str) else list(req.peer_addr or [])[:1],
    }
    print(f"pre_request {json.dumps(seen)}", flush=True)
    if RAISES == "pre_request":
        raise ValueError("raised in pre_request")


def post_request(worker, req, environ, resp):
    seen = {"pid": worker.pid, "uri": req.uri, "path": environ.get("PATH_INFO")}
    if resp is not None:
        seen |= {
            "status": resp.status,
            "status_code": getattr(resp, "status_code", None),  # unknown before start_response
            "headers": resp.headers,
            "headers_sent": resp.headers_sent,
            "sent": resp.sent,
            "response_length": resp.response_length,
            "chunked": resp.chunked,
            "should_close": bool(resp.should_close()),
        }
    print(f"post_request {json.dumps(seen)}", flush=True)
    if RAISES == "post_request":
        raise ValueError("raised in post_request")
