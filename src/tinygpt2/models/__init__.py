"""GPT-2 models: configurations, weights, loading, saving and forward passes."""
