"""The version, for whatever must not import the rest of the package.

Process: every process.
Never: import anything.
"""

__version__ = "0.1.0"
