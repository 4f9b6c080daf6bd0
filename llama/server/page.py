"""The page at /, for people without a client: page.html, and the policy that keeps it to itself."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse

PAGE = Path(__file__).with_name("page.html")


def page() -> HTMLResponse:
    """The response: it runs only the script and has only the style that stand in it, asks this service alone, and
    turns no text into HTML (https://www.w3.org/TR/CSP3/, https://www.w3.org/TR/trusted-types/)."""
    text = PAGE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_digest('script', text)}'; style-src '{_digest('style', text)}';"
        " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})


def _digest(tag: str, text: str) -> str:
    """Of what stands in the one element with that tag."""
    (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}"
