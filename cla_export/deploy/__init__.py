"""A bundle on what runs many servers: Ray Serve."""
