"""Updates become the next global weights: over files, tensor by tensor, in the order of the site names."""
