"""Text for many at once: the thread around the engine, an OpenAI-like server, batch files."""
