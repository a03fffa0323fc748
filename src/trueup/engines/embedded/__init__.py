"""The embedded engine: continuous batching wherever torch runs, stamped, verifiable, and bitwise on request."""
