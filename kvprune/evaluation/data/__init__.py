"""Models, texts and questions that comparisons read."""
