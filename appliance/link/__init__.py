"""The side of the hospital that faces the network and sees no data."""
