"""What runs in front-end processes (API servers, ``LLM``): options of requests, the processor, the engine client."""
