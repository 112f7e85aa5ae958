"""The reverse proxy. Knows nothing of the master, of workers, or of where it is mounted."""
