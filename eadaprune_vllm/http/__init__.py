"""What HTTP adds to vLLM: the field and the report at its endpoints, and endpoints of our own."""
