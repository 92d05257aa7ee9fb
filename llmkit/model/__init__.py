"""What a model is: its configuration, its arithmetic, its cache and its folder."""
