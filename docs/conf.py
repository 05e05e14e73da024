"""The site of the documents, of which some are beside what they are about: ``make docs``."""

project = "EAdaPrune for vLLM"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = project
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "deploy/*.md", "benchmarks/*.md", "eadaprune_vllm/demo/trained/*.md"]
myst_heading_anchors = 3
