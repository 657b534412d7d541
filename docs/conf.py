"""The site (`make docs`): Sphinx, since it alone reads these .md files (MyST), our docstrings and every link in one checked build.

The source is the repository, so that a link between two .md files is the same on GitHub and on the site. `docs/index.md` is the
navigation: each of its headings is a section, each link below it an entry.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import oprd

ROOT = Path(__file__).parent.parent
vars(oprd).update(
    {name: getattr(oprd, name) for name in oprd.__all__}
)  # they are loaded late; autodoc looks at what is there

project = "oprd"
author = "the oprd authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "evidence/**/README.md",
    "evidence/README.md",
    "benchmarks/NOTES.md",
    "dev/LOG.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".*", "build", "dist", "models", "runs", "src", "tests"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 4  # GitHub's anchors
suppress_warnings = ["myst.header"]  # a page of GitHub may skip a level

default_role = "code"  # docstrings write `name`
autodoc_member_order = "alphabetical"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "oprd"
html_show_copyright = False
html_copy_source = False
html_extra_path = ["_site"]  # index.html: from the site's address to the first page
html_theme_options = {"top_of_page_buttons": []}


def navigation(index: str) -> list[tuple[str, list[str]]]:
    """Heading → documents that the links below it name, from `docs/index.md`."""
    sections = re.split(r"^## ", index, flags=re.MULTILINE)[1:]
    found = []
    for section in sections:
        pages = re.findall(r"\]\(([\w./-]+)\.md\)", section)
        found.append((section.splitlines()[0], ["/" + _from_root(page) for page in pages]))
    return found


def _from_root(page: str) -> str:
    return (ROOT / "docs" / page).resolve().relative_to(ROOT).as_posix()


def _unlink_folders(app: Sphinx, name: str, text: list[str]) -> None:
    """Leave the words of links to folders: these are pages on GitHub, and none here."""
    text[0] = re.sub(r"\[([^\]]+)\]\([\w./-]*/\)", r"\1", text[0])


def _add_toctrees(app: Sphinx, name: str, text: list[str]) -> None:
    """Give the first page its toctrees, and one each to the pages that it does not name: of docs/, and elsewhere."""
    if name != root_doc:
        return
    sections = navigation(text[0])
    named = {page for _, pages in sections for page in pages}
    rest = sorted(f"/{page}" for page in app.env.found_docs if f"/{page}" not in named and page != root_doc)
    own = [page for page in rest if page.startswith("/docs/")]
    elsewhere = [page for page in rest if page not in own]
    for caption, pages in [*sections, ("More", own), ("Records", elsewhere)]:
        if pages:
            text[0] += (
                f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"
            )


def _without_settings(app: Sphinx, what: str, name: str, *rest: Any) -> tuple[str, None] | None:
    """OPRDConfig has 150 arguments; `docs/configuration.md` lists them."""
    return ("(…)", None) if name.endswith("OPRDConfig") else None


def _copy_sources(app: Sphinx, exception: Exception | None) -> None:
    """Put each page's .md beside its .html, and llms.txt, which names them, at the site's address."""
    if exception is not None or app.builder.format != "html":
        return
    for page in app.env.found_docs:
        shutil.copy(ROOT / f"{page}.md", Path(app.outdir, f"{page}.md"))
    names = (ROOT / "docs" / "llms.txt").read_text()
    Path(app.outdir, "llms.txt").write_text(names.replace("](", "](docs/"))


def setup(app: Sphinx) -> None:
    """Connect them."""
    app.connect("source-read", _unlink_folders)
    app.connect("source-read", _add_toctrees)
    app.connect("autodoc-process-signature", _without_settings)
    app.connect("build-finished", _copy_sources)
