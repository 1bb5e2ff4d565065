"""Sphinx builds the site from the pages of this folder: `make docs`.

The pages are plain Markdown, so that they read well on GitHub too. Nothing is fetched while they
are built, and no code of a page is run: tests run it.
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
# Links to files outside of this folder are links to the repository, which a site does not have.
suppress_warnings = ["myst.xref_missing"]

# Notebooks are shown with the output that they were saved with.
nb_execution_mode = "off"
# Shell blocks hold placeholders that are no shell, such as `--clip …`.
highlight_language = "none"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_numpy_docstring = False
# In docstrings, `name` is code.
default_role = "code"


def _bring_notebooks() -> None:
    """Copy examples/*.ipynb next to the pages, where Sphinx looks for them, and link them."""
    shown = FOLDER / "examples"
    shutil.rmtree(shown, ignore_errors=True)
    shown.mkdir()
    names = [
        Path(shutil.copy(notebook, shown)).stem
        for notebook in sorted((FOLDER.parent / "examples").glob("*.ipynb"))
    ]
    lines = ["# Examples", "", "Notebooks that run in minutes.", "", "```{toctree}", *names, "```"]
    (shown / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


_bring_notebooks()
