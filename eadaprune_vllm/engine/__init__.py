"""The engine's process: it encodes images and videos with vLLM's own model, and decides what is kept of them."""
