"""HTTP: routes, authentication, disconnects."""
