"""What a request is told that is not answered: one sentence, in the form that clients of OpenAI's interface read."""

from typing import Any

__all__ = ["Refused", "refusal"]

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):  # noqa: N818 - it is not an error of ours
    """A request that cannot be answered.

    Args:
        message: one sentence: given, expected, what to do.
        status: of HTTP.
        field: of the body that is the reason, if one is.
    """

    def __init__(self, message: str, status: int = 400, field: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.field = message, status, field


def refusal(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    """Write the body of an answer that refuses.

    Args:
        message: one sentence.
        status: of HTTP.
        field: of the request's body, if one is the reason.

    Returns:
        The body.
    """
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}
