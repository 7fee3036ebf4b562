"""Running a model: where it comes from, sampling, generation, text."""
