"""What operators write to have their own logs: a logger class, and a formatter of access records."""

import datetime
import json
import logging

from gunicorn.glogging import Logger


class OwnLogger(Logger):
    """Adds an atom, and keeps an account of its own."""

    def atoms(self, resp, req, environ, request_time):
        atoms = super().atoms(resp, req, environ, request_time)
        atoms["own"] = f"own-{req.method}-{resp.status_code}"
        return atoms

    def access(self, resp, req, environ, request_time):
        super().access(resp, req, environ, request_time)
        assert isinstance(request_time, datetime.timedelta)
        account = {
            "status": resp.status,
            "code": resp.status_code,
            "sent": resp.sent,
            "length": resp.response_length,
            "answer": dict(resp.headers).get("X-Answer"),
            "method": req.method,
            "uri": req.uri,
            "path": req.path,
            "query": req.query,
            "version": list(req.version),
            "asked": dict(req.headers).get("X-ASKED"),
            "peer": environ["REMOTE_ADDR"],
        }
        self.error_log.info("account %s", json.dumps(account))


class JsonFormatter(logging.Formatter):
    """One object a line, made from the record's atoms."""

    def format(self, record):
        names = (
            "h",
            "m",
            "U",
            "q",
            "s",
            "B",
            "D",
            "{x-asked}i",
            "{x-answer}o",
            "{request_method}e",
            "{none}i",
        )
        return json.dumps({"logger": record.name, **{name: record.args[name] for name in names}})
