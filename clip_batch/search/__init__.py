"""Search of an index: from a query to hits with their metadata."""
