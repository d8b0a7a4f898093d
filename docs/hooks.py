"""A hook of mkdocs: links from pages to files outside docs/ are for GitHub, and the built site has their text only."""

import re


def on_page_markdown(markdown: str, page, **_) -> str:
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"(?<!!)\[([^\]]+)\]\({re.escape(up)}[^)]*\)", r"\1", markdown)
