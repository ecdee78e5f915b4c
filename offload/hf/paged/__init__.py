"""The paged KV cache as transformers sees it."""
