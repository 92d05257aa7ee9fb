"""Test a model's knowledge: questions, judges, lessons, recitation."""
