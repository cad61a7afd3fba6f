"""From requests to tokens: sampling, generation, the LLM door."""
