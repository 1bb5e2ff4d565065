"""Configure Sphinx, which builds the site from the pages of this folder: `make docs`.

The pages are plain Markdown, so that they read well on GitHub too. The build downloads nothing and
runs no code of a page; the tests run it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import distinit

FOLDER = Path(__file__).parent

project = "distinit"
author = "The distinit developers"
project_copyright = "The distinit developers. Apache-2.0"
version = release = distinit.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"distinit {distinit.__version__}"

# Headings of two levels can be linked to, as on GitHub.
myst_heading_anchors = 3
# Links to files outside of this folder lead into the repository, which is not part of the site.
suppress_warnings = ["myst.xref_missing"]

# Notebooks are shown with their saved outputs.
nb_execution_mode = "off"
# Shell blocks contain placeholders that no lexer accepts, such as `--clip …`.
highlight_language = "none"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_numpy_docstring = False
# Single backticks in docstrings mark code.
default_role = "code"


def _copy_notebooks() -> None:
    """Copy examples/*.ipynb next to the pages, where Sphinx looks for them, and link them."""
    pages = FOLDER / "examples"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    names = [
        Path(shutil.copy(notebook, pages)).stem
        for notebook in sorted((FOLDER.parent / "examples").glob("*.ipynb"))
    ]
    lines = ["# Examples", "", "Notebooks that run in minutes.", "", "```{toctree}", *names, "```"]
    (pages / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


_copy_notebooks()
