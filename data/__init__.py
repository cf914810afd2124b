"""The bundled model (pocket/), the recorded runs (runs.json), and what builds the model from IMDb."""
