"""Settings of Sphinx, and the directive that makes the reference: ``make docs``."""

from __future__ import annotations

import inspect
import shutil
from abc import ABC
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import lightning_rft as rft

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

project = "lightning-rft"
version = release = rft.__version__
html_title = f"{project} {version}"
html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sphinx = html_show_copyright = False
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebook, with a real model
shutil.copy2(ROOT / "examples/notebooks/quickstart.ipynb", ROOT / "docs")  # a link would lead out of the pages

autodoc_inherit_docstrings = False  # an override has none, since it is its base's method
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # an attribute may be a property, which has a place of its own
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

# Of these, what users call; of all other classes, everything that has a docstring.
MEMBERS = {
    "ByDifficulty": "",
    "ByPassRate": "",
    "ExplorerPool": "launch, stop",
    "Mixture": "",
    "Objective": "token_loss",
    "Priority": "",
    "RFTDataModule": "",
    "RFTModule": "save_pretrained, weights",
    "Replay": "",
    "RewardSum": "",
    "Sampling": "",
    "Score": "",
    "TaskSet": "",
    "TimelineCallback": "spans",
    "Tolerance": "",
}


class Exports(SphinxDirective):
    """Documents what ``lightning_rft`` exports from the modules whose names begin with the arguments, in that order."""

    required_arguments = 1
    optional_arguments = 100

    def run(self) -> list[nodes.Node]:
        """Has autodoc describe each name."""
        homes = (home for prefix in self.arguments for home in rft._MODULES if home.startswith(prefix))
        names = (name for home in dict.fromkeys(homes) for name in rft._MODULES[home])
        return self.parse_text_to_nodes("\n".join([".. currentmodule:: lightning_rft", "", *map(_described, names)]))


def _described(name: str) -> str:
    value = getattr(rft, name)
    if not inspect.isclass(value):
        return f".. autofunction:: {name}\n"
    lines = [f".. {'autoexception' if issubclass(value, Exception) else 'autoclass'}:: {name}"]
    if not set(value.__bases__) <= {ABC, object}:
        lines.append("   :show-inheritance:")
    if MEMBERS.get(name) != "":
        lines += [f"   :members: {MEMBERS.get(name, '')}", "   :special-members: __call__"]
    return "\n".join([*lines, ""])


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    """Begins the first page with the README, and leads links out of docs/ to the pages that are made of those files."""
    if name == "index":
        app.env.note_dependency(README)
        tour = README.read_text(encoding="utf-8").partition("## Read on")[0]
        source[0] = tour.replace("](docs/", "](").replace("](examples/", "](../examples/") + source[0]
    for file, page in {
        "../benchmarks/README.md": "benchmarks.rst",
        "../examples/notebooks/quickstart.ipynb": "quickstart.ipynb",
        "../CHANGELOG.md": "changelog.rst",
        "../README.md": "index.md",
    }.items():
        source[0] = source[0].replace(f"]({file}", f"]({page}")


def _signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str, str | None] | None:
    """Writes a default that is made anew each time as ``...``, which Sphinx can read."""
    if signature is None or "<factory>" not in signature:
        return None
    return signature.replace("<factory>", "..."), result


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("exports", Exports)
    app.connect("source-read", _read)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True}
