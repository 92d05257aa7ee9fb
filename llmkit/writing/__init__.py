"""Conversations and preferences that models write, by labelling instructions."""
