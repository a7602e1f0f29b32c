"""The demonstration world: rendered scenes in the public data sets' layouts, and a tiny random backbone."""
