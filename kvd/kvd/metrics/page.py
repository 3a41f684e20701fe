"""The status page as it is sent: one file, which may load nothing but its data from here.

Its style and script are in it, and are allowed by their hashes; whatever a name may bring into the
page, no other can run.
"""

import base64
import hashlib
import re
from http import HTTPStatus
from pathlib import Path

from kvd.metrics.http import Response

_FILE = Path(__file__).with_name("page.html")


def _response() -> Response:
    text = _FILE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(content) == 1, f"the page has one <{tag}>"
        hashes[tag] = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
    policy = (
        "default-src 'none'; connect-src 'self'; "
        f"style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Response(
        HTTPStatus.OK,
        text.encode(),
        "text/html; charset=utf-8",
        (f"Content-Security-Policy: {policy}", "Referrer-Policy: no-referrer"),
    )


RESPONSE = _response()
