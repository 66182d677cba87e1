"""Pages of the site that are kept beside what they describe, and the links between these and the pages of this folder."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# A file of the repository → the page that it is.
ELSEWHERE = {
    "weights/tiny-facts/README.md": "tiny-facts.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are kept elsewhere."""
    for path, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links that lead from file to file of the repository into links from page to page."""
    ours = page.file.src_uri
    place = next((path for path, name in ELSEWHERE.items() if name == ours), f"docs/{ours}")

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link[1]))
        target = ELSEWHERE.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(ours) or ".")

    return LINK.sub(on_site, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Warns of what a browser would fetch from elsewhere: the site works offline."""
    for address in FETCHED.findall(output):
        log.warning("%s fetches %s, and pages of the site fetch nothing.", page.file.src_uri, address)
