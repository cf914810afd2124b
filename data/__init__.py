"""The bundled model (pocket/), the recorded runs (runs.json, smollm2/), and what builds the model from IMDb."""
