"""Follows the redirects of upstreams (the option ``follow_redirects``).

Process: any process in which the proxy is mounted, in the greenlet or thread of the request.
Never: send the credentials of a request to an origin other than the one they were meant for.
"""

from __future__ import annotations

from gunicorn_passenger.errors import BadResponse
from gunicorn_passenger.proxy import rewrite
from gunicorn_passenger.proxy.forwarded_request import ForwardedRequest
from gunicorn_passenger.proxy.plan import ForwardPlan, plan_send
from gunicorn_passenger.proxy.request_body import NO_BODY_SENDER
from gunicorn_passenger.proxy.response_head import ResponseHead
from gunicorn_passenger.proxy.round_trip import RoundTrip

REDIRECTS = (301, 302, 303, 307, 308)
_CREDENTIALS = {"authorization", "cookie"}
_CONTENT = {"content-length", "content-type", "content-encoding", "content-language", "content-location"}


class Redirects:
    """The redirects that one request has followed."""

    def __init__(self, first: ForwardPlan) -> None:
        """
        :param first: the plan of the client's own request.
        """
        self._origin = first.target
        self._followed = 0

    def follow(
        self, request: ForwardedRequest, plan: ForwardPlan, round_trip: RoundTrip, head: ResponseHead
    ) -> ForwardPlan | None:
        """The plan for the request that a redirect asks for.

        :returns: ``None`` when the client gets the redirect: it has no usable ``Location``, or the body of
            the request would be needed again.
        :raises BadResponse: after more redirects than allowed.
        """
        options = request.options
        location = next((value for name, value in head.headers if name.lower() == "location"), None)
        if location is None:
            return None
        method = request.method
        body = request.sender.length != 0 or request.sender.replaced
        becomes_get = head.status == 303 or (head.status in (301, 302) and method == "POST")
        if body and not becomes_get:
            return None
        found = rewrite.redirect(location, plan.target, request.upstream_path, request.headers.host)
        if found is None:
            return None
        self._followed += 1
        if self._followed > options.follow_redirects:
            raise BadResponse(f"it has redirected the request more than {options.follow_redirects} times")
        if round_trip.has_whole_body:
            round_trip.receive()
        round_trip.finish()
        request.round_trip = request.upstream = None
        headers = request.headers
        if becomes_get:
            if method != "HEAD":
                method = "GET"
            headers = headers.without_length()
            headers = headers.changed([line for line in headers.lines if line[0].lower() not in _CONTENT])
            request.sender.abandon()
            request.sender = NO_BODY_SENDER
        target, path = found
        foreign = target != self._origin
        if foreign:
            rest = [line for line in headers.lines if line[0].lower() not in _CREDENTIALS]
            headers = headers.changed(rest).with_host(target.authority, options.preserve_header_key_case)
        request.headers = headers
        request.target = target
        request.backends = []
        request.waits = True
        return plan_send(request, target, method, path, foreign=foreign)
