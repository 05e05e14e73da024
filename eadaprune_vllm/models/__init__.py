"""One adapter for each family of models; ``llava.py`` first."""
