"""Questions with several answers, of which a model chooses the likeliest."""
