"""Configuration of a run: table of fields, loading, checks, and grids and network from it."""
