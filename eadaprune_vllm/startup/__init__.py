"""Before anything is served: flags, what cannot be served, and what a configuration becomes."""
