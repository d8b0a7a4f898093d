"""Reports in Markdown, and the same as one HTML page that needs no other file."""

import base64
import html
import re
from pathlib import Path

import markdown

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; max-height: 60rem; } em { color: #444; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.85rem; }
th, td { padding: 0.2rem 0.4rem; border-bottom: 1px solid #ccc; vertical-align: bottom; }
@media print { body { margin: 0; font-size: 10pt; } img, tr { break-inside: avoid; } table { font-size: 6pt; } }
"""


def write_page(text: str, path: Path, title: str) -> None:
    """Write Markdown into the file `path`, and beside it an HTML page with the PNG images of that folder in it."""

    def embed(match: re.Match[str]) -> str:
        data = base64.b64encode(path.with_name(match[1]).read_bytes()).decode("ascii")
        return f'src="data:image/png;base64,{data}"'

    path.write_text(text, encoding="utf-8")
    body = re.sub(r'src="([^":/]+\.png)"', embed, markdown.markdown(text, extensions=["tables"]))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    path.with_suffix(".html").write_text(page, encoding="utf-8")


def escape(text: str) -> str:
    """Make plain text of what Markdown or HTML would read as markup."""
    return re.sub(r"([\\`*_\[\]#|])", r"\\\1", html.escape(text, quote=False))
