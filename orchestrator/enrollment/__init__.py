"""Who may take part: the authority's keys and certificates."""
