"""Sphinx configuration: `make docs`."""

from pathlib import Path

from mpitrain import __version__
from mpitrain.train import job_reference

project = "mpitrain"
author = "the mpitrain developers"
copyright = "2026, the mpitrain developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
napoleon_google_docstring = False
napoleon_use_param = False  # the types of parameters are prose: 'array of float64, shape (n,)'
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_mock_imports = ["cupy", "jax", "torch"]
nitpick_ignore_regex = [
    (r"py:class", r"(?!mpitrain\.).*"),  # other libraries, and types that are prose
    (r"py:class", r"mpitrain\..*\._\w+"),  # private bases
    (
        r"py:class",
        r"mpitrain\.(_options|comm\.(calls|collectives|engine|ledger|messages|plan|shard_plans|watchdog)|parallel\.tensor\.shared_input|train\.(job|assembly|cadence|checkpoint|samples|signals))\..*",
    ),
    (r"py:exc", r"\w+Error"),  # listed in one place, `mpitrain._errors`
    (r"py:.*", r"shape"),
]
suppress_warnings = ["ref.python"]  # attributes of the same name in two classes
exclude_patterns = ["_build", "results/*.json"]
html_theme = "furo"
html_title = f"mpitrain {version}"

# The reference of the job file follows from its definition; the copy in the repository is for readers without a build.
Path(__file__).with_name("job-reference.md").write_text(f"# Job reference\n\n{job_reference()}", encoding="utf-8")
