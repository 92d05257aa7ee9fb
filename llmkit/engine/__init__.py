"""Floor 3: training and generation. Knows models, tokenizers and data; knows nothing of stages or the command line."""
