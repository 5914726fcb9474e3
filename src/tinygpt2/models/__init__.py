"""GPT-2 models: configurations, weights, loading, and running them."""
