"""Expert-parallel Mixture-of-Experts language models, exact on any mesh."""
