"""The server's own pages: one file each for the browser, which may run what is in it and nothing else."""

import base64
import hashlib
import re
from importlib import resources
from typing import Final

from starlette.responses import HTMLResponse

_STYLE_LINK: Final = re.compile(r'<link rel="stylesheet" href="(\w+\.css)">')
_SCRIPT_LINK: Final = re.compile(r'<script src="(\w+\.js)"></script>')
_STYLES: Final = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_SCRIPTS: Final = re.compile(r"<script>(.*?)</script>", re.DOTALL)


class Page:
    """An HTML file of this package, with the style sheets and scripts that lie beside it put inside.

    Its content security policy admits these by their digests, and requests to this server alone.
    """

    def __init__(self, name: str) -> None:
        """Read the page; raise OSError when it, or what it links to, is not there."""
        text = _STYLE_LINK.sub(lambda link: f"<style>\n{_read(link[1])}</style>", _read(name))
        self.text = _SCRIPT_LINK.sub(lambda link: f"<script>\n{_read(link[1])}</script>", text)
        self._headers = {
            "Content-Security-Policy": "default-src 'none'; "
            f"style-src {_digests(_STYLES.findall(self.text))}; script-src {_digests(_SCRIPTS.findall(self.text))}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    def response(self) -> HTMLResponse:
        """Return the page."""
        return HTMLResponse(self.text, headers=self._headers)


def _read(name: str) -> str:
    return resources.files("disagg.serve.api").joinpath(name).read_text(encoding="utf-8")


def _digests(parts: list[str]) -> str:
    """Return the sources of a policy that admits these inline parts."""
    digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
