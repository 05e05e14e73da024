"""The site of the documents, of which some are beside what they are about: ``make docs``."""

project = "EAdaPrune for vLLM"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = project
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "deploy/*.md", "benchmarks/*.md", "eadaprune_vllm/demo/trained/*.md"]
include_patterns += ["eadaprune_vllm/reference/*.md"]
myst_heading_anchors = 3
