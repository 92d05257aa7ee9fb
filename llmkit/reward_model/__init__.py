"""Learning rewards from preferences: head, comparisons, loss, evaluation, scoring."""
