"""The site: ``make docs``."""

project = "EAdaPrune for vLLM"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = project
exclude_patterns = ["conf.py"]
myst_heading_anchors = 3
