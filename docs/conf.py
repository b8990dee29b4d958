"""Sphinx configuration: `make docs`."""

from mpitrain import __version__

project = "mpitrain"
author = "the mpitrain developers"
copyright = "2026, the mpitrain developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
napoleon_google_docstring = False
napoleon_use_rtype = False
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_mock_imports = ["cupy"]
exclude_patterns = ["_build", "results/*.json"]
html_theme = "furo"
html_title = f"mpitrain {version}"
