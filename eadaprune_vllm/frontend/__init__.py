"""The front end's process (an API server, or that of ``LLM``): options of requests, processor, decision client."""
