"""What a model can do, in the numbers that the field compares."""
