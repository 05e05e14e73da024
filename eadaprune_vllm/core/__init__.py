"""The method and its options, without vLLM: from features to a decision and its report."""
