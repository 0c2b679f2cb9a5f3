"""How Sphinx builds docs/ into a site that needs no network: `make docs` writes it to build/docs."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

project = "FednnU-Net Appliance"
author = "The FednnU-Net Appliance team"
version = release = installed("fednnunet")
html_title = f"{project} {release}"

extensions = ["myst_parser"]
root_doc = "README"
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "native"


CONTENTS = {
    "Start": ["getting-started/one-machine"],
    "Hospital IT": [
        "how-to/join-a-federation",
        "how-to/containers",
        "how-to/doctor",
        "how-to/approve-a-study",
        "how-to/air-gapped-image",
    ],
    "Coordinator": [
        "how-to/run-a-study",
        "how-to/enroll-a-hospital",
        "how-to/watch-a-study",
        "how-to/after-a-failure",
        "how-to/choose-a-configuration",
        "how-to/cascade",
        "how-to/nnunet-dataset-ids",
    ],
    "Researcher": ["how-to/read-the-report", "how-to/predict"],
    "Platform": ["how-to/kubernetes", "how-to/operate"],
    "Reference": [f"reference/{name}" for name in ("cli", "study", "settings", "errors", "metrics", "nnunet-breadth")]
    + ["reference/measured/README", "reference/measured/accuracy"],
    "Explanation": [
        f"explanation/{name}"
        for name in (
            *("what-leaves-a-hospital", "threat-model", "ffe", "asymfedavg", "aggregation", "wire-and-journal"),
            *("architecture", "scaling"),
        )
    ],
}
"""The pages by who reads them; a page that stands nowhere is a warning, which `make docs` takes as an error."""


def _for_the_site(app: object, docname: str, source: list[str]) -> None:
    """What stands in the files for readers of the repository, as the site needs it.

    A link to a file that is no page becomes its text, since the site is read without a checkout; an HTML anchor becomes
    one that links find; the first page gets the contents.
    """
    source[0] = re.sub(r'<a id="([^"]+)"></a>', r"[]{#\1}", source[0])
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```\n"
    here = Path(__file__).resolve().parent / f"{docname}.md"

    def shown(match: re.Match[str]) -> str:
        target = (here.parent / match[2].partition("#")[0]).resolve()
        inside = here.parents[len(Path(docname).parts) - 1]
        return match[0] if target.is_relative_to(inside) and target.suffix in (".md", ".png", ".svg") else match[1]

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)([^)\s#]+(?:#[^)\s]*)?)\)", shown, source[0])


def _first_page(app: Any, failure: Exception | None) -> None:
    """A folder that is opened shows its index.html."""
    if failure is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", _for_the_site)
    app.connect("build-finished", _first_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
