"""The version, for whatever must not import the rest of the package. Runs in: every process."""

__version__ = "0.1.0"
