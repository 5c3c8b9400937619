"""Faults of a store: which of them may be gone at another try."""

_PASSING = {"IncompleteBody", "BadDigest", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}
_PASSING |= {"ServiceUnavailable", "SlowDown", "InternalError", "XAmzContentSHA256Mismatch", "RequestTimeTooSkewed"}
_DROPPED = {
    "HTTPClientError",
    "ConnectionError",
    "ClientError",
    "ClientPayloadError",
    "IncompleteRead",
    "ResponseParserError",
}


def code(error: BaseException) -> str:
    """A bucket's own name for an error, as S3 has them; empty where there is none."""
    response = getattr(error.__cause__ or error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def passes(error: BaseException | None) -> bool:
    """Whether a fault of a bucket may be gone at another try: by its code, or a connection that broke or was slow."""
    if error is not None and (name := code(error)):
        return name in _PASSING or (name.isdigit() and int(name) in (408, 409, 429, 500, 502, 503, 504))
    if getattr(error, "code", 0) in (408, 429, 500, 502, 503, 504):  # gcsfs
        return True
    return isinstance(error, (TimeoutError, ConnectionError)) or any(k.__name__ in _DROPPED for k in type(error).mro())
