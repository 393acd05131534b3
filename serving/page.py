"""The page of the server: one file, and the policy that lets a browser run that file and nothing
else.

The file holds its own style and script. The policy names their hashes, so that no text of a model
or of a link can become a script, and lets the page connect to this server alone.
"""
import base64
import hashlib
import re
from pathlib import Path

NOTHING = "default-src 'none'; frame-ancestors 'none'"     # for answers that are no page


def hash_of(kind, text):
    """The hash of the one style or script in a page, as a policy names it."""
    [inside] = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
    digest = hashlib.sha256(inside.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def policy_of(text):
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hash_of('script', text)}",
            f"style-src {hash_of('style', text)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


PAGE = Path(__file__).with_name("page.html").read_bytes()
POLICY = policy_of(PAGE.decode())
