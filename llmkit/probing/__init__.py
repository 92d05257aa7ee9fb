"""What a model knows: questions, judges, lessons, recitation."""
