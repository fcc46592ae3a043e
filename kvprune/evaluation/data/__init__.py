"""The models, texts and questions that comparisons read."""
