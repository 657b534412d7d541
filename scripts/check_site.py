"""Check a built site: every link, picture and anchor inside it exists. Needs no network.

python scripts/check_site.py build/docs     # make docs
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Targets and anchors of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect `href`, `src`, `id` and `name`."""
        for key, value in attrs:
            if key in ("href", "src") and value:
                self.targets.append(value)
            if key == "id" or (tag == "a" and key == "name"):
                self.anchors.add(value or "")


def broken(folder: Path) -> list[str]:
    """`page: target` of every link of the site in `folder` whose file or anchor does not exist."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            lost = anchor and file in pages and anchor not in pages[file].anchors
            if lost or not file.exists() or not file.is_relative_to(folder.resolve()):
                found.append(f"{path.relative_to(folder.resolve()).as_posix()}: {target}")
    return found


def main() -> int:
    """Print what is broken; 1 if anything is, or if there is no page."""
    folder = Path(sys.argv[1])
    found = broken(folder)
    count = len(list(folder.rglob("*.html")))
    print("\n".join([*found, f"check_site: {len(found)} broken links in {count} pages of {folder}"]))
    return 1 if found or not count else 0


if __name__ == "__main__":
    sys.exit(main())
