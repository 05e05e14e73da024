"""Where this package takes hold of vLLM, one file per seam; ``window`` says which releases have them."""
