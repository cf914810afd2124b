"""What is read from disk and hubs and written to disk: formats, model folders, the one writer."""
