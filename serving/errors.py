"""What a client is told when it does not get what it asked for, in the shape that clients of the
OpenAI API know.
"""

KINDS = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refused(Exception):
    """A request that is answered with an error. param: the field that is wrong, if it is one's
    fault.
    """

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self):
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def wrong(message, param=None, code=None):
    """A Refused for a request that asks for something that does not exist."""
    return Refused(400, message, param, code)
